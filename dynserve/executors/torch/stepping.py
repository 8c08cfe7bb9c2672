"""The interface of a device to the torch executor's thread: it begins a step and returns the result later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from dynserve.executors.scheduler import Sampled, Slice
from dynserve.executors.torch.attention import KvCache
from dynserve.executors.torch.cuda.kernels import Launcher
from dynserve.executors.torch.model import Transformer
from dynserve.executors.torch.sampler import sample
from dynserve.executors.torch.whole import observe_prompt


class DeviceStep(Protocol):
    """A step that has begun."""

    @property
    def work(self) -> Sequence[Slice]: ...

    def result(self) -> list[list[Sampled]]:
        """Waits until the step has ended and returns one new token for each slice that samples. Called once."""
        ...


class Runner(Protocol):
    @property
    def overlaps(self) -> bool:
        """Whether a step can be begun while the one before it is being computed."""
        ...

    @property
    def launcher(self) -> Launcher | None:
        """The launcher of kernels on the device, or None if there are no kernels."""
        ...

    def enter(self) -> None:
        """Called once by the thread that steps."""
        ...

    def begin(self, work: Sequence[Slice], before: DeviceStep | None) -> DeviceStep:
        """Begins a step. `before` is the last step if its result is not read yet: its slices continue with its tokens."""
        ...


class PlainRunner:
    """Computes a step at once, with torch's operations alone, on any device."""

    overlaps = False
    launcher = None

    def __init__(self, model: Transformer, cache: KvCache) -> None:
        self._model, self._cache = model, cache

    def enter(self) -> None:
        if self._cache.stream is not None:
            torch.cuda.set_device(self._model.device)
            torch.cuda.set_stream(self._cache.stream)

    def begin(self, work: Sequence[Slice], before: DeviceStep | None) -> DeviceStep:
        layout, owners = self._cache.lay_out(work)
        hidden = self._model.forward(self._cache, layout)
        for i, first in layout.whole:
            observe_prompt(self._model, hidden[first : first + work[i].size], work[i])
        sampled: list[list[Sampled]] = [[] for _ in work]
        logits = self._model.logits(hidden[layout.sampling])
        for owner, new in zip(owners, sample(logits, [work[i].sequence for i in owners]), strict=True):
            sampled[owner] = [new]
        return _Done(work, sampled)


class _Done:
    def __init__(self, work: Sequence[Slice], sampled: list[list[Sampled]]) -> None:
        self.work, self._sampled = work, sampled

    def result(self) -> list[list[Sampled]]:
        return self._sampled
