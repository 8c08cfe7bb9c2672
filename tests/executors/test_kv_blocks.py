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
    held = blocks.take(2)
    blocks.seal(held, [10, 11], None)
    blocks.release(held)
    assert blocks.free == 4
    assert blocks.acquire([10, 11, 12]) == held
    assert blocks.free == 2


def test_eviction_takes_the_tail_of_the_oldest_prefix_first() -> None:
    blocks = BlockManager(3, 2)
    held = blocks.take(3)
    blocks.seal(held, [1, 2, 3], None)
    blocks.release(held)
    blocks.drain_events()
    blocks.take(1)
    assert blocks.overlap([1, 2, 3]) == 2
    assert blocks.drain_events() == [Removed([3])]


def test_events_name_the_parent_of_a_chain() -> None:
    blocks = BlockManager(4, 2)
    held = blocks.take(3)
    blocks.seal(held[:1], [1], None)
    blocks.seal(held[1:], [2, 3], held[0])
    assert blocks.drain_events() == [Stored(None, [1]), Stored(1, [2, 3])]


def test_what_follows_a_private_copy_stays_private_too() -> None:
    blocks = BlockManager(6, 2)
    first, second = blocks.take(2), blocks.take(3)
    blocks.seal(first, [1, 2], None)
    blocks.seal(second[:2], [1, 2], None)
    blocks.seal(second[2:], [3], second[1])
    assert blocks.overlap([1, 2, 3]) == 2  # else 1 and 2 could go before 3
    blocks.release(first)
    blocks.release(second)
    blocks.check()


def test_a_second_copy_of_a_block_stays_private() -> None:
    blocks = BlockManager(4, 2)
    first, second = blocks.take(1), blocks.take(1)
    blocks.seal(first, [1], None)
    blocks.seal(second, [1], None)
    blocks.release(second)
    blocks.release(first)
    blocks.check()
    assert blocks.cached == 1


def test_can_take_counts_blocks_that_reuse_would_wake() -> None:
    blocks = BlockManager(2, 2)
    held = blocks.take(1)
    blocks.seal(held, [1], None)
    blocks.release(held)
    assert blocks.can_take(2)
    assert not blocks.can_take(2, reusing=[1])
    assert blocks.can_take(1, reusing=[1])


def test_releasing_twice_is_an_error() -> None:
    blocks = BlockManager(2, 2)
    held = blocks.take(1)
    blocks.release(held)
    with pytest.raises(RuntimeError, match="more often"):
        blocks.release(held)


def test_without_reuse_nothing_is_kept() -> None:
    blocks = BlockManager(2, 2, reuse=False)
    held = blocks.take(1)
    blocks.seal(held, [1], None)
    assert blocks.overlap([1]) == 0


class Machine(RuleBasedStateMachine):
    """Random sequences of what an engine does; the books must always add up, and events must mirror the cache."""

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
        if not self.blocks.can_take(need, reused):
            return
        held = self.blocks.acquire(reused)
        fresh = self.blocks.take(need)
        new = hashes[len(reused) :]
        self.blocks.seal(fresh[: len(new)], new, held[-1] if held else None)
        if held + fresh:
            self.held.append(held + fresh)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.blocks.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @rule()
    def clear(self) -> None:
        self.blocks.clear()

    @invariant()
    def books_add_up(self) -> None:
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
