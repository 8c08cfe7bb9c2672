"""Turns TensorRT-LLM's rows of iteration statistics into a load report and metrics.

A row describes one iteration; an engine without work has none. So the load is based on our own count of open requests; a
row, as long as it is fresh, adds how many of them wait and how many blocks are free.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynserve.wire.events import Load

FRESH = 2.0  # seconds for which a row is used

_TOTALS = {
    "reusedBlocks": "engine_reused_blocks_total",
    "missedBlocks": "engine_missed_blocks_total",
    "allocTotalBlocks": "engine_allocated_blocks_total",
}
_GAUGES = {"iterLatencyMS": "engine_iteration_ms", "gpuMemUsage": "engine_gpu_bytes"}


class Stats:
    """The newest row of one rank. `total_blocks` is the cache's size, 0 until it is known."""

    def __init__(self, total_blocks: int, max_batch_size: int, block_size: int) -> None:
        self.total_blocks = total_blocks
        self._max_batch_size, self._block_size = max_batch_size, block_size
        self._row: Mapping[str, Any] = {}
        self._cache: Mapping[str, Any] = {}
        self._at = float("-inf")

    def update(self, row: Mapping[str, Any], now: float) -> None:
        """Stores a row. Every key may be missing: the set differs between versions."""
        self._row, self._at = row, now
        self._cache = row.get("kvCacheStats") or {}
        self.total_blocks = self._cache.get("maxNumBlocks") or self.total_blocks

    def load(self, live: int, handoffs: int, held_tokens: int, now: float) -> Load:
        """Returns the load. `live` is our count of open requests; hand-offs hold `held_tokens`, which rows do not count."""
        waiting = max(0, live - self._max_batch_size)
        if self.fresh(now):
            waiting = min(live, max(0, int(self._row.get("numQueuedRequests") or 0)))
        free = self.total_blocks
        if live and "freeNumBlocks" in self._cache:
            free = int(self._cache["freeNumBlocks"])
        elif not live:
            free -= -(-held_tokens // self._block_size)
        return Load(live - waiting, waiting, max(0, min(free, self.total_blocks)), self.total_blocks, handoffs)

    def fresh(self, now: float) -> bool:
        return now - self._at <= FRESH

    def state(self, live: int, now: float) -> str:
        """Returns `idle` without open requests, else `busy` with a fresh row, else `silent`."""
        return "busy" if live and self.fresh(now) else "silent" if live else "idle"

    def counters(self) -> dict[str, float]:
        found = {"engine_iterations_total": float(self._row.get("iter") or 0)}
        for ours, theirs in ((_TOTALS, self._cache), (_GAUGES, self._row)):
            for key, name in ours.items():
                if isinstance(value := theirs.get(key), int | float):
                    found[name] = float(value)
        return found
