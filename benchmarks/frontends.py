"""What a second frontend process on the same port adds.

    python benchmarks/frontends.py [--quick]

On a machine with few cores the load, the worker and NATS take part of what two frontends could have, so what is compared
is what they could carry on cores of their own: what is answered per CPU second of the busiest frontend process. With two
processes each would have half of it at best; what sharing costs, and a spread that is not even, make it more. Streams come
paced: at full speed a single process is behind, and sends several tokens at once, which a second one would spare it. Linux
only.
"""

from __future__ import annotations

import argparse
import json
import time
import urllib.request
from collections.abc import Sequence
from typing import NamedTuple

import load
from budget import Row, machine, report
from plane import PROMPT, STEPS_ONLY, Setup, cluster, cpu_seconds

from dynserve.config import TINY_MODEL

CLIENTS, TOKENS = 512, 128
ENGINE = STEPS_ONLY | {"max_batch_size": CLIENTS, "max_num_tokens": 1 << 17, "num_blocks": 60_000}


class Carried(NamedTuple):
    rate: float  # as it was here, per second
    capacity: float  # per CPU second of the busiest process
    shares: list[float]  # of the frontends' CPU time


def children(pid: int) -> list[int]:
    """The processes of a group, or the one that serves alone."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()] or [pid]


def carried(setup: Setup, workers: int, seconds: float, ask: load.PlacementQuery) -> Carried:
    wait_for(setup.port, workers)
    load.run(setup.port, ask, CLIENTS, 1.0)
    pids = children(setup.pids["frontend"][0])
    before = [cpu_seconds([pid]) for pid in pids]
    answered = load.run(setup.port, ask, CLIENTS, seconds)
    spent = [cpu_seconds([pid]) - was for pid, was in zip(pids, before, strict=True)]
    done = answered.tokens if ask.stream else answered.requests
    return Carried(done / answered.seconds, done / max(spent), [one / sum(spent) for one in spent])


def wait_for(port: int, processes: int) -> None:
    """Until all answer, and know the model."""
    seen: set[int] = set()
    deadline = time.monotonic() + 60
    while len(seen) < processes:
        if time.monotonic() > deadline:
            raise SystemExit(f"{len(seen)} of {processes} frontends know the model")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                health = json.load(answer)
        except OSError:  # 503: one that has not heard of the worker yet
            time.sleep(0.05)
            continue
        if health["models"]:
            seen.add(health["pid"])


def both(seconds: float, ask: load.PlacementQuery, name: str, step_ms: float) -> float:
    found: list[Carried] = []
    for workers in (1, 2):
        flags: Sequence[str] = ["--workers", str(workers)]
        with cluster(["prefill_and_decode"], ENGINE | {"step_ms": step_ms}, frontend_flags=flags) as setup:
            one = carried(setup, workers, seconds, ask)
        found.append(one)
        shares = ", ".join(f"{share:.0%}" for share in one.shares)
        print(
            f"{name:<22} {workers} process(es)   {one.rate:>9,.0f}/s here   {one.capacity:>9,.0f} per CPU second of the busiest"
            f"   shares {shares}", flush=True,
        )  # fmt: skip
    return found[1].capacity / found[0].capacity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="a fifth of the time, for a first look")
    seconds = 2.0 if parser.parse_args().quick else 10.0
    print(f"{CLIENTS} clients, {machine()}\n")
    unary = both(seconds, load.PlacementQuery(TINY_MODEL.name, PROMPT, 1, stream=False), "unary, 1 token", 1.0)
    streamed = both(seconds, load.PlacementQuery(TINY_MODEL.name, PROMPT, TOKENS), f"streamed, {TOKENS} tokens", 20.0)
    report(
        [
            Row("two frontends carry, times one: unary requests", unary, 1.7, True),
            Row("two frontends carry, times one: streamed tokens", streamed, 1.7, True),
        ]
    )


if __name__ == "__main__":
    main()
