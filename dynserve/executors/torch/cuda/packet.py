"""The host's input to a step on the device: arrays of equal lifetime, sent in one copy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# packets that the host may fill before the device has read the first of them: one more than steps in flight
IN_FLIGHT = 3

_NUMPY = {torch.int32: np.int32, torch.float32: np.float32}


class Packet:
    """Arrays by name, at the same addresses on the device for every step. `names` gives each one's length and type, which
    has four bytes. The host writes into the arrays of `fill()`, and `send` copies them without waiting."""

    def __init__(self, names: Mapping[str, tuple[int, torch.dtype]], device: torch.device) -> None:
        self._names = dict(names)
        words = sum(length for length, _ in names.values())
        self._device = torch.zeros(words, dtype=torch.int32, device=device)
        pinned = device.type == "cuda"
        self._hosts = [torch.zeros(words, dtype=torch.int32, pin_memory=pinned) for _ in range(IN_FLIGHT)]
        self._arrays = [self._views_of(host) for host in self._hosts]
        self._at = 0
        self._tensors = self._tensors_of(self._device)

    def __getitem__(self, name: str) -> Tensor:
        """The array on the device."""
        return self._tensors[name]

    def fill(self) -> dict[str, NDArray[Any]]:
        """Returns the host's arrays for the next step. They still hold the values of `IN_FLIGHT` steps before."""
        self._at = (self._at + 1) % IN_FLIGHT
        return self._arrays[self._at]

    def send(self) -> None:
        self._device.copy_(self._hosts[self._at], non_blocking=True)

    def _tensors_of(self, words: Tensor) -> dict[str, Tensor]:
        found, at = {}, 0
        for name, (length, dtype) in self._names.items():
            found[name] = words[at : at + length].view(dtype)
            at += length
        return found

    def _views_of(self, words: Tensor) -> dict[str, NDArray[Any]]:
        return {
            name: tensor.view(torch.int32).numpy().view(_NUMPY[self._names[name][1]])
            for name, tensor in self._tensors_of(words).items()
        }
