"""What is used of the package `tensorrt_llm`, imported once, and what this version of it can do.

Names move between versions, so each is looked for here, and nowhere is a version compared: a keyword, field or class
that is not there is not used.
"""

from __future__ import annotations

import inspect
from dataclasses import fields
from importlib import import_module
from typing import Any, NamedTuple

from dynserve.errors import ConfigError
from dynserve.executors.trtllm import PIN
from dynserve.executors.trtllm.environment import undecodable


class Api(NamedTuple):
    version: str
    llm: Any
    arguments: Any  # the model of the constructor's arguments
    sampling: Any
    guided: Any
    disaggregated: Any
    scheduling: Any
    lora: Any
    logprob: Any
    request_error: type[Exception]
    engine_dead: type[Exception] | None  # 1.2 has none: there a dead engine is silent
    keywords: frozenset[str]  # of generate_async
    handed_over: frozenset[str]  # fields of DisaggregatedParams


def import_api() -> Api:
    """Takes many seconds with the real package.

    Raises:
        ConfigError: it is not installed, or cannot be imported here.
    """
    try:
        package = import_module("tensorrt_llm")
        api = import_module("tensorrt_llm.llmapi")
        sampling = import_module("tensorrt_llm.sampling_params")
        utils = import_module("tensorrt_llm.executor.utils")
        scheduling = import_module("tensorrt_llm.scheduling_params")
        request = import_module("tensorrt_llm.executor.request")
        result = import_module("tensorrt_llm.executor.result")
    except UnicodeDecodeError as error:
        raise undecodable(error) from error
    except ImportError as error:
        raise ConfigError(
            f"--executor trtllm needs TensorRT-LLM, which cannot be imported here: {error}; use its release image, or "
            f"pip install tensorrt-llm=={PIN}"
        ) from error
    return Api(
        version=package.__version__,
        llm=package.LLM,
        arguments=api.TorchLlmArgs,
        sampling=package.SamplingParams,
        guided=sampling.GuidedDecodingParams,
        disaggregated=package.DisaggregatedParams,
        scheduling=scheduling.SchedulingParams,
        lora=request.LoRARequest,
        logprob=result.Logprob,
        request_error=utils.RequestError,
        engine_dead=getattr(utils, "EngineDeadError", None),
        keywords=frozenset(inspect.signature(package.LLM.generate_async).parameters),
        handed_over=frozenset(field.name for field in fields(package.DisaggregatedParams)),
    )
