"""The start of a TensorRT-LLM engine: options, environment, import, construction, first token. Each step reports its
errors before the next, slower one begins.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, NamedTuple

from dynserve.config import WorkerConfig
from dynserve.errors import ConfigError, InternalError
from dynserve.executors.base import Executor
from dynserve.executors.trtllm import environment
from dynserve.executors.trtllm import options as opts
from dynserve.executors.trtllm.api import Api, import_api
from dynserve.executors.trtllm.arguments import LlmArguments, llm_arguments, resolved_backend
from dynserve.executors.trtllm.engine import TrtllmEngine, capacity_of
from dynserve.executors.trtllm.executor import TrtllmExecutor
from dynserve.executors.trtllm.probes import check_adapters, check_kv_events
from dynserve.tasks import detached, task_group

log = logging.getLogger(__name__)


@asynccontextmanager
async def open_executor(
    config: WorkerConfig, instance_id: str, transceivers: object = None, prepared: StartPlan | None = None
) -> AsyncIterator[Executor]:
    """Builds the engine (minutes, in a thread), waits for its first token, and runs it until the block ends.

    Raises:
        ConfigError: an option, the model or the installation is not usable; raised before weights are loaded.
        InternalError: the engine could not start.
    """
    plan: StartPlan = await detached(partial(prepare, config)) if prepared is None else prepared
    if config.plane_tls_certificate and config.role != "aggregated":
        log.warning(
            "--plane-tls-certificate does not cover TensorRT-LLM's KV transfers: keep them on a private network"
        )
    log.info("tensorrt_llm %s", plan.api.version)
    if plan.arguments.no_grammars:
        log.info("requests cannot have a grammar: %s", plan.arguments.no_grammars)
    llm = await detached(partial(_build, plan))
    async with task_group() as tasks:
        engine = TrtllmEngine(llm, plan.api, config, instance_id, plan.backend, await capacity_of(llm), tasks)
        no_grammars = plan.arguments.no_grammars
        engine.targets = targets = tuple(
            TrtllmExecutor(engine, config, instance_id, rank, no_grammars) for rank in range(engine.ranks)
        )
        try:
            await engine.start()
            await check_kv_events(engine, targets[0].max_prompt)
            await check_adapters(engine, targets[0].adapters)
            yield targets[0]
        finally:
            await engine.close()


class StartPlan(NamedTuple):
    """All that is known of an engine before it is built. `backend`: that of its transceiver; empty without one."""

    given: opts.Options
    api: Api
    arguments: LlmArguments
    backend: str


def prepare(config: WorkerConfig) -> StartPlan:
    """Imports TensorRT-LLM, which takes many seconds, and checks everything that can be known before weights are loaded.

    Raises:
        ConfigError: an option, an adapter or the installation is not usable.
    """
    given = opts.read_options(config)
    environment.prepare(os.environ, config.model_path)
    api = import_api()
    schema, name = opts.schema_of(api.arguments), f"tensorrt_llm {api.version}"
    opts.check_names(given, schema, name)
    tells_size = hasattr(api.llm, "get_kv_cache_capacity")
    arguments = llm_arguments(given, config, schema, api.version, tells_size=tells_size)
    _check_values(api, arguments, given)
    backend = ((arguments.keywords.get("cache_transceiver_config") or {}).get("backend")) or ""
    backend = backend and resolved_backend(backend, api.version)
    if backend == "NIXL":
        environment.check_nixl(os.environ)
    return StartPlan(given, api, arguments, backend)


def _check_values(api: Api, arguments: LlmArguments, given: opts.Options) -> None:
    """Raises ConfigError for values that the arguments' own model refuses; the constructor reports everything else."""
    try:
        api.arguments(**arguments.keywords)
    except ValueError as error:
        if getattr(error, "errors", None) is not None:
            raise ConfigError(_explained(error, given)) from error
    except Exception as error:
        log.debug("the arguments cannot be checked before the engine is built: %s: %s", type(error).__name__, error)


def _build(plan: StartPlan) -> Any:
    try:
        return plan.api.llm(**plan.arguments.keywords)
    except ValueError as error:
        raise ConfigError(_explained(error, plan.given)) from error
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
