"""Engine options of the torch and simulated executors, from flags, `--extra-engine-args` and `--override-engine-args`.

Names are TensorRT-LLM's where it has them, so that one YAML file serves all executors. Precedence is also TensorRT-LLM's:
the file wins over flags, the JSON object over the file.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec

from dynserve.config import WorkerConfig, nearest
from dynserve.errors import ConfigError
from dynserve.executors.option_names import ARGS, KV_CACHE, OLD, TRANSCEIVER, Schema

log = logging.getLogger(__name__)


# DEFAULT selects the best transport that both workers have; UCX is the library under NIXL
BACKENDS = ("DEFAULT", "NIXL", "UCX", "TCP")
_FOREIGN_BACKENDS = ("MOONCAKE", "MPI")  # TensorRT-LLM's; None turns transfers off there


class KvCacheOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    tokens_per_block: int = 32
    max_tokens: int | None = None
    enable_block_reuse: bool = True
    free_gpu_memory_fraction: float | None = None


class CacheTransceiverOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    backend: str = "DEFAULT"
    kv_transfer_timeout_ms: int = 60_000
    max_tokens_in_buffer: int | None = None

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(
                f"cache_transceiver_config.backend {self.backend!r} is not a backend of this executor"
                f"{nearest(self.backend.upper(), BACKENDS)}; use one of {', '.join(BACKENDS)}"
            )


class EngineArgs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The options of the scheduler and of both executors. None: derived from the model."""

    max_batch_size: int = 64
    max_num_tokens: int = 2048
    max_seq_len: int | None = None
    enable_chunked_prefill: bool = True
    kv_cache_config: KvCacheOptions = KvCacheOptions()
    cache_transceiver_config: CacheTransceiverOptions = CacheTransceiverOptions()
    num_blocks: int | None = None
    # torch
    num_threads: int | None = None
    # simulated: milliseconds, microseconds, gigabytes per second; `speed` divides all times, 0 removes them
    step_ms: float = 5.0
    prefill_us_per_token: float = 50.0
    decode_us_per_sequence: float = 20.0
    decode_us_per_ktoken: float = 40.0  # reading 128 KiB of KV cache per token at 3.3 TB/s
    transfer_gb_per_s: float = 10.0
    bytes_per_token: int = 131_072
    speed: float = 1.0
    leap: int = 1  # upper bound of decode-only steps that are computed at once

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_num_tokens", "max_seq_len", "num_blocks", "num_threads", "leap"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.kv_cache_config.tokens_per_block < 1:
            raise ValueError("kv_cache_config.tokens_per_block must be at least 1")
        for name in ("step_ms", "prefill_us_per_token", "decode_us_per_sequence", "decode_us_per_ktoken", "speed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} cannot be negative")
        if self.transfer_gb_per_s <= 0:
            raise ValueError("transfer_gb_per_s must be greater than 0")


# Valid for TensorRT-LLM, without effect here; a file that executors share may contain them.
_TRTLLM_ONLY = frozenset(ARGS.keys() | OLD) - frozenset(EngineArgs.__struct_fields__)
_NESTED: dict[str, tuple[type[msgspec.Struct], Schema]] = {
    "kv_cache_config": (KvCacheOptions, KV_CACHE),
    "cache_transceiver_config": (CacheTransceiverOptions, TRANSCEIVER),
}


def engine_args(config: WorkerConfig, defaults: Mapping[str, Any] = MappingProxyType({})) -> EngineArgs:
    """Returns the merged options. `defaults` are those of the device, where they differ from `EngineArgs`.

    Raises:
        ConfigError: a key is unknown (the message has the nearest valid one and the place), or a value is invalid.
    """
    merged = {**defaults, **_from_flags(config)}
    if config.extra_engine_args:
        _merge(merged, _yaml(config.extra_engine_args), f"--extra-engine-args {config.extra_engine_args}")
    if config.override_engine_args:
        _merge(merged, _json(config.override_engine_args), "--override-engine-args")
    try:
        return msgspec.convert(_without_nulls(merged, EngineArgs), EngineArgs)
    except msgspec.ValidationError as error:
        raise ConfigError(f"engine options: {error}") from error


def _from_flags(config: WorkerConfig) -> dict[str, Any]:
    flags: dict[str, Any] = {
        name: value
        for name in ("max_batch_size", "max_num_tokens", "max_seq_len")
        if (value := getattr(config, name)) is not None
    }
    cache = {
        key: value
        for key, value in (
            ("tokens_per_block", config.kv_block_size),
            ("free_gpu_memory_fraction", config.free_gpu_memory_fraction),
        )
        if value is not None
    }
    return flags | ({"kv_cache_config": cache} if cache else {})


def _without_nulls(options: Mapping[str, Any], kind: type[msgspec.Struct]) -> dict[str, Any]:
    """Returns the options without those that are null where that means the default, as in TensorRT-LLM's files."""
    found: dict[str, Any] = {}
    for field in msgspec.structs.fields(kind):
        if field.name not in options or (options[field.name] is None and field.default is not None):
            continue
        value = options[field.name]
        found[field.name] = _without_nulls(value, _NESTED[field.name][0]) if field.name in _NESTED else value
    return found


def _merge(into: dict[str, Any], options: dict[str, Any], where: str) -> None:
    known = EngineArgs.__struct_fields__
    if ignored := sorted(_TRTLLM_ONLY & options.keys()):
        log.info("%s: ignored, without effect in this executor: %s", where, ", ".join(ignored))
    for key, value in options.items():
        if key in _TRTLLM_ONLY:
            continue
        if key not in known:
            _unknown(str(key), known, where)
            continue
        if key in _NESTED:
            into[key] = into.get(key, {}) | _nested(value, key, where)
        else:
            into[key] = value


def _unknown(key: str, known: Iterable[str], where: str, block: str = "") -> None:
    """Raises ConfigError for a misspelt key. One that resembles none of ours may be TensorRT-LLM's, of a version that we do
    not know: it does not stop this executor."""
    if hint := nearest(key, known, 0.75):
        raise ConfigError(f"{where}: unknown key {key!r}{block}{hint}")
    log.warning("%s: ignored, unknown to this executor: %r%s", where, key, block)


def _nested(value: Any, key: str, where: str) -> dict[str, Any]:
    ours, theirs = _NESTED[key]
    known = ours.__struct_fields__
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: {key} must hold keys and values, not {value!r}")
    for name in value:
        if name not in known and name not in theirs:
            _unknown(str(name), known, where, f" in {key}")
    if isinstance(backend := value.get("backend"), str):
        value = {**value, "backend": backend.upper()}
    if key == "cache_transceiver_config" and value.get("backend") in _FOREIGN_BACKENDS:
        log.warning("%s: backend %s is TensorRT-LLM's; this executor uses DEFAULT instead", where, value["backend"])
        value = {**value, "backend": "DEFAULT"}
    return {name: item for name, item in value.items() if name in known}


def _yaml(path: str) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"--extra-engine-args {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--extra-engine-args {path} is not YAML: {error}") from error
    return _object(found or {}, f"--extra-engine-args {path}")


def _json(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--override-engine-args is not JSON: {error}") from error
    return _object(found, "--override-engine-args")


def _object(found: Any, where: str) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise ConfigError(f"{where}: expected keys and values, found {type(found).__name__}")
    return found
