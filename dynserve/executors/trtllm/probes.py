"""The proofs that an engine gives before it serves: its adapters change answers, and it reports KV events.

Both can be lost without a word: by an option that the installed version ignores, or that the engine has changed by itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from itertools import combinations, count
from typing import Any, NamedTuple

from dynserve.errors import ConfigError, DynserveError, InternalError
from dynserve.executors.trtllm.engine import TrtllmEngine
from dynserve.executors.trtllm.request import Adapter, lora_request

log = logging.getLogger(__name__)

TOP_LOGPROBS = 5
PROMPTS = tuple([first + 3 * at for at in range(16)] for first in (1, 50, 99))  # of the proofs that an adapter is used
PLAIN_ANSWERS = 3  # for each prompt: their differences are the engine's noise
CERTAIN = 3.0  # times the noise: a smaller change may be noise, too
MIN_DIFFERENCE = 1e-4  # of log-probabilities
PROBE_TIMEOUT = 120.0  # seconds for one probe: an adapter is loaded at its first use
BLOCKS = 4  # of the prompt that must cause KV events
EVENTS_TIMEOUT = 10.0  # seconds for those events
POLL_EVERY = 0.02  # seconds
NUDGE_AFTER = 25  # polls; version 1.2 passes events on after submissions only


async def check_adapters(engine: TrtllmEngine, adapters: Mapping[str, Adapter]) -> None:
    """Compares the first token of some answers with each adapter and without.

    Raises:
        ConfigError: an adapter cannot be loaded, or it changes nothing for any prompt.
        InternalError: the engine fails at a prompt without an adapter.
    """
    if not adapters:
        return
    plain = [[await _first_token(engine, prompt) for _ in range(PLAIN_ANSWERS)] for prompt in PROMPTS]
    noise = max(difference(one, other) for answers in plain for one, other in combinations(answers, 2))
    if noise == float("inf"):
        log.warning("the engine's answers to the same prompt have nothing in common: its adapters cannot be checked")
        return
    for name, adapter in adapters.items():
        request = lora_request(engine.api, name, adapter)
        try:
            found = [await _first_token(engine, prompt, request) for prompt in PROMPTS]
        except InternalError as error:
            raise ConfigError(f"adapter {name!r} cannot be loaded from {adapter.path}: {error}") from error
        changes = max(difference(answers[0], other) for answers, other in zip(plain, found, strict=True))
        if changes <= max(noise, MIN_DIFFERENCE):
            raise ConfigError(
                f"adapter {name!r} ({adapter.path}) changes nothing: the engine answers as the model without it. Check "
                "lora_config in the engine options, and that the adapter belongs to this model"
            )
        if changes <= CERTAIN * noise:
            log.warning(
                "adapter %s changes answers hardly more than the engine's own noise: check that it is in use", name
            )
        log.info("adapter %s is in use: it changes answers (log-probabilities by up to %.2g)", name, changes)


async def check_kv_events(engine: TrtllmEngine, max_prompt: int) -> None:
    """Computes a prompt of some blocks and reads its KV events. Without any, the worker publishes that it has none: then
    routers predict its cache instead. The block size that events show wins over the options'.

    `max_prompt`: the tokens of the longest prompt that the engine takes.
    """
    if engine.streams is None:
        return
    streams, longest = engine.streams.ranks, min(BLOCKS * engine.block_size + 1, max_prompt)
    try:
        length = await _compute_blocks(engine, longest)
        async with asyncio.timeout(EVENTS_TIMEOUT):
            for turn in count(1):
                if any(one.full_size or (one.told and engine.knows_block_size) for one in streams):
                    break
                await asyncio.sleep(POLL_EVERY)
                if turn % NUDGE_AFTER == 0:
                    await _limited(engine.canary())
    except InternalError as error:
        engine.give_up_kv_events(f"a prompt of {longest} tokens failed: {error}")
        return
    except TimeoutError:
        if not any(one.told for one in streams):
            engine.give_up_kv_events(f"none came within {EVENTS_TIMEOUT:.0f} s for a prompt of {length} tokens")
        else:
            log.warning(
                "the engine does not tell the size of its KV blocks; taking it for %d tokens", engine.block_size
            )
        return
    sizes = [one.full_size for one in streams if one.full_size]
    if sizes and sizes[0] != engine.block_size:
        engine.set_block_size(sizes[0])


async def _compute_blocks(engine: TrtllmEngine, length: int) -> int:
    """Computes a prompt of this length, or of one step, where an engine does not compute prompts in chunks although its
    options say so. Returns the length."""
    try:
        await _limited(engine.probe([1 + at % 97 for at in range(length)]))
        return length
    except InternalError:
        if length <= (one_step := engine.llm.args.max_num_tokens):
            raise
        await _limited(engine.probe([1 + at % 97 for at in range(one_step)]))
        return int(one_step)


class FirstToken(NamedTuple):
    """The first token of an answer, and the log-probabilities of the likeliest ones, itself among them. Empty if the engine
    returns none."""

    token: int
    logprobs: Mapping[int, float]


def difference(one: FirstToken, other: FirstToken) -> float:
    """Returns by how much two answers differ: the greatest difference of a token's log-probabilities, or in `one` that of
    their two tokens, which is small for a near tie."""
    mine, theirs = one.logprobs, other.logprobs
    if not mine or not theirs:
        return 0.0 if one.token == other.token else float("inf")
    margin = mine[one.token] - mine.get(other.token, min(mine.values())) if one.token in mine else 0.0
    return max([margin, *(abs(mine[token] - theirs[token]) for token in mine.keys() & theirs.keys())])


async def _first_token(engine: TrtllmEngine, prompt: list[int], lora: Any = None) -> FirstToken:
    result = await _limited(engine.probe(prompt, logprobs=TOP_LOGPROBS, lora=lora))
    output = result.outputs[0]
    entries = {token: entry.logprob for token, entry in output.logprobs[0].items()} if output.logprobs else {}
    return FirstToken(output.token_ids[0], entries)


async def _limited(probe: Any) -> Any:
    """Awaits a probe. Raises InternalError if it fails, takes too long, or the engine dies."""
    try:
        async with asyncio.timeout(PROBE_TIMEOUT):
            return await probe
    except TimeoutError:
        raise InternalError(f"the engine did not answer within {PROBE_TIMEOUT:.0f} s") from None
    except DynserveError:
        raise
    except Exception as error:
        raise InternalError(f"{type(error).__name__}: {error}") from error
