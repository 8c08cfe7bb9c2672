"""A worker whose engine costs nothing: the same token for everyone, at the same time. What is left is the plane.

    python benchmarks/zero.py STEP_MS [flags of a worker]

It is dynserve's own worker around an executor of twenty lines, as the peers' benchmarks workers are theirs.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from functools import partial
from itertools import count
from typing import Any

from dynserve.config import WorkerConfig
from dynserve.executors.base import ExecutorLimits, KvListener, Output, OutputSink
from dynserve.process import StopSignal, run_role, settle_memory
from dynserve.server.serving import bind, serving, url_of
from dynserve.tasks import task_group
from dynserve.transport.planes import open_planes
from dynserve.wire.events import Load
from dynserve.wire.requests import GenerateRequest
from dynserve.worker.serving import new_instance_id, serving_targets
from dynserve.worker.system import system_app
from dynserve.worker.worker import Worker

BLOCK, BLOCKS = 32, 1 << 20


class Zero:
    """An `Executor`: a request's tokens are 300, 301 and so on, one a step."""

    def __init__(self, step: float) -> None:
        self._step = step
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.limits = ExecutorLimits(BLOCK, BLOCKS, 1 << 20, 4096, 2048)
        self.targets = (self,)
        self._live: dict[int, tuple[OutputSink, list[int]]] = {}  # and the tokens that are left
        self._tickets = count(1)
        self._wake = asyncio.Event()

    def submit(self, request: GenerateRequest, sink: OutputSink) -> int:
        ticket = next(self._tickets)
        self._live[ticket] = (sink, [300 + at % 500 for at in range(request.stop.max_tokens)][::-1])
        self._wake.set()
        return ticket

    def abort(self, ticket: int) -> None:
        self._live.pop(ticket, None)

    def handoff_done(self, ticket: int) -> None:
        pass

    def load(self) -> Load:
        return Load(len(self._live), 0, BLOCKS, BLOCKS, 0)

    def counters(self) -> Mapping[str, float]:
        return {}

    def describe(self) -> Mapping[str, str]:
        return {}

    def listen_kv(self, listener: KvListener) -> None:
        pass

    async def run(self) -> None:
        at = 0
        while True:
            if not self._live:
                self._wake.clear()
                await self._wake.wait()
            if self._step:  # a timer may fire early: never twice in one step
                at = max(at + 1, int(time.monotonic() / self._step) + 1)
                await asyncio.sleep(max(0.0, at * self._step - time.monotonic()))
            else:
                await asyncio.sleep(0)
            for ticket, (sink, left) in list(self._live.items()):
                output = Output([left.pop()])
                if not left:
                    output.reason = "length"
                    self._live.pop(ticket, None)
                sink(output)


async def run(step: float, config: WorkerConfig, stop: StopSignal) -> None:
    instance_id = new_instance_id(config.role)
    workers: list[Worker] = []
    async with AsyncExitStack() as stack:
        sock = bind(config.system_host, config.system_port, "--system-port")
        await stack.enter_async_context(serving(system_app(lambda: workers), sock))
        planes = await stack.enter_async_context(open_planes(config, instance_id))
        engine: Any = Zero(step)
        (await stack.enter_async_context(task_group())).create_task(engine.run())
        workers += await stack.enter_async_context(serving_targets(config, engine, planes, instance_id, url_of(sock)))
        settle_memory()
        await stop.wait()


if __name__ == "__main__":
    run_role(WorkerConfig, "python benchmarks/zero.py", partial(run, float(sys.argv[1]) / 1000), sys.argv[2:])
