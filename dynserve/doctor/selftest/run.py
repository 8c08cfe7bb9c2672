"""The run of the self-test: builds both engines, checks all facts in order, and prints each when it is known."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from dynserve.config import DisaggregationMode
from dynserve.doctor.finding import DoctorConfig
from dynserve.doctor.selftest.api import api_rows
from dynserve.doctor.selftest.death import DEATH, descendants
from dynserve.doctor.selftest.engines import Engines, config_of, make_adapter, why
from dynserve.doctor.selftest.fact import Fact, Row, judged
from dynserve.doctor.selftest.handoffs import HANDOFFS
from dynserve.doctor.selftest.requests import REQUESTS
from dynserve.errors import ConfigError, InternalError
from dynserve.executors.base import open_executor
from dynserve.executors.trtllm.api import import_api
from dynserve.executors.trtllm.executor import TrtllmExecutor
from dynserve.hub import is_id, model_folder
from dynserve.model_files import check_model_folder
from dynserve.tasks import detached

FACT_TIMEOUT = 180.0  # seconds
SHUTDOWN = 40.0  # seconds
FACTS = [*REQUESTS, *HANDOFFS, *DEATH]


async def selftest(config: DoctorConfig, groups: Collection[str] = ()) -> AsyncIterator[Row]:
    """Yields a row for each fact of these groups, or of all groups. Without engines that start there are only a few."""
    if is_id(config.model_path):
        config = replace(config, model_path=await detached(model_folder, config.model_path))
    check_model_folder(Path(config.model_path))
    api = await detached(import_api)
    if not groups or "api" in groups:
        for row in api_rows(api):
            yield row
    with tempfile.TemporaryDirectory(prefix="dynserve-adapter-") as folder:
        async with AsyncExitStack() as stack:
            engines = None
            async for found in _opened(config, Path(folder), stack):
                if isinstance(found, Row):
                    yield found
                else:
                    engines = found
            if engines is None:
                return
            for fact in FACTS:
                if not groups or fact.group in groups:
                    yield await _checked(fact, engines)
            began = time.monotonic()
        seconds = time.monotonic() - began
        yield judged(
            "shutdown of both engines", "in time", "in time" if seconds < SHUTDOWN else f"after {seconds:.0f} s"
        )


async def _opened(config: DoctorConfig, folder: Path, stack: AsyncExitStack) -> AsyncIterator[Row | Engines]:
    """Builds the engines, one after the other: each measures the free memory when it starts."""
    model = Path(config.model_path)
    try:
        prefill = await _open(stack, config, "prefill", "")
    except Exception as error:
        yield Row("FAILED", "a prefill engine", "starts", why(error))
        return
    yield Row("ok", "a prefill engine", "starts", "starts")
    before, adapter = descendants(os.getpid()), ""
    try:
        adapter = make_adapter(model, folder)
        decode = await _open(stack, config, "decode", adapter)
        yield Row("ok", "a decode engine with an adapter", "starts", "starts")
    except Exception as error:
        yield Row("FAILED", "a decode engine with an adapter", "starts", why(error))
        adapter = ""
        try:
            decode = await _open(stack, config, "decode", "")
        except Exception as second:
            yield Row("FAILED", "a decode engine", "starts", why(second))
            return
    engines = Engines(prefill, decode, model, adapter.partition("=")[0])
    engines.processes = descendants(os.getpid()) - before
    yield engines


async def _open(stack: AsyncExitStack, config: DoctorConfig, role: DisaggregationMode, adapter: str) -> TrtllmExecutor:
    opened = await stack.enter_async_context(open_executor(config_of(config, role, adapter), f"selftest-{role}"))
    if not isinstance(opened, TrtllmExecutor):
        raise InternalError("this is not a TensorRT-LLM executor")
    return opened


async def _checked(fact: Fact, engines: Engines) -> Row:
    if because := fact.needs(engines):
        return Row("skip", fact.name, fact.expected, because)
    try:
        async with asyncio.timeout(FACT_TIMEOUT):
            return judged(fact.name, fact.expected, await fact.check(engines))
    except Exception as error:
        return Row("FAILED", fact.name, fact.expected, why(error))


async def main(config: DoctorConfig) -> int:
    """Prints the table. Returns the exit code: 1 if something failed or differs from what is expected."""
    rows: list[Row] = []
    with _own_output() as output:
        try:
            async for row in selftest(config):
                rows.append(row)
                if not config.json:
                    print(row.line, file=output, flush=True)
        except ConfigError as error:
            rows.append(Row("FAILED", "the self-test", "runs", why(error)))
            if not config.json:
                print(rows[-1].line, file=output)
        wrong = sum(row.state in ("FAILED", "DIFFERS") for row in rows)
        if config.json:
            print(json.dumps({"ok": not wrong, "facts": [row._asdict() for row in rows]}, indent=2), file=output)
        else:
            print(f"\nas expected: {sum(row.state == 'ok' for row in rows)}, different or failed: {wrong}", file=output)
    return 1 if wrong else 0


@contextmanager
def _own_output() -> Iterator[TextIO]:
    """Yields the standard output. Whatever else is printed there, as engines and their processes do, goes to the standard
    error, for the rest of the process."""
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w") as output:
        os.dup2(2, 1)
        yield output
