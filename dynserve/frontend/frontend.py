"""`Frontend`: one frontend process, with its fleet, router and pipeline, connected to the planes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections.abc import AsyncIterator
from concurrent.futures import Executor as Pool
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from secrets import token_hex
from typing import Any, get_args

from dynserve.addresses import advertised
from dynserve.config import FrontendConfig, Role, mode_of
from dynserve.frontend.admission import Admission, QueueLimits
from dynserve.frontend.fleet import Fleet, Patience
from dynserve.frontend.gate import Gate
from dynserve.frontend.metrics import FrontendMetrics
from dynserve.frontend.objective import FirstTokenObjective
from dynserve.frontend.pipeline import Pipeline, PipelineLimits
from dynserve.frontend.reply import Peer
from dynserve.frontend.resumption import Resumption
from dynserve.frontend.scaling import ScalingCollector
from dynserve.frontend.sharing import Sharing
from dynserve.frontend.submissions import Submissions
from dynserve.frontend.threads import TokenizerThreads
from dynserve.routing.policy import IndexState, KvWeights, policy_maker
from dynserve.routing.router import Router, RouterOptions
from dynserve.tasks import OwnedTasks, task_group
from dynserve.transport.base import Change, Planes, Registration
from dynserve.wire import discovery, events
from dynserve.wire.discovery import FrontendInstance

LAG_EVERY = 0.05  # seconds between measurements of the event loop's lag
HOUSEKEEPING_EVERY = 1.0  # seconds between checks that no event triggers, such as expiries


def router_options(config: FrontendConfig) -> RouterOptions:
    return RouterOptions(
        mode=config.router_mode,
        policy=config.router_policy,
        weights=KvWeights(
            prefill=config.router_prefill_weight,
            overlap=config.router_overlap_weight,
            transfer=config.router_transfer_weight,
            herd=config.router_herd_factor,
            temperature=config.router_temperature,
        ),
        slow_start_s=config.router_slow_start_s,
        session_ttl_s=config.router_session_ttl_s,
        assume_ttl_s=config.router_assume_ttl_s,
        index_bytes=config.router_index_bytes,
        local_prefill_tokens=config.local_prefill_tokens,
        local_prefill_toll=config.local_prefill_toll,
        busy_prefill_tokens=config.busy_prefill_tokens,
        busy_kv_fraction=config.busy_kv_fraction,
    )


def check_policy(config: FrontendConfig) -> None:
    """Raises ConfigError for a policy that cannot be used. Runs before anything is connected."""
    policy_maker(config.router_mode, config.router_policy, KvWeights(), random.Random())()


class Frontend:
    """One frontend. Create it with `Frontend.open`; `dynserve.frontend.app.make_apps` creates its ASGI apps."""

    def __init__(
        self, config: FrontendConfig, planes: Planes, id_: str, rng: random.Random | None, pool: Pool, tasks: OwnedTasks
    ) -> None:
        self.config, self.id, self._planes = config, id_, planes
        self.started_at = time.time()
        objective = FirstTokenObjective(config.ttft_slo_ms / 1000) if config.ttft_slo_ms else None
        self.metrics = FrontendMetrics(objective)
        self.gate = Gate(config.api_keys_file, config.max_requests)
        self.threads = TokenizerThreads(pool)
        self.router = Router(router_options(config), rng)
        self.sharing = Sharing(id_, config.namespace, planes.bus, self.router.ledger)
        self.submissions = Submissions(
            config.namespace, id_, planes.bus, self.metrics, lambda works: self.fleet.request_events_by_link(not works)
        )
        self.fleet = Fleet(
            id_, self.router, planes.fetch_file, tasks,
            on_ack=self.submissions.acknowledged, on_change=lambda: self.admission.recheck(),
            on_suspicion=lambda how: self.metrics.suspicions.labels(how).inc(),
            on_adopted=lambda number, kept: self.resumption.adopted(number, kept),
            patience=Patience(config.suspect_s, config.silence_s, config.role_grace_s),
        )  # fmt: skip
        self.resumption = Resumption(self.fleet.peers.values, config.resume_s)
        self.admission = Admission(
            QueueLimits(config.max_queued, config.max_queued_s, config.ttft_slo_ms / 1000), self.fleet
        )
        self.router.ledger.listeners.append(lambda _: self.admission.recheck())
        self.pipeline = Pipeline(
            id_, self.fleet, self.router, self.submissions, self.metrics, self.admission,
            PipelineLimits(
                config.request_timeout_s, config.max_stream_bytes, config.max_migrations, config.max_queued_s
            ),
        )  # fmt: skip
        self.metrics.add(ScalingCollector(
            config.namespace, self.fleet.peers.values,
            lambda: sum(map(len, self.admission.queues.values())), objective,
        ))  # fmt: skip
        self._registration: Registration | None = None
        self._listed = asyncio.Event()  # set once discovery has listed this frontend, and so all older entries

    @staticmethod
    @asynccontextmanager
    async def open(
        config: FrontendConfig, planes: Planes, http_url: str = "", rng: random.Random | None = None
    ) -> AsyncIterator[Frontend]:
        """Listens for links, follows discovery and events, and registers. Does not wait for etcd or for workers. `rng`
        breaks ties; a seeded one makes a simulation repeatable.

        Raises:
            ConfigError: the link port is in use, `router_policy` names no policy, or the keys file is invalid.
        """
        id_ = f"frontend-{token_hex(6)}"
        namespace, every = config.namespace, (config.namespace, "*", "*")
        with ThreadPoolExecutor(config.tokenizer_threads, "tokenise") as pool:
            async with task_group() as tasks:
                frontend = Frontend(config, planes, id_, rng, pool, tasks)
                fleet = frontend.fleet
                tasks.create_task(frontend.sharing.publish())
                tasks.create_task(frontend._housekeeping())
                tasks.create_task(frontend._watch_lag())
                async with (
                    planes.links.listen(config.link_host, config.link_port, fleet.accept) as address,
                    frontend.submissions.listening(),
                    planes.bus.subscribe(events.kv_subject(*every), fleet.kv_changed),
                    planes.bus.subscribe(events.load_subject(*every), fleet.load_reported),
                    planes.bus.subscribe(events.placed_subject(namespace, "*"), frontend._placed),
                    planes.registry.watch(discovery.prefix(namespace), frontend._discovered),
                ):
                    instance = FrontendInstance(
                        id=id_,
                        host=advertised(config.http_host, config.advertise_host),
                        pid=os.getpid(),
                        link_address=address,
                        http_url=http_url,
                    )
                    tasks.create_task(frontend.submissions.watch_bus())
                    key = discovery.key(namespace, instance)
                    async with planes.registry.register(key, discovery.encode(instance)) as registration:
                        frontend._registration = registration
                        yield frontend

    def _discovered(self, change: Change) -> None:
        """Passes a change of discovery on: of a worker to the fleet, of a frontend to the sharing of placements."""
        if change.key.startswith(discovery.frontends(self.config.namespace)):
            if change.key.endswith(self.id):
                self._listed.set()
            self.sharing.discovered(change)
        else:
            self.fleet.discovered(change)

    def _placed(self, payload: bytes) -> None:
        """Handles the placements of another frontend, which may have released room."""
        self.sharing.received(payload)
        self.admission.recheck()

    async def settled(self, timeout_s: float) -> None:
        """Returns when all listed workers can be placed on, at the latest after `timeout_s` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._listed.wait()
                while self.fleet.settling:
                    await asyncio.sleep(0.02)

    async def _housekeeping(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(HOUSEKEEPING_EVERY)
            self.gate.refresh()
            self.router.expire(loop.time())
            self.fleet.feeds.resync_degraded()
            self.fleet.expire_models()
            self.fleet.expire_loads()
            self.admission.recheck()
            for worker in [w for w in self.pipeline.predictions.ratios() if w not in self.fleet.peers]:
                self.pipeline.predictions.forget(worker)

    async def _watch_lag(self) -> None:
        """Measures the event loop's lag: a timer fires as late as any other callback of the loop."""
        while True:
            due = time.perf_counter() + LAG_EVERY
            await asyncio.sleep(LAG_EVERY)
            self.metrics.loop_lag.observe(max(0.0, time.perf_counter() - due))

    def health(self) -> dict[str, Any]:
        """Returns the body of `/health`. `instances` lists the linked workers, with the state of each."""
        models = [name for name in self.fleet.names() if self.fleet.serves(name)]
        registered = self._registration is not None and self._registration.registered.is_set()
        return {
            "status": "healthy" if models else "starting",
            "id": self.id,
            "pid": os.getpid(),
            "models": models,
            "router_mode": self.config.router_mode,
            "planes": {"nats": self._planes.bus.connected and self.submissions.bus_works, "registered": registered},
            "warnings": self.fleet.warnings(),
            "queued": {model: len(queue) for model, queue in self.admission.queues.items()},
            "instances": [
                self._instance(peer) for peer in self.fleet.peers.values() if peer.instance is not None and peer.linked
            ],
        }

    def _instance(self, peer: Peer) -> dict[str, Any]:
        assert peer.instance is not None
        account = self.router.ledger.account(peer.id)
        load = peer.load
        return {
            "id": peer.id,
            "role": mode_of(peer.instance.role),
            "model": peer.instance.card.model,
            "address": peer.instance.system_url,
            "pid": peer.instance.pid,
            "state": peer.state,
            "index": peer.target.index if peer.target is not None else IndexState.DEGRADED,
            "cached_blocks": self.router.index.blocks(peer.id),
            "warnings": ["CACHE_PREDICTION_DRIFT"] if self.pipeline.predictions.drifting(peer.id) else [],
            "load_age_s": None if load is None else round(self.fleet.age_of_load(peer), 1),
            "load": None if load is None else {name: getattr(load, name) for name in load.__struct_fields__},
            "placed": {
                "requests": account.requests,
                "prefill_tokens": account.prefill_tokens,
                "decode_tokens": account.decode_tokens,
            },
        }

    def metrics_page(self) -> bytes:
        for role in get_args(Role):
            usable = [p for p in self.fleet.peers.values() if p.usable and p.instance and p.instance.role == role]
            self.metrics.instances.labels(mode_of(role)).set(len(usable))
        metrics, router = self.metrics, self.router
        metrics.index_blocks.set(len(router.index))
        metrics.index_bytes.set(router.index.num_bytes)
        metrics.index_evicted.set(router.index.evicted)
        metrics.resyncs.set(self.fleet.feeds.resyncs)
        metrics.frontends.set(1 + self.sharing.others)
        metrics.open_requests.set(self.gate.open_requests.count)
        for name, served in self.fleet.models.items():
            metrics.tokenised.labels(name, "remembered").set(served.preprocessor.segments.hits)
            metrics.tokenised.labels(name, "new").set(served.preprocessor.segments.misses)
        metrics.roles_missing.clear()
        for model, role in self.fleet.missing_roles():
            metrics.roles_missing.labels(model, role).set(1)
        for gauge in (metrics.index_state, metrics.prediction_ratio, metrics.queue_length):
            gauge.clear()
        for target in router.targets.values():
            for state in IndexState:
                metrics.index_state.labels(target.worker, state).set(target.index is state)
        for worker, ratio in self.pipeline.predictions.ratios().items():
            metrics.prediction_ratio.labels(worker).set(ratio)
        for model, queue in self.admission.queues.items():
            metrics.queue_length.labels(model).set(len(queue))
        return metrics.render()
