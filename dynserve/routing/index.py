"""The prefix index: which worker holds which blocks.

One dict from rolling hash to an int used as a set of workers (bit i: the worker in slot i). A rolling hash names its
whole prefix, so the longest match of every worker falls out of one walk along the prompt's hashes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class PrefixIndex:
    """Keyed by worker id. Questions change nothing; `store`, `remove`, `clear` and `drop` do."""

    def __init__(self) -> None:
        self._holders: dict[int, int] = {}
        self._slots: dict[str, int] = {}
        self._workers: dict[int, str] = {}
        self._held: dict[str, set[int]] = {}  # per worker, so that its removal is exact

    def __len__(self) -> int:
        """Distinct blocks known."""
        return len(self._holders)

    def blocks(self, worker: str) -> int:
        return len(self._held.get(worker, ()))

    def overlap(self, hashes: Sequence[int]) -> dict[str, int]:
        """Leading blocks that each worker holds; workers without any are left out."""
        found: dict[str, int] = {}
        alive = -1
        for depth, hash_ in enumerate(hashes):
            holders = self._holders.get(hash_, 0) & alive
            if depth and holders != alive:
                self._note(found, alive & ~holders, depth)
            alive = holders
            if not alive:
                return found
        if hashes:
            self._note(found, alive, len(hashes))
        return found

    def store(self, worker: str, hashes: Iterable[int]) -> None:
        bit = 1 << self._slot(worker)
        held = self._held[worker]
        for hash_ in hashes:
            self._holders[hash_] = self._holders.get(hash_, 0) | bit
            held.add(hash_)

    def remove(self, worker: str, hashes: Iterable[int]) -> None:
        """Blocks that the worker did not hold are ignored."""
        if worker not in self._slots:
            return
        held = self._held[worker]
        for hash_ in hashes:
            if hash_ in held:
                held.remove(hash_)
                self._unset(hash_, 1 << self._slots[worker])

    def clear(self, worker: str) -> None:
        """The worker holds nothing any more."""
        if worker in self._slots:
            bit = 1 << self._slots[worker]
            for hash_ in self._held[worker]:
                self._unset(hash_, bit)
            self._held[worker].clear()

    def drop(self, worker: str) -> None:
        """The worker is gone; its slot is free for another."""
        if worker in self._slots:
            self.clear(worker)
            del self._workers[self._slots.pop(worker)], self._held[worker]

    def check(self) -> None:
        """Raises AssertionError when the two sides of the book differ."""
        expected: dict[int, int] = {}
        for worker, held in self._held.items():
            for hash_ in held:
                expected[hash_] = expected.get(hash_, 0) | 1 << self._slots[worker]
        assert expected == self._holders
        assert {slot: worker for worker, slot in self._slots.items()} == self._workers

    def _slot(self, worker: str) -> int:
        slot = self._slots.get(worker)
        if slot is None:
            slot = next(i for i in range(len(self._workers) + 1) if i not in self._workers)
            self._slots[worker], self._workers[slot], self._held[worker] = slot, worker, set()
        return slot

    def _unset(self, hash_: int, bit: int) -> None:
        if left := self._holders[hash_] & ~bit:
            self._holders[hash_] = left
        else:
            del self._holders[hash_]

    def _note(self, found: dict[str, int], slots: int, depth: int) -> None:
        while slots:
            low = slots & -slots
            found[self._workers[low.bit_length() - 1]] = depth
            slots ^= low
