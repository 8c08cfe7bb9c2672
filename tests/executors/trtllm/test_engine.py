"""What the engine changes by itself, refuses late, or says in a way that is easily misread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import msgspec
import pytest

from dynserve.errors import BadRequest, ContextTooLong, EngineDied, InternalError, Unavailable, WorkerLost
from dynserve.executors.trtllm import engine as engine_module
from dynserve.executors.trtllm.engine_request import EngineRequest, Kind
from dynserve.executors.trtllm.executor import TrtllmExecutor
from dynserve.wire.hashing import rolling_hashes
from dynserve.wire.requests import Grammar, PriorOutput, ReasoningTokens, SamplingParams, StopConditions
from tests.conftest import make_request, until
from tests.executors.trtllm.test_executor import BRIEF, LONG, Opener, OutputSink, handed_over, prompt, run_request
from tests.executors.trtllm.test_kv_events import applied


@pytest.fixture
async def opened(trtllm_double: None) -> AsyncIterator[Opener]:
    async with AsyncExitStack() as stack:
        yield Opener(stack)


def keywords(executor: TrtllmExecutor, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Returns a list that each later call of `generate_async` adds its keywords to."""
    llm = type(executor._engine.llm)
    inner, found = llm.generate_async, []

    def call(self: Any, prompt: Any, params: Any, **given: Any) -> Any:
        found.append(given | {"sampling": params})
        return inner(self, prompt, params, **given)

    monkeypatch.setattr(llm, "generate_async", call)
    return found


# limits


@pytest.mark.parametrize("version", ["1.3.0rc29", "1.2.1"])
async def test_the_context_is_limited_to_what_the_kv_cache_holds(
    opened: Opener, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setenv("TRTLLM_DOUBLE_VERSION", version)
    executor = await opened(kv_cache_config={"max_tokens": 320}, max_seq_len=1000)
    assert executor.limits.max_seq_len == 320
    with pytest.raises(ContextTooLong, match="400 tokens leave no room for an answer in a context of 320"):
        executor.submit(make_request(prompt(400)), OutputSink())
    sink, _ = await run_request(
        executor, make_request(prompt(310), stop=StopConditions(max_tokens=50, ignore_eos=True))
    )
    assert (len(sink.tokens), sink.outputs[-1].reason) == (10, "length")


@pytest.mark.parametrize("role", ["aggregated", "prefill", "decode"])
async def test_a_prompt_that_the_engine_finds_too_long_is_the_clients_error(
    opened: Opener, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    """An engine may have less room than it reports; it says so while the answer is read."""
    monkeypatch.setattr(TrtllmExecutor, "max_seq_len", 10_000)
    executor = await opened(kv_cache_config={"max_tokens": 320})
    request = make_request(prompt(400), phase=role)
    if role == "decode":
        request = msgspec.structs.replace(request, prior=PriorOutput([5]))
    sink, _ = await run_request(executor, request)
    error = sink.outputs[-1].error
    assert isinstance(error, ContextTooLong) and error.code == "context_length_exceeded" and error.status == 400
    assert "400 tokens leave no room for an answer" in str(error)
    sink, _ = await run_request(executor, make_request(prompt()))
    assert len(sink.tokens) == 8, "the engine is fine"


# signs of life


async def test_a_canary_that_is_refused_is_no_sign_of_life(opened: Opener) -> None:
    executor = await opened(config={"engine_stall_s": 0.3})
    executor._engine.llm._executor.crash_loop("CUDA error: an illegal memory access")
    with pytest.raises(EngineDied, match="not even one token"):
        async with asyncio.timeout(10):
            await executor.failed


async def test_an_engine_whose_event_loop_has_crashed_is_dead_at_the_first_request_that_says_so(opened: Opener) -> None:
    executor = await opened()
    sinks = [OutputSink(), OutputSink()]
    for sink in sinks:
        executor.submit(make_request(prompt(), stop=LONG), sink)
    await until(lambda: all(sink.outputs for sink in sinks))
    executor._engine.llm._executor.crash_loop("CUDA error: an illegal memory access")
    await until(lambda: all(sink.ended for sink in sinks))
    assert all(isinstance(sink.outputs[-1].error, WorkerLost) for sink in sinks)
    with pytest.raises(EngineDied, match="Event loop terminated with error: CUDA error"):
        await executor.failed
    with pytest.raises(Unavailable):
        executor.submit(make_request(prompt()), OutputSink())


async def test_a_crashed_event_loop_is_recognised_in_a_refusal_at_the_call_too(
    opened: Opener, monkeypatch: Any
) -> None:
    executor = await opened()
    refusal = executor._engine.api.request_error("Event loop terminated with error: out of memory")

    def crashed(*_: Any, **__: Any) -> Any:
        raise refusal

    monkeypatch.setattr(executor._engine.llm, "generate_async", crashed)
    with pytest.raises(Unavailable, match="the engine is dead"):
        executor.submit(make_request(prompt()), OutputSink())
    assert executor.failed.done()


async def test_an_engine_that_refuses_its_first_prompt_does_not_start(
    opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = __import__("tensorrt_llm._engine", fromlist=["Server"]).Server
    monkeypatch.setattr(server, "_refusal", lambda *_: "Event loop terminated with error: out of memory")
    with pytest.raises(InternalError, match="the engine's first token failed: RequestError: Event loop terminated"):
        await opened()
    monkeypatch.undo()


async def test_a_request_that_is_refused_does_not_end_the_engine(opened: Opener) -> None:
    executor = await opened()
    with pytest.raises(BadRequest):
        executor.submit(make_request(prompt(), sampling=SamplingParams(logit_bias={9999: 1.0})), OutputSink())
    assert await executor._engine.alive()


# requests


@pytest.mark.parametrize(
    ("grammar", "fine"),
    [
        (Grammar(kind="regex", text="[0-9]{3}"), True),
        (Grammar(kind="json", text="{}"), True),
        (Grammar(kind="grammar", text='root ::= "a"'), False),
        (Grammar(kind="structural_tag", text="{}"), False),
        (Grammar(kind="regex", text="[0-9]", reasoning=ReasoningTokens(begin=5, end=6, open=True)), False),
    ],
    ids=lambda found: found.kind if isinstance(found, Grammar) else "",
)
async def test_llguidance_is_sent_only_what_it_takes(opened: Opener, grammar: Grammar, fine: bool) -> None:
    """It raises at structural tags, in versions in which that ends the engine, and has another syntax of grammars."""
    executor = await opened(guided_decoding_backend="llguidance")
    if fine:
        sink, _ = await run_request(executor, make_request(prompt(), grammar=grammar))
        assert sink.outputs[-1].error is None
        return
    with pytest.raises(
        BadRequest, match="guided_decoding_backend llguidance takes JSON schemas and regular expressions"
    ):
        executor.submit(make_request(prompt(), grammar=grammar), OutputSink())


async def test_a_grammar_at_which_an_engine_crashed_is_not_tried_on_other_workers(opened: Opener) -> None:
    executor = await opened()
    plain, guided = OutputSink(), OutputSink()
    executor._engine.llm._executor.crash_loop("out of memory")
    executor.submit(make_request(prompt(), grammar=Grammar(kind="regex", text="[0-9]{3}")), guided)
    executor.submit(make_request(prompt()), plain)
    await until(lambda: plain.ended and guided.ended)
    assert isinstance(plain.outputs[-1].error, WorkerLost)
    assert isinstance(guided.outputs[-1].error, InternalError) and not isinstance(guided.outputs[-1].error, WorkerLost)


@pytest.mark.parametrize("version", ["1.3.0rc29", "1.2.1"])
async def test_log_probabilities_of_the_sampled_tokens_alone_come_from_every_version(
    opened: Opener, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    """`logprobs=0` means none in 1.2."""
    monkeypatch.setenv("TRTLLM_DOUBLE_VERSION", version)
    prefill, decode = await opened(), await opened()
    request = make_request(prompt(), sampling=SamplingParams(temperature=0.0, logprobs=0))
    first, rest = await handed_over(prefill, decode, request)
    entries = first.logprobs + rest.logprobs
    assert [entry.token_id for entry in entries] == first.tokens + rest.tokens
    assert all(entry.top == [] and entry.logprob <= 0 for entry in entries)


async def test_a_priority_is_passed_only_to_an_engine_that_orders_by_it(
    opened: Opener, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    ordered = await opened(scheduler_config={"waiting_queue_policy": "priority"})
    plain = await opened()
    calls = keywords(plain, monkeypatch)
    for executor in (ordered, plain, plain):
        await run_request(executor, make_request(prompt(), priority=1))
    assert [call.get("priority") for call in calls] == [0.75, None, None]
    assert caplog.text.count("priorities of requests are not passed to the engine") == 1


async def test_the_trace_of_a_request_is_passed_on(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = await opened()
    calls = keywords(executor, monkeypatch)
    trace = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    await run_request(executor, make_request(prompt(), trace_headers=trace))
    await run_request(executor, make_request(prompt()))
    assert [call.get("trace_headers") for call in calls] == [trace, None]


async def test_a_session_is_a_conversation_to_an_engine_that_keeps_conversations_on_one_rank(
    opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeping = await opened(attention_dp_config={"kv_cache_routing_conversation_affinity": True})
    other = await opened()
    calls = keywords(keeping, monkeypatch)
    for executor in (keeping, other):
        await run_request(executor, make_request(prompt(), session="mine"))
    found = [call.get("conversation_params") for call in calls]
    assert found[0].conversation_id == "mine" and found[1] is None


async def test_a_conversation_may_stay_on_the_rank_of_its_first_turn(
    opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = await opened(
        config={"tensor_parallel_size": 2}, enable_attention_dp=True,
        attention_dp_config={"kv_cache_routing_conversation_affinity": True},
    )  # fmt: skip
    calls = keywords(executor, monkeypatch)
    for session in ("", "mine"):
        await run_request(executor.targets[1], make_request(prompt(), session=session))
    params = [call["scheduling_params"] for call in calls]
    assert [(one.attention_dp_rank, one.attention_dp_relax) for one in params] == [(1, False), (1, True)]


async def test_cached_tokens_do_not_count_as_used_again(opened: Opener) -> None:
    executor = await opened()
    await run_request(executor, make_request(prompt(640)))
    tickets = []
    for _ in range(4):
        tickets.append(executor.submit(make_request(prompt(640), stop=LONG), sink := OutputSink()))
        await until(lambda sink=sink: bool(sink.outputs))
    assert executor.load().free_blocks > 120, "they share 20 blocks"
    for ticket in tickets:
        executor.abort(ticket)
    await until(lambda: executor.load().free_blocks == 200)
    assert executor._in_flight.counts == (0, 0, 0, 0, 0)


async def test_cached_tokens_are_counted_whatever_the_options_say_of_postprocessing(opened: Opener) -> None:
    executor = await opened(num_postprocess_workers=2)
    for cached in (0, 64):
        sink, _ = await run_request(executor, make_request(prompt()))
        assert sink.outputs[-1].cached_tokens == cached


async def test_salted_requests_on_the_second_cache_manager_are_not_routed_by_cache_and_it_is_said_once(
    opened: Opener, caplog: Any
) -> None:
    executor = await opened(kv_cache_config={"max_tokens": 6400, "use_kv_cache_manager_v2": True})
    found: list[Any] = []
    executor.listen_kv(found.extend)
    for _ in range(2):
        await run_request(executor, make_request(prompt(), cache_salt="tenant"))
    plain = make_request(prompt(70, 900))
    await run_request(executor, plain)
    await until(lambda: applied(found) == set(rolling_hashes(plain.prompt, 32)))
    assert caplog.text.count("this engine's KV events name no salts") == 1


async def test_nothing_is_left_of_salted_requests_that_ended_or_were_refused(
    opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "EVENTS_GRACE", 0.05)
    executor = await opened()
    assert executor._engine.streams is not None
    apart = executor._engine.streams._apart
    await run_request(executor, make_request(prompt(), cache_salt="tenant"))
    refused = SamplingParams(temperature=0.0, logit_bias={9999: 1.0})
    with pytest.raises(BadRequest):
        executor.submit(make_request(prompt(), cache_salt="tenant", sampling=refused), OutputSink())
    ticket = executor.submit(make_request(prompt(), cache_salt="tenant", stop=LONG), sink := OutputSink())
    await until(lambda: bool(sink.outputs))
    assert apart, "that request is open"
    executor.abort(ticket)
    await until(lambda: not apart)


async def test_transfers_do_not_count_as_waiting_and_prompts_that_have_no_turn_do(
    opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill, decode = await opened(max_num_tokens=64), await opened(max_num_tokens=64)
    decode._engine.llm._executor.submit = lambda *_: None  # the engine never receives them
    prefill._engine.llm._executor.submit = lambda *_: None
    for number in range(4):
        request = make_request(prompt(), id=f"r{number}", phase="prefill")
        prefill.submit(request, OutputSink())
        whole = msgspec.structs.replace(request, phase="aggregated")
        call = EngineRequest(whole, Kind.GENERATION, OutputSink(), 0.0)
        decode._in_flight.started(call)
    assert (prefill.load().running, prefill.load().waiting) == (1, 3)
    assert (decode.load().running, decode.load().waiting) == (4, 0)


async def test_the_blocks_of_a_prefill_that_ends_after_its_client_has_left_count_as_used(opened: Opener) -> None:
    prefill = await opened(cache_transceiver_config=BRIEF)
    sink = OutputSink()
    ticket = prefill.submit(make_request(prompt(), phase="prefill"), sink)
    prefill._engine.abort = lambda _: None  # type: ignore[method-assign]  # it comes too late
    prefill.abort(ticket)
    await until(lambda: prefill.load().running == 0)
    assert not sink.outputs and (prefill.load().open_handoffs, prefill.load().free_blocks) == (0, 197)
    await until(lambda: prefill.load().free_blocks == 200)


async def test_used_blocks_are_counted_without_statistics(opened: Opener) -> None:
    executor = await opened()
    assert not executor._engine.llm.args.enable_iter_perf_stats
    ticket = executor.submit(make_request(prompt(), stop=LONG), sink := OutputSink())
    await until(lambda: len(sink.tokens) > 40)
    load = executor.load()
    assert load.running == 1 and load.free_blocks <= 200 - (70 + 40) // 32
    executor.abort(ticket)
    await until(lambda: executor.load().free_blocks == 200)


async def test_the_load_of_each_rank_is_its_own(opened: Opener) -> None:
    executor = await opened(
        config={"tensor_parallel_size": 2}, enable_attention_dp=True, enable_iter_perf_stats=True,
        kv_cache_config={"max_tokens": 3200},
    )  # fmt: skip
    first, second = executor.targets
    ticket = first.submit(make_request(prompt(640), stop=LONG), filling := OutputSink())
    other = second.submit(make_request(prompt(64, 900), stop=LONG), small := OutputSink())
    await until(lambda: bool(filling.outputs and small.outputs))
    await until(lambda: first.load().free_blocks <= 80 and 90 <= second.load().free_blocks <= 98)
    first.abort(ticket)
    second.abort(other)
    await until(lambda: [target.load().free_blocks for target in executor.targets] == [100, 100])
