"""The user's engine options, from flags, `--extra-engine-args` and `--override-engine-args`. `arguments` completes them.

TensorRT-LLM's order of precedence: the file wins over flags, the JSON object over the file. A block of the file replaces
an earlier one, except for a few that are merged key by key; the JSON object is merged at every depth, as Dynamo's worker
does it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

from dynserve.config import WorkerConfig, nearest
from dynserve.errors import ConfigError
from dynserve.executors.option_names import Schema
from dynserve.executors.trtllm.spellings import BACKENDS, Entry, Path_, modernised
from dynserve.model_files import model_config

log = logging.getLogger(__name__)

WITHOUT_EFFECT = frozenset(["sampler_type"])  # documented as accepted, by versions that do not have it any more
MERGED = frozenset(["kv_cache_config", "telemetry_config", "multimodal_config"])  # key by key, as `trtllm-serve` does


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
        _merge(options, modernised(_json(config.override_engine_args), "--override-engine-args"), deeply=True)
    _check_graphs(options)
    _check_transceiver(options, config)
    return options


def check_names(options: Options, schema: Schema, version: str) -> None:
    """Raises ConfigError for a key that TensorRT-LLM would refuse, with the nearest valid one."""
    for name, value in options.values.items():
        if name == "model":
            raise ConfigError(f"{options.place(name)}: the model is given with --model-path")
        if name not in schema and name not in WITHOUT_EFFECT:
            raise ConfigError(f"{options.place(name)}: unknown key {name!r}{nearest(name, schema)} ({version})")
        nested = schema.get(name)
        if nested is None or value is None:
            continue
        if not isinstance(value, dict):
            raise ConfigError(f"{options.place(name)}: {name} must hold keys and values, not {value!r}")
        for key in value:
            if key not in nested:
                hint = nearest(str(key), nested)
                raise ConfigError(f"{options.place(name, key)}: unknown key {key!r} in {name}{hint} ({version})")


def schema_of(model: Any) -> Schema:
    """Returns the field names of a pydantic model and of the models nested in it."""
    return {name: _nested(field.annotation) for name, field in model.model_fields.items()}


def context_length(model_path: str) -> int | None:
    """Returns the length that the model's config.json gives, in tokens, if any."""
    found = model_config(Path(model_path)).get("max_position_embeddings")
    return found if isinstance(found, int) else None


def _nested(annotation: Any) -> Schema | None:
    found = [kind for kind in (annotation, *get_args(annotation)) if hasattr(kind, "model_fields")]
    return schema_of(found[0]) if len(found) == 1 else None


def _merge(options: Options, entries: list[Entry], *, deeply: bool = False) -> None:
    """Merges one source over the earlier ones, and logs which of their values it replaces. A block replaces an earlier one,
    except those of `MERGED`; `deeply`, all blocks are merged, at every depth."""
    replaced: list[str] = []
    before = options.values
    given = {path[0] for path, _, _ in entries}
    kept = given if deeply else MERGED
    values = {name: before[name] for name in before if name in kept or name not in given}
    for path, value, place in entries:
        known, old = _lookup(before, path)
        if known and old != value and not (isinstance(old, dict) and isinstance(value, dict)):
            replaced.append(f"{'.'.join(path)}: {_shown(value)} (was {_shown(old)}, {options.place(*path)})")
        options.places[path] = place
        if len(path) == 1:
            values[path[0]] = values[path[0]] if value == {} and isinstance(values.get(path[0]), dict) else value
            continue
        block = values.get(path[0])
        within = values[path[0]] = dict(block) if isinstance(block, dict) else {}
        within[path[1]] = merged(within.get(path[1]), value) if deeply else value
    before.clear()
    before.update(values)
    if replaced:
        log.info("engine options that replace others: %s", "; ".join(replaced))


def merged(below: Any, above: Any) -> Any:
    """Returns `above` merged over `below`, where both hold keys and values."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return below | {name: merged(below.get(name), value) for name, value in above.items()}


def _lookup(values: Mapping[str, Any], path: Path_) -> tuple[bool, Any]:
    found: Any = values
    for name in path:
        if not isinstance(found, dict) or name not in found:
            return False, None
        found = found[name]
    return True, found


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)


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
