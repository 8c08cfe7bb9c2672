"""The run of the self-test: builds the engines, checks the facts in order, and prints each when it is known."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, TextIO

import uvloop

from dynserve.config import DisaggregationMode
from dynserve.doctor.finding import DoctorConfig
from dynserve.doctor.selftest.adapter import NAME, NoAdapter, make_adapter
from dynserve.doctor.selftest.api import api_rows
from dynserve.doctor.selftest.engines import PAIR_OPTIONS, Engines, config_of, why
from dynserve.doctor.selftest.fact import Fact, Row, judged
from dynserve.doctor.selftest.pair import PAIR, descendants
from dynserve.doctor.selftest.requests import REQUESTS
from dynserve.errors import InternalError
from dynserve.executors.base import open_executor
from dynserve.executors.trtllm import environment
from dynserve.executors.trtllm.api import import_api
from dynserve.executors.trtllm.executor import TrtllmExecutor
from dynserve.hub import is_id, model_folder
from dynserve.model_files import check_model_folder
from dynserve.tasks import detached

OPEN_TIMEOUT = 1800.0  # seconds for one engine
FACT_TIMEOUT = 300.0  # seconds
NOTICE_S = 0.6  # seconds until the executor has noticed that an engine died
SHUTDOWN_S = 25.0  # less than the executor's own limit
FACTS = [*REQUESTS, *PAIR]

Opening = Callable[[AsyncExitStack], AsyncIterator[Row | Engines]]


async def selftest(config: DoctorConfig, groups: Collection[str] = ()) -> AsyncIterator[Row]:
    """Yields a row for each fact of these groups, or of all groups."""
    environment.prepare(os.environ, config.model_path)
    if is_id(config.model_path):
        config = replace(config, model_path=await detached(model_folder, config.model_path))
    check_model_folder(Path(config.model_path))
    api = await detached(import_api)
    if not groups or "api" in groups:
        for row in api_rows(api):
            yield row
    with tempfile.TemporaryDirectory(prefix="dynserve-adapter-") as folder:
        stages = (REQUESTS, _one(config), "shutdown"), (PAIR, _two(config, Path(folder)), "shutdown of both engines")
        for facts, opening, ending in stages:
            chosen = [fact for fact in facts if not groups or fact.group in groups]
            if chosen:
                async for row in _stage(opening, chosen, ending):
                    yield row


async def _stage(opening: Opening, facts: Sequence[Fact], ending: str) -> AsyncIterator[Row]:
    """Checks facts on the same engines, and their shutdown. Where a fact kills them, they are built again for the next."""
    ahead = list(facts)
    while ahead:
        engines: Engines | None = None
        before = descendants(os.getpid())
        async with AsyncExitStack() as stack:
            async for found in opening(stack):
                if isinstance(found, Row):
                    yield found
                else:
                    engines = found
            if engines is None:
                for fact in ahead:
                    yield Row("skip", fact.name, fact.expected, "its engine does not start")
                return
            while ahead:
                fact = ahead.pop(0)
                yield await _checked(fact, engines)
                if engines.died and ahead:
                    yield Row("FAILED", f"the engine after: {fact.name}", "alive", engines.died)
                    break
            began = time.monotonic()
        if not engines.died:
            seconds, left = time.monotonic() - began, len(descendants(os.getpid()) - before)
            yield judged(ending, "in time", "in time" if seconds < SHUTDOWN_S else f"after {seconds:.0f} s")
            yield judged(f"processes after the {ending}", "", str(left))  # those of MPI live on


def _one(config: DoctorConfig) -> Opening:
    """Returns the opening of an aggregated engine, with the options of a worker."""

    async def opening(stack: AsyncExitStack) -> AsyncIterator[Row | Engines]:
        try:
            executor = await _open(stack, config, "prefill_and_decode", {})
        except Exception as error:
            yield Row("FAILED", "an aggregated engine", "starts", why(error))
            return
        yield Row("ok", "an aggregated engine", "starts", "starts")
        yield Engines(Path(config.model_path), executor)

    return opening


def _two(config: DoctorConfig, folder: Path) -> Opening:
    """Returns the opening of a prefill and a decode engine, one after the other: each measures the free memory."""

    async def opening(stack: AsyncExitStack) -> AsyncIterator[Row | Engines]:
        model, adapter, without = Path(config.model_path), "", ""
        try:
            adapter = make_adapter(model, folder)
        except NoAdapter as error:
            without = str(error)
        try:
            prefill = await _open(stack, config, "prefill", PAIR_OPTIONS)
        except Exception as error:
            yield Row("FAILED", "a prefill engine", "starts", why(error))
            return
        yield Row("ok", "a prefill engine", "starts", "starts")
        before = descendants(os.getpid())
        try:
            decode = await _open(stack, config, "decode", PAIR_OPTIONS, adapter)
        except Exception as error:
            yield Row("FAILED", "a decode engine with an adapter", "starts", why(error))
            adapter, without = "", "the engine does not start with it"
            try:
                decode = await _open(stack, config, "decode", PAIR_OPTIONS)
            except Exception as second:
                yield Row("FAILED", "a decode engine", "starts", why(second))
                return
        name = "a decode engine with an adapter" if adapter else "a decode engine"
        yield Row("ok", name, "starts", "starts")
        processes = descendants(os.getpid()) - before
        yield Engines(model, decode, prefill, NAME if adapter else "", without, processes)

    return opening


async def _open(
    stack: AsyncExitStack,
    config: DoctorConfig,
    role: DisaggregationMode,
    defaults: Mapping[str, Any],
    adapter: str = "",
) -> TrtllmExecutor:
    async with asyncio.timeout(OPEN_TIMEOUT):
        made = config_of(config, role, defaults, adapter)
        opened = await stack.enter_async_context(open_executor(made, f"selftest-{role}-{os.getpid()}"))
    if not isinstance(opened, TrtllmExecutor):
        raise InternalError("this is not a TensorRT-LLM executor")
    return opened


async def _checked(fact: Fact, engines: Engines) -> Row:
    print(f"checking: {fact.name}", file=sys.stderr, flush=True)  # the last line, should the process crash
    try:
        if because := fact.needs(engines):
            return Row("skip", fact.name, fact.expected, because)
        async with asyncio.timeout(FACT_TIMEOUT):
            row = judged(fact.name, fact.expected, await fact.check(engines))
    except Exception as error:
        row = Row("FAILED", fact.name, fact.expected, why(error))
    if row.state in ("FAILED", "DIFFERS"):
        await asyncio.sleep(NOTICE_S)
    return row


def main(config: DoctorConfig) -> NoReturn:
    """Prints the table and ends the process: with 1 if something failed or differs from what is expected."""
    with _own_output() as output:
        code = uvloop.run(_printed(config, output))
    # an engine that was killed may block the clean-up at the end of the interpreter
    for pid in descendants(os.getpid()):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    os._exit(code)


async def _printed(config: DoctorConfig, output: TextIO) -> int:
    def write(text: str) -> None:
        print(text, file=output, flush=True)

    rows: list[Row] = []
    try:
        async for row in selftest(config):
            rows.append(row)
            write(json.dumps(row._asdict()) if config.json else row.line)
    except Exception as error:
        rows.append(Row("FAILED", "the self-test", "runs to its end", why(error)))
        write(json.dumps(rows[-1]._asdict()) if config.json else rows[-1].line)
    wrong = sum(row.state in ("FAILED", "DIFFERS") for row in rows)
    fine = sum(row.state == "ok" for row in rows)
    summary = {"ok": not wrong, "as_expected": fine, "different_or_failed": wrong}
    write(json.dumps(summary) if config.json else f"\nas expected: {fine}, different or failed: {wrong}")
    return 1 if wrong else 0


@contextmanager
def _own_output() -> Iterator[TextIO]:
    """Yields the standard output. Whatever else is printed there, as engines and their processes do, goes to the standard
    error, for the rest of the process."""
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w") as output:
        os.dup2(2, 1)
        yield output
