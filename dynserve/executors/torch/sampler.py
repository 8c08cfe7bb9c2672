"""From logits to tokens. Draws depend on (seed, position) only, so a request continues the same on any worker.

A generator that advances with every draw would have to travel with a hand-off, a preemption, a migration. Instead each draw
has a key, a hash of the request's seed and the number of tokens before it, and each token's share of the draw's randomness
is a hash of that key and the token. The token drawn is the one with the largest sum of its logit (divided by the
temperature) and Gumbel noise: that is a draw from the softmax (Gumbel-max; Maddison et al., arXiv 1411.0030), it needs no
sorting, and it is computed alike on a CPU and, for thousands of tokens in parallel, on a GPU (`cuda/kernels.cu`).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence as Seq
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from xxhash import xxh3_64_intdigest

from dynserve.errors import BadRequest
from dynserve.executors.scheduler import Sampled, Sequence
from dynserve.wire.requests import SamplingParams, TokenLogprob, finite

_pair = struct.Struct("<QQ").pack


@torch.inference_mode()
def sample(logits: Tensor, sequences: Seq[Sequence]) -> list[Sampled]:
    """Samples one token per row of `logits` (`[S, vocab]`, float32)."""
    best = logits.argmax(dim=-1).tolist()
    return [
        Sampled(token) if sequence.request.sampling.greedy and plain(sequence) else _sample_one(logits[row], sequence)
        for row, (token, sequence) in enumerate(zip(best, sequences, strict=True))
    ]


def key_of(seed: int, position: int) -> tuple[int, int]:
    """Returns the key of a draw as two numbers of 32 bits: XXH3-64 of the seed and the number of tokens before."""
    key = xxh3_64_intdigest(_pair(seed & 0xFFFFFFFFFFFFFFFF, position))
    return key & 0xFFFFFFFF, key >> 32


def gumbel(key: tuple[int, int], vocab: int) -> NDArray[np.float32]:
    """Returns standard Gumbel noise for each token, `[vocab]`. The hash is MurmurHash3's 32-bit finaliser, twice."""
    bits = _mixed(_mixed(_spread(vocab) + np.uint32(key[0])) ^ np.uint32(key[1]))
    # the smallest numbers decide the draw, and floating point is finest there
    uniform = np.minimum((bits.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32), np.float32(0.99999994))
    noise: NDArray[np.float32] = -np.log(-np.log1p(-uniform))
    return noise


@lru_cache(maxsize=4)
def _spread(vocab: int) -> NDArray[np.uint32]:
    return np.arange(vocab, dtype=np.uint32) * np.uint32(0x9E3779B1)


def _mixed(x: NDArray[np.uint32]) -> NDArray[np.uint32]:
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def plain(sequence: Sequence) -> bool:
    """Whether the sequence uses the logits unchanged and needs only the token."""
    s = sequence.request.sampling
    return (
        sequence.matcher is None
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
    if (error := adjust(logits, sequence)) is not None:
        return Sampled(0, error=error)
    token = int(logits.argmax()) if sampling.greedy else draw(logits, sampling, len(sequence.tokens))
    return Sampled(token, None if sampling.logprobs is None else logprob_of(raw, token, sampling.logprobs))


def adjust(logits: Tensor, sequence: Sequence, pending: Tensor | None = None) -> BadRequest | None:
    """Applies the request's fields and its grammar to the logits (`[vocab]`, float32), in place; `pending` as in
    `Adjustments.apply`. An error is returned, not raised, because the step's other requests are not affected."""
    if sequence.adjustments is None:
        sequence.adjustments = Adjustments(sequence, len(logits), logits.device)
    sequence.adjustments.apply(logits, sequence, pending)
    if sequence.matcher is not None:
        try:
            sequence.matcher.mask(sequence.tokens, sequence.prompt_len, logits)
        except BadRequest as error:
            return error
    return None


class Adjustments:
    """The changes that one sequence's fields make to its logits: bias and penalties, and no end before `min_tokens`.

    Presence and frequency count what was generated, as OpenAI defines them; repetition (CTRL, arXiv 1909.05858) counts
    the prompt as well. All counts are kept in tensors that are updated with each token, so that the cost of a token
    depends neither on the length of the sequence nor on the number of its biases.
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
        self._noted = 0  # tokens of the sequence that are counted

    def apply(self, logits: Tensor, sequence: Sequence, pending: Tensor | None = None) -> None:
        """Changes the logits (`[vocab]`, float32) of the sequence's next token in place. `pending` (`[1]`) is a token
        after `sequence.tokens` that the host has not read yet."""
        sampling = self._sampling
        if len(self._biased):
            logits.index_add_(0, self._biased, self._bias)
        if self._seen is not None or self._counts is not None:
            self._note(sequence)
            if pending is not None:
                self._note_pending(pending.long())
        if self._seen is not None:
            factor = sampling.repetition_penalty
            penalised = torch.where(logits > 0, logits / factor, logits * factor)
            torch.where(self._seen, penalised, logits, out=logits)
        if self._counts is not None:
            logits -= sampling.presence_penalty * (self._counts > 0) + sampling.frequency_penalty * self._counts
        generated = sequence.generated + (pending is not None)
        if generated < self._min_tokens and sequence.matcher is None:  # where a grammar ends, the answer ends
            logits[self._ends] = float("-inf")

    def _note(self, sequence: Sequence) -> None:
        if self._noted >= len(sequence.tokens):
            return
        new = torch.tensor(sequence.tokens[self._noted :], dtype=torch.long, device=self._biased.device)
        if self._seen is not None:
            self._seen[new] = True
        if self._counts is not None:
            generated = new[max(0, sequence.prompt_len - self._noted) :]
            self._counts.index_add_(0, generated, torch.ones(len(generated), device=generated.device))
        self._noted = len(sequence.tokens)

    def _note_pending(self, token: Tensor) -> None:
        if self._seen is not None:
            self._seen.index_fill_(0, token, True)
        if self._counts is not None:
            self._counts.index_add_(0, token, torch.ones(1, device=token.device))
        self._noted += 1


def draw(logits: Tensor, sampling: SamplingParams, position: int) -> int:
    """Draws one token after top-k, then top-p of the remaining ones, then min-p, all after the temperature."""
    logits = logits.cpu()
    if sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0:
        logits = logits.masked_fill(~_kept(logits, sampling), float("-inf"))
    with np.errstate(over="ignore", invalid="ignore"):
        scores = logits.numpy() / np.float32(sampling.temperature) + gumbel(
            key_of(sampling.seed, position), len(logits)
        )
    token = int(np.argmax(scores))
    # a bias or penalty may make a logit overflow: the likeliest token is used then
    return token if np.isfinite(scores[token]) else int(logits.argmax())


def _kept(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """Returns True for each token that can be drawn, `[vocab]`. The likeliest always can."""
    ranked, ids = torch.sort(logits, descending=True, stable=True)
    if sampling.top_k > 0:
        ranked = ranked[: sampling.top_k]
    p = torch.softmax(ranked / sampling.temperature, dim=-1)
    kept = torch.ones_like(p, dtype=torch.bool)
    if sampling.top_p < 1.0:
        kept &= p.cumsum(dim=-1) - p < sampling.top_p
    if sampling.min_p > 0.0:
        kept &= p >= sampling.min_p * p[0]
    kept[0] = True
    found = torch.zeros(len(logits), dtype=torch.bool)
    found[ids[: len(kept)]] = kept
    return found


def logprob_of(raw: Tensor, token: int, top: int) -> TokenLogprob:
    """Returns log-probabilities of the model's own distribution, before bias, penalties and temperature."""
    logprobs = torch.log_softmax(raw, dim=-1)
    best: list[tuple[int, float]] = []
    if top > 0:
        values, ids = logprobs.topk(min(top, len(logprobs)))
        best = list(zip(ids.tolist(), map(finite, values.tolist()), strict=True))
    return TokenLogprob(token, finite(float(logprobs[token])), best)


def embedding(pooled: Tensor) -> bytes:
    """Returns a pooled state, scaled to length 1, as little-endian float32; a sum and a mean give the same result."""
    vector: bytes = F.normalize(pooled, dim=0).cpu().numpy().astype("<f4").tobytes()
    return vector
