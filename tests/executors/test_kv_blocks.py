from __future__ import annotations

from itertools import accumulate

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dynserve.executors.kv_blocks import BlockManager
from dynserve.wire.events import Removed, Stored


def test_sealed_blocks_are_found_again_after_release() -> None:
    blocks = BlockManager(4, 2)
    held = blocks.allocate(2)
    blocks.seal(held, 0, [10, 11])
    blocks.release(held)
    assert blocks.free == 4
    assert blocks.acquire([10, 11, 12]) == held
    assert blocks.free == 2


def test_eviction_removes_the_tail_of_the_oldest_prefix_first() -> None:
    blocks = BlockManager(3, 2)
    held = blocks.allocate(3)
    blocks.seal(held, 0, [1, 2, 3])
    blocks.release(held)
    blocks.drain_events()
    blocks.allocate(1)
    assert blocks.overlap([1, 2, 3]) == 2
    assert blocks.drain_events() == [Removed([3])]


def test_stored_events_name_the_parent_block() -> None:
    blocks = BlockManager(4, 2)
    held = blocks.allocate(3)
    blocks.seal(held, 0, [1])
    blocks.seal(held, 1, [2, 3])
    assert blocks.drain_events() == [Stored(None, [1]), Stored(1, [2, 3])]


def test_a_duplicate_block_is_replaced_by_the_first_and_its_successor_is_reported() -> None:
    blocks = BlockManager(6, 2)
    first, second = blocks.allocate(2), blocks.allocate(3)
    blocks.seal(first, 0, [1, 2])
    blocks.drain_events()
    blocks.seal(second, 0, [1, 2, 3])
    assert second[:2] == first and blocks.free == 3
    assert blocks.drain_events() == [Stored(2, [3])]
    blocks.release(first)
    blocks.release(second)
    blocks.check()
    assert blocks.overlap([1, 2, 3]) == 3 and blocks.free == 6


def test_after_a_clear_blocks_without_a_cached_parent_are_not_cached() -> None:
    blocks = BlockManager(4, 2)
    held = blocks.allocate(2)
    blocks.seal(held, 0, [1])
    blocks.clear()
    blocks.seal(held, 1, [2])
    assert blocks.cached == 0
    blocks.release(held)
    blocks.check()


def test_can_allocate_counts_free_blocks_that_reuse_would_occupy() -> None:
    blocks = BlockManager(2, 2)
    held = blocks.allocate(1)
    blocks.seal(held, 0, [1])
    blocks.release(held)
    assert blocks.can_allocate(2)
    assert not blocks.can_allocate(2, reusing=[1])
    assert blocks.can_allocate(1, reusing=[1])


def test_releasing_twice_is_an_error() -> None:
    blocks = BlockManager(2, 2)
    held = blocks.allocate(1)
    blocks.release(held)
    with pytest.raises(RuntimeError, match="more often"):
        blocks.release(held)


def test_without_reuse_no_block_is_cached() -> None:
    blocks = BlockManager(2, 2, reuse=False)
    held = blocks.allocate(1)
    blocks.seal(held, 0, [1])
    assert blocks.overlap([1]) == 0


class Machine(RuleBasedStateMachine):
    """Random sequences of an engine's operations. Block counts must stay consistent, and events must mirror the cache."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(8, 2)
        self.held: list[list[int]] = []
        self.mirror: set[int] = set()

    @rule(path=st.lists(st.integers(0, 1), max_size=4), extra=st.integers(0, 3))
    def start(self, path: list[int], extra: int) -> None:
        hashes = list(accumulate(path, lambda hash_, way: 2 * hash_ + way, initial=1))  # each names all before it
        reused = hashes[: self.blocks.overlap(hashes)]
        need = len(hashes) - len(reused) + extra
        if not self.blocks.can_allocate(need, reused):
            return
        held = self.blocks.acquire(reused)
        fresh = self.blocks.allocate(need)
        new = hashes[len(reused) :]
        blocks = held + fresh
        self.blocks.seal(blocks, len(held), new)
        if blocks:
            self.held.append(blocks)

    @rule(path=st.lists(st.integers(0, 1), max_size=3))
    def start_two_alike(self, path: list[int]) -> None:
        hashes = list(accumulate(path, lambda hash_, way: 2 * hash_ + way, initial=1))
        reused = hashes[: self.blocks.overlap(hashes)]
        need = 2 * (len(hashes) - len(reused))
        if not self.blocks.can_allocate(need, reused):
            return
        both = [self.blocks.acquire(reused) for _ in range(2)]
        both = [held + self.blocks.allocate(need // 2) for held in both]
        for held in both:
            self.blocks.seal(held, len(reused), hashes[len(reused) :])
            self.held.append(held)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.blocks.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @rule()
    def clear(self) -> None:
        self.blocks.clear()

    @invariant()
    def counts_are_consistent(self) -> None:
        self.blocks.check()
        for event in self.blocks.drain_events():
            if isinstance(event, Stored):
                self.mirror |= set(event.hashes)
            elif isinstance(event, Removed):
                self.mirror -= set(event.hashes)
            else:
                self.mirror.clear()
        assert len(self.mirror) == self.blocks.cached
        assert self.blocks.num_blocks - self.blocks.free == len({b for held in self.held for b in held})


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
