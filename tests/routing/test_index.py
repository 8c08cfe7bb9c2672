from __future__ import annotations

import random
from itertools import accumulate, pairwise

from hypothesis import given
from hypothesis import strategies as st

from dynserve.routing import index as index_module
from dynserve.routing.index import PrefixIndex

WORKERS = ["a", "b", "c"]
PATHS = st.lists(st.integers(0, 1), max_size=7)
OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["store", "remove", "clear", "drop", "tidy"]), st.sampled_from(WORKERS), PATHS),
    max_size=60,
)


def chain(path: list[int]) -> list[int]:
    """Returns hashes like rolling ones: each depends on all that come before it."""
    return list(accumulate(path, lambda hash_, way: 2 * hash_ + way, initial=1))


class Model:
    """A plain model of the index: a set of hashes per worker, none without all before it."""

    def __init__(self) -> None:
        self.held: dict[str, set[int]] = {}

    def apply(self, index: PrefixIndex, what: str, worker: str, hashes: list[int], most: int = 100) -> None:
        held = self.held.setdefault(worker, set())
        match what:
            case "store":
                index.store(worker, hashes)
                held.update(hashes)
            case "remove":  # children before parents, and no parent that still has one
                gone = []
                for hash_ in reversed(hashes):
                    if len(gone) == most or any(child in held for child in self.children(hash_)):
                        break
                    gone.append(hash_)
                    held.discard(hash_)
                index.remove(worker, gone)
            case "clear":
                index.clear(worker)
                held.clear()
            case "drop":
                index.drop(worker)
                held.clear()
            case "tidy":
                index.tidy()

    def children(self, hash_: int) -> list[int]:
        return [2 * hash_, 2 * hash_ + 1]

    def overlap(self, prompt: list[int]) -> dict[str, int]:
        depths = {
            worker: next((i for i, hash_ in enumerate(prompt) if hash_ not in held), len(prompt))
            for worker, held in self.held.items()
        }
        return {worker: depth for worker, depth in depths.items() if depth}


@given(OPERATIONS, PATHS)
def test_the_index_agrees_with_a_plain_model(operations: list[tuple[str, str, list[int]]], prompt: list[int]) -> None:
    index, model = PrefixIndex(), Model()
    for what, worker, path in operations:
        model.apply(index, what, worker, chain(path))
        index.check()
    assert index.overlap(chain(prompt)) == model.overlap(chain(prompt))
    index.tidy()
    index.tidy()
    assert len(index) == len(set().union(*model.held.values()))


class Branches(Model):
    """Long chains that fork: `followers` are the children of a hash."""

    def __init__(self) -> None:
        super().__init__()
        self.followers: dict[int, list[int]] = {}

    def children(self, hash_: int) -> list[int]:
        return self.followers.get(hash_, [])


def test_the_index_equals_a_plain_model_after_10000_random_operations() -> None:
    """Seventy workers that come and go, long chains that fork, and wiping that takes many turns."""
    r = random.Random(7)
    index, model = PrefixIndex(), Branches()
    index_module.WIPED_AT_ONCE, before = 50, index_module.WIPED_AT_ONCE
    chains: list[list[int]] = []
    for _ in range(30):
        parent = r.choice(chains)[: r.randrange(1, 40)] if chains and r.random() < 0.7 else []
        made = [*parent, *(r.getrandbits(64) for _ in range(r.choice([1, 3, 40, 64, 200])))]
        for this, following in pairwise(made):
            if following not in model.children(this):
                model.followers.setdefault(this, []).append(following)
        chains.append(made)
    workers = [f"w{i}" for i in range(70)]
    try:
        for step in range(10_000):
            hashes, worker = r.choice(chains), r.choice(workers)
            hashes = hashes[: r.randrange(len(hashes) + 1)]
            kind = r.random()
            if kind < 0.5:
                model.apply(index, "store", worker, hashes)
            elif kind < 0.85:
                model.apply(index, "remove", worker, hashes, r.randrange(20))
            elif kind < 0.9:
                model.apply(index, "clear" if kind < 0.88 else "drop", worker, [])
            else:
                fork = [*hashes, *(r.getrandbits(64) for _ in range(r.choice([0, 1, 50])))]
                assert index.overlap(fork) == model.overlap(fork)
                assert index.blocks(worker) == len(model.held.get(worker, ()))
            if step % 500 == 0:
                index.check()
        index.check()
        for hashes in chains:
            assert index.overlap(hashes) == model.overlap(hashes)
    finally:
        index_module.WIPED_AT_ONCE = before


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


def test_over_budget_least_recently_used_blocks_go_and_workers_are_degraded() -> None:
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


def test_eviction_never_makes_an_overlap_longer() -> None:
    index = small_index(64)
    hashes = list(range(40))
    index.store("a", hashes)
    for i in range(200):
        assert index.overlap(hashes).get("a", 0) <= 40
        index.store("b", [1000 + i, 2000 + i])
    assert index.overlap(hashes) == {"a": 40}  # all of it was matched again and again, so the newer ones went
    index.store("b", list(range(5000, 5060)))
    assert index.overlap(hashes).get("a", 0) <= 40


def test_the_estimated_size_of_the_index_is_near_the_measured_size() -> None:
    import tracemalloc

    tracemalloc.start()
    index = PrefixIndex()
    before = tracemalloc.get_traced_memory()[0]
    r = random.Random(1)
    for _ in range(500):
        index.store("a", [r.getrandbits(64) for _ in range(100)])
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert 0.6 * index.num_bytes < used < 1.1 * index.num_bytes
    assert used / 50_000 < 1.1 * index._max_bytes / index.capacity
