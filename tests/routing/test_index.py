from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dynserve.routing.index import PrefixIndex

WORKERS = ["a", "b", "c"]
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["store", "remove", "clear", "drop"]),
        st.sampled_from(WORKERS),
        st.lists(st.integers(0, 9), max_size=6),
    ),
    max_size=60,
)


@given(OPERATIONS, st.lists(st.integers(0, 9), max_size=8, unique=True))
def test_the_index_agrees_with_a_plain_model(operations: list[tuple[str, str, list[int]]], prompt: list[int]) -> None:
    index, model = PrefixIndex(), {worker: set[int]() for worker in WORKERS}
    for what, worker, hashes in operations:
        match what:
            case "store":
                index.store(worker, hashes)
                model[worker] |= set(hashes)
            case "remove":
                index.remove(worker, hashes)
                model[worker] -= set(hashes)
            case "clear":
                index.clear(worker)
                model[worker].clear()
            case "drop":
                index.drop(worker)
                model[worker].clear()
        index.check()
    expected = {}
    for worker, held in model.items():
        depth = next((i for i, hash_ in enumerate(prompt) if hash_ not in held), len(prompt))
        if depth:
            expected[worker] = depth
    assert index.overlap(prompt) == expected
    assert len(index) == len(set().union(*model.values()))


def test_a_hole_ends_the_match_even_when_later_blocks_are_there() -> None:
    index = PrefixIndex()
    index.store("a", [1, 3])
    assert index.overlap([1, 2, 3]) == {"a": 1}


def test_a_dropped_workers_slot_is_reused_without_its_blocks() -> None:
    index = PrefixIndex()
    index.store("a", [1])
    index.drop("a")
    index.store("b", [2])
    assert index.overlap([1]) == {}
    assert index.overlap([2]) == {"b": 1}
