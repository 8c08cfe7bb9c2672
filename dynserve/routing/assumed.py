"""The router's assumptions about caches that no KV event has confirmed.

`PendingPrompts` holds prompts that are being computed. Until a prompt's blocks are reported, the worker that computes it is
where others with the same prefix should go. Kept at every `STRIDE`-th block, which makes it cheap and exact enough.

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
        """Once for each `add`."""
        for hash_ in hashes[STRIDE - 1 :: STRIDE]:
            workers = self._counts[hash_]
            workers[worker] -= 1
            if not workers[worker]:
                del workers[worker]
                if not workers:
                    del self._counts[hash_]

    def extend(self, found: dict[str, int], hashes: Sequence[int]) -> None:
        """Raises the overlaps in `found` to what will be there: the prompts that contain a block contain all before it."""
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
    """Puts what was sent into the index, and takes it out again by time and capacity."""

    def __init__(self, index: PrefixIndex, ttl_s: float) -> None:
        self._index, self._ttl_s = index, ttl_s
        self._sent: dict[str, OrderedDict[int, float]] = {}  # hash -> when it ends; least recently used first

    def note_prompt(self, worker: str, hashes: Sequence[int], capacity: int, now: float) -> None:
        """A prompt of these blocks goes to a worker with room for `capacity`."""
        note_prompt = self._sent.setdefault(worker, OrderedDict())
        self._index.store(worker, hashes)
        for hash_ in reversed(hashes):  # a prefix outlives what follows it
            note_prompt[hash_] = now + self._ttl_s
            note_prompt.move_to_end(hash_)
        self._shed(worker, capacity, now)

    def forget(self, worker: str) -> None:
        self._sent.pop(worker, None)

    def expire(self, now: float) -> None:
        """To be called now and then, for workers that nothing is sent to any more."""
        for worker, note_prompt in self._sent.items():
            self._shed(worker, len(note_prompt), now)

    def _shed(self, worker: str, capacity: int, now: float) -> None:
        note_prompt, gone = self._sent[worker], []
        while note_prompt and (len(note_prompt) > capacity or next(iter(note_prompt.values())) < now):
            gone.append(note_prompt.popitem(last=False)[0])
        self._index.remove(worker, gone)
