"""`FirstTokenObjective`: how many requests got their first token later than `--ttft-slo-ms`."""

from __future__ import annotations

import time
from collections.abc import Callable

WINDOW = 60  # seconds


class FirstTokenObjective:
    """Counts the requests of the last `WINDOW` seconds, and those whose first token came later than `limit_s`."""

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit_s, self._clock = limit_s, clock
        self._seconds = [-1] * WINDOW  # that each slot counts
        self._counts = [[0, 0] for _ in range(WINDOW)]  # all, missed

    def observe(self, ttft_s: float) -> None:
        now = int(self._clock())
        slot = now % WINDOW
        if self._seconds[slot] != now:
            self._seconds[slot], self._counts[slot] = now, [0, 0]
        self._counts[slot][0] += 1
        self._counts[slot][1] += ttft_s > self.limit_s

    def gave_up(self, waited_s: float) -> None:
        """Counts a request that ended without a token as missed, if it has waited for longer than the limit."""
        if waited_s > self.limit_s:
            self.observe(waited_s)

    def missed_ratio(self) -> float:
        """Returns the share of those that missed it; 0 without requests."""
        oldest = int(self._clock()) - WINDOW
        recent = [count for at, count in zip(self._seconds, self._counts, strict=True) if at > oldest]
        total = sum(count[0] for count in recent)
        return sum(count[1] for count in recent) / total if total else 0.0
