"""A prefill and a decode engine: hand-offs, KV events, statistics, adapters, refusals, and a killed engine at the end."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dynserve.doctor.selftest.api import is_old
from dynserve.doctor.selftest.engines import GREEDY, STALL_S, TRANSFER_MS, Engines, read
from dynserve.doctor.selftest.fact import Fact, without_grammars
from dynserve.doctor.selftest.requests import DIGITS, without_reuse
from dynserve.errors import BadRequest, EngineDied
from dynserve.executors.trtllm import state
from dynserve.executors.trtllm.executor import TrtllmExecutor
from dynserve.executors.trtllm.probes import MIN_DIFFERENCE, FirstToken, difference
from dynserve.wire.events import KvEvent, Stored
from dynserve.wire.hashing import rolling_hashes
from dynserve.wire.requests import Grammar, SamplingParams, StopConditions, pack_tokens

WAIT_S = 10.0  # for what must come soon
NUDGE_S = 0.2
ABORT_S = 60.0
ABORT_TOKENS = 900
DEATH_MARGIN_S = 15.0
TOO_LONG_AS_EXPECTED = "default_max_tokens in RequestError, while it is read"
ROW_KEYS = ("iter", "kvCacheStats", "inflightBatchingStats", "numQueuedRequests")


async def context_result(engines: Engines) -> str:
    output = (await _context(engines))[0].outputs[0]
    params = output.disaggregated_params
    if params is None:
        return "no disaggregated_params"
    tokens, id_ = len(params.first_gen_tokens or ()), "with" if params.ctx_request_id is not None else "without"
    ended = "not ended" if output.finish_reason in ("not_finished", "length") else f"ended: {output.finish_reason}"
    return f"{params.request_type}, {tokens} token, {id_} id, {ended}"


async def context_details(engines: Engines) -> str:
    output = (await _context(engines))[0].outputs[0]
    params = output.disaggregated_params
    opaque = "no opaque_state" if not params.opaque_state else f"opaque_state of {len(params.opaque_state)} bytes"
    endpoint = "an endpoint" if getattr(params, "ctx_info_endpoint", None) else "no endpoint"
    return f"finish_reason {output.finish_reason}, {opaque}, {endpoint}"


async def max_tokens_of_generation(engines: Engines) -> str:
    """Returns whether the first token, which the prefill has generated, counts."""
    result, number = await _context(engines)
    params = result.outputs[0].disaggregated_params
    disagg = dataclasses.replace(params, request_type=state.GENERATION, disagg_request_id=number)
    keywords = {"disaggregated_params": disagg}
    result = await read(engines.raw(engines.main, engines.prompt(), max_tokens=4, keywords=keywords))
    return f"{len(result.outputs[0].token_ids)} tokens, the first included"


async def same_answer(engines: Engines) -> str:
    """Compares with the answer of the prefill engine: the decode engine must not have the prompt in its cache."""
    prompt = engines.prompt(11, engines.blocks)
    whole, _ = await engines.run(engines.prefill, engines.request(prompt))
    before = engines.main.counters().get("kv_transfers_done_total", 0)
    tokens, _ = await engines.hand_over(engines.request(prompt))
    if engines.main.counters().get("kv_transfers_done_total", 0) == before:
        return "not transferred: the decode engine has prefilled the prompt itself"
    return "the answer of one engine" if whole.agrees(tokens) else "another answer"


async def with_logprobs(engines: Engines) -> str:
    tokens, logprobs = await engines.hand_over(engines.request(engines.prompt(13), sampling=GREEDY))
    return f"{'one' if [entry.token_id for entry in logprobs] == tokens else 'not one'} entry for each token"


async def with_grammar(engines: Engines) -> str:
    request = engines.request(engines.prompt(17), grammar=DIGITS, stop=StopConditions(max_tokens=24))
    tokens, _ = await engines.hand_over(request)
    text = engines.text(tokens)
    return "follows it" if text.strip().isdigit() and len(text.strip()) == 5 else f"answers {text!r}"


async def cancelled(engines: Engines) -> str:
    """Returns whether and when the engine frees the blocks of a hand-off that nobody fetches."""
    prefill, length = engines.prefill, engines.blocks
    await asyncio.sleep(TRANSFER_MS / 1000 + 1)  # hand-offs of earlier facts
    before = await _free_blocks(prefill)
    request = engines.request(engines.prompt(19, length), phase="prefill")
    _, ticket = await engines.run(prefill, request)
    prefill.abort(ticket)
    enough = before - length // engines.main.limits.block_size + 1  # the measurement itself may hold a block
    held = await _free_blocks(prefill) <= enough
    loop = asyncio.get_running_loop()
    deadline = loop.time() + TRANSFER_MS / 1000 + WAIT_S
    while (now := await _free_blocks(prefill)) < before and loop.time() < deadline:
        await asyncio.sleep(0.2)
    return f"{'held' if held else 'not held'}, then {'free' if now >= before else 'still held'}"


async def aborted(engines: Engines) -> str:
    length = ABORT_TOKENS
    result = engines.raw(engines.main, engines.prompt(), max_tokens=length)
    async with asyncio.timeout(ABORT_S):
        async for step in result:
            if not step.aborted():
                step.abort()
    output = result.outputs[0]
    when = "early" if len(output.token_ids) < length / 2 else f"after {len(output.token_ids)} tokens"
    return f"{output.finish_reason}, {when}"


async def event_blocks(engines: Engines) -> tuple[str, str]:
    streams, size = engines.main.engine.streams, engines.main.limits.block_size
    if streams is None:
        return f"blocks of {size} tokens", "none"
    return f"blocks of {size} tokens", f"blocks of {streams.ranks[0].full_size or 'unknown'} tokens"


async def event_hashes(engines: Engines) -> str:
    found: set[int] = set()

    def listen(events: list[KvEvent]) -> None:
        found.update(hash_ for event in events if isinstance(event, Stored) for hash_ in event.hashes)

    engines.main.listen_kv(listen)
    prompt = engines.prompt(23, engines.blocks)
    await engines.ask(prompt)
    expected = set(rolling_hashes(pack_tokens(prompt), engines.main.limits.block_size))
    came = False
    async with asyncio.timeout(2 * WAIT_S):
        for _ in range(int(WAIT_S / NUDGE_S) + 1):
            if came := expected <= found:
                break
            await asyncio.sleep(NUDGE_S)
            await engines.main.engine.canary()  # version 1.2 passes events on after submissions only
    return "those of the prompt" if came else f"{len(expected & found)} of {len(expected)}"


async def event_salts(engines: Engines) -> str:
    streams = engines.main.engine.streams
    return "named" if streams is not None and streams.names_salts else "not named"


async def event_gaps(engines: Engines) -> str:
    return str(engines.main.engine.losses(0)[0])


async def rows(engines: Engines) -> str:
    await engines.ask()
    await _until(lambda: bool(engines.main.stats.row))
    missing = [name for name in ROW_KEYS if name not in engines.main.stats.row]
    if not engines.main.stats.row:
        return "no rows"
    return f"rows without {', '.join(missing)}" if missing else "rows with every key that is read"


async def adapts(engines: Engines) -> str:
    """Compares the first tokens of an answer with the adapter and without, the latter twice."""
    sampling = SamplingParams(temperature=0.0, logprobs=5)

    async def first(adapter: str) -> FirstToken:
        found = await engines.ask(engines.prompt(29), sampling=sampling, adapter=adapter)
        return FirstToken(found.tokens[0], dict(found.logprobs[0].top) if found.logprobs else {})

    plain, again, other = await first(""), await first(""), await first(engines.adapter)
    changed = difference(plain, other) > max(difference(plain, again), MIN_DIFFERENCE)
    return "another answer" if changed else "the model's answer"


async def adapts_without_the_models_cache(engines: Engines) -> str:
    prompt = engines.prompt(37, engines.blocks)
    await engines.ask(prompt)
    found = await engines.ask(prompt, adapter=engines.adapter)
    return f"{found.last.cached_tokens} cached tokens"


async def refuses_a_grammar(engines: Engines) -> str:
    try:
        found = await engines.ask(grammar=Grammar(kind="json", text='{"type": "wrong"}'))
    except BadRequest:
        return f"refused, then {len((await engines.ask()).tokens)} tokens"
    return f"answers {engines.text(found.tokens)!r}"


async def fills_the_context(engines: Engines) -> str:
    found = await engines.ask(
        engines.prompt(41, engines.main.limits.max_seq_len - 2), stop=StopConditions(max_tokens=1)
    )
    return f"{found.reason}, {len(found.tokens)} tokens"


async def refuses_a_long_prompt(engines: Engines) -> str:
    """Asks the engine itself: the executor refuses such prompts before."""
    where = "at the call"
    try:
        prompt = engines.prompt(43, engines.main.limits.max_seq_len + 10)
        result = engines.raw(engines.main, prompt, max_tokens=4)
        where = "while it is read"
        await read(result)
    except Exception as error:
        text = "default_max_tokens" if "default_max_tokens" in str(error) else repr(str(error))
        return f"{text} in {type(error).__name__}, {where}"
    return "an answer"


async def answers_canary(engines: Engines) -> str:
    return "answers" if await engines.main.engine.alive() else "does not answer"


async def killed(engines: Engines) -> str:
    """Kills the processes of the decode engine with SIGKILL."""
    for pid in engines.processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    limit = 2 * STALL_S + DEATH_MARGIN_S
    try:
        async with asyncio.timeout(limit):
            await asyncio.shield(engines.main.failed)
    except EngineDied as error:
        return f"dead, by its {'silence' if 'not even one token' in str(error) else 'own report'}"
    except TimeoutError:
        return f"not noticed within {limit:.0f} s"
    return "alive"


def descendants(pid: int) -> frozenset[int]:
    """Returns the processes that a process has started, and theirs. Linux only; empty elsewhere."""
    children: dict[int, list[int]] = {}
    for child, parent in _processes():
        children.setdefault(parent, []).append(child)
    found: set[int] = set()
    ahead = [pid]
    while ahead:
        for child in children.get(ahead.pop(), []):
            if child not in found:
                found.add(child)
                ahead.append(child)
    return frozenset(found)


def _processes() -> Iterator[tuple[int, int]]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            yield int(path.parent.name), int(path.read_text().rpartition(")")[2].split()[1])


async def _context(engines: Engines) -> tuple[Any, int]:
    """Returns the result of a context phase as the engine gives it, and its id."""
    engine = engines.prefill.engine
    number = next(engine.ids)
    keywords = {"disaggregated_params": engine.api.disaggregated(request_type=state.CONTEXT, disagg_request_id=number)}
    result = engines.raw(engines.prefill, engines.prompt(), streaming=False, keywords=keywords, max_tokens=8)
    return await read(result), number


async def _free_blocks(executor: TrtllmExecutor) -> int:
    """Returns the free blocks of a row of statistics that was written after this call."""
    before = executor.stats.row.get("iter", 0)
    await executor.engine.canary()
    await _until(lambda: executor.stats.row.get("iter", 0) > before)
    return int((executor.stats.row.get("kvCacheStats") or {}).get("freeNumBlocks") or 0)


async def _until(condition: Any) -> bool:
    try:
        async with asyncio.timeout(WAIT_S):
            while not condition():
                await asyncio.sleep(0.01)
    except TimeoutError:
        return False
    return True


def _without_adapter(engines: Engines) -> str:
    return engines.no_adapter


def _without_rows(engines: Engines) -> str:
    return "" if engines.prefill.stats.row else "the engine writes no statistics"


def _without_processes(engines: Engines) -> str:
    if is_old(engines.main.engine.api):
        return "a dead engine of this version blocks its whole process, which the worker then ends"
    return "" if engines.processes else "the engine has no processes of its own"


PAIR = [
    Fact("hand-offs", "the result of a context phase", "context_only, 1 token, with id, not ended", context_result),
    Fact("hand-offs", "the details of that result", "", context_details),
    Fact("hand-offs", "max_tokens 4 of a generation phase", "", max_tokens_of_generation),
    Fact("hand-offs", "prefill here, decode there", "the answer of one engine", same_answer),
    Fact("hand-offs", "the same with logprobs", "one entry for each token", with_logprobs),
    Fact("hand-offs", "the same with a grammar", "follows it", with_grammar, without_grammars),
    Fact("blocks", "blocks of a cancelled hand-off", "held, then free", cancelled, _without_rows),
    Fact("blocks", "an aborted request", "cancelled, early", aborted),
    Fact("events", "KV events", "", event_blocks),
    Fact("events", "blocks of KV events", "those of the prompt", event_hashes, without_reuse),
    Fact("events", "salts in KV events", "", event_salts, without_reuse),
    Fact("events", "lost KV events", "0", event_gaps, without_reuse),
    Fact("statistics", "rows of statistics", "rows with every key that is read", rows),
    Fact("adapters", "an adapter", "another answer", adapts, _without_adapter),
    Fact(
        "adapters", "an adapter after the model", "0 cached tokens", adapts_without_the_models_cache, _without_adapter
    ),
    Fact("refusals", "a prompt that fills the context", "length, 1 tokens", fills_the_context),
    Fact(
        "refusals",
        "a prompt over the context",
        "default_max_tokens in RequestError, while it is read",
        refuses_a_long_prompt,
    ),
    Fact("refusals", "an invalid grammar", "refused, then 8 tokens", refuses_a_grammar, without_grammars),
    Fact("death", "a canary", "answers", answers_canary),
    Fact("death", "a killed engine", "dead, by its own report", killed, _without_processes),
]
