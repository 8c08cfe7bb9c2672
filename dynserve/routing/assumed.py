"""The router's assumptions about caches that no KV event has confirmed.

`PendingPrompts` holds prompts that are being computed. Until a prompt's blocks are reported, requests with the same prefix
should go to the worker that computes it. Only every `STRIDE`-th block is stored, which is cheap and exact enough.

`AssumedCaches` covers workers that send no events (`APPROX`). A prompt sent there is assumed to be cached there, for a
while and up to the worker's capacity; the least recently used prompts are dropped first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from dynserve.routing.index import PrefixIndex

STRIDE = 8  # blocks


class PendingPrompts:
    """Prompts that are being computed, by worker."""

    def __init__(self) -> None:
        self._counts: dict[int, dict[str, int]] = {}

    def __len__(self) -> int:
        return len(self._counts)

    def add(self, worker: str, hashes: Sequence[int]) -> None:
        for hash_ in hashes[STRIDE - 1 :: STRIDE]:
            workers = self._counts.setdefault(hash_, {})
            workers[worker] = workers.get(worker, 0) + 1

    def discard(self, worker: str, hashes: Sequence[int]) -> None:
        """Reverts one `add` of the same prompt."""
        for hash_ in hashes[STRIDE - 1 :: STRIDE]:
            workers = self._counts[hash_]
            workers[worker] -= 1
            if not workers[worker]:
                del workers[worker]
                if not workers:
                    del self._counts[hash_]

    def extend(self, found: dict[str, int], hashes: Sequence[int]) -> None:
        """Raises the overlaps in `found` to the blocks that will be cached: a block implies all blocks before it."""
        if not self._counts:
            return
        for at in range(STRIDE - 1, len(hashes), STRIDE):
            workers = self._counts.get(hashes[at])
            if workers is None:
                return
            for worker in workers:
                if found.get(worker, 0) <= at:
                    found[worker] = at + 1


class AssumedCaches:
    """Stores placed prompts in the index, and removes them again by time and capacity."""

    def __init__(self, index: PrefixIndex, ttl_s: float) -> None:
        self._index, self._ttl_s = index, ttl_s
        self._sent: dict[str, OrderedDict[int, float]] = {}  # hash -> when it expires; least recently used first

    def note_prompt(self, worker: str, hashes: Sequence[int], capacity: int, now: float) -> None:
        """Records that a prompt of these blocks was placed on a worker whose cache has `capacity` blocks."""
        sent = self._sent.setdefault(worker, OrderedDict())
        self._index.store(worker, hashes)
        for hash_ in reversed(hashes):  # a prefix outlives the blocks that follow it
            sent[hash_] = now + self._ttl_s
            sent.move_to_end(hash_)
        self._shed(worker, capacity, now)

    def forget(self, worker: str) -> None:
        self._sent.pop(worker, None)

    def expire(self, now: float) -> None:
        """Drops expired blocks, also of workers without new prompts. Call it regularly."""
        for worker, sent in self._sent.items():
            self._shed(worker, len(sent), now)

    def _shed(self, worker: str, capacity: int, now: float) -> None:
        sent, gone = self._sent[worker], []
        while sent and (len(sent) > capacity or next(iter(sent.values())) < now):
            gone.append(sent.popitem(last=False)[0])
        self._index.remove(worker, gone)
