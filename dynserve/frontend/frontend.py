"""`Frontend`: fleet, router and pipeline on the planes, behind one ASGI app."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from secrets import token_hex
from typing import Any

from fastapi import FastAPI

from dynserve.config import FrontendConfig
from dynserve.frontend.app import make_app
from dynserve.frontend.fleet import Fleet
from dynserve.frontend.pipeline import Pipeline
from dynserve.metrics import FrontendMetrics
from dynserve.routing.router import Router
from dynserve.tasks import task_group
from dynserve.transport.base import Registration
from dynserve.transport.planes import Planes
from dynserve.wire import discovery, events
from dynserve.wire.discovery import FrontendInstance

TOKENISER_THREADS = 2


class Frontend:
    """Use `Frontend.open`; `app` is what an ASGI server serves."""

    def __init__(self, config: FrontendConfig, planes: Planes, id_: str, fleet: Fleet, router: Router) -> None:
        self.config, self.id, self.fleet, self.router = config, id_, fleet, router
        self.metrics = FrontendMetrics()
        self.started_at = time.time()
        self._planes = planes
        self._registration: Registration | None = None
        self.pipeline = Pipeline(
            id_, config.namespace, planes.bus, fleet, router, self.metrics,
            timeout_s=config.request_timeout_s, max_stream_bytes=config.max_stream_bytes,
        )  # fmt: skip
        self.app: FastAPI

    @staticmethod
    @asynccontextmanager
    async def open(config: FrontendConfig, planes: Planes, http_url: str = "") -> AsyncIterator[Frontend]:
        """Listens for links, follows discovery and events, and registers. Does not wait for etcd or for workers."""
        id_ = f"frontend-{token_hex(6)}"
        router = Router(config.router_mode, prefill_weight=config.router_prefill_weight)
        prefix, every = discovery.prefix(config.namespace), (config.namespace, "*", "*")
        with ThreadPoolExecutor(TOKENISER_THREADS, "tokenise") as pool:
            async with task_group() as tasks:
                fleet = Fleet(id_, router, planes.fetch_file, tasks)
                frontend = Frontend(config, planes, id_, fleet, router)
                frontend.app = make_app(frontend, pool)
                async with (
                    planes.links.listen(config.link_host, config.link_port, fleet.accept) as address,
                    planes.bus.subscribe(events.kv_subject(*every), fleet.kv_changed),
                    planes.bus.subscribe(events.load_subject(*every), fleet.load_reported),
                    planes.registry.watch(prefix, fleet.discovered),
                ):
                    instance = FrontendInstance(
                        id=id_, host=config.http_host, pid=os.getpid(), link_address=address, http_url=http_url
                    )
                    key = discovery.key(config.namespace, instance)
                    async with planes.registry.register(key, discovery.encode(instance)) as registration:
                        frontend._registration = registration
                        yield frontend

    def health(self) -> dict[str, Any]:
        """`instances` lists workers whose link is up, and says of each whether it is routed to."""
        models = [name for name in self.fleet.models if self.fleet.serves(name)]
        registered = self._registration is not None and self._registration.registered.is_set()
        return {
            "status": "healthy" if models else "starting",
            "id": self.id,
            "models": models,
            "router_mode": self.config.router_mode,
            "planes": {"nats": self._planes.bus.connected, "registered": registered},
            "instances": [
                {
                    "id": peer.id,
                    "role": peer.instance.role,
                    "model": peer.instance.card.model,
                    "address": peer.instance.system_url,
                    "pid": peer.instance.pid,
                    "state": peer.state,
                    "index": "exact" if self.fleet.feeds.exact(peer.id) else "degraded",
                    "cached_blocks": self.router.index.blocks(peer.id),
                    "load": None
                    if peer.load is None
                    else {n: getattr(peer.load, n) for n in peer.load.__struct_fields__},
                }
                for peer in self.fleet.peers.values()
                if peer.instance is not None and peer.linked
            ],
        }

    def metrics_page(self) -> bytes:
        for role in ("prefill", "decode", "prefill_and_decode"):
            usable = [p for p in self.fleet.peers.values() if p.usable and p.instance and p.instance.role == role]
            self.metrics.instances.labels(role).set(len(usable))
        self.metrics.index_blocks.set(len(self.router.index))
        return self.metrics.render()
