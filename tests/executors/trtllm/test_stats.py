"""Load reports from rows of statistics, and from our own count where a row is old or not the rank's own."""

from __future__ import annotations

from typing import Any

import pytest

from dynserve.executors.trtllm.stats import OpenRequests, Stats

CACHE = {"maxNumBlocks": 100, "freeNumBlocks": 40, "reusedBlocks": 7}


def row(rank: int | None = None, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"iter": 5, "iterLatencyMS": 1.5, "numQueuedRequests": 3, "kvCacheStats": CACHE}
    return found | ({} if rank is None else {"attentionDpRank": rank}) | more


def batch(scheduled: int, tokens: int | None) -> dict[str, Any]:
    used = {} if tokens is None else {"numCtxKvTokens": 0, "numGenKvTokens": tokens}
    return {"inflightBatchingStats": {"numScheduledRequests": scheduled, **used}}


def load(
    stats: Stats,
    live: int,
    tokens: int = 0,
    held: int = 0,
    now: float = 1.0,
    unanswered: int = 0,
    unanswered_tokens: int = 0,
) -> tuple[int, int, int, int]:
    requests = OpenRequests(live, tokens, unanswered, unanswered_tokens, held)
    found = stats.load(requests, 1, stats.total_blocks or 100, now)
    return found.running, found.waiting, found.free_blocks, found.total_blocks


def test_without_a_row_the_load_is_our_own_count() -> None:
    stats = Stats(100, 4, 32)
    assert load(stats, 6, tokens=320, held=33) == (4, 2, 88, 100)
    assert load(stats, 0, held=64) == (0, 0, 98, 100)
    assert load(stats, 1, tokens=10**6) == (1, 0, 0, 100)


def test_a_fresh_row_replaces_the_count_until_it_is_old() -> None:
    stats = Stats(0, 4, 32)
    stats.update(row(), 0.0)
    assert load(stats, 6, tokens=320) == (3, 3, 40, 100)
    assert load(stats, 6, tokens=320, now=2.5) == (4, 2, 90, 100), "too old"
    assert load(stats, 0, tokens=0) == (0, 0, 100, 100), "the row is of a time with requests"
    assert load(stats, 2) == (0, 2, 40, 100), "no more wait than there are"


def test_rows_of_other_ranks_are_their_own_only_in_what_is_scheduled() -> None:
    """They repeat rank 0's cache, memory and queue."""
    stats = Stats(100, 4, 32, ranks=4)
    stats.update(row(2, **batch(scheduled=5, tokens=640)), 0.0)
    assert load(stats, 6, tokens=9999, held=32) == (5, 1, 79, 100)
    assert stats.counters() == {}
    stats.update(row(2, **batch(scheduled=5, tokens=None)), 0.0)
    assert load(stats, 6, tokens=320, held=32) == (5, 1, 89, 100), "an older version: our own count"
    stats.update(row(2), 0.0)
    assert load(stats, 12, tokens=320) == (4, 8, 90, 100)
    stats.update(row(2, **batch(scheduled=0, tokens=None)), 0.0)
    assert load(stats, 3, tokens=320) == (3, 0, 90, 100), "of one micro-batch, or older than a burst"


def test_the_queue_in_the_row_of_rank_0_is_that_of_all_ranks() -> None:
    stats = Stats(100, 2, 32, ranks=4)
    stats.update(row(0, **batch(scheduled=2, tokens=64)), 0.0)
    assert load(stats, 3, tokens=96) == (2, 1, 40, 100)
    assert stats.counters()["engine_reused_blocks_total"] == 7


def test_a_row_that_was_gathered_from_its_rank_is_its_own() -> None:
    stats = Stats(100, 8, 32, ranks=4)
    stats.update(row(2) | {"rank": 2}, 0.0)
    assert load(stats, 6, tokens=320) == (3, 3, 40, 100)
    assert stats.counters()["engine_iterations_total"] == 5


def test_requests_that_find_no_room_or_no_turn_count_as_waiting() -> None:
    stats = Stats(100, 64, 32, max_num_tokens=1000)
    assert load(stats, 10, tokens=6400, unanswered=8) == (5, 5, 0, 100), "twice as many tokens as the cache holds"
    assert load(stats, 10, tokens=6400, unanswered=2) == (8, 2, 0, 100), "those that are answered do not wait"
    assert load(stats, 8, tokens=1600, unanswered=8, unanswered_tokens=4000) == (2, 6, 50, 100), (
        "two prompts fit in a step"
    )
    assert load(stats, 8, tokens=800, unanswered=8, unanswered_tokens=800) == (8, 0, 75, 100)


def test_ranks_that_share_each_sequence_hold_a_part_of_its_blocks() -> None:
    stats = Stats(100, 64, 32, parts=4)
    assert load(stats, 2, tokens=6400) == (2, 0, 50, 100)


def test_a_row_that_does_not_say_how_many_wait_leaves_our_own_count() -> None:
    stats = Stats(100, 4, 32)
    stats.update({"iter": 1, "kvCacheStats": CACHE}, 0.0)
    assert load(stats, 6, tokens=320) == (4, 2, 40, 100)


@pytest.mark.parametrize("missing", [{}, {"kvCacheStats": None}, {"inflightBatchingStats": None, "iter": None}])
def test_every_key_of_a_row_may_be_missing(missing: dict[str, Any]) -> None:
    stats = Stats(100, 8, 32)
    stats.update(missing, 0.0)
    assert load(stats, 1, tokens=32) == (1, 0, 99, 100)
    assert stats.counters() == {}
