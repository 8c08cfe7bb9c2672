"""Requests of each kind to one engine."""

from __future__ import annotations

import re
from typing import Any

from dynserve.doctor.selftest.engines import CONTEXT, EIGHT, Answer, Engines
from dynserve.doctor.selftest.fact import Fact, without_grammars
from dynserve.errors import BadRequest
from dynserve.executors.trtllm.probes import difference
from dynserve.model_files import eos_token_ids
from dynserve.wire.requests import Grammar, ReasoningTokens, SamplingParams, StopConditions

BIAS = 1000.0  # makes a token certain
FORCED = 97  # a token id
DIGITS = Grammar(kind="regex", text="[0-9]{5}")
GRAMMARS = {
    "regex": (DIGITS, "[0-9]{5}"),
    "JSON schema": (Grammar(kind="json", text='{"enum": ["yes"]}'), '"yes"'),
    "EBNF": (Grammar(kind="grammar", text='root ::= "yes" | "no"'), "yes|no"),
}


async def repeats(engines: Engines) -> str:
    one, other = await engines.ask(), await engines.ask()
    return f"{len(one.tokens)} tokens, {'the same' if one.tokens == other.tokens else 'others'} twice"


async def streams(engines: Engines) -> str:
    steps = [
        (id(step), len(step.outputs[0].token_ids))
        async for step in engines.raw(engines.decode, engines.prompt(), max_tokens=4)
    ]
    lengths = [length for _, length in steps]
    how = "growing" if lengths == sorted(lengths) else "not growing"
    return f"{len({number for number, _ in steps})} object, {how} to {lengths[-1]} tokens"


async def stops(engines: Engines) -> str:
    plain = await engines.ask()
    stop = plain.tokens[2]
    found = await engines.ask(stop=StopConditions(max_tokens=8, token_ids=(stop,), ignore_eos=True))
    before = found.tokens == plain.tokens[: plain.tokens.index(stop)]
    return f"{found.reason} {'before' if before else 'elsewhere than at'} it"


async def stop_as_returned(engines: Engines) -> str:
    plain = await engines.ask()
    result = await _read(engines.raw(engines.decode, engines.prompt(), max_tokens=8, stop_token_ids=[plain.tokens[2]]))
    output = result.outputs[0]
    there = "in" if plain.tokens[2] in output.token_ids else "not in"
    return f"finish_reason {output.finish_reason}, stop_reason {output.stop_reason}, the token is {there} token_ids"


async def ends_turn(engines: Engines) -> str:
    sampling = SamplingParams(temperature=0.0, logit_bias={eos_token_ids(engines.model)[0]: BIAS})
    found = await engines.ask(sampling=sampling, stop=StopConditions(max_tokens=8))
    return f"{found.reason}, {len(found.tokens)} tokens"


async def ends_at_limit(engines: Engines) -> str:
    found = await engines.ask(stop=EIGHT)
    return f"{found.reason} after {len(found.tokens)}"


async def biased(engines: Engines) -> str:
    found = await engines.ask(sampling=SamplingParams(temperature=0.0, logit_bias={FORCED: BIAS}))
    return "the token of the bias" if set(found.tokens) == {FORCED} else f"tokens {found.tokens}"


async def seeded(engines: Engines) -> str:
    sampling = SamplingParams(temperature=1.0, seed=7)
    one, other = await engines.ask(sampling=sampling), await engines.ask(sampling=sampling)
    return f"{'the same' if one.tokens == other.tokens else 'another'} answer"


async def salted(engines: Engines) -> str:
    prompt = engines.prompt(first=31, length=3 * engines.decode.limits.block_size + 5)
    counts = [(await engines.ask(prompt, cache_salt=salt)).last.cached_tokens for salt in ("a", "b", "a")]
    return ", ".join("some" if number else "none" for number in counts)


async def with_every_keyword(engines: Engines) -> str:
    trace = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    sampling = SamplingParams(
        temperature=0.7, top_p=0.9, top_k=5, min_p=0.01, presence_penalty=0.5, repetition_penalty=1.1
    )
    found = await engines.ask(sampling=sampling, priority=3, trace_headers=trace, session="selftest")
    return f"{len(found.tokens)} tokens"


async def too_long(engines: Engines) -> str:
    """The engine's own refusal: the executor refuses such prompts before."""
    where = "at the call"
    try:
        result = engines.raw(engines.decode, engines.prompt(length=CONTEXT + 10), max_tokens=4)
        where = "while it is read"
        await _read(result)
    except Exception as error:
        text = "default_max_tokens" if "default_max_tokens" in str(error) else repr(str(error))
        return f"{text} in {type(error).__name__}, {where}"
    return "an answer"


async def sampled_logprobs(engines: Engines) -> str:
    found = await engines.ask(sampling=SamplingParams(temperature=0.0, logprobs=0))
    beside = max(len(entry.top) for entry in found.logprobs) if found.logprobs else 0
    return f"{len(found.logprobs)} entries, {beside} beside the sampled token"


async def logprobs_as_returned(engines: Engines) -> str:
    result = await _read(engines.raw(engines.decode, engines.prompt(), max_tokens=4, logprobs=0))
    return f"{len(result.outputs[0].logprobs)} entries for 4 tokens"


async def top_logprobs(engines: Engines) -> str:
    found = await engines.ask(sampling=SamplingParams(temperature=0.0, logprobs=2))
    right = all(len(entry.top) == 2 and entry.top[0][0] == entry.token_id for entry in found.logprobs)
    return f"{len(found.logprobs)} entries, the likeliest {'first' if right else 'not first'}"


async def prompt_logprobs(engines: Engines) -> str:
    prompt = engines.prompt(first=57)
    found = await engines.ask(prompt, sampling=SamplingParams(temperature=0.0, logprobs=1, prompt_logprobs=True))
    whole = [entry.token_id for entry in found.logprobs] == prompt + found.tokens
    known = sum(entry.logprob > -1000 for entry in found.logprobs[1:])
    return f"{'one' if whole else 'not one'} for each token, {len(found.logprobs) - 1 - known} unknown"


def follows(name: str) -> Any:
    async def check(engines: Engines) -> str:
        grammar, pattern = GRAMMARS[name]
        text = engines.text((await engines.ask(grammar=grammar, stop=StopConditions(max_tokens=24))).tokens)
        return "follows it" if re.fullmatch(pattern, text.strip()) else f"answers {text!r}"

    return check


async def follows_behind_reasoning(engines: Engines) -> str:
    grammar = Grammar(kind="regex", text=DIGITS.text, reasoning=ReasoningTokens(begin=0, end=0, open=False))
    text = engines.text((await engines.ask(grammar=grammar, stop=StopConditions(max_tokens=24))).tokens)
    fine = re.fullmatch(r"[0-9]{5}|<think>.*", text.strip(), re.DOTALL)
    return "follows it, or reasons" if fine else f"answers {text!r}"


async def refuses_a_grammar(engines: Engines) -> str:
    try:
        found = await engines.ask(grammar=Grammar(kind="json", text='{"type": "wrong"}'))
    except BadRequest:
        found = await engines.ask()
        return "refused, and the engine goes on" if found.tokens else "refused"
    return f"answers {engines.text(found.tokens)!r}"


async def adapts(engines: Engines) -> str:
    sampling = SamplingParams(temperature=0.0, logprobs=5)
    plain, other = await engines.ask(sampling=sampling), await engines.ask(sampling=sampling, adapter=engines.adapter)
    return "another answer" if difference(_entries(plain), _entries(other)) > 0 else "the model's answer"


async def adapts_without_the_models_cache(engines: Engines) -> str:
    prompt = engines.prompt(first=83, length=3 * engines.decode.limits.block_size + 5)
    await engines.ask(prompt)
    found = await engines.ask(prompt, adapter=engines.adapter)
    return f"{found.last.cached_tokens} cached tokens"


async def block_size(engines: Engines) -> str:
    engine = engines.decode.engine
    options = engine.llm.args.kv_cache_config.tokens_per_block
    return "the options'" if engine.block_size == options else f"{engine.block_size}, not the options' {options}"


async def capacity(engines: Engines) -> str:
    engine = engines.decode.engine
    return "known" if engine.capacity and engine.total_blocks else "not known"


async def context(engines: Engines) -> tuple[str, str]:
    expected = min(CONTEXT, engines.decode.engine.capacity or CONTEXT)
    return str(expected), str(engines.decode.limits.max_seq_len)


async def _read(result: Any) -> Any:
    async for _ in result:
        pass
    return result


def _entries(answer: Answer) -> list[tuple[int, dict[int, float]]]:
    return [(entry.token_id, dict(entry.top)) for entry in answer.logprobs]


def _without_adapter(engines: Engines) -> str:
    return "" if engines.adapter else "the engine has no adapter"


REQUESTS = [
    Fact("limits", "block size", "the options'", block_size),
    Fact("limits", "size of the KV cache", "known", capacity),
    Fact("limits", "context", "", context),
    Fact("requests", "a greedy prompt", "8 tokens, the same twice", repeats),
    Fact("requests", "steps of a stream", "1 object, growing to 4 tokens", streams),
    Fact("requests", "a stop token", "stop before it", stops),
    Fact("requests", "a stop token, as it is returned", "", stop_as_returned),
    Fact("requests", "an end of turn", "stop, 0 tokens", ends_turn),
    Fact("requests", "max_tokens", "length after 8", ends_at_limit),
    Fact("requests", "a bias", "the token of the bias", biased),
    Fact("requests", "a seed, twice", "", seeded),
    Fact("requests", "cached tokens with salts a, b, a", "none, none, some", salted),
    Fact("requests", "every keyword", "8 tokens", with_every_keyword),
    Fact("requests", "a prompt over the context", "default_max_tokens in RequestError, while it is read", too_long),
    Fact("logprobs", "logprobs of sampled tokens", "8 entries, 0 beside the sampled token", sampled_logprobs),
    Fact("logprobs", "logprobs: 0, as it is returned", "", logprobs_as_returned),
    Fact("logprobs", "top logprobs", "8 entries, the likeliest first", top_logprobs),
    Fact("logprobs", "logprobs of a prompt", "one for each token, 0 unknown", prompt_logprobs),
    *(Fact("grammars", f"a grammar: {name}", "follows it", follows(name), without_grammars) for name in GRAMMARS),
    Fact(
        "grammars",
        "a grammar behind reasoning",
        "follows it, or reasons",
        follows_behind_reasoning,
        without_grammars,
    ),
    Fact("grammars", "an invalid grammar", "refused, and the engine goes on", refuses_a_grammar, without_grammars),
    Fact("adapters", "an adapter", "another answer", adapts, _without_adapter),
    Fact(
        "adapters", "an adapter after the model", "0 cached tokens", adapts_without_the_models_cache, _without_adapter
    ),
]
