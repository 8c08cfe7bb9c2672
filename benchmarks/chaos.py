"""Runs whole clusters with random faults on a virtual clock, and checks after each run that nothing was lost, repeated or kept.

    python benchmarks/chaos.py --seeds 10000
    python benchmarks/chaos.py --seed 4711 --log          what happened with one seed, with virtual times

A run is one process: frontends, prefill and decode workers with the simulated executor, and the in-memory planes. Its seed
decides on everything: the cluster, its options, the requests, the faults, which messages are lost, and each jitter. So the
same seed has the same log, byte for byte, and a failing seed can be replayed.

Faults: workers and frontends that die, fall silent, freeze, leave and join; engines that die; links that are cut or silent;
a bus that is silent, down, or loses and delays messages; a registry that is down or has lost entries; hand-offs and
transfers that fail; caches that are cleared. Clients disconnect, are slow, or do not read at all.

Every request must end once: with exactly its text and tokens, or with a typed error that a fault explains (`chaos_clients.py`).
Afterwards nothing may be held anywhere, and every router must know exactly what the workers have cached (`chaos_checks.py`).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

import chaos_checks
from chaos_clients import Client
from chaos_cluster import ChaosCluster, ChaosLoop, share_model
from chaos_faults import Faults
from chaos_plan import LOAD_S, plan

from dynserve.worker.answer import Answer
from dynserve.worker.worker import Worker

REST_S = 60.0  # seconds in which a healed cluster must come to rest: a silent frontend is noticed after 30
LATE_S = 4.0  # seconds in which messages that were late can still arrive
CHECK_EVERY = 0.7  # seconds
MAX_SHOWN, MAX_LINE = 10, 1000  # violations of one seed, and characters of one
REAL_TIMEOUT = 60  # seconds of real time after which a run counts as an endless loop


class Result(NamedTuple):
    seed: int
    violations: list[str]
    outcomes: Counter[str]
    faults: Counter[str]
    reached: Counter[str]  # what happened in the processes that lived until the end
    log: list[str]
    virtual_s: float


def run(seed: int, *, keep_log: bool = False) -> Result:
    random.seed(seed)  # the jitter of retries
    errors: list[str] = []
    with _collecting_errors(errors), asyncio.Runner(loop_factory=ChaosLoop) as runner:
        runner.get_loop().set_exception_handler(lambda _, context: errors.append(_in_words(context)))
        result = runner.run(_run(seed, keep_log))
    gc.collect()  # here, and not at a moment that depends on the runs before; reports errors that nobody has awaited
    return result._replace(violations=result.violations + errors)


async def _run(seed: int, keep_log: bool) -> Result:
    cluster = ChaosCluster(plan(seed))
    clients = [Client(number, planned, cluster) for number, planned in enumerate(cluster.plan.requests)]
    try:
        await cluster.start()
        before = chaos_checks.Resources()
        await _load(cluster, clients)
        await _rest(cluster, before)
    except Exception as error:
        cluster.violations.append(f"the run itself failed: {error!r}")
    virtual_s, reached = cluster.loop.time(), _reached(cluster)
    await cluster.close()
    return Result(
        seed, cluster.violations, Counter(client.outcome for client in clients), cluster.injected, reached,
        cluster.log.lines() if keep_log else [], virtual_s,
    )  # fmt: skip


def _reached(cluster: ChaosCluster) -> Counter[str]:
    counts: Counter[str] = Counter()
    for worker in cluster.live_workers():
        counts.update({name.removesuffix("_total"): int(number) for name, number in worker.engine.counters().items()})
    for process in cluster.live_frontends():
        assert process.frontend is not None
        metrics = process.frontend.metrics
        counts["resyncs"] += process.frontend.fleet.feeds.resyncs
        for name in ("replaced", "link_fallbacks", "local_prefills", "slow_clients"):
            counts[name] += int(getattr(metrics, name)._value.get())
    return counts


async def _load(cluster: ChaosCluster, clients: list[Client]) -> None:
    """Runs requests and faults until all have ended, and checks what must always hold."""
    began = cluster.loop.time()
    async with asyncio.TaskGroup() as group:
        for client in clients:
            group.create_task(client.run(began))
        group.create_task(Faults(cluster).run(began))
        for _ in range(int(LOAD_S / CHECK_EVERY) + 1):
            await asyncio.sleep(CHECK_EVERY)
            cluster.violations += chaos_checks.always(cluster)


async def _rest(cluster: ChaosCluster, before: chaos_checks.Resources) -> None:
    """Ends all faults, and waits until the cluster is at rest, and still is when no message can be late any more."""
    await cluster.heal()
    quiet, deadline = cluster.loop.time() + LATE_S, cluster.loop.time() + REST_S
    while True:
        await asyncio.sleep(CHECK_EVERY)
        now = cluster.loop.time()
        if now < quiet:
            continue
        found = list(chaos_checks.at_rest(cluster, before))
        if not found:
            return
        if now >= deadline:
            cluster.violations += [f"at rest: {what}" for what in found]
            return


# errors that are only logged


class _Errors(logging.Handler):
    """Collects what dynserve logs as an error: under faults that it must survive, each is one."""

    def __init__(self, errors: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._errors = errors

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg != "the engine died":
            self._errors.append(f"logged: {self.format(record)}")


@contextlib.contextmanager
def _collecting_errors(errors: list[str]) -> Iterator[None]:
    logger, handler = logging.getLogger("dynserve"), _Errors(errors)
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _in_words(context: dict[str, Any]) -> str:
    return f"the loop reports: {context.get('message')}: {context.get('exception')!r}"


# faults of dynserve itself, which a run must notice


def _forget_cancels() -> None:
    Worker._cancel = lambda self, key: None  # type: ignore[method-assign]


def _repeat_tokens() -> None:
    finish = Answer._finish

    def repeated(self: Answer, output: Any, data: bytes, reason: str) -> None:
        output.token_ids = output.token_ids * 2
        finish(self, output, data, reason)

    Answer._finish = repeated  # type: ignore[method-assign]


BROKEN: dict[str, Callable[[], None]] = {"cancels": _forget_cancels, "tokens": _repeat_tokens}


# many seeds


def _prepare(broken: str | None) -> None:
    share_model()
    if broken is not None:
        BROKEN[broken]()
    gc.collect()
    gc.freeze()
    gc.disable()


def _run_in_time(seed: int) -> Result:
    def overdue(*_: object) -> None:
        raise TimeoutError(f"seed {seed} takes longer than {REAL_TIMEOUT} s")

    signal.signal(signal.SIGALRM, overdue)
    signal.alarm(REAL_TIMEOUT)
    try:
        return run(seed)
    except Exception as error:
        return Result(seed, [f"the run ended with {error!r}"], Counter(), Counter(), Counter(), [], 0.0)
    finally:
        signal.alarm(0)


def _results(seeds: range, processes: int, broken: str | None) -> Iterator[Result]:
    if processes == 1:
        _prepare(broken)
        yield from map(_run_in_time, seeds)
        return
    with ProcessPoolExecutor(processes, get_context("fork"), _prepare, (broken,)) as pool:
        yield from pool.map(_run_in_time, seeds, chunksize=8)


def _report_failure(result: Result, broken: str | None) -> None:
    print(f"seed {result.seed} FAILED; replay: python benchmarks/chaos.py --seed {result.seed} --log", end="")
    print(f" --break {broken}" if broken else "")
    for violation in result.violations[:MAX_SHOWN]:
        print(f"    {violation[:MAX_LINE]}")
    if (more := len(result.violations) - MAX_SHOWN) > 0:
        print(f"    and {more} more")
    sys.stdout.flush()


def _print_summary(seeds: int, failed: int, seconds: float, totals: dict[str, Counter[str]]) -> None:
    print(f"{seeds} seeds, {failed} failed; {seeds / seconds:.1f} seeds/s")
    for title, counts in totals.items():
        parts = ", ".join(f"{name or 'unknown'} {number}" for name, number in counts.most_common())
        print(f"{title}: {counts.total()}; {parts}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1000, help="how many to run; default 1000")
    parser.add_argument("--first", type=int, default=0, help="the first of them; default 0")
    parser.add_argument("--seed", type=int, help="run only this one")
    parser.add_argument("--log", action="store_true", help="with --seed: print what happened, with virtual times")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="default: one per core")
    parser.add_argument("--break", dest="broken", choices=BROKEN, help="break dynserve: its seeds must fail")
    options = parser.parse_args()
    if options.seed is not None:
        _prepare(options.broken)
        result = run(options.seed, keep_log=options.log)
        print("\n".join(result.log))
        if result.violations:
            _report_failure(result, options.broken)
        raise SystemExit(bool(result.violations))
    seeds = range(options.first, options.first + options.seeds)
    began, failed = time.perf_counter(), 0
    totals: dict[str, Counter[str]] = {"requests": Counter(), "faults": Counter(), "reached": Counter()}
    for result in _results(seeds, options.processes, options.broken):
        for counts, more in zip(totals.values(), (result.outcomes, result.faults, result.reached), strict=True):
            counts.update(more)
        if result.violations:
            failed += 1
            _report_failure(result, options.broken)
    _print_summary(len(seeds), failed, time.perf_counter() - began, totals)
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
