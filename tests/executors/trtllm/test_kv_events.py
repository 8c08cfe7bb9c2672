"""The translation of TensorRT-LLM's KV events: the quirks of the stream, and a property over random histories."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from dynserve.executors.trtllm import kv_events
from dynserve.executors.trtllm.kv_events import PROBE_SALT, KvStream, KvStreams
from dynserve.wire.events import Cleared, KvEvent, Removed, Stored
from dynserve.wire.hashing import adapter_salt, rolling_hashes
from dynserve.wire.requests import pack_tokens

SIZE = 4
A, B, C = list(range(4)), list(range(4, 8)), list(range(8, 12))


class Engine:
    """Writes events as TensorRT-LLM does, one id after the other."""

    def __init__(self, window: int = 1024, rank: int | None = None) -> None:
        self.window, self.rank, self.next = window, rank, 0

    def event(self, data: dict[str, Any], window: int | None = None) -> dict[str, Any]:
        event: dict[str, Any] = {"event_id": self.next, "window_size": window or self.window, "data": data}
        if self.rank is not None:
            event["attention_dp_rank"] = self.rank
        self.next += 1
        return event

    def created(self, window: int | None = None) -> dict[str, Any]:
        return self.event({"type": "created", "num_blocks_per_cache_level": [100, 0]}, window)

    def stored(
        self, *chain: list[int], parent: int | None = None, first: int = 1 << 63, window: int | None = None, **more: Any
    ) -> dict[str, Any]:
        data = {
            "type": "stored",
            "parent_hash": parent,
            "blocks": [
                {
                    "type": "stored_block",
                    "block_hash": first + at,
                    "tokens": [{"type": "unique_token", "token_id": t, "token_extra_id": 0} for t in tokens],
                    "cache_level": 0,
                    "priority": 35,
                    **{k: v for k, v in more.items() if k != "lora_name"},
                }
                for at, tokens in enumerate(chain)
            ],
        }
        return self.event(data | ({"lora_name": more["lora_name"]} if "lora_name" in more else {}), window)

    def removed(self, *names: int) -> dict[str, Any]:
        return self.event({"type": "removed", "block_hashes": list(names)})


def hashes(*blocks: list[int], salt: str = "") -> list[int]:
    return rolling_hashes(pack_tokens([t for block in blocks for t in block]), SIZE, salt)


BIG = 1 << 63


def test_blocks_of_images_in_the_second_cache_manager_are_skipped_with_those_after_them() -> None:
    """Its tokens of multimodal inputs are text, and `mm_keys` is empty."""
    engine, stream = Engine(), KvStream(SIZE)
    image = engine.stored(A, B, mm_keys=[])
    image["data"]["blocks"][0]["tokens"][1]["token_id"] = "9f86d081884c7d65"
    other = engine.stored(C, first=500)
    below = engine.stored(B, parent=BIG + 1, first=700)
    assert stream.translate([image, other, below]) == [Stored(None, hashes(C))]
    assert (stream.gaps, stream.orphans) == (0, 0)


def test_blocks_that_are_reported_once_for_each_group_of_layers_count_once() -> None:
    engine, stream = Engine(), KvStream(SIZE)
    found = stream.translate(
        [engine.stored(A, B), engine.stored(A, B), engine.removed(BIG + 1), engine.removed(BIG + 1)]
    )
    assert found == [Stored(None, hashes(A, B)), Removed(hashes(A, B)[1:])]
    assert stream.gaps == 0


def test_blocks_without_salts_are_not_taken_for_those_of_the_plain_prompt() -> None:
    """Neither version 1.2 nor the second cache manager names salts and adapters in its blocks."""
    engine, streams = Engine(), KvStreams(SIZE, 1)
    salted = pack_tokens(A + B)
    streams.note_apart(salted)
    assert streams.translate([engine.stored(A, B), engine.stored(C, parent=BIG + 1, first=77)]) == {}
    assert not streams.names_salts and streams.ranks[0].orphans == 0
    # other prompts, and those that begin later with the same block, are plain
    assert streams.translate([engine.stored(B, first=300), engine.stored(A, parent=300, first=400)]) == {
        0: [Stored(None, hashes(B)), Stored(hashes(B)[0], hashes(B, A)[1:])]
    }


def test_blocks_with_salts_are_apart_by_their_salts_and_adapters_by_their_names() -> None:
    engine, streams = Engine(), KvStreams(SIZE, 1)
    streams.note_apart(pack_tokens(A))
    assert streams.translate([engine.stored(A, cache_salt=None)]) == {0: [Stored(None, hashes(A))]}, "salts are named"
    streams.note_apart(pack_tokens(B), adapter=True)
    assert streams.translate([engine.stored(B, first=20, cache_salt=None)]) == {}, "are adapters named, too?"
    named = engine.stored(B, first=30, cache_salt=None, lora_name="french")
    assert streams.translate([named]) == {0: [Stored(None, hashes(B, salt=adapter_salt("french", "")))]}
    assert streams.translate([engine.stored(B, first=40, cache_salt=None)]) == {0: [Stored(None, hashes(B))]}


def test_the_workers_own_prompts_are_not_reported() -> None:
    engine, stream = Engine(), KvStream(SIZE)
    assert stream.translate([engine.stored(A, B, cache_salt=f"{PROBE_SALT}-1")]) == []


def test_a_block_that_has_a_child_shows_the_block_size() -> None:
    engine, stream = Engine(), KvStream(SIZE)
    stream.translate([engine.stored([1, 2], first=5)])
    assert (stream.told, stream.full_size) == (1, 0), "it may be a partial one"
    stream.translate([engine.stored([3], parent=5, first=6)])
    assert (stream.told, stream.full_size) == (2, 2)
    stream = KvStream(SIZE)
    stream.translate([Engine().stored(A + B, C)])
    assert stream.full_size == 8
    stream.translate([])


def test_a_prompt_with_a_salt_hides_plain_blocks_only_while_it_is_open() -> None:
    engine, streams = Engine(), KvStreams(SIZE, 1)
    noted = [streams.note_apart(pack_tokens(A + B)), streams.note_apart(pack_tokens(A), adapter=True)]
    assert streams.note_apart(pack_tokens(A[:3])) is None, "it fills no block"
    assert streams.translate([engine.stored(A)]) == {}
    for one in noted:
        assert one is not None
        streams.forget_apart(one)
        streams.forget_apart((12345, False))  # unknown ones are ignored
    assert streams.translate([engine.stored(A, first=9)]) == {0: [Stored(None, hashes(A))]}


def test_an_adapter_with_a_salt_is_not_taken_for_the_models_where_events_name_salts_only() -> None:
    engine, streams = Engine(), KvStreams(SIZE, 1)
    streams.note_apart(pack_tokens(A), adapter=True)
    assert streams.translate([engine.stored(A, cache_salt="tenant")]) == {}


def test_prompts_are_noted_while_another_thread_looks_them_up() -> None:
    engine, streams = Engine(), KvStreams(SIZE, 1)
    streams.note_apart(pack_tokens(A))
    stop, found = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            found.extend(streams.translate([engine.stored(A, first=7), engine.removed(7)]).values())

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(20_000):
        noted = streams.note_apart(pack_tokens(A))
        assert noted is not None
        streams.forget_apart(noted)
    stop.set()
    reader.join()
    assert not found


def test_single_blocks_are_remembered_for_a_while_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_events, "MAX_LENGTHS", 3)
    engine, stream = Engine(), KvStream(SIZE)
    stream.translate([engine.stored([1, at], first=at) for at in range(10)])
    assert len(stream._lengths) <= 3


def test_a_chain_of_blocks_becomes_dynserves_rolling_hashes() -> None:
    engine, stream = Engine(), KvStream(SIZE)
    found = stream.translate([engine.created(), engine.stored(A, B), engine.stored(C, parent=BIG + 1, first=77)])
    a, b, c = hashes(A, B, C)
    assert found == [Stored(None, [a, b]), Stored(b, [c])]


def test_block_names_are_unsigned_and_may_be_text() -> None:
    engine, stream = Engine(), KvStream(SIZE)
    event = engine.stored(A, first=(1 << 64) - 1)
    text = engine.stored(B)
    text["data"]["blocks"][0]["block_hash"] = "sha256:ab"
    gone = engine.removed((1 << 64) - 1)
    assert stream.translate([event, text, gone]) == [
        Stored(None, hashes(A)), Stored(None, hashes(B)), Removed(hashes(A)),
    ]  # fmt: skip


def test_blocks_of_a_salt_or_an_adapter_have_other_hashes() -> None:
    engine, stream = Engine(), KvStream(SIZE)
    events = [engine.stored(A, cache_salt="tenant"), engine.stored(A, first=1, lora_name="french", cache_salt=None)]
    assert stream.translate(events) == [
        Stored(None, hashes(A, salt="tenant")), Stored(None, hashes(A, salt=adapter_salt("french", ""))),
    ]  # fmt: skip


def test_a_child_block_has_the_salt_of_its_parent() -> None:
    engine, stream = Engine(), KvStream(SIZE)
    events = [engine.stored(A, cache_salt="t"), engine.stored(B, parent=BIG, first=5, cache_salt="t")]
    assert stream.translate(events)[-1] == Stored(hashes(A, salt="t")[0], hashes(A, B, salt="t")[1:])


def test_a_partial_block_and_its_descendants_are_ignored() -> None:
    engine, stream = Engine(), KvStream(SIZE)
    found = stream.translate([engine.stored(A, [4, 5], B), engine.stored(C, parent=BIG + 2, first=99)])
    assert found == [Stored(None, hashes(A))]
    assert stream.orphans == 0, "what hangs on a partial block is not lost"
    assert stream.translate([engine.removed(BIG + 1, BIG + 2, 99)]) == []


def test_a_partial_block_that_is_filled_is_stored_under_a_new_name() -> None:
    engine, stream = Engine(), KvStream(SIZE)
    stream.translate([engine.stored(A, [4, 5])])
    found = stream.translate([engine.removed(BIG + 1), engine.stored(B, parent=BIG, first=7)])
    assert found == [Stored(hashes(A)[0], hashes(A, B)[1:])]


def test_blocks_of_images_are_ignored() -> None:
    engine, stream = Engine(), KvStream(SIZE)
    image = engine.stored(A)
    image["data"]["blocks"][0]["tokens"][2]["token_extra_id"] = 9
    keyed = engine.stored(B, first=5, mm_keys=[{"type": "mm_key", "hash": "ff"}])
    assert stream.translate([image, keyed]) == []


def test_events_of_attention_windows_other_than_the_largest_are_ignored() -> None:
    engine, stream = Engine(), KvStream(SIZE)
    events = [engine.created(128), engine.created(), engine.stored(A, window=128, first=3), engine.stored(A)]
    assert stream.translate(events)[-1] == Stored(None, hashes(A))
    assert stream.blocks == 1


def test_a_gap_in_event_ids_clears_all_even_at_an_ignored_event() -> None:
    engine, stream = Engine(), KvStream(SIZE)
    stream.translate([engine.created(), engine.stored(A)])
    engine.next += 1
    assert stream.translate([engine.created(128)]) == [Cleared()]
    assert (stream.gaps, stream.blocks) == (1, 0)


def test_after_a_gap_a_stored_child_proves_that_its_prefix_is_cached() -> None:
    engine, stream = Engine(), KvStream(SIZE)
    stream.translate([engine.stored(A, B)])
    engine.next += 3
    found = stream.translate([engine.stored(C, parent=BIG + 1, first=50)])
    a, b, c = hashes(A, B, C)
    assert found == [Cleared(), Stored(None, [a, b]), Stored(b, [c])]


def test_a_child_of_an_unknown_block_is_ignored_and_counted() -> None:
    engine, stream = Engine(), KvStream(SIZE)
    assert stream.translate([engine.stored(A, parent=12345)]) == []
    assert stream.orphans == 1


def test_event_ids_that_begin_again_mean_that_the_engine_restarted() -> None:
    engine, stream = Engine(), KvStream(SIZE)
    stream.translate([engine.created(), engine.stored(A)])
    again = Engine()
    assert stream.translate([again.created(), again.stored(B, first=9)]) == [Cleared(), Stored(None, hashes(B))]


def test_children_are_removed_before_their_parents_and_with_them() -> None:
    engine, stream = Engine(), KvStream(SIZE)
    a, b, c = hashes(A, B, C)
    stream.translate([engine.stored(A, B, C)])
    assert stream.translate([engine.removed(BIG, BIG + 1, BIG + 2)]) == [Removed([c, b, a])]
    stream.translate([engine.stored(A, B, C)])
    assert stream.translate([engine.removed(BIG + 1)]) == [Removed([c, b])]
    assert stream.translate([engine.removed(BIG + 2)]) == []


def test_a_block_moved_to_another_cache_level_is_still_cached() -> None:
    engine, stream = Engine(), KvStream(SIZE)
    diff = {"type": "event_diff", "new_value": 1, "old_value": 0}
    updated = {"type": "updated", "block_hash": BIG, "cache_level": diff, "priority": None}
    assert stream.translate([engine.stored(A), engine.event(updated)]) == [Stored(None, hashes(A))]


def test_an_invalid_event_clears_all_like_a_lost_one() -> None:
    engine, stream = Engine(), KvStream(SIZE)
    stream.translate([engine.stored(A)])
    assert stream.translate([engine.event({"type": "stored", "blocks": [{}]})]) == [Cleared()]


def test_blocks_of_unreported_salts_are_removed_with_the_last_of_them() -> None:
    """Version 1.2 reports no salts: equal tokens of two tenants have two names there and one hash here."""
    engine, stream = Engine(), KvStream(SIZE)
    a, b = hashes(A, B)
    events = [engine.stored(A, B), engine.stored(A, B, first=5)]
    assert stream.translate(events) == [Stored(None, [a, b])]
    assert stream.translate([engine.removed(5, 6)]) == []
    assert stream.translate([engine.removed(BIG + 1, BIG)]) == [Removed([b, a])]


def test_events_of_each_rank_are_translated_separately() -> None:
    first, second = Engine(rank=0), Engine(rank=1)
    streams = KvStreams(SIZE, 2)
    found = streams.translate([first.stored(A), second.stored(B), first.stored(C, first=8)])
    assert found == {0: [Stored(None, hashes(A)), Stored(None, hashes(C))], 1: [Stored(None, hashes(B))]}
    second.next += 1
    assert streams.translate([second.stored(B), first.stored(A)]) == {1: [Cleared(), Stored(None, hashes(B))]}


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["store", "remove", "lose"]), st.integers(0, 9)), max_size=60))
def test_reported_blocks_are_always_a_subset_of_the_cached_blocks(history: list[tuple[str, int]]) -> None:
    """A tree of prefixes grows and shrinks at its leaves; some events are lost. The reported blocks are a prefix-closed
    part of it, and all of it as long as nothing was lost."""
    engine, stream = Engine(), KvStream(SIZE)
    there: dict[tuple[int, ...], int] = {}  # path -> name
    reported: set[int] = set()
    lost = False

    def ours(path: tuple[int, ...]) -> list[int]:
        return hashes(*[[step] * SIZE for step in path])

    for what, at in history:
        paths = [(), *there]
        if what == "store":
            path = (*paths[at % len(paths)], at)
            if path in there:
                continue
            parent = there.get(path[:-1])
            there[path] = name = BIG + hash(path) % 1000003
            event = engine.stored([at] * SIZE, parent=parent, first=name)
        else:
            leaves = [path for path in there if not any(other[: len(path)] == path != other for other in there)]
            if not leaves:
                continue
            event = engine.removed(there.pop(leaves[at % len(leaves)]))
            if what == "lose":
                lost = True
                continue
        reported = applied(stream.translate([event]), reported)
        real = {ours(path)[-1] for path in there}
        assert reported <= real
        assert all(set(ours(path)) <= reported for path in there if ours(path)[-1] in reported)
        if not lost:
            assert reported == real


def applied(events: list[KvEvent], before: Iterable[int] = ()) -> set[int]:
    """Returns the blocks that these events add up to, and asserts that none is stored without its parent."""
    reported = set(before)
    for event in events:
        match event:
            case Stored(parent=parent, hashes=new):
                assert parent is None or parent in reported
                reported |= set(new)
            case Removed(hashes=gone):
                reported -= set(gone)
            case Cleared():
                reported = set()
    return reported
