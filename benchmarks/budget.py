"""What the benchmarks promise: rows of a figure and its bound, printed with pass or MISS, and collected by `bench.py`."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

COLLECT = "DYNSERVE_BUDGET_ROWS"  # environment variable: the file that rows are added to


def machine() -> str:
    """Cores, interpreter, and how fast it is now: a shared machine may be twice as slow an hour later."""
    return f"{os.cpu_count()} cores, Python {sys.version.split()[0]}, yardstick {yardstick_ms():.1f} ms"


def yardstick_ms() -> float:
    """Milliseconds that 300,000 look-ups in a dictionary take, the best of five times."""
    table = {number: number for number in range(100)}
    best = float("inf")
    for _ in range(5):
        began, total = time.perf_counter(), 0
        for number in range(300_000):
            total += table[number % 100]
        best = min(best, time.perf_counter() - began)
    return best * 1000


class Row(NamedTuple):
    what: str
    found: float
    bound: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.found >= self.bound if self.at_least else self.found <= self.bound

    def __str__(self) -> str:
        sign, verdict = ("≥" if self.at_least else "≤"), ("pass" if self.met else "MISS")
        return f"  {self.what:<58} {self.found:>12,.2f}   {sign} {self.bound:>10,.2f}   {verdict}"


def report(rows: list[Row]) -> None:
    print(f"\nbudget (yardstick {yardstick_ms():.1f} ms)")
    for row in rows:
        print(row, flush=True)
    if path := os.environ.get(COLLECT):
        with Path(path).open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def collected(path: Path) -> list[Row]:
    return [Row(*json.loads(line)) for line in path.read_text().splitlines()]
