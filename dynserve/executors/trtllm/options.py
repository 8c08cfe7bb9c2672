"""The arguments of `LLM(...)`, from flags, `--extra-engine-args` and `--override-engine-args`.

TensorRT-LLM's order of precedence: the file wins over flags, the JSON object over the file; `kv_cache_config` is merged
key by key, any other key replaced. Only options that were set are passed on: its models have their own defaults.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

from dynserve.config import WorkerConfig, nearest
from dynserve.errors import ConfigError
from dynserve.executors.option_names import Schema
from dynserve.executors.trtllm.spellings import Entry, Path_, modernised
from dynserve.model_files import model_config

log = logging.getLogger(__name__)

EVENT_BUFFER = 100_000  # events; TensorRT-LLM's own servers use as many
TRANSFER_TIMEOUT_MS = 60_000
BACKENDS = ("DEFAULT", "NIXL", "UCX", "MOONCAKE", "MPI")
_RESOLVING = ("NIXL", "UCX", "MOONCAKE", "MPI")  # in the order in which TRTLLM_USE_..._KVCACHE are checked


class Options(NamedTuple):
    """The merged options and the place where each was set, for messages."""

    values: dict[str, Any]
    places: dict[Path_, str]

    def place(self, *path: str) -> str:
        """Returns `file:line`, or the flag."""
        for end in range(len(path), 0, -1):
            if (found := self.places.get(path[:end])) is not None:
                return found
        return "engine options"


def read_options(config: WorkerConfig) -> Options:
    """Returns the options that the user has set, in today's spelling. TensorRT-LLM need not be installed.

    Raises:
        ConfigError: a file or value is invalid, or two of them contradict each other.
    """
    options = Options({}, {})
    _merge(options, _flags(config))
    if config.extra_engine_args:
        _merge(options, modernised(_file(config.extra_engine_args), config.extra_engine_args))
    if config.override_engine_args:
        _merge(options, modernised(_json(config.override_engine_args), "--override-engine-args"))
    _check_graphs(options)
    _check_transceiver(options, config)
    return options


def check_names(options: Options, schema: Schema, version: str) -> None:
    """Raises ConfigError for a key that TensorRT-LLM would refuse, with the nearest valid one."""
    for name, value in options.values.items():
        if name == "model":
            raise ConfigError(f"{options.place(name)}: the model is given with --model-path")
        if name not in schema:
            raise ConfigError(f"{options.place(name)}: unknown key {name!r}{nearest(name, schema)} ({version})")
        nested = schema[name]
        if nested is None or value is None:
            continue
        if not isinstance(value, dict):
            raise ConfigError(f"{options.place(name)}: {name} must hold keys and values, not {value!r}")
        for key in value:
            if key not in nested:
                hint = nearest(str(key), nested)
                raise ConfigError(f"{options.place(name, key)}: unknown key {key!r} in {name}{hint} ({version})")


def llm_arguments(options: Options, config: WorkerConfig, schema: Schema, version: str) -> dict[str, Any]:
    """Returns the constructor's keywords: the user's options, and the role's defaults where nothing was set."""
    given = {name: dict(value) if isinstance(value, dict) else value for name, value in options.values.items()}
    defaults: dict[str, Any] = {
        "enable_iter_perf_stats": True,
        "enable_chunked_prefill": True,
        "guided_decoding_backend": "xgrammar",
        "telemetry_config": {"disabled": True},
        "tensor_parallel_size": config.tensor_parallel_size,
        "pipeline_parallel_size": config.pipeline_parallel_size,
    }
    if config.disaggregation_mode == "prefill":
        defaults["disable_overlap_scheduler"] = True  # 1.2 requires it of context servers
    if config.lora_adapters:
        defaults["enable_lora"] = True
    made = {name: value for name, value in defaults.items() if name in schema} | given
    cache = made.setdefault("kv_cache_config", {}) or {}
    if config.kv_events and cache.get("enable_block_reuse", True):
        cache.setdefault("event_buffer_max_size", EVENT_BUFFER)
    if (transceiver := made.get("cache_transceiver_config")) is not None:
        made["cache_transceiver_config"] = _transceiver(transceiver, options, config, schema, version)
    return {**made, "kv_cache_config": cache, "model": config.model_path, "skip_tokenizer_init": True}


def resolved_backend(backend: str, version: str) -> str:
    """Returns the backend that `DEFAULT` stands for: the first that a variable selects, else the version's default."""
    if backend != "DEFAULT":
        return backend
    for name in _RESOLVING:
        if os.environ.get(f"TRTLLM_USE_{name}_KVCACHE") == "1":
            return name
    return "UCX" if version.startswith(("1.0", "1.1", "1.2")) else "NIXL"


def schema_of(model: Any) -> Schema:
    """Returns the field names of a pydantic model and of the models nested in it."""
    return {name: _nested(field.annotation) for name, field in model.model_fields.items()}


def context_length(model_path: str) -> int | None:
    found = model_config(Path(model_path)).get("max_position_embeddings")
    return found if isinstance(found, int) else None


def _nested(annotation: Any) -> Schema | None:
    found = [kind for kind in (annotation, *get_args(annotation)) if hasattr(kind, "model_fields")]
    return schema_of(found[0]) if len(found) == 1 else None


def _merge(options: Options, entries: list[Entry]) -> None:
    """Merges one source over the earlier ones."""
    touched = {path[0] for path, _, _ in entries}
    for name in touched - {"kv_cache_config"}:
        options.values.pop(name, None)
    for path, value, place in entries:
        options.places[path] = place
        if path == ("kv_cache_config",) and value == {}:
            options.values.setdefault(path[0], {})
        elif len(path) == 1:
            options.values[path[0]] = value
        else:
            within = options.values.setdefault(path[0], {})
            if not isinstance(within, dict):
                within = options.values[path[0]] = {}
            within[path[1]] = value


def _flags(config: WorkerConfig) -> list[Entry]:
    found: list[Entry] = []
    for name in ("max_batch_size", "max_num_tokens", "max_seq_len"):
        if (value := getattr(config, name)) is not None:
            found.append(((name,), value, f"--{name.replace('_', '-')}"))
    for key, flag in (("tokens_per_block", "kv_block_size"), ("free_gpu_memory_fraction",) * 2):
        if (value := getattr(config, flag)) is not None:
            found.append((("kv_cache_config", key), value, f"--{flag.replace('_', '-')}"))
    return found


def _file(path: str) -> list[Entry]:
    """Reads the keys of two levels of a YAML file, with their lines."""
    import yaml

    try:
        root = yaml.compose(Path(path).read_text(), Loader=yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(f"--extra-engine-args {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--extra-engine-args {path} is not YAML: {error}") from error
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"--extra-engine-args {path}: expected keys and values")
    constructor = yaml.SafeLoader("")

    def value_of(node: Any) -> Any:
        return constructor.construct_object(node, deep=True)

    entries: list[Entry] = []
    for key, node in root.value:
        entries += _entries(str(value_of(key)), value_of(node), f"{path}:{key.start_mark.line + 1}")
        if isinstance(node, yaml.MappingNode):
            lines = {(str(value_of(key)), str(value_of(k))): k.start_mark.line + 1 for k, _ in node.value}
            entries = [(p, v, f"{path}:{lines[p]}" if p in lines else place) for p, v, place in entries]
    return entries


def _json(text: str) -> list[Entry]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--override-engine-args is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"--override-engine-args: expected keys and values, found {type(found).__name__}")
    return [entry for key, value in found.items() for entry in _entries(key, value, "--override-engine-args")]


def _entries(key: str, value: Any, place: str) -> list[Entry]:
    if not isinstance(value, dict):
        return [((key,), value, place)]
    # an empty block is an entry, too: `cuda_graph_config: {}` turns graphs on
    return [((key,), {}, place), *(((key, str(name)), item, place) for name, item in value.items())]


def _check_graphs(options: Options) -> None:
    graphs = options.values.get("cuda_graph_config")
    if isinstance(graphs, dict) and graphs.get("batch_sizes") is not None and graphs.get("max_batch_size"):
        raise ConfigError(
            f"{options.place('cuda_graph_config', 'max_batch_size')}: cuda_graph_config has both batch_sizes and "
            "max_batch_size; keep one of them (versions of TensorRT-LLM differ in what both together mean)"
        )


def _check_transceiver(options: Options, config: WorkerConfig) -> None:
    """Raises ConfigError for a prefill or decode worker without a transceiver backend, or for an unknown backend."""
    name = "cache_transceiver_config"
    found = options.values.get(name)
    if found is not None and not isinstance(found, dict):
        raise ConfigError(f"{options.place(name)}: {name} must hold keys and values, not {found!r}")
    backend = (found or {}).get("backend")
    if backend is not None and backend not in BACKENDS:
        hint = nearest(str(backend).upper(), BACKENDS)
        raise ConfigError(
            f"{options.place(name, 'backend')}: backend {backend!r} is not one of {', '.join(BACKENDS)}{hint}"
        )
    if config.disaggregation_mode == "prefill_and_decode" or backend is not None:
        return
    length = options.values.get("max_seq_len") or context_length(config.model_path) or 8192
    lacking = f"has no backend in its {name}" if found is not None else f"needs a {name}"
    where = f"add to {config.extra_engine_args}" if config.extra_engine_args else "give --extra-engine-args a file with"
    raise ConfigError(
        f"a {config.disaggregation_mode} worker {lacking}: without one it cannot send or receive KV caches; {where}\n"
        f"  {name}:\n    backend: NIXL\n    max_tokens_in_buffer: {length}"
    )


def _transceiver(
    given: dict[str, Any], options: Options, config: WorkerConfig, schema: Schema, version: str
) -> dict[str, Any]:
    """Returns the complete block, so that nothing in it depends on a default that differs between versions."""
    known = schema.get("cache_transceiver_config") or {}
    backend = resolved_backend(given.get("backend") or "DEFAULT", version)
    length = options.values.get("max_seq_len") or context_length(config.model_path)
    made = dict(given)
    if "transceiver_runtime" in known and given.get("transceiver_runtime", "auto") in ("auto", None):
        made["transceiver_runtime"] = "PYTHON" if backend == "NIXL" else "CPP"
    if "kv_transfer_timeout_ms" in known:
        made.setdefault("kv_transfer_timeout_ms", TRANSFER_TIMEOUT_MS)
    if made.get("kv_transfer_timeout_ms") is None and "kv_transfer_timeout_ms" in known:
        log.warning(
            "kv_transfer_timeout_ms: null holds the KV blocks of lost requests for ever; set a limit, such as 60000"
        )
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
    second = (options.values.get("kv_cache_config") or {}).get("use_kv_cache_manager_v2")
    if runtime == "CPP" and second is True:
        raise ConfigError(
            f"{place}: transceiver_runtime CPP cannot move the cache of use_kv_cache_manager_v2: true; "
            "use backend NIXL with transceiver_runtime PYTHON, or use_kv_cache_manager_v2: false"
        )
