"""Requests that need every position of their prompt: log-probabilities of its tokens, and embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from dynserve.executors.scheduler import Slice
from dynserve.executors.torch.model import Transformer
from dynserve.executors.torch.sampler import logprob_of
from dynserve.wire.requests import TokenLogprob

ROWS = 256  # positions whose logits are computed at once


@torch.inference_mode()
def observe_prompt(model: Transformer, hidden: Tensor, work: Slice) -> None:
    """Adds a slice's hidden states (`[size, hidden]`) to its sequence's pooled state or prompt log-probabilities."""
    sequence = work.sequence
    if sequence.request.pooling == "mean":
        total = model.normed(hidden).sum(dim=0, dtype=torch.float32)
        sequence.pooled = total if sequence.pooled is None else sequence.pooled + total
    elif sequence.request.pooling == "last":
        sequence.pooled = model.normed(hidden[-1:])[0].float()
    else:
        _score(model, hidden, work)


def _score(model: Transformer, hidden: Tensor, work: Slice) -> None:
    sequence = work.sequence
    if work.start == 0:
        sequence.prompt_logprobs = [TokenLogprob(sequence.tokens[0], 0.0)]
    top = sequence.request.sampling.logprobs or 0
    # the logits at a position predict the token after it; after the prompt's last one the answer begins
    last = min(work.start + work.size, sequence.prompt_len - 1)
    for at in range(work.start, last, ROWS):
        end = min(at + ROWS, last)
        rows = model.logits(hidden[at - work.start : end - work.start])
        for row, position in zip(rows, range(at, end), strict=True):
            sequence.prompt_logprobs.append(logprob_of(row, sequence.tokens[position + 1], top))
