"""Turns TensorRT-LLM's rows of iteration statistics into a load report and metrics.

A row describes one iteration; an engine without work has none, and statistics are off by default where they only cost. So
the load is based on our own count of open requests and their tokens; a row, as long as it is fresh, replaces parts of it.

With attention DP the rows of ranks other than 0 are copies of rank 0's, in which only the counts of scheduled requests
and tokens are the rank's own (`iteration_stats.py`); older versions gather a row from each rank, which has the key `rank`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from dynserve.wire.events import Load

FRESH = 2.0  # seconds for which a row is used

_TOTALS = {
    "reusedBlocks": "engine_reused_blocks_total",
    "missedBlocks": "engine_missed_blocks_total",
    "allocTotalBlocks": "engine_allocated_blocks_total",
}
_GAUGES = {"iterLatencyMS": "engine_iteration_ms", "gpuMemUsage": "engine_gpu_bytes"}
_USED_TOKENS = ("numCtxKvTokens", "numGenKvTokens")


class OpenRequests(NamedTuple):
    """The requests in the engine, by our own count."""

    live: int
    tokens: int  # of their prompts and answers, without those that were cached
    unanswered: int  # without a first response
    unanswered_tokens: int  # of their prompts
    held_tokens: int  # of finished prefills whose blocks the engine holds


class Stats:
    """The newest row of one rank, as the engine has written it. `total_blocks` is the cache's size, 0 until it is known.
    `block_size` is in tokens."""

    def __init__(
        self, total_blocks: int, max_batch_size: int, block_size: int, ranks: int = 1, max_num_tokens: int = 8192,
        parts: int = 1,
    ) -> None:  # fmt: skip
        """`parts`: the ranks that share each sequence; blocks are those of one."""
        self.total_blocks, self.block_size, self._parts = total_blocks, block_size, parts
        self._max_batch_size, self._ranks, self._max_num_tokens = max_batch_size, ranks, max_num_tokens
        self.row: Mapping[str, Any] = {}
        self._at = float("-inf")

    def update(self, row: Mapping[str, Any], now: float) -> None:
        """Stores a row. Every key may be missing: the set differs between versions."""
        self.row, self._at = row, now
        self.total_blocks = self._own_cache.get("maxNumBlocks") or self.total_blocks

    def load(self, requests: OpenRequests, handoffs: int, total_blocks: int, now: float) -> Load:
        """Returns the load of this rank, whose cache has `total_blocks`."""
        live = requests.live
        used = self._blocks(requests.tokens + requests.held_tokens)
        waiting = self._counted_waiting(requests, used, total_blocks)
        if live and now - self._at <= FRESH:
            waiting = min(live, self._waiting(live, waiting))
            used = self._used(used, requests.held_tokens, total_blocks)
        return Load(live - waiting, waiting, max(0, total_blocks - used), total_blocks, handoffs)

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

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // (self.block_size * self._parts))

    def _counted_waiting(self, requests: OpenRequests, used: int, total_blocks: int) -> int:
        """Estimates how many requests wait in the engine: beyond the batch, for blocks, or for their turn in a step."""
        waiting = requests.live - self._max_batch_size
        if used > total_blocks > 0:
            waiting = max(waiting, requests.live * (used - total_blocks) // used)
        if requests.unanswered_tokens > self._max_num_tokens:  # as many as one step computes do not wait
            fit = -(-requests.unanswered * self._max_num_tokens // requests.unanswered_tokens)
            waiting = max(waiting, requests.unanswered - fit)
        return max(0, min(waiting, max(requests.unanswered, requests.live - self._max_batch_size)))

    def _waiting(self, live: int, counted: int) -> int:
        if self._ranks > 1 and "rank" not in self.row:  # the queue of all ranks is in rank 0's row
            running = (self.row.get("inflightBatchingStats") or {}).get("numScheduledRequests")
            return counted if running is None else min(counted, max(0, live - int(running)))
        queued = self.row.get("numQueuedRequests")
        return counted if queued is None else max(0, int(queued))

    def _used(self, counted: int, held_tokens: int, total_blocks: int) -> int:
        """Returns the used blocks: the row's where they are the rank's own, else `counted`."""
        if "freeNumBlocks" in self._own_cache:
            return total_blocks - int(self._own_cache["freeNumBlocks"])
        batch = self.row.get("inflightBatchingStats") or {}
        if all(name in batch for name in _USED_TOKENS):
            return self._blocks(sum(int(batch[name]) for name in _USED_TOKENS) + held_tokens)
        return counted
