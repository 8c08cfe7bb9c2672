"""Start and stop of a worker's service: its parts are opened in the order of their dependencies, and closed in reverse."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from secrets import token_hex

from dynserve.config import WorkerConfig
from dynserve.executors.base import Executor
from dynserve.tasks import task_group
from dynserve.transport.base import Planes
from dynserve.wire import discovery
from dynserve.worker.frontend_links import FrontendLinks
from dynserve.worker.model_text import ModelText
from dynserve.worker.worker import Worker


@asynccontextmanager
async def serving_worker(
    config: WorkerConfig, executor: Executor, planes: Planes, instance_id: str, system_url: str, files_url: str = "",
    text: ModelText | None = None,
) -> AsyncIterator[Worker]:  # fmt: skip
    """Yields a worker that serves: warmed up, registered, linked to every frontend. Drains it at the end of the block."""
    worker = Worker(config, executor, planes, instance_id, text)
    async with planes.bus.serve(worker.subject, worker.accept):
        await worker.warm_up()
        async with task_group() as tasks:
            tasks.create_task(worker.publish_events())
            tasks.create_task(worker.publish_load())
            tasks.create_task(worker.watch_engine())
            frontends = FrontendLinks(worker, planes.links, tasks)
            async with planes.registry.watch(discovery.frontends(config.namespace), frontends.discovered):
                instance = worker.instance(system_url, files_url)
                key = discovery.key(config.namespace, instance)
                async with planes.registry.register(key, discovery.encode(instance)) as registration:
                    await registration.registered.wait()
                    worker.ready = True
                    yield worker
                    worker.leave()
                worker.ready = False
                await worker.drain()
                worker.close()


def new_instance_id(role: str) -> str:
    """Returns a unique id that is readable in logs, as `prefill-1f6c0a52b9d3`."""
    return f"{role.replace('_', '-')}-{token_hex(6)}"


@asynccontextmanager
async def serving_targets(
    config: WorkerConfig, executor: Executor, planes: Planes, instance_id: str, system_url: str, files_url: str = "",
    text: ModelText | None = None,
) -> AsyncIterator[list[Worker]]:  # fmt: skip
    """Yields a worker for each target of the executor: one, or several when an engine has several KV caches. Those stop
    together: while one drains, the others must not accept new requests."""
    targets = executor.targets
    if len(targets) == 1:
        async with serving_worker(config, executor, planes, instance_id, system_url, files_url, text) as worker:
            yield [worker]
        return
    leave = asyncio.Event()
    async with task_group() as tasks:
        serving = []
        for at, target in enumerate(targets):
            ready: asyncio.Future[Worker] = asyncio.get_running_loop().create_future()
            one = serving_worker(config, target, planes, f"{instance_id}-{at}", system_url, files_url, text)
            serving.append((tasks.create_task(_serve_until(one, ready, leave)), ready))
        try:
            yield [await ready for _, ready in serving]
        finally:
            leave.set()
            await asyncio.wait([task for task, _ in serving])


async def _serve_until(
    opened: AbstractAsyncContextManager[Worker], ready: asyncio.Future[Worker], leave: asyncio.Event
) -> None:
    async with opened as worker:
        ready.set_result(worker)
        await leave.wait()
