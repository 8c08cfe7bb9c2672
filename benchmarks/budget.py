"""What the benchmarks promise: rows of a figure and its bound, printed with pass or MISS, and collected by `bench.py`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

COLLECT = "DYNSERVE_BUDGET_ROWS"  # environment variable: the file that rows are added to


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
    print("\nbudget")
    for row in rows:
        print(row, flush=True)
    if path := os.environ.get(COLLECT):
        with Path(path).open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def collected(path: Path) -> list[Row]:
    return [Row(*json.loads(line)) for line in path.read_text().splitlines()]
