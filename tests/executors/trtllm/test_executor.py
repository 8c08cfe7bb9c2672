"""The executor against the double, whose engine is a thread of this process. The contract of all executors is in
tests/executors/test_executors.py."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tokenizers

from dynserve.config import TINY_MODEL, WorkerConfig
from dynserve.errors import BadRequest, ConfigError, EngineDied, InternalError, Unavailable, WorkerLost
from dynserve.executors.base import Output, generate, open_executor
from dynserve.executors.trtllm import executor as module
from dynserve.executors.trtllm.executor import TrtllmExecutor
from dynserve.executors.trtllm.request import priority_of
from dynserve.wire.events import Cleared, KvEvent
from dynserve.wire.hashing import adapter_salt, rolling_hashes
from dynserve.wire.requests import (
    GenerateRequest,
    Grammar,
    PriorOutput,
    ReasoningTokens,
    SamplingParams,
    StopConditions,
    unpack_tokens,
)
from tests.conftest import make_request, until
from tests.executors.trtllm.test_kv_events import applied

LONG = StopConditions(max_tokens=2000, ignore_eos=True)
TRANSCEIVER = {"backend": "NIXL"}
# how long the engine keeps the blocks of a hand-off that was cancelled
BRIEF = TRANSCEIVER | {"kv_transfer_timeout_ms": 1500}
FRENCH = '{"r": 8, "target_modules": ["q_proj"], "bias": {"444": 1000.0}}'


class Opener:
    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack, self._count = stack, 0

    async def __call__(self, *, config: dict[str, Any] | None = None, **engine: Any) -> TrtllmExecutor:
        self._count += 1
        defaults = {"kv_cache_config": {"max_tokens": 6400}, "cache_transceiver_config": TRANSCEIVER}
        made = WorkerConfig(executor="trtllm", override_engine_args=json.dumps(defaults | engine), **(config or {}))
        opened = await self._stack.enter_async_context(open_executor(made, f"w{self._count}"))
        assert isinstance(opened, TrtllmExecutor)
        return opened


@pytest.fixture
async def opened(trtllm_double: None) -> AsyncIterator[Opener]:
    async with AsyncExitStack() as stack:
        yield Opener(stack)


@pytest.fixture(params=["1.3.0rc29", "1.2.1"])
async def either(request: pytest.FixtureRequest, trtllm_double: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Opens executors on either version of the interface."""
    monkeypatch.setenv("TRTLLM_DOUBLE_VERSION", request.param)
    async with AsyncExitStack() as stack:
        yield Opener(stack)


class OutputSink:
    """All outputs of one request."""

    def __init__(self) -> None:
        self.outputs: list[Output] = []

    def __call__(self, output: Output) -> None:
        self.outputs.append(output)

    @property
    def tokens(self) -> list[int]:
        return [token for output in self.outputs for token in output.token_ids]

    @property
    def logprobs(self) -> list[Any]:
        return [entry for output in self.outputs for entry in output.logprobs or []]

    @property
    def ended(self) -> bool:
        return bool(self.outputs) and (self.outputs[-1].reason is not None or self.outputs[-1].error is not None)


async def run_request(executor: Any, request: GenerateRequest) -> tuple[OutputSink, int]:
    sink = OutputSink()
    ticket = executor.submit(request, sink)
    await until(lambda: sink.ended)
    return sink, ticket


async def handed_over(prefill: Any, decode: Any, request: GenerateRequest) -> tuple[OutputSink, OutputSink]:
    first, ticket = await run_request(prefill, msgspec.structs.replace(request, phase="prefill"))
    last = first.outputs[-1]
    assert last.reason == "handoff", last
    prior = PriorOutput(first.tokens, first.logprobs)
    rest, _ = await run_request(
        decode, msgspec.structs.replace(request, phase="decode", prior=prior, handoff=last.handoff)
    )
    prefill.handoff_done(ticket)
    return first, rest


def really_free() -> list[int]:
    """Returns the number of free blocks of each engine, by its own count."""
    return [server.free_blocks for server in sys.modules["tensorrt_llm._engine"].SERVERS]


def prompt(length: int = 70, first: int = 300) -> list[int]:
    return list(range(first, first + length))


CHANGES: list[dict[str, Any]] = [
    {"sampling": SamplingParams(temperature=0.0, logprobs=2)},
    {"sampling": SamplingParams(temperature=0.8, top_p=0.9, top_k=40, seed=7)},
    {
        "sampling": SamplingParams(temperature=0.0, logit_bias={400: 100.0}),
        "stop": StopConditions(max_tokens=3, token_ids=(401,)),
    },
    {"grammar": Grammar(kind="regex", text="[0-9]{6}")},
    {"cache_salt": "tenant"},
]


@pytest.mark.parametrize(
    ("version", "changes"),
    [("1.3.0rc29", change) for change in CHANGES] + [("1.2.1", change) for change in CHANGES[:2]],
)
async def test_prefill_and_decode_give_the_answer_of_one_worker_and_of_torch(
    opened: Opener, monkeypatch: pytest.MonkeyPatch, version: str, changes: dict[str, Any]
) -> None:
    monkeypatch.setenv("TRTLLM_DOUBLE_VERSION", version)
    prefill, decode, both = await opened(), await opened(), await opened()
    request = make_request(prompt(), **changes)
    whole, _ = await run_request(both, request)
    first, rest = await handed_over(prefill, decode, request)
    assert first.tokens + rest.tokens == whole.tokens
    assert [e.token_id for e in first.logprobs + rest.logprobs] == [e.token_id for e in whole.logprobs]
    assert decode.counters()["kv_transfers_done_total"] == 1
    assert prefill.counters()["handoffs_delivered_total"] == 1
    async with open_executor(WorkerConfig(executor="torch"), "torch") as torch:
        theirs, _ = await run_request(torch, request)
    assert theirs.tokens == whole.tokens and theirs.outputs[-1].reason == rest.outputs[-1].reason
    assert [(e.token_id, e.top) for e in theirs.logprobs] == [(e.token_id, e.top) for e in whole.logprobs]


async def test_an_end_of_turn_token_ends_prefill_or_decode(either: Opener) -> None:
    prefill, decode = await either(), await either()
    # the tiny model's own end of turn, forced at once, and after three tokens
    eos = 2
    config = json.loads((TINY_MODEL / "config.json").read_text())
    ends = json.loads((TINY_MODEL / "generation_config.json").read_text()).get("eos_token_id", config["eos_token_id"])
    eos = ends[0] if isinstance(ends, list) else ends
    bias = SamplingParams(temperature=0.0, logit_bias={eos: 1000.0})
    at_once, _ = await run_request(
        prefill, make_request(prompt(), phase="prefill", sampling=bias, stop=StopConditions(max_tokens=9))
    )
    assert (at_once.tokens, at_once.outputs[-1].reason, at_once.outputs[-1].stop_token) == ([], "stop", eos)
    assert prefill.load().open_handoffs == 0
    stop = StopConditions(max_tokens=9, min_tokens=3)
    _, rest = await handed_over(prefill, decode, make_request(prompt(), sampling=bias, stop=stop))
    assert (len(rest.tokens), rest.outputs[-1].reason) == (2, "stop")


async def test_max_tokens_0_or_1_needs_no_hand_off(opened: Opener) -> None:
    prefill = await opened()
    for most in (0, 1):
        sink, _ = await run_request(
            prefill, make_request(prompt(), phase="prefill", stop=StopConditions(max_tokens=most))
        )
        assert (len(sink.tokens), sink.outputs[-1].reason) == (most, "length")
    assert prefill.load().open_handoffs == 0


async def test_prompt_logprobs_come_first_and_disable_the_prefix_cache(either: Opener) -> None:
    executor = await either()
    await run_request(executor, make_request(prompt()))
    sampling = SamplingParams(temperature=0.0, logprobs=1, prompt_logprobs=True)
    for _ in range(2):
        sink, _ = await run_request(
            executor, make_request(prompt(), sampling=sampling, stop=StopConditions(max_tokens=2))
        )
        assert [e.token_id for e in sink.logprobs] == prompt() + sink.tokens
        assert sink.outputs[-1].cached_tokens == 0


async def test_an_adapter_that_this_worker_lacks_is_unavailable_not_invalid(opened: Opener) -> None:
    with pytest.raises(Unavailable, match="no adapter 'nobody'"):
        (await opened()).submit(make_request(prompt(), adapter="nobody"), OutputSink())


async def test_an_unreadable_result_fails_only_its_request(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = await opened()
    result = sys.modules["tensorrt_llm.executor.result"].GenerationResult
    take = result._take

    def poisoned(self: Any, response: Any) -> None:
        take(self, response)
        if self.prompt_token_ids[0] == 666:
            raise AssertionError("logprobs length")

    monkeypatch.setattr(result, "_take", poisoned)
    sink, _ = await run_request(executor, make_request([666, 667]))
    assert isinstance(sink.outputs[-1].error, InternalError)
    assert not executor.failed.done()
    monkeypatch.setattr(module, "note_costs", lambda *_: 1 / 0)
    sink, _ = await run_request(executor, make_request(prompt()))
    assert isinstance(sink.outputs[-1].error, InternalError) and not executor.failed.done()
    monkeypatch.undo()


async def test_a_worker_decodes_a_prompt_that_is_too_long_for_it_to_prefill(opened: Opener) -> None:
    small = {"enable_chunked_prefill": False, "max_num_tokens": 64}
    prefill, decode = await opened(), await opened(**small)
    request = make_request(prompt(90))
    first, rest = await handed_over(prefill, decode, request)
    assert len(first.tokens + rest.tokens) == 8
    decoding = msgspec.structs.replace(request, phase="decode", prior=PriorOutput(first.tokens), handoff=None)
    with pytest.raises(Unavailable, match="too long to be prefilled here"):
        decode.submit(decoding, OutputSink())


async def test_a_deferred_abort_expires_without_reaching_the_engine(
    opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill, decode = await opened(), await opened()
    request = make_request(prompt(), stop=LONG)
    first, _ = await run_request(prefill, msgspec.structs.replace(request, phase="prefill"))
    handoff = first.outputs[-1].handoff
    assert handoff is not None
    monkeypatch.setattr(module, "TRANSFER_GRACE", 0.0)
    decode._engine.llm._executor.submit = lambda *_: None  # no response will ever come
    decoding = msgspec.structs.replace(
        request, phase="decode", prior=PriorOutput(first.tokens), handoff=msgspec.structs.replace(handoff, ttl_s=0.1)
    )
    decode.abort(decode.submit(decoding, OutputSink()))
    del decode._engine.llm._executor.submit
    await until(lambda: decode.load().running == 0)
    sink, _ = await run_request(decode, make_request(prompt()))
    assert len(sink.tokens) == 8, "the double would be dead if it had been told to abort"


async def test_a_declined_hand_off_is_reported_in_the_first_output(opened: Opener) -> None:
    prefill, decode = await opened(), await opened()
    request = make_request(prompt())
    first, _ = await run_request(prefill, msgspec.structs.replace(request, phase="prefill"))
    handoff = msgspec.structs.replace(first.outputs[-1].handoff, sequence_hash=1)
    decoding = msgspec.structs.replace(request, phase="decode", prior=PriorOutput(first.tokens), handoff=handoff)
    sink, _ = await run_request(decode, decoding)
    assert [output.handoff_declined for output in sink.outputs] == [True] + [False] * (len(sink.outputs) - 1)
    first, rest = await handed_over(prefill, decode, msgspec.structs.replace(request, id="next"))
    assert not any(output.handoff_declined for output in rest.outputs)


async def test_max_tokens_holds_if_the_engine_does_not_count_the_first_token(
    opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not known whether the real engine counts the first token."""
    make = module.sampling_of

    def one_more(*args: Any, **keywords: Any) -> Any:
        params = make(*args, **keywords)
        params.max_tokens += 1
        return params

    for interval in (1, 4):
        monkeypatch.setattr(module, "sampling_of", make)
        prefill, decode = await opened(), await opened(stream_interval=interval)
        request = make_request(prompt(), id=f"r{interval}", stop=StopConditions(max_tokens=7, ignore_eos=True))
        first, _ = await run_request(prefill, msgspec.structs.replace(request, phase="prefill"))
        monkeypatch.setattr(module, "sampling_of", one_more)
        last = first.outputs[-1]
        decoding = msgspec.structs.replace(
            request, phase="decode", prior=PriorOutput(first.tokens), handoff=last.handoff
        )
        rest, _ = await run_request(decode, decoding)
        assert (len(rest.tokens), rest.outputs[-1].reason) == (6, "length")


async def test_an_abort_before_the_first_response_does_not_crash_the_engine(opened: Opener) -> None:
    prefill, decode = await opened(), await opened()
    request = make_request(prompt(), stop=LONG)
    first, _ = await run_request(prefill, msgspec.structs.replace(request, phase="prefill"))
    handoff = first.outputs[-1].handoff
    sink = OutputSink()
    decoding = msgspec.structs.replace(request, phase="decode", prior=PriorOutput(first.tokens), handoff=handoff)
    decode.abort(decode.submit(decoding, sink))  # before a first response; the double's engine would crash
    assert decode.load().running == 1, "it is still in the engine"
    await until(lambda: decode.load().running == 0)
    await until(lambda: really_free() == [200, 200])
    assert not sink.outputs and not decode.failed.done()


async def test_the_blocks_of_a_cancelled_hand_off_count_as_used_until_the_engine_frees_them(opened: Opener) -> None:
    """The engine cannot abort a request whose last response it has sent."""
    prefill = await opened(cache_transceiver_config=BRIEF)
    _, ticket = await run_request(prefill, make_request(prompt(), phase="prefill"))
    assert (prefill.load().open_handoffs, prefill.load().free_blocks) == (1, 197)
    prefill.abort(ticket)
    assert (prefill.load().open_handoffs, prefill.load().free_blocks) == (0, 197)
    assert prefill.counters()["handoffs_cancelled_total"] == 1
    assert really_free() == [197], "the engine still holds them"
    await until(lambda: really_free() == [200])
    await until(lambda: prefill.load().free_blocks == 200)


async def test_blocks_that_the_engine_holds_for_ever_count_as_used_for_ever(opened: Opener) -> None:
    prefill = await opened(cache_transceiver_config=TRANSCEIVER | {"kv_transfer_timeout_ms": None})
    _, ticket = await run_request(prefill, make_request(prompt(), phase="prefill"))
    prefill.abort(ticket)
    assert prefill.load().free_blocks == 197 and not prefill._in_flight._releases


async def test_a_hand_off_that_is_never_fetched_expires(opened: Opener) -> None:
    prefill = await opened(cache_transceiver_config=TRANSCEIVER | {"kv_transfer_timeout_ms": 100})
    await run_request(prefill, make_request(prompt(), phase="prefill"))
    await until(lambda: prefill.load().open_handoffs == 0)
    assert prefill.counters()["handoffs_expired_total"] == 1
    await until(lambda: really_free() == [200])


@pytest.mark.parametrize("grammar", [None, Grammar(kind="regex", text="[0-9]{6}")])
async def test_after_a_failed_transfer_the_decode_worker_prefills_the_prompt_itself(
    opened: Opener, grammar: Grammar | None
) -> None:
    prefill, decode = await opened(cache_transceiver_config=BRIEF), await opened(cache_transceiver_config=BRIEF)
    request = make_request(prompt(), grammar=grammar)
    whole, _ = await run_request(decode, msgspec.structs.replace(request, cache_salt=""))
    request = msgspec.structs.replace(request, id="second")
    first, ticket = await run_request(prefill, msgspec.structs.replace(request, phase="prefill"))
    prefill.abort(ticket)  # the blocks are gone when the decode worker comes for them
    await until(lambda: really_free() == [200, 200])
    last = first.outputs[-1]
    decoding = msgspec.structs.replace(request, phase="decode", prior=PriorOutput(first.tokens), handoff=last.handoff)
    rest, _ = await run_request(decode, decoding)
    assert first.tokens + rest.tokens == whole.tokens
    assert decode.counters()["kv_transfers_failed_total"] == 1


async def test_after_a_transfer_timeout_the_decode_worker_prefills_the_prompt_itself(
    opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill, decode = await opened(), await opened()
    request = make_request(prompt())
    whole, _ = await run_request(decode, request)
    request = msgspec.structs.replace(request, id="second")
    first, _ = await run_request(prefill, msgspec.structs.replace(request, phase="prefill"))
    handoff = first.outputs[-1].handoff
    assert handoff is not None
    monkeypatch.setattr(module, "TRANSFER_GRACE", 0.0)
    monkeypatch.setattr(module, "ABORT_TIMEOUT", 0.2)
    decode._engine.llm._executor.submit = lambda *_: None  # the engine never receives it
    sink = OutputSink()
    decoding = msgspec.structs.replace(
        request, phase="decode", prior=PriorOutput(first.tokens), handoff=msgspec.structs.replace(handoff, ttl_s=0.05)
    )
    decode.submit(decoding, sink)
    del decode._engine.llm._executor.submit
    await until(lambda: sink.ended)
    assert first.tokens + sink.tokens == whole.tokens
    assert decode.counters()["kv_transfers_failed_total"] == 1
    await until(lambda: decode.load().running == 0)


async def test_workers_with_different_kv_caches_decline_each_others_hand_offs(opened: Opener, caplog: Any) -> None:
    prefill, decode = await opened(), await opened(kv_cache_config={"max_tokens": 6400, "dtype": "fp8"})
    first, rest = await handed_over(prefill, decode, make_request(prompt()))
    assert "KV cache dtype is bfloat16 on prefill and fp8 on decode" in caplog.text
    assert len(first.tokens + rest.tokens) == 8 and decode.counters()["kv_transfers_failed_total"] == 1


async def test_hand_off_ids_are_unique_and_in_tensorrt_llms_global_range(opened: Opener) -> None:
    prefill = await opened()
    ids = []
    for _ in range(3):
        sink, _ = await run_request(prefill, make_request(prompt(), phase="prefill"))
        handoff = sink.outputs[-1].handoff
        assert handoff is not None
        ids.append(handoff.id)
    assert len(set(ids)) == 3 and all((1 << 40) <= id_ < (1 << 63) - 1 for id_ in ids)


@pytest.mark.parametrize("engine", [{}, {"kv_cache_config": {"max_tokens": 6400, "max_attention_window": [64, 4096]}}])
async def test_kv_events_name_the_blocks_that_the_torch_executor_names(either: Opener, engine: dict[str, Any]) -> None:
    requests = [make_request(prompt(100 + 7 * i, 300 + 50 * (i % 3))) for i in range(6)]
    found: list[KvEvent] = []
    executor = await either(**engine)
    executor.listen_kv(found.extend)
    async with open_executor(WorkerConfig(executor="torch"), "torch") as torch:
        expected: list[KvEvent] = []
        torch.listen_kv(expected.extend)
        for request in requests:
            await run_request(torch, request)
    for request in requests:
        await run_request(executor, request)
    await until(lambda: applied(found) == applied(expected))
    assert executor.counters()["kv_event_gaps_total"] == 0


async def test_hashes_of_salted_blocks_include_the_salt(opened: Opener) -> None:
    executor = await opened()
    found: list[KvEvent] = []
    executor.listen_kv(found.extend)
    request = make_request(prompt(), cache_salt="tenant")
    await run_request(executor, request)
    await until(lambda: applied(found) == set(rolling_hashes(request.prompt, 32, "tenant")))


async def test_an_overflow_of_kv_events_is_detected_and_later_events_are_applied(opened: Opener) -> None:
    executor = await opened(kv_cache_config={"max_tokens": 6400, "event_buffer_max_size": 2})
    found: list[KvEvent] = []
    executor.listen_kv(found.extend)
    requests = [
        make_request(prompt(128, 300 + i), stop=StopConditions(max_tokens=40, ignore_eos=True)) for i in range(30)
    ]
    await asyncio.gather(*(run_request(executor, request) for request in requests))
    await until(lambda: executor.counters()["kv_event_gaps_total"] > 0)
    assert any(isinstance(event, Cleared) for event in found)
    await asyncio.sleep(0.1)
    last = make_request(prompt(64, 900))
    await run_request(executor, last)
    await until(lambda: set(rolling_hashes(last.prompt, 32)) <= applied(found))


async def test_the_engine_is_reported_as_idle_before_and_after_a_request(opened: Opener) -> None:
    executor = await opened(enable_iter_perf_stats=True)
    assert executor.describe()["engine"] == "idle"
    load = executor.load()
    assert (load.running, load.waiting, load.free_blocks, load.total_blocks) == (0, 0, 200, 200)
    sink = OutputSink()
    ticket = executor.submit(make_request(prompt(), stop=LONG), sink)
    await until(lambda: executor.describe()["engine"] == "busy" and executor.load().free_blocks < 200)
    executor.abort(ticket)
    await until(lambda: executor.describe()["engine"] == "idle" and executor.load().free_blocks == 200)
    assert executor.counters()["engine_iterations_total"] > 0


@pytest.mark.parametrize("version", ["1.3.0rc29", "1.2.1"])
async def test_the_number_of_kv_blocks_is_known_for_both_versions(
    trtllm_double: None, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setenv("TRTLLM_DOUBLE_VERSION", version)
    async with AsyncExitStack() as stack:
        executor = await Opener(stack)()
        assert (executor.limits.num_blocks, executor.limits.block_size) == (200, 32)


async def test_a_dead_engine_fails_its_requests_as_lost_and_refuses_new_ones(opened: Opener) -> None:
    executor = await opened()
    sinks = [OutputSink(), OutputSink()]
    for sink in sinks:
        executor.submit(make_request(prompt(), stop=LONG), sink)
    await until(lambda: all(sink.outputs for sink in sinks))
    executor._engine.llm._executor._died(RuntimeError("MPI worker rank 0 exited unexpectedly"))
    await until(lambda: all(sink.ended for sink in sinks))
    assert all(isinstance(sink.outputs[-1].error, WorkerLost) for sink in sinks)
    with pytest.raises(EngineDied, match="MPI worker rank 0 exited unexpectedly"):
        await executor.failed
    with pytest.raises(Unavailable):
        executor.submit(make_request(prompt()), OutputSink())
    assert executor.describe()["engine"] == "dead"


async def test_a_clean_shutdown_is_not_logged_as_a_dead_engine(trtllm_double: None, caplog: Any) -> None:
    async with AsyncExitStack() as stack:
        executor = await Opener(stack)()
        executor.submit(make_request(prompt(), stop=LONG), OutputSink())
        await run_request(executor, make_request(prompt(), phase="prefill"))
    assert "dead" not in caplog.text and "failed" not in caplog.text


async def test_the_death_of_an_idle_engine_is_detected(opened: Opener) -> None:
    executor = await opened()
    executor._engine.llm._executor._fatal_error = RuntimeError("out of memory")
    await until(lambda: executor.failed.done())
    with pytest.raises(EngineDied, match="out of memory"):
        await executor.failed


async def test_an_engine_that_does_not_answer_a_canary_is_declared_dead(opened: Opener) -> None:
    executor = await opened(config={"engine_stall_s": 0.3})
    await asyncio.sleep(1.0)
    assert not executor.failed.done(), "canaries keep an idle engine alive"
    executor._engine.llm._executor.submit = lambda *_: None
    sink = OutputSink()
    executor.submit(make_request(prompt()), sink)
    await until(lambda: sink.ended)
    assert isinstance(sink.outputs[-1].error, WorkerLost)
    with pytest.raises(EngineDied, match="not even one token"):
        await executor.failed


async def test_a_failed_health_check_of_the_engine_fails_the_executor(
    opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dynserve.executors.trtllm import watch

    monkeypatch.setattr(watch, "HEALTH_EVERY", 0.05)
    executor = await opened()
    executor._engine.llm._check_health = lambda: False
    await until(lambda: executor.failed.done())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling": SamplingParams(logit_bias={99999: 1.0})}, "token 99999 is not one of 0 to 2047"),
        ({"grammar": Grammar(kind="json", text='{"type": "wrong"}')}, "wrong|schema"),
        ({"pooling": "mean"}, "no embeddings"),
    ],
)
async def test_a_request_that_the_engine_cannot_run_is_a_bad_request(
    opened: Opener, changes: dict[str, Any], message: str
) -> None:
    executor = await opened()
    with pytest.raises(BadRequest, match=message):
        async for _ in generate(executor, make_request(prompt(), **changes)):
            pass
    sink, _ = await run_request(executor, make_request(prompt()))
    assert len(sink.tokens) == 8


def reasoning_tokens() -> tuple[int, int]:
    """Returns the tiny model's tokens before and after its reasoning."""
    added = json.loads((TINY_MODEL / "tokenizer.json").read_text())["added_tokens"]
    ids = {token["content"]: token["id"] for token in added}
    return ids["<think>"], ids["</think>"]


def after_reasoning(grammar: Grammar, *, open_: bool) -> Grammar:
    begin, end = reasoning_tokens()
    return msgspec.structs.replace(grammar, reasoning=ReasoningTokens(begin=begin, end=end, open=open_))


def forced(tokens: dict[int, float], **stop: Any) -> dict[str, Any]:
    """Sampling that prefers some tokens wherever the grammar allows them."""
    sampling = SamplingParams(temperature=0.0, logit_bias=tokens)
    return {"sampling": sampling, "stop": StopConditions(max_tokens=12, **stop)}


@pytest.mark.parametrize("open_", [False, True])
@pytest.mark.parametrize(
    "grammar",
    [
        Grammar(kind="regex", text="[0-9]{3}"),
        Grammar(kind="grammar", text='root ::= "1" "2" "3"'),
        Grammar(kind="json", text='{"enum": [123]}'),
        # rules instead of the schema, whose compiler may drop words
        Grammar(kind="json", text="{}", rules='root ::= "123"'),
        Grammar(kind="structural_tag", text='{"type": "structural_tag", "format": {"type": "regex", "pattern": "[0-9]{3}"}}'),
    ],
    ids=lambda found: found.kind if isinstance(found, Grammar) else "",
)  # fmt: skip
async def test_a_grammar_begins_behind_the_reasoning(opened: Opener, grammar: Grammar, open_: bool) -> None:
    executor = await opened()
    begin, end = reasoning_tokens()
    tokenizer = tokenizers.Tokenizer.from_file(str(TINY_MODEL / "tokenizer.json"))
    if not open_:  # the model may reason, or answer at once
        sink, _ = await run_request(
            executor, make_request(prompt(), grammar=after_reasoning(grammar, open_=False), **forced({begin: -1000.0}))
        )
        assert re.fullmatch("[0-9]{3}", tokenizer.decode(sink.tokens))
    # it reasons for as long as it likes, and then its answer follows the grammar
    opening = {} if open_ else {begin: 500.0}
    behind = after_reasoning(grammar, open_=open_)
    sink, _ = await run_request(executor, make_request(prompt(), grammar=behind, **forced(opening | {444: 900.0})))
    assert sink.tokens[0] == (444 if open_ else begin) and sink.tokens.count(444) >= 10
    sink, _ = await run_request(executor, make_request(prompt(), grammar=behind, **forced(opening | {end: 900.0})))
    answer = sink.tokens[sink.tokens.index(end) + 1 :]
    assert end in sink.tokens[:2] and re.fullmatch("[0-9]{3}", tokenizer.decode(answer).strip())


async def test_the_engine_gets_rules_instead_of_a_schema_and_llguidance_the_schema(opened: Opener) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(TINY_MODEL / "tokenizer.json"))
    grammar = Grammar(kind="json", text='{"enum": [456]}', rules='root ::= "123"')
    for backend, answer in (("xgrammar", "123"), ("llguidance", "456")):
        executor = await opened(guided_decoding_backend=backend)
        sink, _ = await run_request(executor, make_request(prompt(), grammar=grammar, **forced({})))
        assert tokenizer.decode(sink.tokens) == answer


async def test_the_engines_reasoning_parser_changes_nothing_for_a_grammar(opened: Opener) -> None:
    """It is an option of TensorRT-LLM's own server."""
    executor = await opened(reasoning_parser="qwen3")
    plain = Grammar(kind="regex", text="[0-9]{3}")
    sink, _ = await run_request(executor, make_request(prompt(), grammar=plain))
    tokenizer = tokenizers.Tokenizer.from_file(str(TINY_MODEL / "tokenizer.json"))
    assert re.fullmatch("[0-9]{3}", tokenizer.decode(sink.tokens))


async def test_without_a_grammar_backend_grammars_are_refused(opened: Opener) -> None:
    executor = await opened(guided_decoding_backend=None)
    assert not executor.limits.grammars
    with pytest.raises(BadRequest, match="grammar"):
        executor.submit(make_request(prompt(), grammar=Grammar(kind="regex", text="a")), OutputSink())


async def test_an_adapter_answers_differently_and_shares_no_blocks(opened: Opener, tmp_path: Path) -> None:
    adapter = tmp_path / "french"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(FRENCH)
    executor = await opened(config={"lora_adapters": f"french={adapter}"})
    assert executor.limits.adapters == ("french",)
    found: list[KvEvent] = []
    executor.listen_kv(found.extend)
    plain, _ = await run_request(executor, make_request(prompt()))
    request = make_request(prompt(), adapter="french")
    other, _ = await run_request(executor, request)
    assert other.tokens == [444] * 8 != plain.tokens
    assert other.outputs[-1].cached_tokens == 0
    await until(lambda: set(rolling_hashes(request.prompt, 32, adapter_salt("french", ""))) <= applied(found))
    prefill = await opened(config={"lora_adapters": f"french={adapter}"})
    _, rest = await handed_over(prefill, executor, request)
    assert rest.tokens == [444] * 7 and executor.counters()["kv_transfers_done_total"] == 1


async def test_each_attention_dp_rank_is_a_target_with_its_own_cache(opened: Opener) -> None:
    executor = await opened(
        config={"tensor_parallel_size": 2}, enable_attention_dp=True, kv_cache_config={"max_tokens": 3200}
    )
    first, second = executor.targets
    assert first is executor and first is not second
    found: dict[int, list[KvEvent]] = {0: [], 1: []}
    for at, target in enumerate(executor.targets):
        target.listen_kv(found[at].extend)
    request = make_request(prompt())
    await run_request(second, request)
    await until(lambda: applied(found[1]) == set(rolling_hashes(request.prompt, 32)))
    assert found[0] == []
    cached, _ = await run_request(second, request)
    cold, _ = await run_request(first, request)
    assert (cached.outputs[-1].cached_tokens, cold.outputs[-1].cached_tokens) == (64, 0)


def test_priorities_keep_their_order_within_the_engines_range() -> None:
    found = [priority_of(p) for p in (-(2**40), -3, -1, 0, 1, 2, 2**40)]
    assert found == sorted(found) and priority_of(0) == 0.5
    assert all(0 <= p <= 1 for p in found)


async def test_a_request_with_a_priority_runs_on_both_versions(either: Opener) -> None:
    executor = await either(scheduler_config={} if "1.2" in _version() else {"waiting_queue_policy": "priority"})
    sink, _ = await run_request(executor, make_request(prompt(), priority=5))
    assert len(sink.tokens) == 8


def _version() -> str:
    import os

    return os.environ.get("TRTLLM_DOUBLE_VERSION", "")


@pytest.mark.parametrize(
    ("engine", "error", "message"),
    [
        ({"kv_cache_config": {"free_gpu_memory_fraction": 3}}, ConfigError, "between 0 and 1"),
        (
            {"max_batch_size": "many"},
            ConfigError,
            "--override-engine-args: max_batch_size: Input should be a valid integer",
        ),
        ({"kv_cache_config": {"max_tokns": 3}}, ConfigError, "did you mean max_tokens"),
        ({"tensor_parallel_size": 64}, InternalError, "could not start.*GPUs"),
    ],
)
async def test_invalid_engine_options_are_refused_before_weights_are_loaded(
    opened: Opener, engine: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        await opened(**engine)


async def test_without_tensorrt_llm_the_error_says_how_to_install_it() -> None:
    assert "tensorrt_llm" not in sys.modules
    with pytest.raises(ConfigError, match="release image, or pip install tensorrt-llm==1.3.0rc29"):
        async with open_executor(WorkerConfig(executor="trtllm"), "w"):
            pass


async def test_steps_of_several_tokens_lose_no_token(opened: Opener) -> None:
    executor = await opened(stream_interval=5)
    request = make_request(prompt(), stop=StopConditions(max_tokens=23, ignore_eos=True))
    sink, _ = await run_request(executor, request)
    assert [len(output.token_ids) for output in sink.outputs] == [5, 5, 5, 5, 3]
    plain, _ = await run_request(await opened(), request)
    assert sink.tokens == plain.tokens and unpack_tokens(request.prompt) == prompt()


async def test_an_exception_in_an_output_callback_ends_only_its_request(opened: Opener) -> None:
    executor = await opened()

    def broken(output: Output) -> None:
        raise ValueError("a fault of the renderer")

    executor.submit(make_request(prompt(), stop=LONG), broken)
    await until(lambda: executor.load().running == 0)
    assert not executor.failed.done()
    sink, _ = await run_request(executor, make_request(prompt()))
    assert len(sink.tokens) == 8
