"""What an engine must prove before it serves: that its adapters change answers, and that it reports KV events.

Both can be lost without a word: by an option that the installed version ignores, or that the engine has changed by itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from dynserve.errors import ConfigError
from dynserve.executors.trtllm.engine import TrtllmEngine
from dynserve.executors.trtllm.request import Adapter

log = logging.getLogger(__name__)

ADAPTER_TOKENS = 4  # of a probe's answer
TOP_LOGPROBS = 5
PROBE_TIMEOUT = 120.0  # seconds for one probe: an adapter is loaded at its first use
BLOCKS = 4  # of the prompt that must cause KV events
EVENTS_TIMEOUT = 10.0  # seconds for those events
DIFFERENT = float("inf")


async def check_adapters(engine: TrtllmEngine, adapters: Mapping[str, Adapter]) -> None:
    """Compares an answer of each adapter with that of the model.

    Raises:
        ConfigError: an adapter cannot be loaded, or its answer is that of the model.
    """
    if not adapters:
        return
    plain, again = await _answer(engine, None), await _answer(engine, None)
    noise = difference(plain, again)
    for name, adapter in adapters.items():
        try:
            found = await _answer(engine, engine.api.lora(name, adapter.number, adapter.path))
        except engine.api.request_error as error:
            raise ConfigError(f"adapter {name!r} cannot be loaded from {adapter.path}: {error}") from error
        if difference(plain, found) <= noise:
            raise ConfigError(
                f"adapter {name!r} ({adapter.path}) changes nothing: the engine answers as the model without it. Check "
                "lora_config in the engine options, and that the adapter belongs to this model"
            )
        log.info("adapter %s is in use: its answers differ from the model's", name)


async def check_kv_events(engine: TrtllmEngine, max_prompt: int) -> None:
    """Computes a prompt of some blocks and reads its KV events. Without any, the worker publishes that it has none: then
    routers predict its cache instead. The block size that events show wins over the options'.

    `max_prompt`: the tokens of the longest prompt that the engine takes.
    """
    if engine.streams is None:
        return
    length = min(BLOCKS * engine.block_size + 1, max_prompt)
    stream = engine.streams.ranks[0]
    await _limited(engine.probe([1 + at % 97 for at in range(length)]))
    try:
        async with asyncio.timeout(EVENTS_TIMEOUT):
            while not (stream.full_size or (stream.told and engine.knows_block_size)):
                await asyncio.sleep(0.02)
    except TimeoutError:
        if not stream.told:
            engine.give_up_kv_events(f"none came within {EVENTS_TIMEOUT:.0f} s for a prompt of {length} tokens")
        else:
            log.warning(
                "the engine does not tell the size of its KV blocks; taking it for %d tokens", engine.block_size
            )
        return
    if stream.full_size and stream.full_size != engine.block_size:
        engine.set_block_size(stream.full_size)


def difference(one: list[tuple[int, dict[int, float]]], other: list[tuple[int, dict[int, float]]]) -> float:
    """Returns the greatest difference of two answers' log-probabilities; infinite if their tokens differ. Each position is
    a token and the log-probabilities of the likeliest tokens there."""
    worst = 0.0
    for (token, mine), (other_token, theirs) in zip(one, other, strict=False):
        common = mine.keys() & theirs.keys()
        if token != other_token or (not common and (mine or theirs)):
            return DIFFERENT
        worst = max([worst, *(abs(mine[id_] - theirs[id_]) for id_ in common)])
    return worst if len(one) == len(other) else DIFFERENT


async def _answer(engine: TrtllmEngine, lora: Any) -> list[tuple[int, dict[int, float]]]:
    prompt = list(range(1, 17))
    result = await _limited(engine.probe(prompt, max_tokens=ADAPTER_TOKENS, logprobs=TOP_LOGPROBS, lora=lora))
    output = result.outputs[0]
    entries: list[dict[int, float]] = [{id_: one.logprob for id_, one in entry.items()} for entry in output.logprobs]
    entries += [{}] * (len(output.token_ids) - len(entries))  # none, if the engine ignores `logprobs`
    return list(zip(output.token_ids, entries, strict=False))


async def _limited(probe: Any) -> Any:
    async with asyncio.timeout(PROBE_TIMEOUT):
        return await probe
