"""The prefix index: which worker holds which blocks.

One dict from rolling hash to an int used as a set of workers (bit i: the worker in slot i). A rolling hash names its
whole prefix, and no worker keeps a block without all before it (`wire/events.py` says so of its events). So along a prompt
the set of workers that hold a block only ever shrinks, and where it shrinks is found by bisection: a prompt of 256 blocks
takes some ten looks per depth at which somebody drops out, not 256.

A worker that clears its cache or leaves gives up its slot at once, and nothing else happens: bits of given-up slots are
masked out of every answer, and wiped in small portions by `tidy`. So a worker with a million blocks leaves in a
microsecond, and no set of blocks is kept per worker.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

WIPED_AT_ONCE = 4096  # entries that one call of `tidy` cleans of given-up slots
EVICTED_AT_ONCE = 1024  # entries that go, at least, when the budget is reached
KEY_BYTES = sys.getsizeof(1 << 63)
TABLE_BYTES = 120  # CPython's dict: 4 to 6 slots of 4 bytes and up to 4 entries of 24 for each used one after it grew


class PrefixIndex:
    """Keyed by worker id. Questions change nothing that an answer shows; `store`, `remove`, `clear` and `drop` do.

    `max_bytes` bounds the index: when it is reached, the blocks that were least recently stored or matched go, and every
    worker that loses one is put into `degraded`, for its feed to know.
    """

    def __init__(self, max_bytes: int = 1 << 30) -> None:
        self._max_bytes = max_bytes
        self.evicted = 0  # blocks that went for want of room
        self.degraded: set[str] = set()
        self._holders: dict[int, int] = {}  # least recently stored or matched first, once the budget is near
        self._slots: dict[str, int] = {}
        self._workers: dict[int, str] = {}
        self._counts: dict[str, int] = {}
        self._live = 0  # bits of the slots in use
        self._given_up = 0  # bits of slots whose entries are not wiped yet
        self._wiping: Iterator[int] | None = None
        self._wiping_bits = 0  # those of them that are being wiped

    def __len__(self) -> int:
        """Distinct blocks known, and those of workers that left which are not wiped yet."""
        return len(self._holders)

    @property
    def num_bytes(self) -> int:
        """The table, its keys, and a value of its own for each entry (an overestimate where only one worker holds it)."""
        return sys.getsizeof(self._holders) + len(self._holders) * (KEY_BYTES + self._value_bytes)

    @property
    def capacity(self) -> int:
        """Blocks that fit into the budget however the dict grows: a table just made has 120 bytes per entry at worst."""
        return self._max_bytes // (TABLE_BYTES + KEY_BYTES + self._value_bytes)

    @property
    def _value_bytes(self) -> int:
        return 24 + 4 * ((self._live | self._given_up).bit_length() // 30 + 1)

    def blocks(self, worker: str) -> int:
        return self._counts.get(worker, 0)

    def overlap(self, hashes: Sequence[int]) -> dict[str, int]:
        """Leading blocks that each worker holds; workers without any are left out."""
        found: dict[str, int] = {}
        get, last = self._holders.get, len(hashes) - 1
        alive = get(hashes[0], 0) & self._live if hashes else 0
        depth = 0  # all that are left hold this block
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
            left = get(hashes[differs], 0) & alive
            self._note(found, alive & ~left, differs)
            alive, depth = left, differs
        if found and self._near_budget:
            self._touch(hashes[: max(found.values())])
        return found

    def store(self, worker: str, hashes: Sequence[int]) -> None:
        slot = self._slots.get(worker)
        if slot is None:
            slot = self._allocate_slot(worker)
        bit, live, holders, new = 1 << slot, self._live, self._holders, 0
        for hash_ in reversed(hashes):  # should the budget be reached, the end of a prompt goes before its beginning
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
        """Blocks that the worker did not hold are ignored."""
        slot = self._slots.get(worker)
        if slot is None:
            return
        bit, live, holders, gone = 1 << slot, self._live, self._holders, 0
        for hash_ in hashes:
            known = holders.get(hash_, 0)
            if known & bit:
                gone += 1
                if left := known & live & ~bit:
                    holders[hash_] = left
                else:
                    del holders[hash_]
        self._counts[worker] -= gone

    def clear(self, worker: str) -> None:
        """The worker holds nothing any more."""
        if worker in self._slots:
            self.drop(worker)
            self._allocate_slot(worker)

    def drop(self, worker: str) -> None:
        """The worker is gone."""
        slot = self._slots.pop(worker, None)
        self.degraded.discard(worker)
        if slot is not None:
            del self._workers[slot]
            if self._counts.pop(worker):
                self._given_up |= 1 << slot
            self._live &= ~(1 << slot)

    def tidy(self) -> None:
        """Wipes a portion of what workers left behind. To be called now and then, also in quiet times."""
        if self._given_up:
            self._wipe()

    def check(self) -> None:
        """Raises AssertionError when the books do not add up."""
        counts = dict.fromkeys(self._slots, 0)
        for bits in self._holders.values():
            assert bits, "an entry that nobody holds"
            assert not bits & ~(self._live | self._given_up), "a bit of no slot"
            for slot in _bits(bits & self._live):
                counts[self._workers[slot]] += 1
        assert counts == self._counts
        assert {slot: worker for worker, slot in self._slots.items()} == self._workers
        assert sum(1 << slot for slot in self._workers) == self._live
        assert not self._live & self._given_up, "a slot is in use and given up"

    def _allocate_slot(self, worker: str) -> int:
        taken = self._live | self._given_up
        slot = (~taken & (taken + 1)).bit_length() - 1  # the lowest bit that is free
        self._slots[worker], self._workers[slot], self._counts[worker] = slot, worker, 0
        self._live |= 1 << slot
        return slot

    def _wipe(self) -> None:
        """A portion of the entries loses its given-up bits. A slot can be taken again once all have."""
        if self._wiping is None:
            self._wiping, self._wiping_bits = iter(list(self._holders)), self._given_up
        holders, keep = self._holders, ~self._wiping_bits
        portion = list(islice(self._wiping, WIPED_AT_ONCE))
        for hash_ in portion:
            bits = holders.get(hash_, 0)
            if bits & ~keep:
                if left := bits & keep:
                    holders[hash_] = left
                else:
                    del holders[hash_]
        if len(portion) < WIPED_AT_ONCE:
            self._given_up &= ~self._wiping_bits
            self._wiping, self._wiping_bits = None, 0

    @property
    def _near_budget(self) -> bool:
        return len(self._holders) * 4 > self.capacity * 3

    def _touch(self, hashes: Sequence[int]) -> None:
        """Matched blocks go to the safe end, the first block last: a prefix outlives what follows it."""
        holders = self._holders
        for hash_ in reversed(hashes):
            if (bits := holders.pop(hash_, None)) is not None:
                holders[hash_] = bits

    def _evict(self) -> None:
        """The least recently stored or matched entries go, a portion at a time."""
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
    """Numbers of the bits that are set, lowest first."""
    while bits:
        low = bits & -bits
        yield low.bit_length() - 1
        bits ^= low
