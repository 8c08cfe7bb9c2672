from __future__ import annotations

import random

from dynserve.routing.assumed import STRIDE, AssumedCaches, PendingPrompts
from dynserve.routing.index import PrefixIndex


def test_pending_prompts_raise_overlaps_to_whole_strides() -> None:
    pending = PendingPrompts()
    pending.add("a", list(range(3 * STRIDE + 2)))
    found = {"b": 1}
    pending.extend(found, list(range(100)))
    assert found == {"a": 3 * STRIDE, "b": 1}
    fork = [*range(2 * STRIDE), *range(1000, 1100)]
    found = {"a": 2 * STRIDE + 1}
    pending.extend(found, fork)
    assert found == {"a": 2 * STRIDE + 1}  # what it holds already is more


def test_discarded_pending_prompts_no_longer_count_as_overlap() -> None:
    r = random.Random(1)
    pending, open_ = PendingPrompts(), list[tuple[str, list[int]]]()
    for _ in range(500):
        if r.random() < 0.5 or not open_:
            open_.append((r.choice("ab"), list(range(r.randrange(60)))))
            pending.add(*open_[-1])
        else:
            pending.discard(*open_.pop(r.randrange(len(open_))))
        depth = {w: max((len(h) // STRIDE * STRIDE for x, h in open_ if x == w), default=0) for w in "ab"}
        found: dict[str, int] = {}
        pending.extend(found, list(range(60)))
        assert found == {w: d for w, d in depth.items() if d}
    for one in open_:
        pending.discard(*one)
    assert len(pending) == 0


def test_assumed_blocks_expire_by_age_and_by_capacity_tail_first() -> None:
    index = PrefixIndex()
    assumed = AssumedCaches(index, 10.0)
    assumed.note_prompt("w", list(range(8)), 10, 0.0)
    assumed.note_prompt("w", list(range(100, 105)), 10, 5.0)  # three too many: the tail of the older prompt goes
    assert index.overlap(list(range(8))) == {"w": 5}
    assumed.expire(12.0)
    assert index.overlap(list(range(8))) == {} and index.overlap([100]) == {"w": 1}
    assumed.forget("w")
    index.drop("w")
    assumed.expire(100.0)
    index.check()
