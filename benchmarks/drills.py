"""Fault drills: what clients see while etcd, NATS, workers, links and frontends die, freeze, restart and come back.

    python benchmarks/drills.py [--rows etcd,decode-kill] [--runs N] [--list] [--json FILE] [--logs DIR]

Each drill has a cluster of real processes (etcd, nats-server, a frontend, two prefill and two decode workers with simulated
engines of 15 ms steps) and 24 clients that stream answers of 80 tokens. A simulated engine's tokens are a function of the
prompt, so each answer is compared with the one that the healthy cluster gave before, to the last character. The fault comes
three seconds after the load begins. A row counts failed requests and wrong texts. Its pauses are the longest ones between
two chunks of a stream, less the median gap before the fault: of the streams that were open at the fault, and of those that
began later, which may have waited between prefill and decode for one of the 16 places of the only decode worker. Failed
streams have no pause. "Held" is what workers and the frontend still hold five seconds after the last answer.

The exit code is 1 if a drill has failed requests or wrong texts, if something is held, or if a process did not behave as
the drill expects. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import NamedTuple

import uvloop
from budget import machine
from drill_clients import Answer, Client, Load, Prompt, ResumableClient, RetryingClient, make_prompts
from drill_cluster import BATCH, START, Cluster, Process, Server, Setup, until
from load import at
from plane import resident

CLIENTS = 24
PROMPTS = 192
BEFORE = 3.0  # seconds of load before the fault
AFTER = 6.0  # seconds of load after the fault, at least
AFTER_REPAIR = 2.0  # seconds of load once all is ready again, at least
DRAIN = 45.0  # seconds in which a worker must have drained
ABSENT = 13.0  # seconds: longer than entries survive that an emptied etcd lacks
CROWD = 600  # clients of the overload
CROWDED = 30.0  # seconds of it
MAX_QUEUED_S = 2  # of its frontend
DEAD = 600  # seconds for which etcd and NATS are dead
FLAT = 10.0  # percent by which memory may grow between the second and the last quarter of an overload


# faults: each is injected and repaired; the text returned says what a process did wrong


async def outage(*servers: Server, seconds: float, empty: bool = False) -> str:
    """etcd, NATS or both are killed, and come back."""
    await asyncio.gather(*(server.kill() for server in servers))
    await asyncio.sleep(seconds)
    await asyncio.gather(*(server.start(empty=empty) for server in servers))
    if empty:
        await asyncio.sleep(ABSENT)
    return ""


async def nats_frozen(cluster: Cluster) -> str:
    cluster.nats.signal(signal.SIGSTOP)
    await asyncio.sleep(6)
    cluster.nats.signal(signal.SIGCONT)
    return ""


async def workers_killed(cluster: Cluster, role: str, count: int, seconds: float = 0) -> str:
    """Workers of a role are killed at the same moment. New ones are started after a time."""
    killed = cluster.of(role)[:count]
    await asyncio.gather(*(worker.kill() for worker in killed))
    await asyncio.sleep(seconds)
    for worker in killed:
        await cluster.replace(worker)
    return ""


async def decode_frozen(cluster: Cluster) -> str:
    worker = cluster.of("decode")[0]
    worker.signal(signal.SIGSTOP)
    await asyncio.sleep(8)
    worker.signal(signal.SIGCONT)
    return ""


async def decode_stopped(cluster: Cluster) -> str:
    """A decode worker drains and exits, and then gets a replacement."""
    worker = cluster.of("decode")[0]
    complaint = await _stopped(worker)
    await cluster.replace(worker)
    return complaint


async def decode_stopped_twice(cluster: Cluster) -> str:
    """A decode worker that drains gets a second signal, which ends it at once."""
    worker = cluster.of("decode")[0]
    worker.signal(signal.SIGTERM)
    await asyncio.sleep(0.3)
    complaint = await _stopped(worker, code=130, seconds=2.0)
    await cluster.replace(worker)
    return complaint


async def all_workers_replaced(cluster: Cluster) -> str:
    """Each worker is stopped once its replacement is ready."""
    complaints = []
    for worker in list(cluster.workers):
        cluster.start_worker(worker.role)
        await cluster.ready()
        complaints.append(await _stopped(worker))
        cluster.workers.remove(worker)
    return "; ".join(filter(None, complaints))


async def _stopped(process: Process, code: int = 0, seconds: float = DRAIN) -> str:
    """Sends SIGTERM. Returns a complaint if the process does not exit in time with this code."""
    process.signal(signal.SIGTERM)
    found = await process.ended(seconds)
    if found is None:
        await process.kill()
        return f"still ran {seconds:.0f} s after SIGTERM"
    return "" if found == code else f"exit code {found} instead of {code}"


async def link_reset(cluster: Cluster) -> str:
    assert cluster.proxy is not None
    cluster.proxy.reset(await _decode_id(cluster))
    return ""


async def link_stalled(cluster: Cluster) -> str:
    assert cluster.proxy is not None
    async with cluster.proxy.stalled(await _decode_id(cluster)):
        await asyncio.sleep(8)
    return ""


async def _decode_id(cluster: Cluster) -> str:
    (health,) = await cluster.frontend_healths()
    return next(str(i["id"]) for i in health["instances"] if i["pid"] == cluster.of("decode")[0].pid)


async def frontend_killed(cluster: Cluster) -> str:
    assert cluster.frontend is not None
    await cluster.frontend.kill()
    cluster.start_frontend()
    return ""


async def frontend_stopped(cluster: Cluster) -> str:
    """The frontend finishes its requests and exits; then it is started again."""
    assert cluster.frontend is not None
    complaint = await _stopped(cluster.frontend)
    cluster.start_frontend()
    return complaint


async def frontends_rolled(cluster: Cluster) -> str:
    """SIGHUP makes a group of frontends replace its processes one after the other."""
    assert cluster.frontend is not None
    before = cluster.frontend_pids()
    cluster.frontend.signal(signal.SIGHUP)

    def replaced() -> bool:
        now = cluster.frontend_pids()
        return len(now) == len(before) and not now & before

    await until(replaced, 2 * START, "the frontends are not replaced")
    return ""


async def engine_dies(cluster: Cluster) -> str:
    """A decode worker's engine dies. The process reports that to the frontend, and exits with 3."""
    worker = cluster.of("decode")[0]
    worker.signal(signal.SIGUSR1)
    found = await worker.ended(10.0)
    await cluster.replace(worker)
    return "" if found == 3 else f"exit code {found} instead of 3"


# the table


class Result(NamedTuple):
    """One run of one drill."""

    name: str
    what: str
    requests: int
    failed: int
    wrong: int
    errors: dict[str, int]  # kinds of failures and of wrong content
    pause_p50_ms: float
    pause_max_ms: float
    later_max_ms: float  # the longest pause of streams that began after the fault
    first_max_ms: float  # the longest time to the first chunk
    held: str
    complaint: str = ""
    lines: tuple[str, ...] = ()  # further figures

    @property
    def bad(self) -> bool:
        return bool(self.failed or self.wrong or self.held or self.complaint)


Fault = Callable[[Cluster], Awaitable[str]]
Measure = Callable[["Drill", Cluster, Sequence[Prompt]], Awaitable[Result]]


async def under_load(drill: Drill, cluster: Cluster, prompts: Sequence[Prompt]) -> Result:
    """Runs the clients, and the fault after `BEFORE` seconds."""
    assert drill.fault is not None
    async with Load(cluster.port, prompts, CLIENTS, drill.client) as load:
        await asyncio.sleep(BEFORE)
        fault_at = time.monotonic()
        try:
            complaint = await drill.fault(cluster)
            await cluster.ready()
        except TimeoutError as error:
            complaint = str(error)
        await asyncio.sleep(max(fault_at + AFTER - time.monotonic(), AFTER_REPAIR))
    return _result(drill, load.answers, fault_at, await cluster.held(), complaint)


def _result(drill: Drill, answers: list[Answer], fault_at: float, held: str, complaint: str) -> Result:
    usual = statistics.median([gap for a in answers if a.ended < fault_at for _, gap in _gaps(a)] or [0.0])

    def added(answer: Answer, since: float) -> float:
        return max((gap for t, gap in _gaps(answer) if t > since), default=usual) - usual

    whole = [a for a in answers if a.times and not a.failure]
    at_fault = sorted(added(a, fault_at) for a in whole if a.times[0] <= fault_at < a.ended)
    later = [added(a, a.began) for a in whole if a.times[0] > fault_at]
    return Result(
        drill.name, drill.what, len(answers),
        sum(bool(a.failure) for a in answers), sum(bool(a.wrong) for a in answers),
        dict(Counter(kind for a in answers for kind in (a.failure, a.wrong) if kind)),
        at(at_fault, 0.5) * 1000, at(at_fault, 1.0) * 1000, max(later, default=0) * 1000,
        max((a.times[0] - a.began for a in answers if a.times), default=0) * 1000, held, complaint,
    )  # fmt: skip


def _gaps(answer: Answer) -> Iterator[tuple[float, float]]:
    """The times of the chunks after the first one, with the gaps before them."""
    for before, now in zip(answer.times, answer.times[1:], strict=False):
        yield now, now - before


async def overload(drill: Drill, cluster: Cluster, prompts: Sequence[Prompt]) -> Result:
    """Runs as many clients as there is room for, then many more, and reads the memory of all processes meanwhile."""
    async with Load(cluster.port, prompts, 2 * BATCH) as capacity:
        await asyncio.sleep(8)
    memory: dict[str, list[float]] = {"frontend": [], "workers": []}
    waiting: Counter[str] = Counter()
    began = time.monotonic()
    async with Load(cluster.port, prompts, CROWD) as load:
        while time.monotonic() < began + CROWDED:
            memory["frontend"].append(sum(map(resident, cluster.frontend_pids())))
            memory["workers"].append(sum(resident(worker.pid) for worker in cluster.workers))
            waiting |= await _waiting(cluster)  # which keeps the larger counts
            await asyncio.sleep(0.5)
    refused = [a for a in load.answers if a.failure.startswith("429")]
    accepted = [a for a in load.answers if not a.failure.startswith("429")]
    bound = 1.5 * _seconds(capacity.answers)[2] + MAX_QUEUED_S
    late = f"p99 of the accepted requests is over {bound:.1f} s" if _seconds(accepted)[2] > bound else ""
    growth = {name: (_mean(seen, 3) / _mean(seen, 1) - 1) * 100 for name, seen in memory.items()}
    complaints = [late, *(f"{name} memory grows by {part:.0f} %" for name, part in growth.items() if part > FLAT)]
    result = _result(
        drill, capacity.answers + accepted, began, await cluster.held(), "; ".join(filter(None, complaints))
    )
    lines = [
        "{:<12} {:>5}, p50 {:.2f} s, p99 {:.2f} s, longest {:.2f} s".format(name, *_seconds(answers))
        for name, answers in ((f"{2 * BATCH} clients", capacity.answers), ("accepted", accepted), ("429", refused))
    ]
    lines += [f"{name:<12} " + " ".join(f"{mb:.0f}" for mb in seen[::5]) + " MB" for name, seen in memory.items()]
    lines += ["waiting      " + ", ".join(f"{count} in {place}" for place, count in waiting.items()) + ", at most"]
    return result._replace(lines=tuple(lines))


async def planes_dead(drill: Drill, cluster: Cluster, prompts: Sequence[Prompt]) -> Result:
    """Kills etcd and NATS for long. The router must know the caches as well as before: predicted by reported cached tokens."""
    async with Load(cluster.port, prompts, CLIENTS) as load:
        await asyncio.sleep(30)
        before, fault_at = await cluster.prediction_ratios(), time.monotonic()
        await cluster.etcd.kill()
        await cluster.nats.kill()
        await asyncio.sleep(DEAD)
        during, states = await cluster.prediction_ratios(), await cluster.frontend_healths()
        await cluster.etcd.start()
        await cluster.nats.start()
        await asyncio.sleep(AFTER)
    inexact = [i["id"] for health in states for i in health["instances"] if i["index"] != "exact"]
    complaint = f"index not exact: {', '.join(inexact)}" if inexact else ""
    lines = [
        f"cached tokens, predicted by reported, {name}: " + ", ".join(f"{ratio:.3f}" for ratio in ratios)
        for name, ratios in (("before", before), (f"after {DEAD // 60} min", during))
    ]
    result = _result(drill, load.answers, fault_at, await cluster.held(), complaint)
    return result._replace(lines=tuple(lines))


async def _waiting(cluster: Cluster) -> Counter[str]:
    """The requests that wait in the frontend's queue, in prefill workers and in decode workers."""
    found: Counter[str] = Counter()
    for health in await cluster.frontend_healths():
        found["the frontend"] += sum(health["queued"].values())
        for instance in health["instances"]:
            found[f"{instance['role']} workers"] += (instance["load"] or {}).get("waiting", 0)
    return found


def _mean(seen: list[float], quarter: int) -> float:
    size = len(seen) // 4
    return statistics.mean(seen[quarter * size : (quarter + 1) * size])


def _seconds(answers: list[Answer]) -> tuple[int, float, float, float]:
    """The number of the answers, and the median, 99th percentile and maximum of the time that they took."""
    took = sorted(a.ended - a.began for a in answers)
    return len(took), at(took, 0.5), at(took, 0.99), at(took, 1.0)


class Drill(NamedTuple):
    name: str
    what: str
    fault: Fault | None
    setup: Setup = Setup()
    client: type[Client] = Client
    measure: Measure = under_load
    long: bool = False  # runs only when it is named


PROXIED = Setup(proxied=True)
MIGRATING = Setup(worker_flags=("--drain-mode", "migrate"))
# The frontend's queue counts KV blocks: with the blocks of `BATCH` sequences, it is the workers' room for sequences that fills.
SEQUENCE_BLOCKS = 7
CHANGING = Setup(num_blocks=400)  # which hold a third of the prompts: caches and loads change all the time
FULL = Setup(frontend_flags=("--max-queued-s", str(MAX_QUEUED_S)), num_blocks=BATCH * SEQUENCE_BLOCKS)
DRILLS = (
    Drill("etcd", "etcd killed, back after 5 s", lambda c: outage(c.etcd, seconds=5)),
    Drill("etcd-empty", "etcd killed, back empty", lambda c: outage(c.etcd, seconds=1, empty=True)),
    Drill("nats", "NATS killed, back after 3 s", lambda c: outage(c.nats, seconds=3)),
    Drill("both", "etcd and NATS killed, back after 3 s", lambda c: outage(c.etcd, c.nats, seconds=3)),
    Drill("nats-frozen", "NATS frozen for 6 s", nats_frozen),
    Drill("prefill-kill", "prefill worker killed", lambda c: workers_killed(c, "prefill", 1)),
    Drill("decode-kill", "decode worker killed", lambda c: workers_killed(c, "decode", 1)),
    Drill("decodes-kill", "both decode workers killed, back after 1 s", lambda c: workers_killed(c, "decode", 2, 1)),
    Drill("decode-frozen", "decode worker frozen for 8 s", decode_frozen),
    Drill("decode-term", "decode worker stopped", decode_stopped),
    Drill("decode-migrate", "decode worker stopped, migrating", decode_stopped, MIGRATING),
    Drill("rolling", "all workers replaced, one by one", all_workers_replaced),
    Drill("decode-term-2", "decode worker stopped twice", decode_stopped_twice),
    Drill("engine", "decode worker's engine dies", engine_dies, Setup(mortal_engines=True)),
    Drill("link-reset", "decode worker's link reset", link_reset, PROXIED),
    Drill("link-stalled", "decode worker's link stalled for 8 s", link_stalled, PROXIED),
    Drill("frontend-resume", "frontend killed, clients resume", frontend_killed, client=ResumableClient),
    Drill("frontend-kill", "frontend killed, clients retry", frontend_killed, client=RetryingClient),
    Drill("frontend-term", "frontend restarted, clients retry", frontend_stopped, client=RetryingClient),
    Drill("frontend-hup", "two frontends replaced by SIGHUP", frontends_rolled, Setup(2)),
    Drill("overload", "600 clients, room for 32", None, FULL, measure=overload),
    Drill("planes-dead", f"etcd and NATS dead for {DEAD // 60} min", None, CHANGING, measure=planes_dead, long=True),
)  # fmt: skip
HEADER = f"{'drill':<44}{'requests':>9}{'failed':>7}{'wrong':>6}{'pause p50':>11}{'max':>7}{'later':>7}{'first':>7} ms  errors; held"


def line(result: Result) -> str:
    """The row of the table."""
    times = (result.pause_p50_ms, result.pause_max_ms, result.later_max_ms, result.first_max_ms)
    p50, longest, later, first = (f"{max(0, ms):.0f}" for ms in times)
    errors = ", ".join(f"{kind} ×{count}" for kind, count in sorted(result.errors.items()))
    says = "; ".join(filter(None, [errors, result.held and f"HELD {result.held}", result.complaint]))
    counts = f"{result.requests:>9}{result.failed:>7}{result.wrong:>6}"
    return f"{result.what:<44}{counts}{p50:>11}{longest:>7}{later:>7}{first:>7}     {says}".rstrip()


class Runner:
    """Runs drills, on as few clusters as they allow. Use `run` within the block."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._stack = folder, AsyncExitStack()
        self._cluster: Cluster | None = None
        self._prompts: list[Prompt] = []
        self._clusters = 0

    async def __aenter__(self) -> Runner:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def run(self, drill: Drill) -> Result:
        try:
            cluster = await self._fitting(drill.setup)
        except (TimeoutError, RuntimeError) as error:  # the other drills have clusters of their own
            await self._close()
            return Result(drill.name, drill.what, 0, 0, 0, {}, 0, 0, 0, 0, "", f"no cluster: {error}")
        result = await drill.measure(drill, cluster, self._prompts)
        if result.held or result.complaint:
            await self._close()
        return result

    async def _fitting(self, setup: Setup) -> Cluster:
        """The running cluster if it has this setup and is healthy, else a new one that has answered some requests."""
        if self._cluster is not None and self._cluster.setup == setup:
            try:
                await self._cluster.ready(5)
                return self._cluster
            except TimeoutError:
                pass
        await self._close()
        self._clusters += 1
        folder = self._folder / f"cluster-{self._clusters}"
        folder.mkdir(parents=True)
        cluster = self._cluster = await self._stack.enter_async_context(Cluster.open(setup, folder))
        # Answers depend on prompts only: those of the first cluster are right for all.
        warm = await make_prompts(cluster.port, CLIENTS if self._prompts else PROMPTS)
        self._prompts = self._prompts or warm
        return cluster

    async def _close(self) -> None:
        self._cluster = None
        await self._stack.aclose()


async def run_all(drills: Sequence[Drill], runs: int, folder: Path) -> list[Result]:
    """Runs the drills, prints their rows, and returns the results."""
    results = []
    print(f"{CLIENTS} clients, {machine()}\n\n{HEADER}")
    async with Runner(folder) as runner:
        for _ in range(runs):
            for drill in drills:
                results.append(result := await runner.run(drill))
                print("\n    ".join([line(result), *result.lines]), flush=True)
    if runs > 1:
        print("\nall runs")
        for drill in drills:
            if found := [result for result in results if result.name == drill.name]:
                print(line(summed(found)))
    return results


def summed(results: Sequence[Result]) -> Result:
    """The sums of several runs of one drill; of pauses and times the longest."""
    errors = sum((Counter(result.errors) for result in results), Counter[str]())
    p50, longest, later, first = (max(times) for times in zip(*(result[6:10] for result in results), strict=True))
    return Result(
        results[0].name, results[0].what, sum(r.requests for r in results), sum(r.failed for r in results),
        sum(r.wrong for r in results), dict(errors), p50, longest, later, first,
        "; ".join(r.held for r in results if r.held), "; ".join(r.complaint for r in results if r.complaint),
    )  # fmt: skip


def _chosen(names: str) -> list[Drill]:
    known = {drill.name: drill for drill in DRILLS}
    wanted = names.split(",") if names else [drill.name for drill in DRILLS if not drill.long]
    if unknown := [name for name in wanted if name not in known]:
        sys.exit(f"no drill {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in wanted]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rows", default="", help="names of drills, with commas; default: all that are not long")
    parser.add_argument("--runs", type=int, default=1, help="how often each drill runs")
    parser.add_argument("--list", action="store_true", help="print the drills' names")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--logs", type=Path, help="keep the processes' logs in this new folder")
    args = parser.parse_args()
    drills = _chosen(args.rows)
    if args.list:
        print("\n".join(f"{drill.name:<16}{drill.what}" for drill in drills))
        return
    with tempfile.TemporaryDirectory() as folder:
        results = uvloop.run(run_all(drills, args.runs, args.logs or Path(folder)))
    if args.json:
        args.json.write_text(json.dumps([result._asdict() for result in results], indent=1))
    sys.exit(any(result.bad for result in results))


if __name__ == "__main__":
    main()
