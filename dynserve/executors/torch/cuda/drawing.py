"""Sampling on the device: as in `sampler.py`, but for all rows of a step at once and without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dynserve.errors import BadRequest
from dynserve.executors.scheduler import Sampled
from dynserve.executors.scheduler import Sequence as _Sequence
from dynserve.executors.torch.cuda.forward import Forward
from dynserve.executors.torch.cuda.kernels import BLOCKS, Launcher
from dynserve.executors.torch.cuda.packet import IN_FLIGHT, Packet
from dynserve.executors.torch.sampler import adjust, embedding, key_of, plain
from dynserve.wire.requests import TokenLogprob, finite

CHUNKS = 64  # upper bound of the blocks that share a row's logits


class Drawing:
    """The device's sampler. `packet` holds the picks of `Forward.head` and every row's sampling fields."""

    def __init__(self, forward: Forward, launcher: Launcher, vocabulary: int, rows: int, device: torch.device) -> None:
        self._forward, self._launch = forward, launcher.launch
        self._vocabulary = vocabulary
        i, f = torch.int32, torch.float32
        self.packet = Packet(
            {"picks": (rows, i), "temperatures": (rows, f), "keys": (2 * rows, i), "top_ks": (rows, i),
             "top_ps": (rows, f), "min_ps": (rows, f), "turn": (1, i)}, device,
        )  # fmt: skip
        self._cuts = torch.zeros(rows, dtype=torch.int64, device=device)
        self._best = torch.zeros(rows, dtype=torch.int64, device=device)
        self._arrived = torch.zeros(rows, dtype=torch.int32, device=device)
        pinned = device.type == "cuda"
        self._hosts = torch.zeros(IN_FLIGHT, rows, dtype=torch.int32, pin_memory=pinned)
        self._turn = 0
        self._cut = self._was_cut = False

    @staticmethod
    def kernel_names() -> list[str]:
        return ["choose", "truncate"]

    def prepare(
        self, sequences: Sequence[_Sequence], positions: Sequence[int], rows: Sequence[int], padded: int
    ) -> bool:
        """Sends the rows to pick and their sampling fields. `positions` counts the tokens before each drawn one. Returns
        True if `choose` suffices: no row has a cut distribution or changed logits, or needs more than the token."""
        host = self.packet.fill()
        count = len(sequences)
        host["picks"][:count] = rows
        host["picks"][count:padded] = 0
        host["temperatures"][:padded] = 0.0
        self._turn = (self._turn + 1) % IN_FLIGHT
        host["turn"][0] = self._turn
        keys, temperatures = host["keys"].view("uint32"), host["temperatures"]
        self._cut, simple = False, True
        for at, (sequence, position) in enumerate(zip(sequences, positions, strict=True)):
            simple &= plain(sequence)
            sampling = sequence.request.sampling
            if sampling.greedy:
                continue
            temperatures[at] = sampling.temperature
            keys[2 * at : 2 * at + 2] = key_of(sampling.seed, position)
            host["top_ks"][at] = min(sampling.top_k, self._vocabulary)
            host["top_ps"][at], host["min_ps"][at] = sampling.top_p, sampling.min_p
            self._cut |= sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0
        self.packet.send()
        if self._was_cut and not self._cut:
            self._cuts.zero_()
        self._was_cut = self._cut
        return simple and not self._cut

    def choose(self, count: int) -> None:
        """Draws from the first `count` rows of the logits as they are."""
        packet = self.packet
        chunks = max(8, min(CHUNKS, BLOCKS // count))
        self._launch(
            "choose", (chunks, count, 1), 256, self._forward.logits, packet["temperatures"], packet["keys"], self._cuts,
            self._best, self._arrived, self._forward.drawn, self._hosts, packet["turn"], self._hosts.shape[1], early=True,
        )  # fmt: skip

    def drawn(self, count: int) -> Drawn:
        """Returns the tokens of the last `choose`."""
        return Drawn(self._hosts[self._turn], count, [])

    def draw(self, sequences: Sequence[_Sequence], before: Sequence[int]) -> Drawn:
        """Draws a token for each row of the logits, with all options of its request. `before[i]` is the row of sequence
        `i`'s last token among the last step's tokens, if the host has not read it yet, or -1."""
        count = len(sequences)
        logits, pending = self._forward.logits, self._forward.drawn
        special = [_SpecialRow(at, logits[at], s, self._vocabulary) for at, s in enumerate(sequences) if not plain(s)]
        for row in special:
            source = before[row.at]
            row.apply(pending[source : source + 1] if source >= 0 else None)
        if self._cut:
            packet = self.packet
            self._launch(
                "truncate", (count, 1, 1), 1024, logits, packet["temperatures"], packet["top_ks"], packet["top_ps"],
                packet["min_ps"], self._cuts,
            )  # fmt: skip
        self.choose(count)
        for row in special:
            row.finish(pending)
        return Drawn(self._hosts[self._turn], count, special)


class Drawn:
    """Drawn tokens that are being copied to the host."""

    def __init__(self, host: Tensor, count: int, special: list[_SpecialRow]) -> None:
        self._host, self._count, self._special = host, count, special

    def read(self) -> list[Sampled]:
        """Returns the tokens; the step must have ended."""
        sampled = [Sampled(token) for token in self._host[: self._count].tolist()]
        for row in self._special:
            sampled[row.at] = row.sampled(sampled[row.at].token_id)
        return sampled


class _SpecialRow:
    """A row whose request changes the logits, or needs log-probabilities or an embedding."""

    def __init__(self, at: int, logits: Tensor, sequence: _Sequence, vocabulary: int) -> None:
        self.at, self._logits, self._sequence, self._vocabulary = at, logits, sequence, vocabulary
        self._error: BadRequest | None = None
        self._top: tuple[Tensor, Tensor] | None = None
        self._own: Tensor | None = None
        self._logprobs: Tensor | None = None

    def apply(self, pending: Tensor | None) -> None:
        """Keeps the log-probabilities that the request needs, then applies its fields to the logits."""
        sequence = self._sequence
        if sequence.pooled is not None:
            return
        if (top := sequence.request.sampling.logprobs) is not None:
            self._logprobs = torch.log_softmax(self._logits, dim=-1)
            if top > 0:
                values, ids = self._logprobs.topk(min(top, self._vocabulary))
                self._top = _to_host(values), _to_host(ids)
        self._error = adjust(self._logits, sequence, pending)

    def finish(self, drawn: Tensor) -> None:
        if self._logprobs is not None:
            self._own = _to_host(self._logprobs.gather(0, drawn[self.at : self.at + 1].long()))
            self._logprobs = None

    def sampled(self, token: int) -> Sampled:
        if self._sequence.pooled is not None:
            return Sampled(0, embedding=embedding(self._sequence.pooled))
        if self._error is not None:
            return Sampled(0, error=self._error)
        if self._own is None:
            return Sampled(token)
        best: list[tuple[int, float]] = []
        if self._top is not None:
            values, ids = self._top
            best = list(zip(ids.tolist(), map(finite, values.tolist()), strict=True))
        return Sampled(token, TokenLogprob(token, finite(float(self._own)), best))


def _to_host(values: Tensor) -> Tensor:
    """Returns a copy in the host's memory, which is complete once the step has ended."""
    if values.device.type == "cpu":
        return values.clone()
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    return host
