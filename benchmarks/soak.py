"""512 streams for ten minutes: memory, lost tokens, and how even the tokens come.

    python benchmarks/soak.py [--quick] [--streams N] [--minutes X] [--step-ms N]

The load runs beside frontend, worker and servers on the same cores. Memory is read every ten seconds; what counts is how it
grows from the fourth minute on, when the books that have a bound are full (10,000 decisions, 20,000 ended requests, the index
of all blocks). A token is lost when an answer has fewer (or more) chunks than the first. Linux only.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time

import load
from budget import Row, machine, report
from plane import PROMPT, STEPS_ONLY, Setup, cluster, cpu_seconds, resident

from dynserve.config import TINY_MODEL

TOKENS = 256


class Memory(threading.Thread):
    """Resident megabytes of processes, every so often."""

    def __init__(self, setup: Setup, every: float) -> None:
        super().__init__(daemon=True)
        self._pids = {name: pids for name, pids in setup.pids.items() if name != "nats"}
        self._every, self.ended = every, threading.Event()
        self.seen: dict[str, list[float]] = {name: [] for name in self._pids}

    def run(self) -> None:
        while not self.ended.wait(self._every):
            for name, pids in self._pids.items():
                self.seen[name].append(sum(resident(pid) for pid in pids))


def growth(seen: list[float]) -> float:
    """Of the last tenth over the fourth tenth, in percent."""
    tenth = max(1, len(seen) // 10)
    return (statistics.mean(seen[-tenth:]) / statistics.mean(seen[3 * tenth : 4 * tenth]) - 1) * 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="half a minute")
    parser.add_argument("--streams", type=int, default=512)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--step-ms", type=float, default=20.0)
    args = parser.parse_args()
    seconds = 30.0 if args.quick else args.minutes * 60
    engine = STEPS_ONLY | {"step_ms": args.step_ms}
    engine |= {"max_batch_size": args.streams, "max_num_tokens": 1 << 17, "num_blocks": 40_000}
    print(f"{args.streams} streams of {TOKENS} tokens, steps of {args.step_ms:.0f} ms, {seconds:.0f} s, {machine()}\n")
    with cluster(["prefill_and_decode"], engine) as setup:
        ask = load.PlacementQuery(TINY_MODEL.name, PROMPT, TOKENS)
        load.run(setup.port, ask, args.streams, 2.0)
        memory = Memory(setup, seconds / 60)
        memory.start()
        before, began = {name: cpu_seconds(pids) for name, pids in setup.pids.items()}, time.monotonic()
        answered = load.run(setup.port, ask, args.streams, seconds)
        took = time.monotonic() - began
        cpu = {name: (cpu_seconds(pids) - before[name]) / took for name, pids in setup.pids.items()}
        memory.ended.set()
        memory.join()
    gaps = [load.at(answered.gaps_s, part) * 1000 for part in (0.5, 0.99, 0.999, 1.0)]
    print(
        f"{answered.requests:,} answers, {answered.tokens:,} tokens, {answered.tokens / answered.seconds:,.0f} tokens/s"
    )
    print(f"gaps between tokens, ms: p50 {gaps[0]:.1f}, p99 {gaps[1]:.1f}, p99.9 {gaps[2]:.1f}, longest {gaps[3]:.1f}")
    print("cores in use: " + ", ".join(f"{name} {share:.2f}" for name, share in cpu.items()))
    for name, seen in memory.seen.items():
        print(f"{name} MB: " + " ".join(f"{value:.0f}" for value in seen[:: max(1, len(seen) // 12)]))
    lost = answered.odd + (answered.tokens != answered.requests * TOKENS)
    rows = [Row("512 streams: answers with lost or doubled tokens", lost, 0)]
    rows += [Row("512 streams: p99 of gaps beyond one step, in steps", gaps[1] / args.step_ms - 1, 1.0)]
    rows += [Row(f"512 streams: growth of {name} memory, %", growth(seen), 5.0) for name, seen in memory.seen.items()]
    report(rows)


if __name__ == "__main__":
    main()
