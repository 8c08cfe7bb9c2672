"""Translates old spellings of engine options: files of older guides work unchanged, with a warning that names both.

`pytorch_backend_config` was a block up to 0.20; `enable_chunked_context` and `enable_trt_overlap` are names of Triton's
backend that are used in guides; `cuda_graph_config.enable_cuda_graph` was never an option, but is found in files; NVIDIA's
aiconfigurator writes the transceiver's backends in lower case.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeAlias

from dynserve.errors import ConfigError

log = logging.getLogger(__name__)

Path_: TypeAlias = tuple[str, ...]
Entry: TypeAlias = tuple[Path_, Any, str]  # key, or block and key; value; place

BLOCK = "pytorch_backend_config"


def _same(value: Any) -> Any:
    return value


def _negated(value: Any) -> Any:
    return not value


_MEMBERS: dict[str, tuple[Path_, Callable[[Any], Any]]] = {
    "cuda_graph_batch_sizes": (("cuda_graph_config", "batch_sizes"), _same),
    "cuda_graph_max_batch_size": (("cuda_graph_config", "max_batch_size"), _same),
    "cuda_graph_padding_enabled": (("cuda_graph_config", "enable_padding"), _same),
    "autotuner_enabled": (("enable_autotuner",), _same),
    "enable_overlap_scheduler": (("disable_overlap_scheduler",), _negated),
    "enable_trt_overlap": (("disable_overlap_scheduler",), _negated),
    "enable_chunked_context": (("enable_chunked_prefill",), _same),
    "hf_revision": (("revision",), _same),  # of trtllm-serve's files
    "kv_cache_dtype": (("kv_cache_config", "dtype"), _same),
    "moe_backend": (("moe_config", "backend"), _same),
}
BACKENDS = ("DEFAULT", "NIXL", "UCX", "MOONCAKE", "MPI")  # of the transceiver
_TRANSCEIVER = ("cache_transceiver_config", "backend")
# the choice of a sampler, while there were two
_GONE = {"use_torch_sampler", "enable_trtllm_sampler", "mixed_sampler", "enable_mixed_sampler"}
_SWITCHES = {(BLOCK, "use_cuda_graph"), ("use_cuda_graph",), ("cuda_graph_config", "enable_cuda_graph")}
_BUILD = ("max_batch_size", "max_num_tokens", "max_seq_len", "max_input_len", "max_beam_width")


def modernised(entries: list[Entry], where: str) -> list[Entry]:
    """Returns the entries of one source in today's spelling.

    Raises:
        ConfigError: an option has two different values, or a block does not hold keys and values.
    """
    made: dict[Path_, tuple[Any, str]] = {}
    changes: list[str] = []
    graphs: bool | None = None
    for path, value, place in entries:
        if path in ((BLOCK,), ("build_config",)):
            if value not in ({}, None):
                raise ConfigError(f"{place}: {path[0]} must hold keys and values, not {value!r}")
            continue
        if path == ("backend",):
            if value not in ("pytorch", None):
                raise ConfigError(f"{place}: backend {value!r} was removed from TensorRT-LLM; use pytorch")
            changes.append("backend → remove it")
            continue
        if path[-1] in _GONE and len(path) == (2 if path[0] == BLOCK else 1):
            changes.append(f"{'.'.join(path)} → remove it: there is one sampler")
            continue
        if path == _TRANSCEIVER and isinstance(value, str) and value not in BACKENDS and value.upper() in BACKENDS:
            changes.append(f"{'.'.join(path)}: {value} → {value.upper()}")
            value = value.upper()
        if path in _SWITCHES:
            graphs = bool(value)
            changes.append(
                f"{'.'.join(path)}: {str(graphs).lower()} → cuda_graph_config: {'{...}' if graphs else 'null'}"
            )
            continue
        new, change = _today(path)
        value = change(value)
        if new != path:
            changes.append(
                f"{'.'.join(path)} → {'.'.join(new)}" + (f": {str(value).lower()}" if change is _negated else "")
            )
        _put(made, new, value, place)
    if graphs is False:
        made = {path: found for path, found in made.items() if path[0] != "cuda_graph_config"}
        made["cuda_graph_config",] = (None, where)
    elif graphs:
        made.setdefault(("cuda_graph_config",), ({}, where))
    if changes:
        log.warning("%s has spellings that TensorRT-LLM no longer accepts; use instead: %s", where, "; ".join(changes))
    # blocks before their members
    return [(path, value, place) for path, (value, place) in sorted(made.items(), key=lambda item: len(item[0]))]


def _today(path: Path_) -> tuple[Path_, Callable[[Any], Any]]:
    match path:
        case (block, name) if block == BLOCK:
            return _MEMBERS.get(name, ((name,), _same))
        case ("build_config", name) if name in _BUILD:
            return (name,), _same
        case (name,) if name in _MEMBERS:
            return _MEMBERS[name]
        case ("cuda_graph_config", "padding_enabled"):
            return ("cuda_graph_config", "enable_padding"), _same
        case _:
            return path, _same


def _put(made: dict[Path_, tuple[Any, str]], path: Path_, value: Any, place: str) -> None:
    before = made.get(path)
    if before is not None and before[0] != value:
        raise ConfigError(
            f"{place}: {'.'.join(path)} is {value!r} here and {before[0]!r} at {before[1]} (maybe in an old spelling)"
        )
    made[path] = (value, place)
