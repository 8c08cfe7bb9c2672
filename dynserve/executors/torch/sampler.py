"""From logits to tokens. Draws depend on (seed, position) only, so a request continues the same on any worker.

A generator that advances with every draw would have to travel with a hand-off, a preemption, a migration. Instead the
uniform number of a draw is a hash of the request's seed and the number of tokens before it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence as Seq

import torch
import torch.nn.functional as F
from torch import Tensor
from xxhash import xxh3_64_intdigest

from dynserve.errors import BadRequest
from dynserve.executors.scheduler import Sampled, Sequence
from dynserve.wire.requests import Sampling, TokenLogprob, finite

_pair = struct.Struct("<QQ").pack


@torch.inference_mode()
def sample(logits: Tensor, sequences: Seq[Sequence]) -> list[Sampled]:
    """One token per row of `logits` (`[S, vocab]`, float32)."""
    best = logits.argmax(dim=-1).tolist()
    return [
        Sampled(token) if _plain(sequence) else _sample_one(logits[row], sequence)
        for row, (token, sequence) in enumerate(zip(best, sequences, strict=True))
    ]


def uniform(seed: int, position: int) -> float:
    """In [0, 1), from 53 bits of XXH3-64."""
    return (xxh3_64_intdigest(_pair(seed & 0xFFFFFFFFFFFFFFFF, position)) >> 11) / (1 << 53)


def _plain(sequence: Sequence) -> bool:
    """Whether the likeliest token, untouched, is the answer."""
    s = sequence.request.sampling
    return (
        s.greedy
        and sequence.matcher is None
        and sequence.pooled is None
        and s.logprobs is None
        and not s.logit_bias
        and s.presence_penalty == s.frequency_penalty == 0.0
        and s.repetition_penalty == 1.0
        and sequence.generated >= sequence.request.stop.min_tokens
    )


def _sample_one(raw: Tensor, sequence: Sequence) -> Sampled:
    if sequence.pooled is not None:
        return Sampled(0, embedding=embedding(sequence.pooled))
    sampling = sequence.request.sampling
    logits = raw.clone()
    if sequence.adjustments is None:
        sequence.adjustments = Adjustments(sequence, len(raw), raw.device)
    sequence.adjustments.apply(logits, sequence)
    if sequence.matcher is not None:
        try:
            sequence.matcher.mask(sequence.tokens, sequence.prompt_len, logits)
        except BadRequest as error:  # the others of this step have done nothing wrong
            return Sampled(0, error=error)
    token = int(logits.argmax()) if sampling.greedy else draw(logits, sampling, len(sequence.tokens))
    return Sampled(token, None if sampling.logprobs is None else logprob_of(raw, token, sampling.logprobs))


class Adjustments:
    """The changes that one sequence's fields make to its logits: bias and penalties, and no end before `min_tokens`.

    Presence and frequency count what was generated, as OpenAI defines them; repetition (CTRL, arXiv 1909.05858) counts
    the prompt as well. All of it is kept in tensors that follow the sequence, so that a token costs the same however long
    the sequence is and however much its request asked for.
    """

    def __init__(self, sequence: Sequence, vocab: int, device: torch.device) -> None:
        sampling, stop = sequence.request.sampling, sequence.request.stop
        self._sampling, self._min_tokens = sampling, stop.min_tokens
        biases = {token: bias for token, bias in sampling.logit_bias.items() if 0 <= token < vocab}
        self._biased = torch.tensor(list(biases), dtype=torch.long, device=device)
        self._bias = torch.tensor(list(biases.values()), dtype=torch.float32, device=device)
        ends = [token for token in sequence.ends if 0 <= token < vocab]
        self._ends = torch.tensor(ends, dtype=torch.long, device=device)
        counted = bool(sampling.presence_penalty or sampling.frequency_penalty)
        self._counts = torch.zeros(vocab, device=device) if counted else None
        self._seen = torch.zeros(vocab, dtype=torch.bool, device=device) if sampling.repetition_penalty != 1.0 else None
        self._noted = 0  # tokens of the sequence

    def apply(self, logits: Tensor, sequence: Sequence) -> None:
        """Changes the logits (`[vocab]`, float32) of the sequence's next token in place."""
        sampling = self._sampling
        if len(self._biased):
            logits.index_add_(0, self._biased, self._bias)
        if self._seen is not None or self._counts is not None:
            self._note(sequence)
        if self._seen is not None:
            factor = sampling.repetition_penalty
            penalised = torch.where(logits > 0, logits / factor, logits * factor)
            torch.where(self._seen, penalised, logits, out=logits)
        if self._counts is not None:
            logits -= sampling.presence_penalty * (self._counts > 0) + sampling.frequency_penalty * self._counts
        if sequence.generated < self._min_tokens and sequence.matcher is None:  # where a grammar ends, the answer ends
            logits[self._ends] = float("-inf")

    def _note(self, sequence: Sequence) -> None:
        new = torch.tensor(sequence.tokens[self._noted :], dtype=torch.long, device=self._biased.device)
        if self._seen is not None:
            self._seen[new] = True
        if self._counts is not None:
            generated = new[max(0, sequence.prompt_len - self._noted) :]
            self._counts.index_add_(0, generated, torch.ones(len(generated), device=generated.device))
        self._noted = len(sequence.tokens)


def draw(logits: Tensor, sampling: Sampling, position: int) -> int:
    """Temperature, then top-k, then top-p, then min-p, then the inverse of the cumulative distribution."""
    logits, ids = torch.sort(logits, descending=True, stable=True)
    if sampling.top_k > 0:
        logits = logits[: sampling.top_k]
    p = torch.softmax(logits / sampling.temperature, dim=-1)
    if not torch.isfinite(p[0]):  # a bias or penalty took the logits out of range: the likeliest is still the likeliest
        return int(ids[0])
    if sampling.top_p < 1.0:
        before = p.cumsum(dim=-1) - p
        p = torch.where(before < sampling.top_p, p, 0.0)  # the likeliest always stays: nothing is before it
        p[0] = p[0] if p[0] > 0 else 1.0
    if sampling.min_p > 0.0:
        p = torch.where(p >= sampling.min_p * p[0], p, 0.0)
    cumulative = p.double().cumsum(dim=-1)
    at = torch.searchsorted(cumulative, uniform(sampling.seed, position) * cumulative[-1], right=True)
    return int(ids[min(int(at), int((p > 0).nonzero()[-1]))])


def logprob_of(raw: Tensor, token: int, top: int) -> TokenLogprob:
    """Of the model's own distribution, before bias, penalties and temperature."""
    logprobs = torch.log_softmax(raw, dim=-1)
    best: list[tuple[int, float]] = []
    if top > 0:
        values, ids = logprobs.topk(min(top, len(logprobs)))
        best = list(zip(ids.tolist(), map(finite, values.tolist()), strict=True))
    return TokenLogprob(token, finite(float(logprobs[token])), best)


def embedding(pooled: Tensor) -> bytes:
    """A pooled state as little-endian float32 of length 1; a sum does as well as a mean."""
    vector: bytes = F.normalize(pooled, dim=0).cpu().numpy().astype("<f4").tobytes()
    return vector
