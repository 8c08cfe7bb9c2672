from __future__ import annotations

import random
from typing import Any

import pytest

from dynserve.errors import NoWorker
from dynserve.routing.policy import IndexState, KvWeights
from dynserve.routing.router import PlacementQuery, Reservation, Router, RouterOptions
from dynserve.wire.events import Cleared, Load, Removed, Stored
from dynserve.wire.hashing import next_hash, rolling_hashes
from dynserve.wire.requests import pack_tokens

PROMPT = pack_tokens(list(range(128)))


def make_router(workers: str = "ab", **options: Any) -> Router:
    """Workers that joined long ago, with 1000 blocks of 32 tokens each."""
    router = Router(RouterOptions(**options), random.Random(1))
    for worker in workers:
        router.join(worker, 32, 1000, -1000.0).index = IndexState.EXACT
    return router


def place(router: Router, prompt: bytes = PROMPT, phase: Any = "prefill", now: float = 0.0, **ask: Any) -> Reservation:
    return router.place(PlacementQuery(prompt, **ask), phase, list(router.targets.values()), now)


def test_hashes_are_those_of_the_published_vector() -> None:
    tokens = pack_tokens(list(range(64)))
    assert [next_hash(None, tokens[at : at + 128]) for at in (0, 128)] == [0x4FE4B52E3D3D116C, 0xC1B55E9B2A3036C7]
    assert rolling_hashes(tokens, 32) == [0x4FE4B52E3D3D116C, 0xE72E765DBBB3FC6B]


def test_a_partial_block_has_no_hash() -> None:
    assert len(rolling_hashes(pack_tokens(list(range(63))), 32)) == 1


def test_equal_tokens_under_different_salts_have_different_hashes() -> None:
    assert not set(rolling_hashes(PROMPT, 32)) & set(rolling_hashes(PROMPT, 32, "tenant"))


def test_kv_mode_sends_a_prompt_to_the_worker_that_caches_its_prefix() -> None:
    router = make_router()
    router.apply("b", [Stored(None, rolling_hashes(PROMPT, 32))])
    placed = place(router)
    # one token is always computed, so the last block of a prompt of full blocks is never counted on
    assert (placed.worker, placed.cached_tokens) == ("b", 96)


def test_kv_mode_prefers_a_far_less_busy_worker_to_a_cached_prefix() -> None:
    router = make_router()
    router.apply("b", [Stored(None, rolling_hashes(PROMPT, 32))])
    router.ledger.charge("b", decode_tokens=3200)
    assert place(router, phase="aggregated").worker == "a"


def test_removed_and_cleared_blocks_no_longer_count_as_overlap() -> None:
    router, hashes = make_router(), rolling_hashes(PROMPT, 32)
    router.apply("b", [Stored(None, hashes), Removed(hashes[:0:-1])])
    assert router.index.overlap(hashes) == {"b": 1}
    router.apply("b", [Cleared()])
    assert router.index.overlap(hashes) == {}


def test_the_reason_of_a_placement_lists_every_candidate_and_its_cost() -> None:
    reason = place(make_router()).reason
    assert [c.worker for c in reason.candidates] == ["a", "b"]
    assert reason.costs == [32.0, 32.0]  # four blocks to compute, at eight times the weight of waiting
    assert (reason.prompt_blocks, reason.why, reason.phase) == (4, "Kv", "prefill")


def test_a_closed_reservation_removes_all_its_charges() -> None:
    router = make_router()
    first, second, third = place(router), place(router, phase="decode"), place(router, phase="aggregated")
    first.prefilled()
    second.add_tokens(100)
    third.add_tokens(7)
    for placed in (first, second, third):
        placed.close()
        placed.close()
        placed.add_tokens(5)
    router.ledger.check()
    for target in router.targets.values():
        own = target.account.own
        assert (own.prefill_tokens, own.decode_tokens, own.requests) == (0, 0, 0)
    assert len(router.pending) == 0


def test_pending_prompts_count_as_overlap_for_prompts_with_the_same_prefix() -> None:
    router = make_router(weights=KvWeights(overlap=8.0, herd=10.0))
    shared = list(range(1024))
    first = place(router, pack_tokens([*shared, 1]))
    second = place(router, pack_tokens([*shared, 2]))
    assert second.worker == first.worker and second.cached_tokens == 1024
    first.close()
    second.close()
    assert place(router, pack_tokens([*shared, 3])).cached_tokens == 0  # it ended without a stored block


@pytest.mark.parametrize("mode", ["round-robin", "random", "least-loaded", "power-of-two"])
def test_the_modes_without_overlaps_use_every_worker(mode: str) -> None:
    router = make_router(mode=mode)
    assert {place(router).worker for _ in range(20)} == {"a", "b"}


def test_round_robin_alternates_between_workers() -> None:
    router = make_router(mode="round-robin")
    workers = [place(router).worker for _ in range(4)]
    assert workers[0] == workers[2] != workers[1] == workers[3]


def test_placement_without_workers_raises_no_worker() -> None:
    with pytest.raises(NoWorker):
        make_router("").place(PlacementQuery(PROMPT), "prefill", [], 0.0)


def test_a_session_stays_on_its_worker_until_it_expires() -> None:
    router = make_router("abcdef", mode="random", session_ttl_s=10.0)
    first = place(router, session="s").worker
    again = [place(router, session="s", now=float(i)) for i in range(9)]
    assert {p.worker for p in again} == {first} and {p.reason.why for p in again} == {"session"}
    assert {place(router, session="s", now=100.0 * i).worker for i in range(1, 30)} != {first}


def test_a_session_moves_away_from_a_worker_over_its_threshold() -> None:
    router = make_router(mode="least-loaded", busy_prefill_tokens=1000)
    first = place(router, session="s").worker
    router.ledger.charge(first, prefill_tokens=2000)
    assert place(router, session="s").worker != first


def test_workers_over_their_threshold_are_candidates_only_when_all_are() -> None:
    router = make_router(mode="random", busy_prefill_tokens=1000)
    router.ledger.charge("a", prefill_tokens=2000)
    assert {place(router).worker for _ in range(5)} == {"b"}
    router.ledger.charge("b", prefill_tokens=2000)
    assert {place(router).worker for _ in range(30)} == {"a", "b"}


def test_prompts_sent_to_a_worker_without_events_count_as_cached_for_a_while() -> None:
    router = Router(RouterOptions(assume_ttl_s=60.0))
    target = router.join("a", 32, 10, -1000.0, events=False)
    assert target.index is IndexState.APPROX
    assert place(router).cached_tokens == 0
    assert place(router, now=30.0).cached_tokens == 96
    router.expire(100.0)
    assert place(router, now=100.0).cached_tokens == 0
    place(router, pack_tokens(list(range(1000, 1320))), now=101.0)  # as many blocks as it has
    assert router.index.blocks("a") == 10
    assert place(router, now=102.0).cached_tokens == 0


def test_a_short_remainder_is_prefilled_on_a_decode_worker_that_caches_the_rest() -> None:
    router = make_router("abp", local_prefill_tokens=64, local_prefill_toll=16)
    a, b, prefill = router.targets.values()
    ask = PlacementQuery(PROMPT)
    assert router.local(ask, [a, b], [prefill])[0] == []
    router.apply("b", [Stored(None, rolling_hashes(PROMPT, 32)[:3])])
    assert router.local(ask, [a, b], [prefill])[0] == [b]
    router.ledger.charge("b", prefill_tokens=40)  # with these it would be over 64 at once
    assert router.local(ask, [a, b], [prefill])[0] == []
    for other in (make_router("b", local_prefill_tokens=0), make_router("b", mode="least-loaded")):
        other.apply("b", [Stored(None, rolling_hashes(PROMPT, 32)[:3])])
        busy = other.join("p", 32, 1000, -1000.0)
        other.ledger.charge("p", prefill_tokens=10_000)
        assert other.local(ask, [other.targets["b"]], [busy])[0] == []


def test_a_prefill_worker_that_is_nearly_as_quick_keeps_the_prompt() -> None:
    router = make_router("bp", local_prefill_tokens=64, local_prefill_toll=16)
    decode, prefill = router.targets.values()
    hashes = rolling_hashes(PROMPT, 32)
    router.apply("b", [Stored(None, hashes[:3])])
    router.apply("p", [Stored(None, hashes[:3])])
    assert router.local(PlacementQuery(PROMPT), [decode], [prefill])[0] == []
    router.ledger.charge("p", prefill_tokens=17)
    assert router.local(PlacementQuery(PROMPT), [decode], [prefill])[0] == [decode]


def test_a_worker_that_just_joined_receives_requests_only_gradually() -> None:
    router = make_router("a", slow_start_s=10.0)
    router.join("new", 32, 1000, 0.0)
    router.ledger.charge("a", prefill_tokens=128)
    assert place(router, now=0.5).worker == "a"
    assert place(router, now=10.0).worker == "new"


def test_workers_that_all_joined_recently_share_requests_equally() -> None:
    router = make_router("", slow_start_s=10.0)
    router.join("first", 32, 1000, 0.0)
    router.join("second", 32, 1000, 1.0)
    assert {c.ramp for c in place(router, now=1.1).reason.candidates} == {1.0}
    assert [c.ramp for c in place(router, now=10.5).reason.candidates] == [1.0, 0.95]


def test_each_model_and_pool_has_a_policy_of_its_own() -> None:
    router = make_router("", mode="round-robin")
    pools = {m: [router.join(f"{m}{i}", 32, 1000, -1000.0) for i in range(2)] for m in ("x", "y")}
    seen: dict[str, set[str]] = {"x": set(), "y": set()}
    for _ in range(4):
        for model, targets in pools.items():
            seen[model].add(router.place(PlacementQuery(PROMPT, model=model), "aggregated", targets, 0.0).worker)
    assert seen == {"x": {"x0", "x1"}, "y": {"y0", "y1"}}


def test_sessions_of_different_models_are_separate() -> None:
    router = make_router("", mode="random")
    pools = {m: [router.join(f"{m}{i}", 32, 1000, -1000.0) for i in range(8)] for m in ("x", "y")}
    placed = [
        (model, router.place(PlacementQuery(PROMPT, model=model, session="s"), "prefill", targets, 0.0).worker)
        for _ in range(5)
        for model, targets in pools.items()
    ]
    assert len(set(placed)) == 2


def test_a_session_that_was_prefilled_locally_is_decoded_there_later() -> None:
    router = make_router("abcdefgh", mode="random")
    targets, ask = list(router.targets.values()), PlacementQuery(PROMPT, session="s")
    local = router.place(ask, "aggregated", targets, 0.0, why="local prefill").worker
    assert {router.place(ask, "decode", targets, 1.0).worker for _ in range(5)} == {local}


def test_a_named_instance_takes_precedence_over_a_session() -> None:
    router = make_router("ab", mode="direct")
    for name in "abab":
        assert place(router, phase="aggregated", session="s", instances=(name,)).worker == name


def test_a_load_report_corrects_the_charges_of_a_prefix_shared_by_many_requests() -> None:
    router = make_router("a", mode="least-loaded", busy_kv_fraction=1.0)
    (target,) = router.targets.values()
    for _ in range(40):
        router.ledger.charge("a", decode_tokens=3200)
    assert not router.has_room((target,), "decode")
    router.ledger.reported("a", Load(running=40, free_blocks=800, total_blocks=1000), 32)
    assert router.has_room((target,), "decode")
    for _ in range(10):
        router.ledger.charge("a", decode_tokens=3200)  # since that report: it is not known yet which blocks they share
    assert not router.has_room((target,), "decode")
