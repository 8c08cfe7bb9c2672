"""The start of a TensorRT-LLM engine: options, environment, import, construction, first token. Each step reports its
errors before the next, slower one begins.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from dynserve.config import WorkerConfig
from dynserve.errors import ConfigError, InternalError
from dynserve.executors.base import Executor
from dynserve.executors.trtllm import options as opts
from dynserve.executors.trtllm.api import Api, import_api
from dynserve.executors.trtllm.engine import TrtllmEngine, capacity_of, pairing_of
from dynserve.executors.trtllm.environment import check_nixl, prepare
from dynserve.executors.trtllm.executor import TrtllmExecutor
from dynserve.tasks import detached, task_group

log = logging.getLogger(__name__)


@asynccontextmanager
async def open_executor(config: WorkerConfig, instance_id: str, transceivers: object = None) -> AsyncIterator[Executor]:
    """Builds the engine (minutes, in a thread), waits for its first token, and runs it until the block ends.

    Raises:
        ConfigError: an option, the model or the installation is not usable; raised before weights are loaded.
        InternalError: the engine could not start.
    """
    given = opts.read_options(config)
    prepare(os.environ, config.model_path)
    if config.plane_tls_certificate and config.role != "aggregated":
        log.warning(
            "--plane-tls-certificate does not cover TensorRT-LLM's KV transfers: keep them on a private network"
        )
    api = await detached(import_api)
    log.info("tensorrt_llm %s", api.version)
    schema, name = opts.schema_of(api.arguments), f"tensorrt_llm {api.version}"
    opts.check_names(given, schema, name)
    arguments = opts.llm_arguments(given, config, schema, api.version)
    backend = ((arguments.get("cache_transceiver_config") or {}).get("backend")) or ""
    backend = backend and opts.resolved_backend(backend, api.version)
    if backend == "NIXL":
        check_nixl(os.environ)
    llm = await detached(partial(_build, api, arguments, given))
    async with task_group() as tasks:
        pairing = pairing_of(api, llm, config.model_path, backend)
        engine = TrtllmEngine(llm, api, config, instance_id, pairing, await capacity_of(llm), tasks)
        engine.targets = targets = tuple(TrtllmExecutor(engine, config, instance_id, at) for at in range(engine.ranks))
        try:
            await engine.start()
            yield targets[0]
        finally:
            await engine.close()


def _build(api: Api, arguments: dict[str, Any], given: opts.Options) -> Any:
    try:
        return api.llm(**arguments)
    except ValueError as error:
        raise ConfigError(_explained(error, given)) from error
    except Exception as error:
        raise InternalError(f"TensorRT-LLM could not start: {type(error).__name__}: {error}") from error


def _explained(error: ValueError, given: opts.Options) -> str:
    """Returns a pydantic error as one sentence per invalid value, each with its place."""
    errors = getattr(error, "errors", None)
    if errors is None:
        return f"engine options: {error}"
    messages = []
    for one in errors():
        path = tuple(str(part) for part in one["loc"])
        messages.append(f"{given.place(*path)}: {'.'.join(path)}: {one['msg']} (not {one.get('input')!r})")
    return "; ".join(messages)
