"""`Cluster`: frontend, router and workers in one process, on in-memory planes, for tests and notebooks."""

from __future__ import annotations

import asyncio
import json
import random
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

from dynserve.config import TINY_MODEL, ExecutorName, FrontendConfig, Role, RouterMode, WorkerConfig, mode_of
from dynserve.errors import TimedOut
from dynserve.executors.base import open_executor
from dynserve.executors.transceiver import MemoryTransceivers
from dynserve.frontend.app import Apps, make_apps
from dynserve.frontend.frontend import Frontend
from dynserve.model_files import digest, read_model_files
from dynserve.transport.memory import MemoryPlanes
from dynserve.worker.serving import new_instance_id, serving_targets
from dynserve.worker.worker import Worker

READY_TIMEOUT = 60.0  # seconds


class Cluster:
    """A cluster with the given number of workers of each role, and one frontend or several.

        async with dynserve.Cluster(prefill=2, decode=2) as cluster:
            async with cluster.client() as client:
                await client.post("/v1/chat/completions", json={...})

    `engine` holds engine options (those of `--override-engine-args`), `options` the fields of `FrontendConfig`.
    `app` is the ASGI app for `httpx` or a server. `planes` has switches for outages (`planes.bus_up = False`).
    `seed` makes random choices repeatable, for simulations under `dynserve.clock`.
    """

    def __init__(
        self, *, prefill: int = 0, decode: int = 0, aggregated: int = 0, model: str | Path = TINY_MODEL,
        executor: ExecutorName = "torch", router_mode: RouterMode = "kv", engine: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None, frontends: int = 1, seed: int | None = None,
    ) -> None:  # fmt: skip
        numbers: dict[Role, int] = {"prefill": prefill, "decode": decode, "aggregated": aggregated}
        self._roles = [role for role, number in numbers.items() for _ in range(number)]
        self._model, self._executor, self._engine = str(model), executor, engine or {}
        self._frontend_config = FrontendConfig(**({"router_mode": router_mode} | (options or {})))
        self._rng = random.Random(seed)
        self.planes = MemoryPlanes()
        self._transceivers = MemoryTransceivers()
        self._stack = AsyncExitStack()
        self._count = frontends
        self.workers: list[Worker] = []
        self.frontends: list[Frontend] = []
        self.apps: list[Apps] = []  # one per frontend

    @property
    def frontend(self) -> Frontend:
        """The first frontend."""
        return self.frontends[0]

    @property
    def app(self) -> FastAPI:
        return self.apps[0].app

    @property
    def model(self) -> str:
        """The model's name in requests."""
        return Path(self._model).resolve().name

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://cluster", timeout=None)

    async def __aenter__(self) -> Cluster:
        async with AsyncExitStack() as stack:
            for _ in range(self._count):
                opened = Frontend.open(self._frontend_config, self.planes.open(), rng=self._rng)
                self.frontends.append(frontend := await stack.enter_async_context(opened))
                self.apps.append(make_apps(frontend))
            self.planes.files |= {digest(c): c for c in read_model_files(Path(self._model)).values()}
            for role in self._roles:
                await self._open_worker(stack, role)
            await self._ready()
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    async def add_worker(self, role: Role, *, model: str | Path | None = None, **changes: Any) -> Worker:
        """Adds a worker for as long as the cluster lives. `changes` are fields of `WorkerConfig`; `model` is another folder
        for the same model name. Does not wait until the frontend routes to the worker, because it may refuse it."""
        folder = Path(model) if model is not None else Path(self._model)
        self.planes.files |= {digest(c): c for c in read_model_files(folder).values()}
        return await self._open_worker(self._stack, role, model_path=str(folder), **changes)

    async def _open_worker(self, stack: AsyncExitStack, role: Role, **changes: Any) -> Worker:
        options: dict[str, Any] = {
            "model_path": self._model,
            "served_model_name": self.model,
            "disaggregation_mode": mode_of(role),
            "executor": self._executor,
            "override_engine_args": json.dumps(self._engine),
        }
        config = WorkerConfig(**(options | changes))
        id_ = new_instance_id(role)
        executor = await stack.enter_async_context(open_executor(config, id_, self._transceivers))
        serving = serving_targets(config, executor, self.planes.open(), id_, "memory:")
        workers = await stack.enter_async_context(serving)
        self.workers += workers
        return workers[0]

    async def _ready(self) -> None:
        try:
            async with asyncio.timeout(READY_TIMEOUT):
                for frontend in self.frontends:
                    while sum(peer.usable for peer in frontend.fleet.peers.values()) < len(self.workers):
                        await asyncio.sleep(0.005)
        except TimeoutError:
            raise TimedOut(f"the cluster was not ready within {READY_TIMEOUT:.0f} s") from None
