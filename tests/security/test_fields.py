"""Fields that cost time at every token: they are bounded, and their cost does not depend on their content."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from dynserve.api.completions import CompletionRequest
from dynserve.api.fields import MAX_BIASES, MAX_STOP_IDS, parsed
from dynserve.dialects.base import held_back
from dynserve.errors import BadRequest
from dynserve.executors.scheduler import Sequence
from dynserve.executors.torch.sampler import Adjustments
from dynserve.render.renderer import StopStrings
from dynserve.wire.requests import SamplingParams, StopConditions
from tests.conftest import make_request

VOCAB = 50


@pytest.mark.parametrize(
    ("field", "most"), [("stop_token_ids", MAX_STOP_IDS), ("logit_bias", MAX_BIASES), ("stop", 16)]
)
def test_lists_that_are_checked_at_every_token_are_bounded(field: str, most: int) -> None:
    def body(count: int) -> dict[str, Any]:
        value: Any = {str(i): 1 for i in range(count)} if field == "logit_bias" else list(range(count))
        return {"model": "m", "prompt": "x", field: [str(i) for i in value] if field == "stop" else value}

    CompletionRequest.model_validate(body(most))
    with pytest.raises(ValidationError, match="at most"):
        CompletionRequest.model_validate(body(most + 1))
    with pytest.raises(BadRequest):
        parsed(CompletionRequest, b'{"model": "m", "prompt": "x", "stop_token_ids": [' + b"1," * 5000 + b"1]}")


def plainly(raw: torch.Tensor, sequence: Sequence) -> torch.Tensor:
    """Applies bias and penalties by their definitions, token by token."""
    sampling, stop, logits = sequence.request.sampling, sequence.request.stop, raw.clone()
    for token, bias in sampling.logit_bias.items():
        if token < len(logits):
            logits[token] += bias
    for token in set(sequence.tokens):
        factor = sampling.repetition_penalty
        logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
    for token, times in Counter(sequence.tokens[sequence.prompt_len :]).items():
        logits[token] -= sampling.presence_penalty + sampling.frequency_penalty * times
    if sequence.generated < stop.min_tokens:
        for token in (*sequence.ends,):
            if token < len(logits):
                logits[token] = float("-inf")
    return logits


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(logit_bias={3: 2.5, 7: -1.0, 900: 1.0}),
        SamplingParams(repetition_penalty=1.3),
        SamplingParams(presence_penalty=0.7),
        SamplingParams(frequency_penalty=-0.4),
        SamplingParams(logit_bias={4: 1.0}, repetition_penalty=0.8, presence_penalty=0.2, frequency_penalty=0.3),
    ],
)
@pytest.mark.parametrize("burst", [1, 3])
def test_bias_and_penalties_are_those_of_their_definitions_for_every_token(
    sampling: SamplingParams, burst: int
) -> None:
    """State is kept from token to token, also where several come at once, and after tokens of an earlier phase."""
    rng = random.Random(4)
    prompt = [rng.randrange(VOCAB) for _ in range(20)]
    request = make_request(
        prompt, sampling=sampling, stop=StopConditions(max_tokens=99, min_tokens=5, token_ids=(9, 999))
    )
    sequence = Sequence(1, request, 32, frozenset({2}), 0.0)
    adjustments = Adjustments(sequence, VOCAB, torch.device("cpu"))
    for step in range(12):
        raw = torch.randn(VOCAB, generator=torch.Generator().manual_seed(step))
        logits = raw.clone()
        adjustments.apply(logits, sequence)
        torch.testing.assert_close(logits, plainly(raw, sequence))
        sequence.tokens += [rng.randrange(10) for _ in range(burst)]


def slowly_held_back(text: str, strings: list[str]) -> int:
    lengths = [
        length for string in strings for length in range(1, len(string)) if length <= len(text) and text.endswith(string[:length])
    ]  # fmt: skip
    return max(lengths, default=0)


def test_the_possible_beginning_of_a_stop_string_is_held_back() -> None:
    rng = random.Random(1)
    for _ in range(2000):
        strings = ["".join(rng.choice("ab") for _ in range(rng.randrange(1, 8))) for _ in range(rng.randrange(4))]
        text = "".join(rng.choice("abc") for _ in range(rng.randrange(10)))
        assert held_back(text, strings) == slowly_held_back(text, strings)


def test_stop_strings_that_nearly_match_need_few_comparisons_per_token() -> None:
    comparisons = 0

    class Counted(str):
        def startswith(self, *args: Any) -> bool:
            nonlocal comparisons
            comparisons += 1
            return super().startswith(*args)

    strings = (*(Counted("b" * 255) for _ in range(15)), Counted("a" * 256))
    stops = StopStrings(strings)
    for _ in range(250):
        stops.push("a")
    assert comparisons <= 250 * 16 * 2
