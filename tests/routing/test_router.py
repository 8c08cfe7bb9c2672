from __future__ import annotations

import random

import pytest

from dynserve.errors import NoWorker
from dynserve.routing.hashing import local_hashes, rolling_hashes
from dynserve.routing.ledger import Ledger
from dynserve.routing.policy import Candidate, Kv
from dynserve.routing.router import Router, Target
from dynserve.wire.events import Cleared, Removed, Stored
from dynserve.wire.requests import pack_tokens

PROMPT = pack_tokens(list(range(128)))
TARGETS = [Target("a", 32), Target("b", 32)]


def test_hashes_are_those_of_the_published_vector() -> None:
    tokens = pack_tokens(list(range(64)))
    assert local_hashes(tokens, 32) == [0x4FE4B52E3D3D116C, 0xC1B55E9B2A3036C7]
    assert rolling_hashes(tokens, 32) == [0x4FE4B52E3D3D116C, 0xE72E765DBBB3FC6B]


def test_a_partial_block_has_no_hash() -> None:
    assert len(rolling_hashes(pack_tokens(list(range(63))), 32)) == 1


def test_equal_tokens_under_different_salts_never_meet() -> None:
    assert not set(rolling_hashes(PROMPT, 32)) & set(rolling_hashes(PROMPT, 32, "tenant"))


def test_kv_mode_sends_a_prompt_where_its_prefix_is() -> None:
    router = Router("kv")
    router.apply("b", [Stored(None, rolling_hashes(PROMPT, 32))])
    placed = router.place(TARGETS, PROMPT)
    assert (placed.worker, placed.overlap) == ("b", 4)


def test_kv_mode_leaves_a_prefix_for_a_worker_that_is_far_less_busy() -> None:
    router = Router("kv")
    router.apply("b", [Stored(None, rolling_hashes(PROMPT, 32))])
    router.ledger.charge("b", decode_blocks=100)
    assert router.place(TARGETS, PROMPT).worker == "a"


def test_removed_and_cleared_blocks_no_longer_attract() -> None:
    router, hashes = Router("kv"), rolling_hashes(PROMPT, 32)
    router.apply("b", [Stored(None, hashes), Removed(hashes[1:2])])
    assert router.index.overlap(hashes) == {"b": 1}
    router.apply("b", [Cleared()])
    assert router.index.overlap(hashes) == {}


def test_the_reason_holds_every_candidates_terms() -> None:
    placed = Router("kv").place(TARGETS, PROMPT)
    assert [c.worker for c in placed.reason.candidates] == ["a", "b"]
    assert placed.reason.costs == [4.0, 4.0]
    assert placed.reason.prompt_blocks == 4


def test_a_charge_is_given_back_whole_however_it_ends() -> None:
    router = Router("kv")
    first, second = router.place(TARGETS, PROMPT), router.place_decode(TARGETS, 128)
    first.charge.prefilled()
    first.charge.close()
    first.charge.close()
    second.charge.close()
    router.ledger.check()
    for target in TARGETS:
        account = router.ledger.account(target.worker)
        assert (account.prefill_tokens, account.decode_blocks, account.requests) == (0, 0, 0)


def test_closing_a_charge_after_its_worker_is_gone_is_safe() -> None:
    ledger = Ledger()
    charge = ledger.charge("a", prefill_tokens=5, decode_blocks=1)
    ledger.drop("a")
    charge.close()
    assert ledger.account("a").requests == 0


def test_ties_do_not_always_go_to_the_same_worker() -> None:
    policy = Kv(rng=random.Random(1))
    candidates = [Candidate(name, 0, 0, 0, 0) for name in "abc"]
    assert {policy.choose(candidates, 1).candidate.worker for _ in range(50)} == {"a", "b", "c"}


@pytest.mark.parametrize("mode", ["round-robin", "random"])
def test_the_simple_modes_reach_every_worker(mode: str) -> None:
    router = Router(mode, rng=random.Random(1))  # type: ignore[arg-type]
    assert {router.place(TARGETS, PROMPT).worker for _ in range(20)} == {"a", "b"}


def test_round_robin_takes_turns() -> None:
    router = Router("round-robin")
    workers = [router.place(TARGETS, PROMPT).worker for _ in range(4)]
    assert workers[0] == workers[2] != workers[1] == workers[3]


def test_without_workers_placement_says_so() -> None:
    with pytest.raises(NoWorker):
        Router("kv").place([], PROMPT)
