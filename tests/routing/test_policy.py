from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest

from dynserve.errors import BadRequest, ConfigError, NoWorker
from dynserve.routing.policy import (
    Candidate,
    Direct,
    Kv,
    KvWeights,
    LeastLoaded,
    PolicyChoice,
    PolicyInput,
    PowerOfTwo,
    policy_maker,
)

PREFILL, DECODE = PolicyInput("prefill", 100), PolicyInput("decode", 100)


def candidate(worker: str, overlap: int = 0, waiting: float = 0, decode: float = 0, **more: float) -> Candidate:
    return Candidate(worker, overlap, waiting, decode, 0, **more)  # type: ignore[arg-type]


class TakesTheLast:
    """A policy as a user would write it."""

    def choose(self, policy_input: PolicyInput, candidates: Sequence[Candidate]) -> PolicyChoice:
        return PolicyChoice(candidates[-1], [])


class NeedsArguments:
    def __init__(self, what: str) -> None:
        pass


def test_kv_weighs_the_blocks_to_compute_against_the_waiting_work() -> None:
    cached, idle = candidate("cached", overlap=80, waiting=50), candidate("idle")
    assert Kv(KvWeights(overlap=1.0)).choose(PREFILL, [cached, idle]).candidate is cached
    busier = candidate("cached", overlap=80, waiting=95)
    assert Kv(KvWeights(overlap=1.0)).choose(PREFILL, [busier, idle]).candidate is idle
    assert Kv(KvWeights(overlap=2.0)).choose(PREFILL, [busier, idle]).candidate is busier


def test_kv_chooses_the_decode_worker_with_least_load_and_least_transfer() -> None:
    policy = Kv(KvWeights(transfer=0.1))
    assert policy.choose(DECODE, [candidate("a", decode=50), candidate("b", decode=49)]).candidate.worker == "b"
    has_it = candidate("a", overlap=100, decode=50)
    assert policy.choose(DECODE, [has_it, candidate("b", decode=49)]).candidate is has_it


def test_a_burst_that_shares_a_prefix_does_not_stay_on_one_worker() -> None:
    policy, waiting = Kv(KvWeights(overlap=8.0, herd=2.0)), dict.fromkeys("abcd", 0.0)
    placed: Counter[str] = Counter()
    has_it = {"a"}
    for _ in range(400):  # 98 of 100 blocks shared; nothing is finished meanwhile
        candidates = [candidate(w, overlap=98 if w in has_it else 0, waiting=waiting[w]) for w in "abcd"]
        worker = policy.choose(PREFILL, candidates).candidate.worker
        waiting[worker] += 2 if worker in has_it else 100
        has_it.add(worker)
        placed[worker] += 1
    assert has_it == set("abcd") and max(placed.values()) < 200
    without, waiting, has_it = Kv(KvWeights(overlap=8.0, herd=1e9)), dict.fromkeys("abcd", 0.0), {"a"}
    for _ in range(400):
        candidates = [candidate(w, overlap=98 if w in has_it else 0, waiting=waiting[w]) for w in "abcd"]
        waiting[without.choose(PREFILL, candidates).candidate.worker] += 2
    assert waiting["a"] > 700  # the case that the rule prevents


def test_the_cost_of_an_excluded_candidate_is_infinite() -> None:
    choice = Kv().choose(PREFILL, [candidate("hot", overlap=99, waiting=500), candidate("idle")])
    assert choice.candidate.worker == "idle" and choice.costs[0] == float("inf")


def test_a_worker_that_just_joined_costs_more_during_its_slow_start() -> None:
    fresh, busy = candidate("fresh", ramp=0.1), candidate("busy", waiting=100)
    assert Kv().choose(PREFILL, [fresh, busy]).candidate is busy
    assert Kv().choose(PREFILL, [candidate("fresh"), busy]).candidate.worker == "fresh"


def test_ties_do_not_always_go_to_the_same_worker() -> None:
    for policy in (Kv(rng=random.Random(1)), LeastLoaded(random.Random(1))):
        candidates = [candidate(name) for name in "abc"]
        assert {policy.choose(PREFILL, candidates).candidate.worker for _ in range(50)} == {"a", "b", "c"}


def test_temperature_draws_cheaper_workers_more_often() -> None:
    policy = Kv(KvWeights(temperature=0.5), random.Random(1))
    candidates = [candidate("cheap", overlap=50), candidate("dear")]
    drawn = Counter(policy.choose(PREFILL, candidates).candidate.worker for _ in range(500))
    assert drawn["cheap"] > drawn["dear"] > 20


def test_power_of_two_never_chooses_the_busiest() -> None:
    policy = PowerOfTwo(random.Random(1))
    candidates = [candidate("a", waiting=5), candidate("b", waiting=1), candidate("c")]
    drawn = Counter(policy.choose(PREFILL, candidates).candidate.worker for _ in range(300))
    assert drawn["a"] == 0 and drawn["b"] > 50 and drawn["c"] > 150
    assert policy.choose(PREFILL, candidates[:1]).candidate.worker == "a"


def test_direct_chooses_the_named_instance_and_refuses_a_missing_name() -> None:
    policy = Direct(random.Random(1))
    candidates = [candidate("prefill-1", waiting=9), candidate("prefill-2")]
    query = PolicyInput("prefill", 1, "", ("prefill-1",))
    assert policy.choose(query, candidates).candidate.worker == "prefill-1"
    assert policy.choose(query._replace(phase="decode"), [candidate("decode-1")]).candidate.worker == "decode-1"
    with pytest.raises(BadRequest, match="x-dynserve-instance"):
        policy.choose(PolicyInput("prefill", 1), candidates)
    with pytest.raises(NoWorker, match="prefill-9"):
        policy.choose(PolicyInput("prefill", 1, "", ("prefill-9",)), candidates)


def test_a_custom_policy_is_a_plain_class() -> None:
    policy = policy_maker("kv", "tests.routing.test_policy:TakesTheLast", KvWeights(), random.Random(1))()
    assert policy.choose(PREFILL, [candidate("a"), candidate("b")]).candidate.worker == "b"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no.such.module:Class", "cannot import no.such.module"),
        ("tests.routing.test_policy:Nobody", "Nobody"),
        ("tests.routing.test_policy", "expected package.module:Class"),
        ("tests.routing.test_policy:NeedsArguments", "without arguments"),
        ("tests.routing.test_policy:random", "Random|random|callable"),
    ],
)
def test_an_invalid_policy_name_is_an_error_with_its_cause(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        policy_maker("kv", name, KvWeights(), random.Random(1))
