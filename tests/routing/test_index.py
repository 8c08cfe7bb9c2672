from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from dynserve.routing import index as index_module
from dynserve.routing.index import CHUNK, PrefixIndex

WORKERS = ["a", "b", "c"]
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["store", "remove", "clear", "drop", "tidy"]),
        st.sampled_from(WORKERS),
        st.lists(st.integers(0, 9), max_size=6),
    ),
    max_size=60,
)


class Model:
    """What the index is meant to be: a set of hashes per worker."""

    def __init__(self) -> None:
        self.held: dict[str, set[int]] = {}

    def apply(self, index: PrefixIndex, what: str, worker: str, hashes: list[int]) -> None:
        match what:
            case "store":
                index.store(worker, hashes)
                self.held.setdefault(worker, set()).update(hashes)
            case "remove":
                index.remove(worker, hashes)
                self.held.get(worker, set()).difference_update(hashes)
            case "clear":
                index.clear(worker)
                self.held.pop(worker, None)
            case "drop":
                index.drop(worker)
                self.held.pop(worker, None)
            case "tidy":
                index.tidy()

    def overlap(self, prompt: list[int]) -> dict[str, int]:
        depths = {
            worker: next((i for i, hash_ in enumerate(prompt) if hash_ not in held), len(prompt))
            for worker, held in self.held.items()
        }
        return {worker: depth for worker, depth in depths.items() if depth}


@given(OPERATIONS, st.lists(st.integers(0, 9), max_size=8, unique=True))
def test_the_index_agrees_with_a_plain_model(operations: list[tuple[str, str, list[int]]], prompt: list[int]) -> None:
    index, model = PrefixIndex(), Model()
    for operation in operations:
        model.apply(index, *operation)
        index.check()
    assert index.overlap(prompt) == model.overlap(prompt)
    index.tidy()
    index.tidy()
    assert len(index) == len(set().union(*model.held.values()))


def test_ten_thousand_random_operations_leave_index_and_model_alike() -> None:
    """Many workers that come and go, chains longer than a chunk, and wiping that takes many turns."""
    r = random.Random(7)
    index, model = PrefixIndex(), Model()
    index_module.WIPED_AT_ONCE, before = 50, index_module.WIPED_AT_ONCE
    chains = [[r.getrandbits(64) for _ in range(r.choice([3, 40, CHUNK, CHUNK + 1, 3 * CHUNK]))] for _ in range(30)]
    workers = [f"w{i}" for i in range(70)]
    try:
        for step in range(10_000):
            chain, worker = r.choice(chains), r.choice(workers)
            cut = r.randrange(len(chain) + 1)
            kind = r.random()
            if kind < 0.6:
                model.apply(index, "store", worker, chain[:cut])
            elif kind < 0.85:
                model.apply(index, "remove", worker, chain[cut:][: r.randrange(8)])
            elif kind < 0.9:
                model.apply(index, "clear" if kind < 0.88 else "drop", worker, [])
            else:
                fork = chain[:cut] + r.choice(chains)
                assert index.overlap(fork) == model.overlap(fork)
                assert index.blocks(worker) == len(model.held.get(worker, ()))
            if step % 500 == 0:
                index.check()
        index.check()
        for chain in chains:
            assert index.overlap(chain) == model.overlap(chain)
    finally:
        index_module.WIPED_AT_ONCE = before


def test_a_hole_ends_the_match_even_when_later_blocks_are_there() -> None:
    index = PrefixIndex()
    index.store("a", [1, 3])
    assert index.overlap([1, 2, 3]) == {"a": 1}


def test_a_dropped_workers_slot_is_reused_without_its_blocks() -> None:
    index = PrefixIndex()
    for turn in range(5):
        index.store("a", [1, turn])
        index.drop("a")
        index.store("b", [2])
        assert index.overlap([1]) == {}
        assert index.overlap([2]) == {"b": 1}
    assert index._live.bit_length() < 5
    index.check()


def small_index(blocks: int) -> PrefixIndex:
    one = PrefixIndex()
    return PrefixIndex(blocks * one._max_bytes // one.capacity)


def test_over_its_budget_the_least_recently_stored_or_matched_go_and_their_workers_are_degraded() -> None:
    index = small_index(64)
    hot, cold = list(range(10)), list(range(100, 140))
    index.store("hot", hot)
    index.store("cold", cold)
    for i in range(300):
        assert index.overlap(hot) == {"hot": 10}  # matched again and again, so it stays
        index.store("new", [1000 + i])
        index.check()
    assert len(index) <= index.capacity
    assert index.overlap(cold) == {}
    assert index.degraded == {"cold", "new"} and index.evicted > 200
    index.clear("cold")
    assert index.degraded == {"new"}


def test_a_prefix_outlives_what_follows_it() -> None:
    index = small_index(64)
    chain = list(range(40))
    index.store("a", chain)
    depth = 40
    for i in range(200):
        found = index.overlap(chain).get("a", 0)
        assert found <= depth
        depth = found
        index.store("b", [1000 + i, 2000 + i])
    assert index.overlap(chain) == {"a": 40}  # all of it was matched, so the newer ones went


def test_the_estimate_of_its_size_is_near_what_python_says() -> None:
    import tracemalloc

    tracemalloc.start()
    index = PrefixIndex()
    before = tracemalloc.get_traced_memory()[0]
    r = random.Random(1)
    index.store("a", (r.getrandbits(64) for _ in range(50_000)))
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert 0.6 * index.num_bytes < used < 1.1 * index.num_bytes
    assert used / 50_000 < 1.1 * index._max_bytes / index.capacity
