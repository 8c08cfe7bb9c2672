"""Policies: given the candidates for one request, which one. Plain classes with one method."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from dynserve.config import RouterMode


class Candidate(NamedTuple):
    """One worker as a policy sees it, in blocks."""

    worker: str
    overlap: int  # leading blocks of the prompt that it holds
    waiting_prefill: float  # blocks placed on it and not yet prefilled
    decode_blocks: int  # blocks of requests that it is answering
    requests: int


class Choice(NamedTuple):
    candidate: Candidate
    costs: list[float]  # of all candidates, in their order; empty when the policy has none


class Policy(Protocol):
    uses_overlap: bool

    def choose(self, candidates: Sequence[Candidate], prompt_blocks: int) -> Choice:
        """One of `candidates`, which has at least one."""
        ...


class Kv:
    """Fewest blocks of work, counting what must be prefilled, what waits before it, and what is being decoded.

        cost = weight · max(0, waiting prefill + prompt − overlap) + decode blocks

    Waiting prefill delays this request; decode blocks slow every step that it takes part in. Ties go at random, or idle
    workers would fill up in the order of their names.
    """

    uses_overlap = True

    def __init__(self, prefill_weight: float = 1.0, rng: random.Random | None = None) -> None:
        self._weight, self._rng = prefill_weight, rng or random.Random()

    def choose(self, candidates: Sequence[Candidate], prompt_blocks: int) -> Choice:
        costs = [
            self._weight * max(0.0, c.waiting_prefill + prompt_blocks - c.overlap) + c.decode_blocks for c in candidates
        ]
        least = min(costs)
        best = [c for c, cost in zip(candidates, costs, strict=True) if cost == least]
        return Choice(best[0] if len(best) == 1 else self._rng.choice(best), costs)


class RoundRobin:
    uses_overlap = False

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, candidates: Sequence[Candidate], prompt_blocks: int) -> Choice:
        self._turn += 1
        return Choice(candidates[self._turn % len(candidates)], [])


class Random:
    uses_overlap = False

    def __init__(self, rng: random.Random | None = None) -> None:
        self._rng = rng or random.Random()

    def choose(self, candidates: Sequence[Candidate], prompt_blocks: int) -> Choice:
        return Choice(self._rng.choice(candidates), [])


def make_policy(mode: RouterMode, prefill_weight: float, rng: random.Random) -> Policy:
    match mode:
        case "kv":
            return Kv(prefill_weight, rng)
        case "round-robin":
            return RoundRobin()
        case "random":
            return Random(rng)
