"""The prefix index: which worker holds which blocks.

One dict maps each rolling hash to an int used as a set of workers (bit i: the worker in slot i). A rolling hash identifies
its whole prefix, and no worker keeps a block without all blocks before it (`wire/events.py` requires this of events). So
along a prompt the set of workers that hold a block only shrinks, and bisection finds each depth at which it shrinks: a
prompt of 256 blocks needs about ten lookups per such depth, not 256.

A worker that clears its cache or departs only gives up its slot: bits of given-up slots are masked out of every result, and
`tidy` wipes them in small portions. So a worker with a million blocks is removed in a microsecond, and no set of blocks is
kept per worker.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

WIPED_AT_ONCE = 4096  # entries that one call of `tidy` cleans of given-up slots
EVICTED_AT_ONCE = 1024  # entries of room that an eviction makes, at most
KEY_BYTES = sys.getsizeof(1 << 63)
TABLE_BYTES = 120  # CPython's dict that has just grown: up to 6 slots of 4 bytes and 4 entries of 24, per used entry


class PrefixIndex:
    """The blocks of every worker, by worker id. Only `store`, `remove`, `clear` and `drop` change the result of a query.

    `max_bytes` bounds the index: when it is reached, the least recently stored or matched blocks are evicted, and every
    worker that loses one is added to `degraded`, which its KV feed reads.
    """

    def __init__(self, max_bytes: int = 1 << 30) -> None:
        self._max_bytes = max_bytes
        self.evicted = 0  # blocks, so far
        self.degraded: set[str] = set()
        self._holders: dict[int, int] = {}  # least recently stored or matched first, once the budget is near
        self._slots: dict[str, int] = {}
        self._workers: dict[int, str] = {}
        self._counts: dict[str, int] = {}
        self._live = 0  # bits of the slots in use
        self._given_up = 0  # bits of slots whose entries are not wiped yet
        self._wiping: Iterator[int] | None = None
        self._wiping_bits = 0  # the given-up bits that are being wiped

    def __len__(self) -> int:
        """The number of distinct blocks, with those of departed workers that are not wiped yet."""
        return len(self._holders)

    @property
    def num_bytes(self) -> int:
        """The estimated size: the table, its keys, and a value per entry (too high for blocks of only one worker)."""
        return sys.getsizeof(self._holders) + len(self._holders) * (KEY_BYTES + self._value_bytes)

    @property
    def capacity(self) -> int:
        """The number of blocks that fit into the budget, even in a table that has just grown to 120 bytes per entry."""
        return self._max_bytes // (TABLE_BYTES + KEY_BYTES + self._value_bytes)

    @property
    def _value_bytes(self) -> int:
        return 24 + 4 * ((self._live | self._given_up).bit_length() // 30 + 1)

    def blocks(self, worker: str) -> int:
        return self._counts.get(worker, 0)

    def overlap(self, hashes: Sequence[int]) -> dict[str, int]:
        """Returns the number of leading blocks that each worker holds, without workers that hold none."""
        found: dict[str, int] = {}
        get, last = self._holders.get, len(hashes) - 1
        alive = get(hashes[0], 0) & self._live if hashes else 0
        depth = 0  # all workers in `alive` hold this block
        while alive:
            if get(hashes[last], 0) & alive == alive:
                self._note(found, alive, last + 1)
                break
            differs = last
            while differs - depth > 1:
                middle = (depth + differs) // 2
                if get(hashes[middle], 0) & alive == alive:
                    depth = middle
                else:
                    differs = middle
            remaining = get(hashes[differs], 0) & alive
            self._note(found, alive & ~remaining, differs)
            alive, depth = remaining, differs
        if found and self._near_budget:
            self._touch(hashes[: max(found.values())])
        return found

    def store(self, worker: str, hashes: Sequence[int]) -> None:
        slot = self._slots.get(worker)
        if slot is None:
            slot = self._allocate_slot(worker)
        bit, live, holders, new = 1 << slot, self._live, self._holders, 0
        for hash_ in reversed(hashes):  # an eviction removes the end of a prompt before its beginning
            known = holders.get(hash_)
            if known is None:
                holders[hash_] = bit  # one int object for all blocks that only this worker holds
                new += 1
            elif not known & bit:
                holders[hash_] = known & live | bit
                new += 1
        self._counts[worker] += new
        if len(holders) > self.capacity:
            self._evict()

    def remove(self, worker: str, hashes: Iterable[int]) -> None:
        """Removes blocks of a worker. Blocks that it did not hold are ignored."""
        slot = self._slots.get(worker)
        if slot is None:
            return
        bit, live, holders, gone = 1 << slot, self._live, self._holders, 0
        for hash_ in hashes:
            known = holders.get(hash_, 0)
            if known & bit:
                gone += 1
                if remaining := known & live & ~bit:
                    holders[hash_] = remaining
                else:
                    del holders[hash_]
        self._counts[worker] -= gone

    def clear(self, worker: str) -> None:
        """Removes all blocks of a worker that stays in the index."""
        if worker in self._slots:
            self.drop(worker)
            self._allocate_slot(worker)

    def drop(self, worker: str) -> None:
        """Removes a worker with all its blocks."""
        slot = self._slots.pop(worker, None)
        self.degraded.discard(worker)
        if slot is not None:
            del self._workers[slot]
            if self._counts.pop(worker):
                self._given_up |= 1 << slot
            self._live &= ~(1 << slot)

    def tidy(self) -> None:
        """Wipes given-up slots from a portion of the entries. Call it regularly, also without traffic."""
        if self._given_up:
            self._wipe()

    def check(self) -> None:
        """Raises AssertionError if the index is inconsistent."""
        counts = dict.fromkeys(self._slots, 0)
        for bits in self._holders.values():
            assert bits, "an entry without a worker"
            assert not bits & ~(self._live | self._given_up), "a bit of no slot"
            for slot in _bits(bits & self._live):
                counts[self._workers[slot]] += 1
        assert counts == self._counts
        assert {slot: worker for worker, slot in self._slots.items()} == self._workers
        assert sum(1 << slot for slot in self._workers) == self._live
        assert not self._live & self._given_up, "a slot is in use and given up"

    def _allocate_slot(self, worker: str) -> int:
        in_use = self._live | self._given_up
        slot = (~in_use & (in_use + 1)).bit_length() - 1  # the lowest bit that is free
        self._slots[worker], self._workers[slot], self._counts[worker] = slot, worker, 0
        self._live |= 1 << slot
        return slot

    def _wipe(self) -> None:
        """Clears the given-up bits of a portion of the entries. A slot can be reused once all entries are done."""
        if self._wiping is None:
            self._wiping, self._wiping_bits = iter(list(self._holders)), self._given_up
        holders, keep = self._holders, ~self._wiping_bits
        portion = list(islice(self._wiping, WIPED_AT_ONCE))
        for hash_ in portion:
            bits = holders.get(hash_, 0)
            if bits & ~keep:
                if remaining := bits & keep:
                    holders[hash_] = remaining
                else:
                    del holders[hash_]
        if len(portion) < WIPED_AT_ONCE:
            self._given_up &= ~self._wiping_bits
            self._wiping, self._wiping_bits = None, 0

    @property
    def _near_budget(self) -> bool:
        return len(self._holders) * 4 > self.capacity * 3

    def _touch(self, hashes: Sequence[int]) -> None:
        """Moves matched blocks to the end that is evicted last, a prefix behind the blocks that follow it."""
        holders = self._holders
        for hash_ in reversed(hashes):
            if (bits := holders.pop(hash_, None)) is not None:
                holders[hash_] = bits

    def _evict(self) -> None:
        """Evicts a portion of the entries, the least recently stored or matched ones."""
        gone = len(self._holders) - self.capacity + min(EVICTED_AT_ONCE, self.capacity // 32)
        lost = 0
        for hash_ in list(islice(self._holders, gone)):
            bits = self._holders.pop(hash_) & self._live
            lost |= bits
            for slot in _bits(bits):
                self._counts[self._workers[slot]] -= 1
        self.evicted += gone
        self.degraded.update(self._workers[slot] for slot in _bits(lost))

    def _note(self, found: dict[str, int], bits: int, depth: int) -> None:
        for slot in _bits(bits):
            found[self._workers[slot]] = depth


def _bits(bits: int) -> Iterator[int]:
    """Yields the numbers of the bits that are set, lowest first."""
    while bits:
        low = bits & -bits
        yield low.bit_length() - 1
        bits ^= low
