"""`Weights`: the tensors of a checkpoint, each of which the model must use."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dynserve.errors import ConfigError
from dynserve.executors.torch.model_config import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_RECOMPUTED = re.compile(r"rotary_emb\.inv_freq$")  # tables that old checkpoints hold, and that config.json determines


class Weights:
    """The safetensors files of a checkpoint, one or many. `prefix` is `model.`, or empty for a file of the model without
    its head."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        self._folder, self._device, self._dtype = folder, device, dtype
        self._open: list[Any] = []
        self._file_of: dict[str, Any] = {}
        self._used: set[str] = set()
        try:
            for name in _files(folder):
                self._add(name)
        except BaseException:
            self.close()
            raise
        self.prefix = "" if "embed_tokens.weight" in self else "model."

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def close(self) -> None:
        for file in self._open:
            file.__exit__(None, None, None)

    def load(self, name: str, *shape: int) -> Tensor:
        """Returns a tensor. Raises ConfigError if it is missing, or is not what `config.json` says."""
        if name not in self:
            raise ConfigError(f"{self._folder}: the checkpoint has no tensor {name}, which its config.json implies")
        try:
            tensor: Tensor = self._file_of[name].get_tensor(name)
        except Exception as error:  # safetensors raises error types of its own for invalid files
            raise ConfigError(f"{self._folder}: cannot read {name}: {error}") from error
        if tuple(tensor.shape) != shape:
            found = list(tensor.shape)
            raise ConfigError(f"{self._folder}: {name} has the shape {found}; config.json implies {list(shape)}")
        if tensor.dtype not in _DTYPES:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ConfigError(
                f"{self._folder}: {name} has the data type {kind}; quantised checkpoints are not supported"
            )
        self._used.add(name)
        return tensor.to(self._device, self._dtype)

    def check_all_used(self) -> None:
        """Raises ConfigError if the checkpoint has tensors that the model did not load: it would compute something else."""
        rest = sorted(name for name in self._file_of.keys() - self._used if not _RECOMPUTED.search(name))
        if rest:
            more = f" and {len(rest) - 5} more" if len(rest) > 5 else ""
            names = ", ".join(rest[:5]) + more
            raise ConfigError(f"{self._folder}: a model of this config.json has no use for these tensors: {names}")

    def _add(self, name: str) -> None:
        try:
            opened: Any = safe_open(str(self._folder / name), framework="pt", device="cpu")
            file = opened.__enter__()
        except Exception as error:
            raise ConfigError(f"{self._folder}: cannot read {name}: {error}") from error
        self._open.append(file)
        self._file_of |= dict.fromkeys(file.keys(), file)


def _files(folder: Path) -> list[str]:
    """The names of the checkpoint's files. As in transformers, a single file has precedence over an index of several."""
    if (folder / SINGLE).exists():
        return [SINGLE]
    if not (folder / INDEX).exists():
        raise ConfigError(f"{folder}: there is no {SINGLE} in it; other formats are not supported")
    found = read_json(folder / INDEX).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise ConfigError(f"{folder}/{INDEX} has no weight_map of tensors to files")
    return sorted(set(found.values()))
