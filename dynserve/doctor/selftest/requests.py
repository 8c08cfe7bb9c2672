"""Requests of each kind to one engine."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any

from dynserve.doctor.selftest.api import is_old
from dynserve.doctor.selftest.engines import EIGHT_TOKENS, Answer, Engines, read
from dynserve.doctor.selftest.fact import Fact, without_grammars
from dynserve.model_files import eos_token_ids
from dynserve.tasks import detached
from dynserve.wire.requests import Grammar, ReasoningTokens, SamplingParams, StopConditions

BIAS = 1000.0  # makes a token certain where it is allowed
DIGITS = Grammar(kind="regex", text="[0-9]{5}")
GRAMMARS = {
    "regular expression": (DIGITS, "[0-9]{5}"),
    "JSON schema": (Grammar(kind="json", text='{"enum": ["yes"]}'), '"yes"'),
    "EBNF": (Grammar(kind="grammar", text='root ::= "yes" | "no"'), "yes|no"),
}
TRACE = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}


async def capacity(engines: Engines) -> str:
    engine = engines.main.engine
    return "known" if engine.capacity and engine.total_blocks else "not known"


async def block_size(engines: Engines) -> str:
    engine = engines.main.engine
    options = engine.llm.args.kv_cache_config.tokens_per_block
    return "that of the options" if engine.block_size == options else f"{engine.block_size}, not {options}"


async def health(engines: Engines) -> str:
    llm = engines.main.engine.llm
    fatal = "" if is_old(engines.main.engine.api) else getattr(llm._executor, "_fatal_error", "no _fatal_error")
    well = await detached(llm._check_health)  # it may block
    return "healthy" if well and not fatal else f"_check_health {well}, {fatal}"


async def repeats(engines: Engines) -> str:
    one, other = await engines.ask(), await engines.ask()
    return f"{len(one.tokens)} tokens, {'the same' if one.agrees(other.tokens) else 'different'} both times"


async def streams(engines: Engines) -> str:
    lengths, objects = [], set()
    async for step in engines.raw(engines.main, engines.prompt(), max_tokens=4):
        lengths.append(len(step.outputs[0].token_ids))
        objects.add(id(step))
    how = "growing" if lengths == sorted(lengths) else "not growing"
    return f"{len(objects)} object, {how} to {lengths[-1]} tokens"


async def stops(engines: Engines) -> str:
    plain = await engines.ask()
    stop = plain.tokens[2]
    found = await engines.ask(stop=StopConditions(max_tokens=8, token_ids=(stop,), ignore_eos=True))
    before = plain.agrees(found.tokens + plain.tokens[len(found.tokens) :]) and stop not in found.tokens
    return f"{found.reason}, the answer ends {'before it' if before else 'elsewhere'}"


async def stop_as_returned(engines: Engines) -> str:
    stop = (await engines.ask()).tokens[2]
    result = await read(engines.raw(engines.main, engines.prompt(), max_tokens=8, stop_token_ids=[stop]))
    output = result.outputs[0]
    there = "in" if stop in output.token_ids else "not in"
    return f"finish_reason {output.finish_reason}, stop_reason {output.stop_reason}, the token is {there} token_ids"


async def ends_turn(engines: Engines) -> str:
    sampling = SamplingParams(temperature=0.0, logit_bias={eos_token_ids(engines.model)[0]: BIAS})
    found = await engines.ask(sampling=sampling, stop=StopConditions(max_tokens=8))
    return f"{found.reason}, {len(found.tokens)} tokens"


async def min_tokens(engines: Engines) -> str:
    sampling = SamplingParams(temperature=0.0, logit_bias={eos_token_ids(engines.model)[0]: BIAS})
    found = await engines.ask(sampling=sampling, stop=StopConditions(max_tokens=8, min_tokens=3))
    return f"{found.reason}, {len(found.tokens)} tokens"


async def ends_at_limit(engines: Engines) -> str:
    found = await engines.ask(stop=EIGHT_TOKENS)
    return f"{found.reason}, {len(found.tokens)} tokens"


async def biased(engines: Engines) -> str:
    token = engines.tokenizer.encode(" river", add_special_tokens=False).ids[0]
    found = await engines.ask(sampling=SamplingParams(temperature=0.0, logit_bias={token: BIAS}))
    return "the biased token" if set(found.tokens) == {token} else f"tokens {found.tokens}"


async def seeded(engines: Engines) -> str:
    sampling = SamplingParams(temperature=1.0, seed=7)
    one, other = await engines.ask(sampling=sampling), await engines.ask(sampling=sampling)
    return f"{'the same' if one.tokens == other.tokens else 'another'} answer"


async def times(engines: Engines) -> str:
    result = await read(engines.raw(engines.main, engines.prompt(), max_tokens=2, return_perf_metrics=True))
    metrics = result.outputs[0].request_perf_metrics
    return "there" if metrics is not None and metrics.timing_metrics is not None else "missing"


async def salted(engines: Engines) -> str:
    prompt = engines.prompt(31, engines.blocks)
    counts = [(await engines.ask(prompt, cache_salt=salt)).last.cached_tokens for salt in ("a", "b", "a")]
    return ", ".join("some" if number else "none" for number in counts)


def accepts(keyword: str) -> Callable[[Engines], Awaitable[str]]:
    """Returns the check that a keyword of `generate_async` is taken, with the value that the executor gives it."""

    async def check(engines: Engines) -> str:
        api = engines.main.engine.api
        values: dict[str, Callable[[], Any]] = {
            "priority": lambda: 0.75,
            "trace_headers": lambda: TRACE,
            "conversation_params": lambda: api.conversation(conversation_id="selftest"),
            "scheduling_params": lambda: api.scheduling(attention_dp_rank=0, attention_dp_relax=False),
        }
        keywords = {keyword: values[keyword]()}
        result = await read(engines.raw(engines.main, engines.prompt(), max_tokens=2, keywords=keywords))
        return f"{len(result.outputs[0].token_ids)} tokens"

    return check


async def sampled_logprobs(engines: Engines) -> str:
    found = await engines.ask(sampling=SamplingParams(temperature=0.0, logprobs=0))
    beside = max((len(entry.top) for entry in found.logprobs), default=0)
    return f"{len(found.logprobs)} entries, {beside} other tokens"


async def logprobs_as_returned(engines: Engines) -> str:
    result = await read(engines.raw(engines.main, engines.prompt(), max_tokens=4, logprobs=0))
    return f"{len(result.outputs[0].logprobs)} entries for 4 tokens"


async def top_logprobs(engines: Engines) -> str:
    found = await engines.ask(sampling=SamplingParams(temperature=0.0, logprobs=2))
    right = all(len(entry.top) == 2 and entry.logprob > entry.top[0][1] - 0.01 for entry in found.logprobs)
    return f"{len(found.logprobs)} entries, the likeliest token {'is' if right else 'is not'} the sampled one"


async def prompt_logprobs(engines: Engines) -> str:
    prompt = engines.prompt(57)
    found = await engines.ask(prompt, sampling=SamplingParams(temperature=0.0, logprobs=1, prompt_logprobs=True))
    whole = [entry.token_id for entry in found.logprobs] == prompt + found.tokens
    unknown = sum(entry.logprob < -1000 for entry in found.logprobs[1:])
    return f"{'one' if whole else 'not one'} for each token, {unknown} unknown"


def follows(name: str) -> Callable[[Engines], Awaitable[str]]:
    """Returns the check that an answer follows one of `GRAMMARS`."""

    async def check(engines: Engines) -> str:
        grammar, pattern = GRAMMARS[name]
        return matched(engines, await engines.ask(grammar=grammar, stop=StopConditions(max_tokens=24)), pattern)

    return check


async def follows_behind_reasoning(engines: Engines) -> str:
    """The prompt counts as one that has opened the reasoning, and a bias ends it at once."""
    end = _end_of_reasoning(engines)
    grammar = Grammar(kind="regex", text=DIGITS.text, reasoning=ReasoningTokens(begin=0, end=end, open=True))
    sampling = SamplingParams(temperature=0.0, logit_bias={end: BIAS})
    found = await engines.ask(grammar=grammar, sampling=sampling, stop=StopConditions(max_tokens=24))
    if found.tokens[:1] != [end]:
        return f"answers {engines.text(found.tokens)!r}"
    found.tokens = found.tokens[1:]
    return matched(engines, found, DIGITS.text)


async def follows_or_reasons(engines: Engines) -> str:
    grammar = Grammar(kind="regex", text=DIGITS.text, reasoning=ReasoningTokens(begin=0, end=0, open=False))
    found = await engines.ask(grammar=grammar, stop=StopConditions(max_tokens=24))
    return matched(engines, found, f"{DIGITS.text}|<think>.*")


def matched(engines: Engines, answer: Answer, pattern: str) -> str:
    text = engines.text(answer.tokens)
    return "follows it" if re.fullmatch(pattern, text.strip(), re.DOTALL) else f"answers {text!r}"


def _end_of_reasoning(engines: Engines) -> int:
    found = engines.tokenizer.token_to_id("</think>")
    return -1 if found is None else int(found)


def _without_reasoning(engines: Engines) -> str:
    return without_grammars(engines) or ("" if _end_of_reasoning(engines) >= 0 else "the model has no token </think>")


def _without_end_of_turn(engines: Engines) -> str:
    return "" if eos_token_ids(engines.model) else "the model has no end-of-turn token"


def without_reuse(engines: Engines) -> str:
    return "" if engines.main.limits.kv_events else "the engine reports no KV events, so it may cache no prefixes"


def _new(engines: Engines) -> str:
    return "version 1.2 does not have it" if is_old(engines.main.engine.api) else ""


REQUESTS = [
    Fact("limits", "size of the KV cache", "known", capacity),
    Fact("limits", "block size", "that of the options", block_size),
    Fact("limits", "health", "healthy", health),
    Fact("requests", "a greedy prompt, twice", "8 tokens, the same both times", repeats),
    Fact("requests", "steps of a stream", "1 object, growing to 4 tokens", streams),
    Fact("requests", "a stop token", "stop, the answer ends before it", stops),
    Fact("requests", "a stop token, as the engine returns it", "", stop_as_returned),
    Fact("requests", "an end of turn", "stop, 0 tokens", ends_turn, _without_end_of_turn),
    Fact("requests", "an end of turn, min_tokens 3", "stop, 3 tokens", min_tokens, _without_end_of_turn),
    Fact("requests", "max_tokens 8", "length, 8 tokens", ends_at_limit),
    Fact("requests", "a bias", "the biased token", biased),
    Fact("requests", "a seed, twice", "", seeded),
    Fact("requests", "times of a request", "there", times),
    Fact("requests", "cached tokens with salts a, b, a", "none, none, some", salted, without_reuse),
    Fact("requests", "the keyword priority", "2 tokens", accepts("priority"), _new),
    Fact("requests", "the keyword trace_headers", "2 tokens", accepts("trace_headers"), _new),
    Fact("requests", "the keyword conversation_params", "2 tokens", accepts("conversation_params"), _new),
    Fact("requests", "the keyword scheduling_params", "2 tokens", accepts("scheduling_params")),
    Fact("logprobs", "logprobs 0", "8 entries, 0 other tokens", sampled_logprobs),
    Fact("logprobs", "logprobs 0, as the engine returns it", "", logprobs_as_returned),
    Fact("logprobs", "logprobs 2", "8 entries, the likeliest token is the sampled one", top_logprobs),
    Fact("logprobs", "logprobs of a prompt", "one for each token, 0 unknown", prompt_logprobs),
    *(Fact("grammars", f"a grammar: {name}", "follows it", follows(name), without_grammars) for name in GRAMMARS),
    Fact("grammars", "a grammar behind reasoning", "follows it", follows_behind_reasoning, _without_reasoning),
    Fact("grammars", "a grammar, reasoning optional", "follows it", follows_or_reasons, without_grammars),
]
