from __future__ import annotations

import random
from typing import Any

import pytest

from dynserve.executors.kv_blocks import BlockManager
from dynserve.executors.scheduler import Sampled, Scheduler, Sequence, SequenceState, Slice
from dynserve.wire.requests import StopConditions
from tests.conftest import make_request


def scheduler(num_blocks: int = 16, *, batch: int = 4, tokens: int = 64, chunked: bool = True) -> Scheduler:
    return Scheduler(
        BlockManager(num_blocks, 4), max_batch_size=batch, max_num_tokens=tokens, max_seq_len=60, chunked=chunked
    )


def sequence(ticket: int, length: int, answer: int = 4, phase: str = "aggregated", base: int = 0) -> Sequence:
    request = make_request([base + i for i in range(length)], stop=StopConditions(max_tokens=answer), phase=phase)
    return Sequence(ticket, request, 4, frozenset({999}), 0.0)


def step(s: Scheduler, token: int = 7) -> list[tuple[int, str | None]]:
    work = s.schedule(0.0)
    outputs = s.commit(work, [[Sampled(token)] if slice_.samples else [] for slice_ in work])
    s.check()
    return [(seq.ticket, output.reason) for seq, output in outputs]


def test_a_request_runs_to_its_length_and_frees_its_blocks() -> None:
    s = scheduler()
    s.add(sequence(1, 10, answer=3))
    assert [step(s) for _ in range(3)] == [[(1, None)], [(1, None)], [(1, "length")]]
    assert s.blocks.free == 16 and s.idle


def test_an_end_token_stops_and_is_not_part_of_the_answer() -> None:
    s = scheduler()
    one = sequence(1, 4)
    s.add(one)
    work = s.schedule(0.0)
    ((_, output),) = s.commit(work, [[Sampled(999)]])
    assert (output.reason, output.token_ids, output.stop_token) == ("stop", [], 999)


def test_a_long_prompt_is_prefilled_in_chunks_while_others_decode() -> None:
    s = scheduler(tokens=8)
    s.add(sequence(1, 4, answer=9))
    step(s)
    s.add(sequence(2, 20, base=100))
    assert step(s) == [(1, None)]
    work = s.schedule(0.0)
    assert [(slice_.sequence.ticket, slice_.size, slice_.samples) for slice_ in work] == [(1, 1, True), (2, 7, False)]


def test_without_chunks_a_long_prompt_waits_for_a_step_of_its_own() -> None:
    s = scheduler(tokens=8, chunked=False)
    s.add(sequence(1, 4, answer=2))
    s.add(sequence(2, 8, base=100))
    assert step(s) == [(1, None)]
    step(s)
    assert (2, None) in step(s)


def test_a_shared_prefix_is_computed_once() -> None:
    s = scheduler()
    s.add(sequence(1, 13, answer=1))
    step(s)
    second = sequence(2, 13, answer=1)
    s.add(second)
    (slice_,) = s.schedule(0.0)
    assert (slice_.start, slice_.size, second.cached_tokens) == (12, 1, 12)


def test_at_least_one_token_is_computed_even_when_all_blocks_are_cached() -> None:
    s = scheduler()
    s.add(sequence(1, 12, answer=1))
    step(s)
    s.add(sequence(2, 12, answer=1))
    (slice_,) = s.schedule(0.0)
    assert (slice_.start, slice_.size) == (8, 4)


def test_when_blocks_run_out_the_newest_sequence_is_preempted_and_finishes() -> None:
    s = scheduler(num_blocks=6)
    s.add(sequence(1, 8, answer=12))
    s.add(sequence(2, 8, answer=12, base=100))
    ends = [end for _ in range(60) for end in step(s) if end[1]]
    assert ends == [(1, "length"), (2, "length")]
    assert s.preemptions > 0 and s.blocks.free == 6


def test_prefill_keeps_its_blocks_until_the_hand_off_has_ended() -> None:
    s = scheduler()
    s.add(sequence(1, 10, phase="prefill"))
    assert step(s) == [(1, "handoff")]
    assert s.blocks.free == 13
    s.release_held(1)
    s.check()
    assert s.blocks.free == 16


@pytest.mark.parametrize("state", [SequenceState.WAITING, SequenceState.RUNNING, SequenceState.HELD])
def test_an_abort_frees_everything_in_every_state(state: SequenceState) -> None:
    s = scheduler()
    one = sequence(1, 10, phase="prefill" if state is SequenceState.HELD else "aggregated")
    s.add(one)
    if state is not SequenceState.WAITING:
        step(s)
    assert one.state is state
    s.abort(one)
    s.check()
    assert s.blocks.free == 16 and s.idle and not s.held


@pytest.mark.parametrize("seed", range(20))
def test_random_work_ends_with_every_block_free(seed: int) -> None:
    r = random.Random(seed)
    s = scheduler(num_blocks=r.randint(15, 24), tokens=r.choice([8, 16, 64]), chunked=r.random() < 0.7)
    live: list[Sequence] = []
    ended = 0
    for ticket in range(1, 200):
        if ticket <= 60:
            phase = r.choice(["aggregated", "prefill"])
            live.append(sequence(ticket, r.randint(1, 30), r.randint(1, 12), phase, base=r.choice([0, 0, 100, 200])))
            s.add(live[-1])
        step(s, r.randint(0, 50))
        for held in list(s.held):
            s.release_held(held)
        if live and r.random() < 0.2:
            one = live.pop(r.randrange(len(live)))
            if one.state is not SequenceState.DONE:
                s.abort(one)
                ended += 1
        s.check()
    assert s.idle and s.blocks.free == s.blocks.num_blocks and ended


# steps begun ahead


def begun(scheduler: Scheduler, *prompts: list[int], **options: Any) -> list[Slice]:
    for number, prompt in enumerate(prompts):
        scheduler.add(Sequence(number, make_request(prompt, **options), scheduler.blocks.block_size, frozenset(), 0.0))
    return scheduler.schedule(0.0)


def test_a_step_ahead_decodes_after_a_token_that_is_not_known_yet() -> None:
    scheduler = Scheduler(BlockManager(20, 4), max_batch_size=4, max_num_tokens=64, max_seq_len=64, chunked=True)
    work = begun(scheduler, [1, 2, 3], [4, 5, 6, 7])
    ahead = scheduler.ahead(work)
    assert [(s.start, s.size, s.samples) for s in ahead] == [(3, 1, True), (4, 1, True)]
    assert len(ahead[1].sequence.blocks) == 2  # the second is for the token after a full block
    scheduler.commit(work, [[Sampled(8)], [Sampled(9)]])
    scheduler.commit(ahead, [[Sampled(10)], [Sampled(11)]])
    assert [s.sequence.tokens for s in ahead] == [[1, 2, 3, 8, 10], [4, 5, 6, 7, 9, 11]]
    scheduler.check()


def test_tokens_of_a_step_ahead_are_dropped_for_a_sequence_that_ended() -> None:
    scheduler = Scheduler(BlockManager(20, 4), max_batch_size=4, max_num_tokens=64, max_seq_len=64, chunked=True)
    stop = StopConditions(max_tokens=8, token_ids=(99,))
    work = begun(scheduler, [1, 2, 3, 4], [5], stop=stop)
    ahead = scheduler.ahead(work)
    scheduler.commit(work, [[Sampled(99)], [Sampled(7)]])
    assert scheduler.ahead(ahead)[0].sequence is ahead[1].sequence  # the other one goes on alone
    outputs = scheduler.commit(ahead, [[Sampled(8)], [Sampled(6)]])
    assert [output.token_ids for _, output in outputs] == [[6]]
    assert ahead[0].sequence.tokens == [1, 2, 3, 4] and not ahead[0].sequence.blocks
    scheduler.check()


def test_no_step_is_begun_ahead_where_the_next_step_needs_a_decision() -> None:
    def made(**changes: Any) -> Scheduler:
        options: dict[str, Any] = {"max_batch_size": 2, "max_num_tokens": 8, "max_seq_len": 64, "chunked": True}
        return Scheduler(BlockManager(changes.pop("num_blocks", 20), 4), **(options | changes))

    chunk = made()
    assert chunk.ahead(begun(chunk, list(range(20)))) == []  # a prompt goes on
    newcomer = made()
    work = begun(newcomer, [1])
    newcomer.add(Sequence(9, make_request([2]), 4, frozenset(), 0.0))
    assert newcomer.ahead(work) == []  # a waiting sequence can be admitted
    last = made()
    assert last.ahead(begun(last, [1], stop=StopConditions(max_tokens=1))) == []  # it ends, whatever the token is
    prefill = made()
    assert prefill.ahead(begun(prefill, [1], phase="prefill")) == []
    full = made(num_blocks=1)
    assert full.ahead(begun(full, [1, 2, 3, 4])) == []  # no block is free
    constrained = made()
    work = begun(constrained, [1])
    work[0].sequence.matcher = object()
    assert constrained.ahead(work) == []  # its grammar has to see the token
    fullhouse = made()
    work = begun(fullhouse, [1], [2], [3])
    assert len(work) == 2 and len(fullhouse.ahead(work)) == 2  # the waiting sequence cannot be admitted anyway
