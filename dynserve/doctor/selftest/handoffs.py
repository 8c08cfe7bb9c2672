"""Hand-offs between the two engines, those that are cancelled, and what an engine reports: KV events and statistics."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from typing import Any

from dynserve.doctor.selftest.engines import TRANSFER_MS, Answer, Engines
from dynserve.doctor.selftest.fact import Fact, without_grammars
from dynserve.doctor.selftest.requests import DIGITS
from dynserve.executors.trtllm import state
from dynserve.executors.trtllm.executor import TrtllmExecutor
from dynserve.wire.events import KvEvent, Stored
from dynserve.wire.hashing import rolling_hashes
from dynserve.wire.requests import SamplingParams, StopConditions, pack_tokens

SOON = 10.0  # seconds
ROW_KEYS = ("iter", "kvCacheStats", "inflightBatchingStats", "numQueuedRequests")


async def context_result(engines: Engines) -> str:
    output = (await _context(engines))[0].outputs[0]
    params = output.disaggregated_params
    ids = params is not None and params.ctx_request_id is not None
    kind = params.request_type if params is not None else "no params"
    tokens = len(params.first_gen_tokens or ()) if params is not None else 0
    fine = output.finish_reason in ("not_finished", "length")
    return f"{kind}, {tokens} token, {'with' if ids else 'without'} id, {'open' if fine else output.finish_reason}"


async def context_details(engines: Engines) -> str:
    output = (await _context(engines))[0].outputs[0]
    params = output.disaggregated_params
    opaque = "no opaque_state" if not params.opaque_state else f"opaque_state of {len(params.opaque_state)} bytes"
    endpoint = "an endpoint" if getattr(params, "ctx_info_endpoint", None) else "no endpoint"
    return f"finish_reason {output.finish_reason}, {opaque}, {endpoint}"


async def max_tokens_of_generation(engines: Engines) -> str:
    """Whether the first token, which the prefill has generated, counts."""
    result, number = await _context(engines)
    params = result.outputs[0].disaggregated_params
    disagg = dataclasses.replace(params, request_type=state.GENERATION, disagg_request_id=number)
    result = engines.raw(engines.decode, engines.prompt(), max_tokens=4, disagg=disagg)
    async for _ in result:
        pass
    return f"max_tokens 4 gives {len(result.outputs[0].token_ids)} tokens, the first included"


async def same_answer(engines: Engines) -> str:
    prompt = engines.prompt(first=11)
    whole = await engines.ask(prompt)
    before = engines.decode.counters().get("kv_transfers_done_total", 0)
    tokens, _ = await engines.hand_over(engines.request(prompt))
    if engines.decode.counters().get("kv_transfers_done_total", 0) == before:
        return "not transferred: the decode engine has prefilled the prompt itself"
    return "the answer of one engine" if tokens == whole.tokens else "another answer"


async def with_logprobs(engines: Engines) -> str:
    request = engines.request(engines.prompt(first=13), sampling=SamplingParams(temperature=0.0, logprobs=2))
    tokens, logprobs = await engines.hand_over(request)
    return f"{'one' if [entry.token_id for entry in logprobs] == tokens else 'not one'} entry for each token"


async def with_grammar(engines: Engines) -> str:
    request = engines.request(engines.prompt(first=17), grammar=DIGITS, stop=StopConditions(max_tokens=24))
    text = engines.text((await engines.hand_over(request))[0])
    return "follows it" if re.fullmatch(DIGITS.text, text.strip()) else f"answers {text!r}"


async def cancelled(engines: Engines) -> str:
    """Whether the engine frees the blocks of a hand-off that nobody fetches, and when."""
    prefill = engines.prefill
    before = await _free_blocks(engines, prefill)
    _, ticket = await engines.run(prefill, engines.request(engines.prompt(first=19), phase="prefill"))
    prefill.abort(ticket)
    held = await _free_blocks(engines, prefill) < before
    loop = asyncio.get_running_loop()
    deadline = loop.time() + TRANSFER_MS / 1000 + SOON
    while (freed := await _free_blocks(engines, prefill) >= before) is False and loop.time() < deadline:
        await asyncio.sleep(0.2)
    return f"{'held' if held else 'not held'}, then {'free' if freed else 'still held'}"


async def aborted(engines: Engines) -> str:
    answer = Answer()
    ticket = engines.decode.submit(engines.request(stop=StopConditions(max_tokens=900, ignore_eos=True)), answer)
    await _until(lambda: bool(answer.tokens))
    engines.decode.abort(ticket)
    return "ended" if await _until(lambda: engines.decode.load().running == 0) else "still running after 10 s"


async def event_blocks(engines: Engines) -> tuple[str, str]:
    streams = engines.decode.engine.streams
    size = engines.decode.limits.block_size
    if streams is None or not engines.decode.limits.kv_events:
        return f"blocks of {size} tokens", "none"
    return f"blocks of {size} tokens", f"blocks of {streams.ranks[0].full_size or 'unknown'} tokens"


async def event_hashes(engines: Engines) -> str:
    found: set[int] = set()

    def listen(events: list[KvEvent]) -> None:
        found.update(hash_ for event in events if isinstance(event, Stored) for hash_ in event.hashes)

    engines.decode.listen_kv(listen)
    prompt = engines.prompt(first=23, length=3 * engines.decode.limits.block_size + 5)
    await engines.ask(prompt)
    expected = set(rolling_hashes(pack_tokens(prompt), engines.decode.limits.block_size))
    return (
        "those of the prompt"
        if await _until(lambda: expected <= found)
        else f"{len(expected & found)} of {len(expected)}"
    )


async def event_names(engines: Engines) -> str:
    streams = engines.decode.engine.streams
    return f"salts are {'named' if streams is not None and streams.names_salts else 'not named'}"


async def event_gaps(engines: Engines) -> str:
    return str(engines.decode.engine.losses(0)[0])


async def rows(engines: Engines) -> str:
    await engines.ask()
    await _until(lambda: bool(engines.decode.stats.row))
    missing = [name for name in ROW_KEYS if name not in engines.decode.stats.row]
    if not engines.decode.stats.row:
        return "no rows"
    return f"rows without {', '.join(missing)}" if missing else "rows with all that is read"


async def _context(engines: Engines) -> tuple[Any, int]:
    """Returns the result of a context phase as the engine gives it, and its id."""
    engine = engines.prefill.engine
    number = next(engine.ids)
    disagg = engine.api.disaggregated(request_type=state.CONTEXT, disagg_request_id=number)
    result = engines.raw(engines.prefill, engines.prompt(), streaming=False, max_tokens=8, disagg=disagg)
    async for _ in result:
        pass
    return result, number


async def _free_blocks(engines: Engines, executor: TrtllmExecutor) -> int:
    """Returns the free blocks of a row of statistics that was written after this call."""
    before = executor.stats.row.get("iter", 0)
    await executor.engine.canary()
    await _until(lambda: executor.stats.row.get("iter", 0) > before)
    return int((executor.stats.row.get("kvCacheStats") or {}).get("freeNumBlocks") or 0)


async def _until(condition: Any) -> bool:
    try:
        async with asyncio.timeout(SOON):
            while not condition():
                await asyncio.sleep(0.01)
    except TimeoutError:
        return False
    return True


def _without_events(engines: Engines) -> str:
    return "" if engines.decode.limits.kv_events else "the engine reports no KV events"


HANDOFFS = [
    Fact("hand-offs", "the result of a context phase", "context_only, 1 token, with id, open", context_result),
    Fact("hand-offs", "the result's details", "", context_details),
    Fact("hand-offs", "max_tokens of a generation phase", "", max_tokens_of_generation),
    Fact("hand-offs", "prefill here, decode there", "the answer of one engine", same_answer),
    Fact("hand-offs", "the same with logprobs", "one entry for each token", with_logprobs),
    Fact("hand-offs", "the same with a grammar", "follows it", with_grammar, without_grammars),
    Fact("blocks", "blocks of a cancelled hand-off", "held, then free", cancelled),
    Fact("blocks", "an aborted request", "ended", aborted),
    Fact("events", "KV events", "", event_blocks),
    Fact("events", "blocks of KV events", "those of the prompt", event_hashes, _without_events),
    Fact("events", "names in KV events", "", event_names, _without_events),
    Fact("events", "lost KV events", "0", event_gaps, _without_events),
    Fact("statistics", "rows of statistics", "rows with all that is read", rows),
]
