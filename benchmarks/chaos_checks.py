"""The invariants of `chaos.py`: what must hold at every moment, and what must hold once all faults have ended."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sized

from chaos_cluster import ChaosCluster, ChaosLoop, FrontendProcess, WorkerProcess

from dynserve.frontend.frontend import Frontend
from dynserve.routing.index import PrefixIndex
from dynserve.routing.policy import IndexState


def always(cluster: ChaosCluster) -> Iterator[str]:
    """Yields the violations of what must hold at every moment."""
    for worker in cluster.live_workers():
        yield from _asserted(worker.name, worker.engine._scheduler.check)
    for frontend in _open(cluster):
        yield from _asserted(f"{frontend.id}'s ledger", frontend.router.ledger.check)
        yield from _asserted(f"{frontend.id}'s index", frontend.router.index.check)


def at_rest(cluster: ChaosCluster, before: Resources) -> Iterator[str]:
    """Yields what is still held, missing or different, although all faults and requests have ended."""
    for process in cluster.processes:
        if not process.task.done() and not process.live:
            yield f"{process.name} is neither up nor gone"
    workers = cluster.live_workers()
    names = [process.name for process in workers]
    for worker in workers:
        yield from _of_worker(worker, cluster)
    for frontend in cluster.live_frontends():
        yield from _of_frontend(frontend, names, cluster)
        yield from _of_index(frontend, workers)
    yield from always(cluster)
    yield from before.leaks(cluster)


class Resources:
    """The tasks and timers of a cluster at rest, by name. No other names may be there after the requests."""

    def __init__(self) -> None:
        self._tasks, self._timers = _task_names(), set(_timers())

    def leaks(self, cluster: ChaosCluster) -> Iterator[str]:
        tasks = _task_names()
        yield from (f"{tasks[name]} tasks of {name} are left" for name in tasks.keys() - self._tasks.keys())
        pairs = len(cluster.live_workers()) * len(cluster.live_frontends())
        if tasks["FrontendLink.keep"] != pairs:
            yield f"{tasks['FrontendLink.keep']} tasks keep links, and not {pairs}"
        ours = {"FaultyLink._deliver"}  # a ping may be under way
        yield from (f"timers of {name} are left" for name in _timers() if name not in self._timers | ours)


def _task_names() -> Counter[str]:
    return Counter(getattr(task.get_coro(), "__qualname__", "?") for task in asyncio.all_tasks())


def _timers() -> list[str]:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, ChaosLoop)
    return sorted(loop.live_timers())


def _open(cluster: ChaosCluster) -> list[Frontend]:
    return [process.frontend for process in cluster.live_frontends() if process.frontend is not None]


def _asserted(name: str, check: Callable[[], None]) -> Iterator[str]:
    try:
        check()
    except AssertionError as error:
        yield f"{name}: {error or 'an assertion of its check() failed'}"


def _of_worker(process: WorkerProcess, cluster: ChaosCluster) -> Iterator[str]:
    worker, engine, name = process.worker, process.engine, process.name
    assert worker is not None
    scheduler = engine._scheduler
    sizes: dict[str, Sized] = {
        "answers": worker._answers, "handed-off answers": worker._handed_off, "hand-offs": engine.handoffs,
        "requests in the engine": engine._live, "fetches": engine._fetches, "waiting sequences": scheduler.waiting,
        "running sequences": scheduler.running, "fetching sequences": scheduler.fetching,
        "held sequences": scheduler.held,
    }  # fmt: skip
    yield from (f"{name} has {len(found)} {what}" for what, found in sizes.items() if len(found))
    if scheduler.blocks.free != scheduler.blocks.num_blocks:
        yield f"{name} has only {scheduler.blocks.free} of {scheduler.blocks.num_blocks} blocks free"
    counts = worker.counts
    if counts["accepted"] != counts["finished"] + counts["failed"] + counts["cancelled"]:
        yield f"{name} accepted more or fewer requests than have ended: {dict(counts)}"
    frontends = sorted(frontend.id for frontend in _open(cluster))
    if sorted(worker.links) != frontends:
        yield f"{name} has links to {sorted(worker.links)}, and not to {frontends}"


def _of_frontend(process: FrontendProcess, workers: list[str], cluster: ChaosCluster) -> Iterator[str]:
    frontend, name = process.frontend, process.name
    assert frontend is not None
    fleet, router = frontend.fleet, frontend.router
    usable = [peer.id for peer in fleet.peers.values() if peer.usable]
    if sorted(usable) != sorted(workers) or len(fleet.peers) != len(workers):
        yield f"{name} knows {sorted(fleet.peers)}, can use {sorted(usable)}, and not {sorted(workers)}"
    yield from (f"{name} has {len(p.replies)} replies of {p.id}" for p in fleet.peers.values() if p.replies)
    sizes: dict[str, Sized] = {
        "open submissions": frontend.submissions._open, "pending prompts": router.pending,
        "open requests": process.client_tasks,
    }  # fmt: skip
    yield from (f"{name} has {len(found)} {what}" for what, found in sizes.items() if len(found))
    for queue in frontend.admission.queues.values():
        if len(queue) or any(not waiting.future.done() for waiting in queue._heap):
            yield f"{name} has {len(queue)} queued requests"
    for model, metrics in frontend.metrics._of.items():
        if metrics.in_flight or metrics.accepted != sum(metrics.ended.values()):
            yield f"{name} accepted {metrics.accepted} requests of {model}, and ended {metrics.ended}"
    yield from _of_ledger(process, frontend, workers)
    others = {other.id for other in _open(cluster)} - {frontend.id}
    for what, known in (("shares", router.ledger._shared), ("messages", frontend.sharing._last_received)):
        if gone := sorted(known.keys() - others):
            yield f"{name} remembers {what} of {gone}, which have ended"


def _of_ledger(process: FrontendProcess, frontend: Frontend, workers: list[str]) -> Iterator[str]:
    router = frontend.router
    for worker, account in router.ledger._accounts.items():
        sums = (account.own, account.others, account)
        if any(one.prefill_tokens or one.decode_tokens or one.requests for one in sums) or account.unseen_tokens:
            yield f"{process.name} has charges on {worker}: {account}"
    known: dict[str, Iterable[str]] = {
        "account": router.ledger._accounts, "target": router.targets, "index": router.index._slots,
        "feed": frontend.fleet.feeds._feeds, "assumed cache": router._assumed._sent,
    }  # fmt: skip
    for what, entries in known.items():
        if gone := sorted(set(entries) - set(workers)):
            yield f"{process.name} keeps an {what} of {gone}, which have ended"


def _of_index(process: FrontendProcess, workers: list[WorkerProcess]) -> Iterator[str]:
    frontend = process.frontend
    assert frontend is not None
    index = frontend.router.index
    for worker in workers:
        target = frontend.router.targets.get(worker.name)
        if target is None or target.index is IndexState.APPROX:
            continue
        if target.index is IndexState.DEGRADED:
            yield f"{process.name}'s index of {worker.name} is degraded"
            continue
        found, cached = _blocks(index, worker.name), set(worker.engine._scheduler.blocks._by_hash)
        if found != cached:
            lacks, adds = len(cached - found), len(found - cached)
            yield f"{process.name}'s index of {worker.name} lacks {lacks} cached blocks, and has {adds} that are not"


def _blocks(index: PrefixIndex, worker: str) -> set[int]:
    slot = index._slots.get(worker)
    return set() if slot is None else {hash_ for hash_, bits in index._holders.items() if bits >> slot & 1}
