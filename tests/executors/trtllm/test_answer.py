"""Results of the engine that grow from step to step, in the forms of its versions."""

from __future__ import annotations

import datetime
from types import SimpleNamespace
from typing import Any

import pytest

from dynserve.errors import HandoffMismatch, InternalError, TimedOut
from dynserve.executors.base import Output
from dynserve.executors.trtllm.answer import UNLIKELY, Cursor, entry_of, note_costs, prompt_entries, read_context
from dynserve.wire.requests import PriorOutput, SamplingParams, StopConditions, TokenLogprob, pack_tokens
from tests.conftest import make_request

EOS = 2


class Logprob:
    def __init__(self, logprob: float, rank: int | None = None) -> None:
        self.logprob, self.rank = logprob, rank


class Growing:
    """One result object that the engine extends from step to step."""

    def __init__(self) -> None:
        self.output = SimpleNamespace(
            token_ids=[], logprobs=[], prompt_logprobs=[], finish_reason=None, stop_reason=None,
            disaggregated_params=None, request_perf_metrics=None,
        )  # fmt: skip
        self.outputs, self.finished, self.cached_tokens = [self.output], False, 0

    def grow(self, *tokens: int, reason: str | None = None, stop: int | None = None, logprobs: Any = ()) -> Growing:
        self.output.token_ids += tokens
        self.output.logprobs += logprobs
        self.output.finish_reason, self.output.stop_reason, self.finished = reason, stop, reason is not None
        return self


def read_all(cursor: Cursor, steps: Any) -> list[Output]:
    return [found for step in steps if (found := cursor.read(step())) is not None]


def cursor(known: tuple[int, ...] = (), stops: tuple[int, ...] = (EOS,), **changes: Any) -> Cursor:
    return Cursor(make_request([5, 6, 7], **changes), stops, known)


def test_every_token_is_reported_once_however_many_come_in_a_step() -> None:
    result = Growing()
    steps = [
        lambda: result.grow(10),
        lambda: result.grow(),
        lambda: result.grow(11, 12),
        lambda: result.grow(13, reason="length"),
    ]
    found = read_all(cursor(), steps)
    assert [(o.token_ids, o.reason) for o in found] == [([10], None), ([11, 12], None), ([13], "length")]


@pytest.mark.parametrize("included", [True, False])
def test_an_end_token_is_removed_whether_the_engine_includes_it_or_not(included: bool) -> None:
    result = Growing().grow(10, *([EOS] if included else []), reason="stop")
    found = cursor().read(result)
    assert found is not None and (found.token_ids, found.reason, found.stop_token) == ([10], "stop", EOS)


def test_the_stop_token_that_the_engine_names_is_reported() -> None:
    found = cursor(stops=(EOS, 99)).read(Growing().grow(10, reason="stop", stop=99))
    assert found is not None and (found.token_ids, found.stop_token) == ([10], 99)


def test_tokens_that_the_client_already_has_are_not_reported_again() -> None:
    result = Growing()
    reader = cursor((10,))
    assert reader.read(result.grow(10)) is None
    found = reader.read(result.grow(11))
    assert found is not None and found.token_ids == [11]


def test_tokens_that_contradict_those_of_the_client_fail_the_hand_off() -> None:
    with pytest.raises(HandoffMismatch, match="began with other tokens"):
        cursor((10,)).read(Growing().grow(12))
    with pytest.raises(HandoffMismatch, match="ended before"):
        cursor((10, 11)).read(Growing().grow(10, reason="length"))


def test_logprobs_stay_aligned_after_tokens_the_client_already_has() -> None:
    sampling = SamplingParams(temperature=0.0, logprobs=1)
    result = Growing().grow(10, 11, logprobs=[{10: Logprob(-1.0)}, {11: Logprob(-2.0), 12: Logprob(-0.5)}])
    reader = Cursor(make_request([5], sampling=sampling, prior=PriorOutput([10])), (), (10,))
    found = reader.read(result)
    assert found is not None and found.logprobs == [TokenLogprob(11, -2.0, [(12, -0.5)])]


@pytest.mark.parametrize(
    ("reason", "error"), [("cancelled", InternalError), ("timeout", TimedOut), ("never_heard_of", InternalError)]
)
def test_other_finish_reasons_are_failures(reason: str, error: type[Exception]) -> None:
    found = cursor().read(Growing().grow(10, reason=reason))
    assert found is not None and isinstance(found.error, error)


def test_with_max_tokens_0_the_one_computed_token_is_dropped() -> None:
    found = cursor(stop=StopConditions(max_tokens=0)).read(Growing().grow(10))
    assert found is not None and (found.token_ids, found.reason) == ([], "length")


def test_a_missing_log_probability_is_reported_as_very_unlikely() -> None:
    assert entry_of(3, {4: Logprob(-0.1)}, 1) == TokenLogprob(3, UNLIKELY, [(4, -0.1)])
    assert entry_of(3, -0.25, 2) == TokenLogprob(3, -0.25)


ENTRIES: list[Any] = [{6: Logprob(-1.0)}, {7: Logprob(-2.0)}]


@pytest.mark.parametrize("entries", [[None, *ENTRIES], ENTRIES, [*ENTRIES, {8: Logprob(-3.0)}]])
def test_prompt_logprobs_are_aligned_with_the_prompts_tokens(entries: list[Any]) -> None:
    found = prompt_entries(pack_tokens([5, 6, 7]), entries, 0)
    assert [(e.token_id, e.logprob) for e in found] == [(5, 0.0), (6, -1.0), (7, -2.0)]


def test_a_prefill_that_ended_the_answer_makes_no_hand_off() -> None:
    found = read_context(Growing().grow(EOS, reason="stop"), cursor())
    assert found is not None and (found.token_ids, found.reason, found.stop_token) == ([], "stop", EOS)


@pytest.mark.parametrize("reason", ["length", "not_finished"])
def test_a_prefill_that_did_not_end_the_answer_makes_a_hand_off(reason: str) -> None:
    result = Growing().grow(10, reason=reason)
    result.output.disaggregated_params = SimpleNamespace(ctx_request_id=1 << 40, disagg_request_id=1 << 40)
    found = read_context(result, cursor())
    assert found is not None and (found.token_ids, found.reason) == ([10], "handoff")
    result.output.disaggregated_params.ctx_request_id = None
    found = read_context(result, cursor())
    assert found is not None and isinstance(found.error, InternalError)


def test_queue_prefill_and_transfer_times_come_from_the_engine() -> None:
    result, output = Growing().grow(10, reason="stop"), Output([10])
    result.cached_tokens = 64
    note_costs(output, result, 0.5)
    assert (output.cached_tokens, output.prefill_s, output.queue_s) == (64, 0.5, 0.0)
    names = (
        "arrival_time",
        "first_scheduled_time",
        "first_token_time",
        "kv_cache_transfer_start",
        "kv_cache_transfer_end",
    )
    times = SimpleNamespace(
        **{n: datetime.timedelta(seconds=s) for n, s in zip(names, (10, 11, 13, 20, 24), strict=True)}
    )
    result.output.request_perf_metrics = SimpleNamespace(timing_metrics=times)
    note_costs(output, result, 0.5)
    assert (output.queue_s, output.prefill_s, output.transfer_s) == (1.0, 2.0, 4.0)
