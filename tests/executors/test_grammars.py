"""Grammars, embeddings and log-probabilities of prompts, on the torch executor: alone, in chunks, batched and handed off."""

from __future__ import annotations

import asyncio
import json
import math
from array import array
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import msgspec
import pytest
import torch
from tokenizers import Tokenizer

from dynserve.config import TINY_MODEL
from dynserve.errors import BadRequest
from dynserve.executors.base import Output
from dynserve.wire.requests import (
    GenerateRequest,
    Grammar,
    PriorOutput,
    ReasoningTokens,
    SamplingParams,
    StopConditions,
)
from tests.conftest import make_request, until
from tests.executors.test_executors import Opener, answer
from tests.reference import Reference

TOKENIZER = Tokenizer.from_file(str(TINY_MODEL / "tokenizer.json"))
NUMBERS = Grammar(kind="regex", text=r"[0-9]{40}")
PROMPT = list(range(300, 400))
REASONING_BEGIN, REASONING_END = TOKENIZER.token_to_id("<think>"), TOKENIZER.token_to_id("</think>")


@pytest.fixture
async def opened() -> AsyncIterator[Opener]:
    async with AsyncExitStack() as stack:
        yield Opener("torch", stack)


def constrained(grammar: Grammar, prompt: list[int] = PROMPT, **changes: Any) -> GenerateRequest:
    fields: dict[str, Any] = {
        "sampling": SamplingParams(temperature=1.5, seed=4),
        "stop": StopConditions(max_tokens=300),
    }
    return make_request(prompt, grammar=grammar, **(fields | changes))


def text_of(tokens: list[int]) -> str:
    text: str = TOKENIZER.decode(tokens, skip_special_tokens=False)
    return text


async def test_a_grammar_constrains_the_answer_from_first_to_last_token(opened: Opener) -> None:
    executor = await opened()
    tokens, last = await answer(executor, constrained(NUMBERS))
    assert len(text_of(tokens)) == 40 and text_of(tokens).isdigit() and last.reason == "stop"
    # neither ignore_eos nor min_tokens delays the end of a finished grammar
    for stop in (StopConditions(max_tokens=300, ignore_eos=True), StopConditions(max_tokens=300, min_tokens=200)):
        again, last = await answer(executor, constrained(NUMBERS, stop=stop))
        assert again == tokens and last.reason == "stop"


async def test_a_grammar_gives_the_same_answer_alone_batched_and_preempted(opened: Opener) -> None:
    roomy, tight = await opened(), await opened(num_blocks=14, max_num_tokens=32)
    requests = [constrained(NUMBERS, [i, *PROMPT], id=f"r{i}") for i in range(5, 13)]
    alone = [(await answer(roomy, request))[0] for request in requests]
    crowd = [tokens for tokens, _ in await asyncio.gather(*(answer(tight, request) for request in requests))]
    assert crowd == alone
    assert tight.counters()["preemptions_total"] > 0
    await until(lambda: tight.load().free_blocks == 14)


async def test_a_grammar_continues_after_a_hand_off(opened: Opener) -> None:
    prefill, decode = await opened(), await opened()
    request = constrained(NUMBERS)
    expected, _ = await answer(decode, request)
    first, handed = await answer(prefill, msgspec.structs.replace(request, phase="prefill"))
    moved = msgspec.structs.replace(request, phase="decode", prior=PriorOutput(first), handoff=handed.handoff)
    rest, last = await answer(decode, moved)
    assert first + rest == expected and last.reason == "stop"


async def test_a_grammar_continues_an_interrupted_answer(opened: Opener) -> None:
    prefill, decode = await opened(), await opened()
    request = constrained(NUMBERS)
    expected, _ = await answer(decode, request)
    for known in range(1, len(expected)):
        interrupted = msgspec.structs.replace(request, prior=PriorOutput(expected[:known]))
        alone, last = await answer(decode, interrupted)
        assert expected[:known] + alone == expected and last.reason == "stop"
        tokens, last = await answer(prefill, msgspec.structs.replace(interrupted, phase="prefill"))
        if last.handoff is not None:
            prior = PriorOutput(expected[:known] + tokens)
            moved = msgspec.structs.replace(request, phase="decode", prior=prior, handoff=last.handoff)
            rest, last = await answer(decode, moved)
            tokens += rest
        assert expected[:known] + tokens == expected and last.reason == "stop"


@pytest.mark.parametrize("open_", [True, False])
async def test_a_grammar_applies_only_after_the_reasoning_has_ended(opened: Opener, open_: bool) -> None:
    executor = await opened()
    grammar = msgspec.structs.replace(
        NUMBERS, reasoning=ReasoningTokens(begin=REASONING_BEGIN, end=REASONING_END, open=open_)
    )
    # a bias makes the model begin or end its reasoning
    push = {REASONING_BEGIN: 100.0} if not open_ else {REASONING_END: 100.0}
    tokens, _ = await answer(
        executor,
        constrained(
            grammar, sampling=SamplingParams(temperature=0.0, logit_bias=push), stop=StopConditions(max_tokens=80)
        ),
    )
    said = text_of(tokens)
    if open_:
        assert said.startswith("</think>") and said.removeprefix("</think>").isdigit()
    else:
        assert said.startswith("<think>")
        assert not any(token in (0, 2) for token in tokens)  # no end before the answer


async def test_an_invalid_grammar_fails_only_its_own_request(opened: Opener) -> None:
    executor = await opened()
    for grammar in (Grammar(kind="regex", text="(("), Grammar(kind="json", text='{"type": "odd"}')):
        with pytest.raises(BadRequest, match="the grammar cannot be used"):
            await answer(executor, constrained(grammar))
    assert (await answer(executor, make_request(PROMPT)))[1].reason == "length"


async def test_a_grammar_with_slow_masks_ends_only_its_own_request(opened: Opener) -> None:
    executor = await opened()
    slow = Grammar(kind="regex", text="(([a-z]{0,80}){0,80}){0,80}x")
    others = [
        answer(executor, make_request([i, *PROMPT], id=f"r{i}", stop=StopConditions(max_tokens=60, ignore_eos=True)))
        for i in range(5, 9)
    ]
    async with asyncio.timeout(60):
        found = await asyncio.gather(answer(executor, constrained(slow)), *others, return_exceptions=True)
    assert isinstance(found[0], BadRequest) and "too long to follow" in str(found[0])
    for other in found[1:]:
        assert isinstance(other, tuple) and len(other[0]) == 60
    await until(lambda: executor.load().free_blocks == 200)


async def test_an_abort_during_grammar_compilation_frees_all_blocks(opened: Opener) -> None:
    executor = await opened()
    outputs: list[Output] = []
    schema = {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(300)}}
    tickets = [
        executor.submit(constrained(Grammar(kind="json", text=json.dumps(schema))), outputs.append) for _ in range(3)
    ]
    for ticket in tickets:
        executor.abort(ticket)
    await answer(executor, constrained(NUMBERS))
    assert outputs == [] and executor.load().free_blocks == executor.load().total_blocks


@pytest.mark.parametrize("engine", [{}, {"max_num_tokens": 16}])
async def test_prompts_have_the_log_probabilities_of_a_plain_forward_pass(
    opened: Opener, engine: dict[str, Any]
) -> None:
    executor = await opened(**engine)
    plain = torch.log_softmax(Reference(TINY_MODEL).logits(PROMPT), dim=-1)
    for _ in range(2):  # the second time all of it is in the cache, and must be computed all the same
        request = make_request(PROMPT, sampling=SamplingParams(temperature=0.0, logprobs=2, prompt_logprobs=True), stop=StopConditions(max_tokens=3, ignore_eos=True))  # fmt: skip
        outputs = [output async for output in _outputs(executor, request)]
        entries = outputs[0].logprobs or []
        assert [entry.token_id for entry in entries[:100]] == PROMPT and len(entries) == 101
        for at, entry in enumerate(entries[1:100]):
            assert entry.logprob == pytest.approx(float(plain[at, PROMPT[at + 1]]), abs=1e-3)
            assert entry.top[0][0] == int(plain[at].argmax()) and len(entry.top) == 2
        assert outputs[0].cached_tokens == 0


async def test_a_prompt_can_be_scored_without_an_answer(opened: Opener) -> None:
    request = make_request(
        PROMPT, sampling=SamplingParams(logprobs=0, prompt_logprobs=True), stop=StopConditions(max_tokens=0)
    )
    tokens, last = await answer(await opened(), request)
    assert tokens == [] and last.reason == "length" and len(last.logprobs or ()) == 100


@pytest.mark.parametrize("engine", [{}, {"max_num_tokens": 16}])
@pytest.mark.parametrize("pool", ["mean", "last"])
async def test_embeddings_are_pooled_states_of_a_plain_forward_pass(
    opened: Opener, pool: Any, engine: dict[str, Any]
) -> None:
    executor = await opened(**engine)
    states = Reference(TINY_MODEL).states(PROMPT)
    pooled = states.mean(dim=0) if pool == "mean" else states[-1]
    expected = (pooled / pooled.norm()).tolist()
    requests = [make_request(PROMPT, pooling=pool, id=f"r{i}") for i in range(6)]
    for _, last in await asyncio.gather(*(answer(executor, request) for request in requests)):
        vector = array("f", last.embedding)
        assert last.reason == "stop" and list(vector) == pytest.approx(expected, abs=1e-4)
        assert math.isclose(math.fsum(v * v for v in vector), 1, rel_tol=1e-4)
    await until(lambda: executor.load().free_blocks == 200)


async def test_the_simulated_executor_refuses_grammars_and_embeddings() -> None:
    async with AsyncExitStack() as stack:
        executor = await Opener("simulated", stack)()
        for request in (constrained(NUMBERS), make_request(PROMPT, pooling="mean")):
            with pytest.raises(BadRequest):
                executor.submit(request, lambda _: None)


async def _outputs(executor: Any, request: GenerateRequest) -> AsyncIterator[Output]:
    from dynserve.executors.base import generate

    async for output in generate(executor, request):
        yield output
