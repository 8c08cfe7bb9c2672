"""The names used from the package `tensorrt_llm`, imported once, and the features of the installed version.

Names move between versions, so features are detected here and not derived from a version number: a missing keyword,
field or class is not used.
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
    grammar: Any
    disaggregated: Any
    scheduling: Any
    lora: Any
    conversation: Any  # None on versions that know no conversations
    logprob: Any
    request_error: type[Exception]
    engine_dead: type[Exception] | None  # None on 1.2, where a dead engine only stops answering
    keywords: frozenset[str]  # of generate_async
    handed_over: frozenset[str]  # fields of DisaggregatedParams


def import_api() -> Api:
    """Imports the package, which takes many seconds.

    Raises:
        ConfigError: the package is not installed, or cannot be imported here.
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
        grammar=sampling.GuidedDecodingParams,
        disaggregated=package.DisaggregatedParams,
        scheduling=scheduling.SchedulingParams,
        lora=request.LoRARequest,
        conversation=getattr(api, "ConversationParams", None),
        logprob=result.Logprob,
        request_error=utils.RequestError,
        engine_dead=getattr(utils, "EngineDeadError", None),
        keywords=frozenset(inspect.signature(package.LLM.generate_async).parameters),
        handed_over=frozenset(field.name for field in fields(package.DisaggregatedParams)),
    )
