"""The keywords of `LLM(...)`: the user's options, and what serving needs where nothing was set.

Only options that were set, or that serving needs, are passed on: TensorRT-LLM's models have their own defaults, some of
which depend on the model. A default that costs throughput, or that may keep an engine from starting, is not set.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, NamedTuple

from dynserve.config import WorkerConfig
from dynserve.errors import ConfigError
from dynserve.executors.option_names import Schema
from dynserve.executors.trtllm.lora import lora_config
from dynserve.executors.trtllm.options import Options, context_length

log = logging.getLogger(__name__)

EVENT_BUFFER = 100_000  # events; TensorRT-LLM's own servers use as many
TRANSFER_TIMEOUT_MS = 60_000
XGRAMMAR = "xgrammar"
WITHOUT_EVENTS = ("FLASHINFER",)  # attention backends with which the engine turns block reuse off
_RESOLVING = ("NIXL", "UCX", "MOONCAKE", "MPI")  # in the order in which TRTLLM_USE_..._KVCACHE are checked
_FINAL = 1 << 30  # of a version that is no release candidate
_V1_3 = (1, 3, 0, 0)
# since about April 2026, so certainly from here on, an engine loads the tokenizer of its grammars itself
_LOADS_TOKENIZER = (1, 3, 0, 16)
_OVERLAPS = (1, 3, 0, 24)  # context servers may overlap


class LlmArguments(NamedTuple):
    """The keywords of `LLM(...)`. `no_grammars`: why requests cannot have a grammar; empty if they can."""

    keywords: dict[str, Any]
    no_grammars: str = ""


def llm_arguments(
    options: Options, config: WorkerConfig, schema: Schema, version: str, *, tells_size: bool | None = None
) -> LlmArguments:
    """Returns the constructor's keywords. Warnings name the options that are changed or dropped.

    `tells_size`: whether the engine tells the size of its cache; None: as this version does.

    Raises:
        ConfigError: options contradict each other, or an adapter cannot be served.
    """
    given = deepcopy(options.values)
    _drop_useless(given, options, schema)
    release = release_of(version)
    defaults: dict[str, Any] = {
        "tensor_parallel_size": config.tensor_parallel_size,
        "pipeline_parallel_size": config.pipeline_parallel_size,
    }
    if not (release >= _V1_3 if tells_size is None else tells_size):
        defaults["enable_iter_perf_stats"] = True  # only statistics tell the cache's size then
    if not config.extra_engine_args:
        defaults["enable_chunked_prefill"] = True  # a file that does not mention it was measured without
    if config.disaggregation_mode == "prefill" and release < _OVERLAPS:
        defaults["disable_overlap_scheduler"] = True
    made = {name: value for name, value in defaults.items() if name in schema} | given
    if "telemetry_config" in schema:
        made["telemetry_config"] = {"disabled": True} | (made.get("telemetry_config") or {})
    made["kv_cache_config"] = _cache(made, options, config)
    if (transceiver := made.get("cache_transceiver_config")) is not None:
        made["cache_transceiver_config"] = _transceiver(transceiver, options, config, schema, version)
    if config.adapters:
        made["lora_config"] = lora_config(config.adapters, made.get("lora_config"), options.place("lora_config"))
    backend, no_grammars = _grammar_backend(made)
    made["guided_decoding_backend"] = backend
    # older versions do not start with a grammar backend and without a tokenizer
    skip = backend is None or release >= _LOADS_TOKENIZER
    return LlmArguments({**made, "model": config.model_path, "skip_tokenizer_init": skip}, no_grammars)


def release_of(version: str) -> tuple[int, int, int, int]:
    """Returns a version as numbers that can be compared: major, minor, patch, release candidate."""
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?(?:rc(\d+))?", version)
    if found is None:
        return (_FINAL, 0, 0, 0)
    major, minor, patch, candidate = found.groups()
    return (int(major), int(minor), int(patch or 0), int(candidate) if candidate else _FINAL)


def resolved_backend(backend: str, version: str) -> str:
    """Returns the backend that `DEFAULT` stands for: the first that a variable selects, else the version's default."""
    if backend != "DEFAULT":
        return backend
    for name in _RESOLVING:
        if os.environ.get(f"TRTLLM_USE_{name}_KVCACHE") == "1":
            return name
    return "NIXL" if release_of(version) >= _V1_3 else "UCX"


def _drop_useless(given: dict[str, Any], options: Options, schema: Schema) -> None:
    """Removes options that would only cost, or that the version refuses although it names them as without effect."""
    if "sampler_type" in given and "sampler_type" not in schema:
        log.warning("%s: sampler_type has no effect in this version; ignored", options.place("sampler_type"))
        del given["sampler_type"]
    if given.get("num_postprocess_workers"):
        place = options.place("num_postprocess_workers")
        log.warning("%s: num_postprocess_workers: ignored, as the engine returns token ids and no text", place)
    given.pop("num_postprocess_workers", None)
    given.pop("postprocess_tokenizer_dir", None)
    if given.get("multimodal_config", {}) is None:
        del given["multimodal_config"]  # null is the default


def _grammar_backend(made: Mapping[str, Any]) -> tuple[str | None, str]:
    """Returns the backend of grammars, and why there is none. It costs speculative decoding: several modes do not start
    with one, others lose the overlap of steps or their draft chain."""
    if "guided_decoding_backend" in made:
        backend: str | None = made["guided_decoding_backend"]
        return backend, "" if backend else "guided_decoding_backend is null in the engine options"
    if made.get("speculative_config"):
        return None, (
            "the engine options have a speculative_config, and grammars may slow it down or keep the engine from "
            f"starting; set guided_decoding_backend: {XGRAMMAR} to have them nevertheless"
        )
    return XGRAMMAR, ""


def _cache(made: Mapping[str, Any], options: Options, config: WorkerConfig) -> dict[str, Any]:
    """Returns `kv_cache_config` with the KV events that the router needs: in the engine's buffer, not pushed by it."""
    cache: dict[str, Any] = made.get("kv_cache_config") or {}
    if not config.kv_events or not cache.get("enable_block_reuse", True):
        return cache
    if made.get("attn_backend") in WITHOUT_EVENTS:
        log.warning(
            "%s: with attn_backend %s the engine caches no prefixes: requests are not routed by its KV events",
            options.place("attn_backend"), made["attn_backend"],
        )  # fmt: skip
        return cache
    pushed = cache.get("kv_events_config") or {}
    if not isinstance(pushed, dict):
        place = options.place("kv_cache_config", "kv_events_config")
        raise ConfigError(f"{place}: kv_events_config must hold keys and values, not {pushed!r}")
    if pushed.get("enable_kv_cache_events") and pushed.get("publisher") != "null":
        log.warning(
            "%s: kv_events_config: enable_kv_cache_events is set to false, since an engine that pushes its KV events does "
            "not return them to the worker; keep it with --kv-events false",
            options.place("kv_cache_config", "kv_events_config"),
        )
        cache["kv_events_config"] = {**pushed, "enable_kv_cache_events": False}
    if cache.get("event_buffer_max_size") == 0:
        log.warning(
            "%s: event_buffer_max_size: 0 is raised to %d, since the router needs KV events; "
            "keep it with --kv-events false",
            options.place("kv_cache_config", "event_buffer_max_size"), EVENT_BUFFER,
        )  # fmt: skip
        cache["event_buffer_max_size"] = EVENT_BUFFER
    cache.setdefault("event_buffer_max_size", EVENT_BUFFER)
    return cache


def _transceiver(
    given: dict[str, Any], options: Options, config: WorkerConfig, schema: Schema, version: str
) -> dict[str, Any]:
    """Returns the complete block, so that nothing in it depends on a default that differs between versions."""
    known = schema.get("cache_transceiver_config") or {}
    backend = resolved_backend(given.get("backend") or "DEFAULT", version)
    made = dict(given)
    forever = "kv_transfer_timeout_ms" in given and given["kv_transfer_timeout_ms"] is None
    if "transceiver_runtime" in known and given.get("transceiver_runtime", "auto") in ("auto", None):
        made["transceiver_runtime"] = "PYTHON" if backend == "NIXL" and not forever else "CPP"
    if "kv_transfer_timeout_ms" in known:
        made.setdefault("kv_transfer_timeout_ms", TRANSFER_TIMEOUT_MS)
    if forever:
        log.warning(
            "kv_transfer_timeout_ms: null holds the KV blocks of lost requests for ever; set a limit, such as 60000"
        )
    length = options.values.get("max_seq_len") or context_length(config.model_path)
    buffer = given.get("max_tokens_in_buffer")
    if length and buffer is None:
        made["max_tokens_in_buffer"] = length
    elif length and isinstance(buffer, int) and buffer < length:
        log.warning(
            "%s: max_tokens_in_buffer: %d is below max_seq_len (%d); longer prompts hang in their transfer: set it to %d",
            options.place("cache_transceiver_config", "max_tokens_in_buffer"), buffer, length, length,
        )  # fmt: skip
    _check_runtime(made, backend, options)
    return made


def _check_runtime(transceiver: Mapping[str, Any], backend: str, options: Options) -> None:
    runtime = transceiver.get("transceiver_runtime")
    place = options.place("cache_transceiver_config", "transceiver_runtime")
    if runtime == "PYTHON" and backend != "NIXL":
        raise ConfigError(f"{place}: transceiver_runtime PYTHON needs backend NIXL, not {backend}")
    if runtime == "PYTHON" and transceiver.get("kv_transfer_timeout_ms") is None:
        place = options.place("cache_transceiver_config", "kv_transfer_timeout_ms")
        raise ConfigError(
            f"{place}: kv_transfer_timeout_ms: null does not go with transceiver_runtime PYTHON, which needs a limit: give "
            f"it milliseconds, such as {TRANSFER_TIMEOUT_MS}, or use transceiver_runtime: CPP"
        )
    second = (options.values.get("kv_cache_config") or {}).get("use_kv_cache_manager_v2")
    if runtime == "CPP" and second is True:
        raise ConfigError(
            f"{place}: transceiver_runtime CPP cannot move the cache of use_kv_cache_manager_v2: true; "
            "use backend NIXL with transceiver_runtime PYTHON, or use_kv_cache_manager_v2: false"
        )
