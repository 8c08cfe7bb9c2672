"""TensorRT-LLM workers of `dynserve up`: the checks before they start, their GPUs and their options."""

from __future__ import annotations

import json
from functools import cache
from importlib.util import find_spec

from dynserve.config import DisaggregationMode, UpConfig, WorkerConfig
from dynserve.errors import ConfigError
from dynserve.executors.trtllm import PIN
from dynserve.executors.trtllm.options import Options, read_options
from dynserve.local.gpus import gpu_names

TRANSCEIVER = {"cache_transceiver_config": {"backend": "DEFAULT"}}


def check(config: UpConfig) -> None:
    """Raises ConfigError if TensorRT-LLM is not installed, an engine option is wrong, or there are too few GPUs."""
    if config.device == "cpu":
        raise ConfigError("--executor trtllm needs GPUs: --device cpu is for --executor torch")
    if find_spec("tensorrt_llm") is None:
        raise ConfigError(
            "--executor trtllm needs TensorRT-LLM, which is not installed here; use its release image, or "
            f"pip install tensorrt-llm=={PIN}"
        )
    for role in {role for _, role in config.roles}:
        _options(config, role)
    visible_gpus(config)


def visible_gpus(config: UpConfig) -> list[dict[str, str]]:
    """Returns the environment that gives each worker GPUs of its own, as many as its options ask for.

    Raises:
        ConfigError: there are too few.
    """
    names, found, wanted = gpu_names(), [], 0
    for _, role in config.roles:
        count = _gpus_of(_options(config, role))
        found.append({"CUDA_VISIBLE_DEVICES": ",".join(names[wanted : wanted + count])})
        wanted += count
    if wanted > len(names):
        have = f"this machine has {len(names)}" if names else "none is visible here"
        raise ConfigError(
            f"{len(found)} TensorRT-LLM workers need {wanted} GPUs, and {have}; use fewer workers, as with --prefill 1 "
            "--decode 1 or --prefill 0 --decode 0 --aggregated 1"
        )
    return found


def flags(config: UpConfig, role: DisaggregationMode) -> list[str]:
    """Returns the flags of a worker's engine options. Workers of one phase get a transceiver if the options have none."""
    found = ["--extra-engine-args", config.extra_engine_args] if config.extra_engine_args else []
    override = _override(config, role)
    return [*found, "--override-engine-args", override] if override else found


def _override(config: UpConfig, role: DisaggregationMode) -> str | None:
    given = config.override_engine_args
    if role == "prefill_and_decode" or _read(config, "prefill_and_decode", given).values.get(
        "cache_transceiver_config"
    ):
        return given
    return json.dumps((json.loads(given) if given else {}) | TRANSCEIVER)


def _options(config: UpConfig, role: DisaggregationMode) -> Options:
    return _read(config, role, _override(config, role))


@cache  # options are read once: each reading logs the old spellings in them
def _read(config: UpConfig, role: DisaggregationMode, override: str | None) -> Options:
    return read_options(
        WorkerConfig(
            executor="trtllm",
            model_path=config.model_path,
            disaggregation_mode=role,
            extra_engine_args=config.extra_engine_args,
            override_engine_args=override,
        )
    )


def _gpus_of(options: Options) -> int:
    count = 1
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "context_parallel_size"):
        size = options.values.get(name, 1)
        if not isinstance(size, int) or size < 1:
            raise ConfigError(f"{options.place(name)}: {name}: {size!r} is not a number of GPUs")
        count *= size
    return count
