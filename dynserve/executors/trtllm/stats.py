"""Turns TensorRT-LLM's rows of iteration statistics into a load report and metrics.

A row describes one iteration; an engine without work has none, and statistics are off by default where they only cost. So
the load is based on our own count of open requests and their tokens; a row, as long as it is fresh, replaces parts of it.

With attention DP the rows of ranks other than 0 are copies of rank 0's, in which only the counts of scheduled requests
and tokens are the rank's own (`iteration_stats.py`); older versions gather a row from each rank, which has the key `rank`.
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
_USED_TOKENS = ("numCtxKvTokens", "numGenKvTokens")


class Stats:
    """The newest row of one rank, as the engine has written it. `total_blocks` is the cache's size, 0 until it is known.
    `block_size` is in tokens."""

    def __init__(self, total_blocks: int, max_batch_size: int, block_size: int, ranks: int = 1) -> None:
        self.total_blocks, self.block_size = total_blocks, block_size
        self._max_batch_size, self._ranks = max_batch_size, ranks
        self.row: Mapping[str, Any] = {}
        self._at = float("-inf")

    def update(self, row: Mapping[str, Any], now: float) -> None:
        """Stores a row. Every key may be missing: the set differs between versions."""
        self.row, self._at = row, now
        self.total_blocks = self._own_cache.get("maxNumBlocks") or self.total_blocks
        if not self.total_blocks:  # all ranks have about as many
            self.total_blocks = (row.get("kvCacheStats") or {}).get("maxNumBlocks") or 0

    def load(self, live: int, live_tokens: int, handoffs: int, held_tokens: int, now: float) -> Load:
        """Returns the load. `live` is our count of open requests and `live_tokens` that of their prompts and answers;
        finished prefills hold `held_tokens`, which rows count as used without naming their requests."""
        waiting = max(0, live - self._max_batch_size)
        used = -(-(live_tokens + held_tokens) // self.block_size)
        if live and self._fresh(now):
            waiting = min(live, self._waiting(live))
            used = self._used(used, held_tokens)
        free = max(0, self.total_blocks - used)
        return Load(live - waiting, waiting, free, self.total_blocks, handoffs)

    def counters(self) -> dict[str, float]:
        if not self._is_own:
            return {}
        found = {"engine_iterations_total": float(self.row["iter"])} if self.row.get("iter") else {}
        for ours, theirs in ((_TOTALS, self._own_cache), (_GAUGES, self.row)):
            for key, name in ours.items():
                if isinstance(value := theirs.get(key), int | float):
                    found[name] = float(value)
        return found

    @property
    def _is_own(self) -> bool:
        """Whether the whole row is this rank's own."""
        return not self.row.get("attentionDpRank") or "rank" in self.row

    @property
    def _own_cache(self) -> Mapping[str, Any]:
        return (self.row.get("kvCacheStats") or {}) if self._is_own else {}

    def _fresh(self, now: float) -> bool:
        return now - self._at <= FRESH

    def _waiting(self, live: int) -> int:
        if self._ranks > 1 and "rank" not in self.row:  # the queue of all ranks is in rank 0's row
            running = (self.row.get("inflightBatchingStats") or {}).get("numScheduledRequests")
            return max(0, live - int(running)) if running is not None else max(0, live - self._max_batch_size)
        return max(0, int(self.row.get("numQueuedRequests") or 0))

    def _used(self, counted: int, held_tokens: int) -> int:
        """Returns the used blocks: the row's where they are the rank's own, else `counted`."""
        if "freeNumBlocks" in self._own_cache:
            return self.total_blocks - int(self._own_cache["freeNumBlocks"])
        batch = self.row.get("inflightBatchingStats") or {}
        if all(name in batch for name in _USED_TOKENS):
            return -(-(sum(int(batch[name]) for name in _USED_TOKENS) + held_tokens) // self.block_size)
        return counted
