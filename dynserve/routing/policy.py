"""Policies: given the candidates for one phase of one request, which one. Plain classes with one method.

A policy of your own is a class without constructor arguments that has `choose`; `--router-policy package.module:Class`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from enum import StrEnum
from importlib import import_module
from typing import Any, NamedTuple, Protocol

import msgspec

from dynserve.config import RouterMode
from dynserve.errors import BadRequest, ConfigError, NoWorker
from dynserve.wire.requests import Phase


class IndexState(StrEnum):
    """How well the router knows what a worker has cached."""

    EXACT = "exact"  # every event applied, none missing
    DEGRADED = "degraded"  # events missing, or entries gone for want of room: resyncing
    APPROX = "approx"  # no events from it: what was sent there is assumed to be there


class Candidate(msgspec.Struct, gc=False, array_like=True):
    """One worker as a policy sees it. Blocks are KV blocks of the model's size."""

    worker: str
    overlap: int  # leading blocks of the prompt that it holds, or will hold when it comes to this request
    waiting_prefill: float  # blocks placed on it and not yet computed
    decode_blocks: float  # blocks of requests that it is answering
    requests: int
    ramp: float = 1.0  # part of its speed that a fresh worker is trusted with, up to 1
    index: str = IndexState.EXACT.value
    index_age_s: float = 0.0  # since its cache was last heard of


class PolicyInput(NamedTuple):
    """What a policy may know of the request."""

    phase: Phase
    prompt_blocks: int
    session: str = ""  # header x-dynserve-session
    instances: tuple[str, ...] = ()  # header x-dynserve-instance


class PolicyChoice(NamedTuple):
    candidate: Candidate
    costs: list[float]  # of all candidates, in their order; empty when the policy has none


class Policy(Protocol):
    def choose(self, asked: PolicyInput, candidates: Sequence[Candidate]) -> PolicyChoice:
        """One of `candidates`, which has at least one. A policy that looks at `overlap` sets `uses_overlap = True`."""
        ...


class KvWeights(NamedTuple):
    """The numbers of `Kv`. The defaults come from `benchmarks/replay.py --sweep`; the README has its table."""

    prefill: float = 1.0  # one block to prefill, in decode blocks
    overlap: float = 8.0  # one block that must be computed anew, in blocks that only wait to be computed
    transfer: float = 0.1  # one block to be moved to a decode worker, in decode blocks
    herd: float = 4.0  # a cache attracts until its wait is this many times the shortest
    temperature: float = 0.0  # 0: the cheapest; above: cheaper ones more often


class Kv:
    """Fewest blocks of work, counting what must be prefilled, what waits before it, and what is being decoded.

        cost = (prefill · (waiting + overlap · new) + decode blocks) / ramp      new = prompt blocks − cached blocks

    Waiting delays this request. What is computed anew delays it as well, and everyone behind it: therefore its own
    weight. Decode blocks slow every step it takes part in. For a decode worker, `new` is what must be moved to it.

    A worker does not attract by its cache when `waiting + new` there is over `herd` times the least of all: it is left
    out. So a burst that shares a prefix spills over, and then the next worker has that prefix, too. Ties go at random,
    or idle workers would fill up in the order of their names.
    """

    uses_overlap = True

    def __init__(self, weights: KvWeights = KvWeights(), rng: random.Random | None = None) -> None:  # noqa: B008
        self.weights, self._rng = weights, rng or random.Random()

    def choose(self, asked: PolicyInput, candidates: Sequence[Candidate]) -> PolicyChoice:
        weights, prompt = self.weights, asked.prompt_blocks
        if asked.phase == "decode":
            transfer = weights.transfer
            costs = [(c.decode_blocks + transfer * (prompt - c.overlap)) / c.ramp for c in candidates]
        else:
            prefill, again = weights.prefill, weights.overlap
            costs = [
                (prefill * (c.waiting_prefill + again * (prompt - c.overlap)) + c.decode_blocks) / c.ramp
                for c in candidates
            ]
            self._leave_out_herds(prompt, candidates, costs)
        if weights.temperature > 0:
            return PolicyChoice(self._draw(candidates, costs), costs)
        least = min(costs)
        if costs.count(least) == 1:
            return PolicyChoice(candidates[costs.index(least)], costs)
        best = [c for c, cost in zip(candidates, costs, strict=True) if cost == least]
        return PolicyChoice(self._rng.choice(best), costs)

    def _leave_out_herds(self, prompt: int, candidates: Sequence[Candidate], costs: list[float]) -> None:
        # prompt - overlap is never 0: one token is always computed
        delays = [c.waiting_prefill + prompt - c.overlap for c in candidates]
        most = self.weights.herd * min(delays)  # which the least itself never passes
        if max(delays) > most:
            for i, delay in enumerate(delays):
                if delay > most and candidates[i].overlap:
                    costs[i] = math.inf

    def _draw(self, candidates: Sequence[Candidate], costs: list[float]) -> Candidate:
        """Softmax over the costs, scaled to their mean, so that one temperature fits short and long prompts."""
        finite = [cost for cost in costs if cost < math.inf]
        scale = self.weights.temperature * (sum(finite) / len(finite) or 1.0)
        least = min(finite)
        odds = [math.exp((least - cost) / scale) for cost in costs]
        return self._rng.choices(candidates, odds)[0]


class RoundRobin:
    uses_overlap = False

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, asked: PolicyInput, candidates: Sequence[Candidate]) -> PolicyChoice:
        self._turn += 1
        return PolicyChoice(candidates[self._turn % len(candidates)], [])


class Random:
    uses_overlap = False

    def __init__(self, rng: random.Random | None = None) -> None:
        self._rng = rng or random.Random()

    def choose(self, asked: PolicyInput, candidates: Sequence[Candidate]) -> PolicyChoice:
        return PolicyChoice(self._rng.choice(candidates), [])


class LeastLoaded:
    """Fewest blocks waiting and being decoded; blind to caches."""

    uses_overlap = False

    def __init__(self, rng: random.Random | None = None) -> None:
        self._rng = rng or random.Random()

    def choose(self, asked: PolicyInput, candidates: Sequence[Candidate]) -> PolicyChoice:
        costs = [(c.waiting_prefill + c.decode_blocks) / c.ramp for c in candidates]
        least = min(costs)
        best = [c for c, cost in zip(candidates, costs, strict=True) if cost == least]
        return PolicyChoice(self._rng.choice(best), costs)


class PowerOfTwo:
    """The less loaded of two drawn at random: nearly as even as the least loaded, and no herd when loads are stale."""

    uses_overlap = False

    def __init__(self, rng: random.Random | None = None) -> None:
        self._rng = rng or random.Random()
        self._least = LeastLoaded(self._rng)

    def choose(self, asked: PolicyInput, candidates: Sequence[Candidate]) -> PolicyChoice:
        two = self._rng.sample(candidates, min(2, len(candidates)))
        return PolicyChoice(self._least.choose(asked, two).candidate, [])


class Direct:
    """The instance that the request names; the least loaded one where it names none of this role."""

    uses_overlap = False

    def __init__(self, rng: random.Random | None = None) -> None:
        self._least = LeastLoaded(rng)

    def choose(self, asked: PolicyInput, candidates: Sequence[Candidate]) -> PolicyChoice:
        if not asked.instances:
            raise BadRequest("router mode direct: name an instance in the header x-dynserve-instance")
        for candidate in candidates:
            if candidate.worker in asked.instances:
                return PolicyChoice(candidate, [])
        role = "decode-" if asked.phase == "decode" else "prefill-"
        if asked.phase != "aggregated" and not any(name.startswith(role) for name in asked.instances):
            return self._least.choose(asked, candidates)
        raise NoWorker(f"no such instance here at the moment: {', '.join(asked.instances)}")


def policy_maker(mode: RouterMode, own: str | None, weights: KvWeights, rng: random.Random) -> Callable[[], Policy]:
    """Makes policies, one for each pool of workers: of the user's class when `own` names one, else of the mode.

    Raises:
        ConfigError: `own` does not name a class with a `choose`.
    """
    if own is not None:
        return _own_class(own)
    makers: dict[RouterMode, Callable[[], Policy]] = {
        "kv": lambda: Kv(weights, rng),
        "round-robin": RoundRobin,
        "random": lambda: Random(rng),
        "least-loaded": lambda: LeastLoaded(rng),
        "power-of-two": lambda: PowerOfTwo(rng),
        "direct": lambda: Direct(rng),
    }
    return makers[mode]


def _own_class(name: str) -> Callable[[], Policy]:
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(f"--router-policy {name}: expected package.module:Class")
    try:
        found: Any = getattr(import_module(module), attribute)
        callable_ = callable(found().choose)
    except ImportError as error:
        raise ConfigError(f"--router-policy {name}: cannot import {module}: {error}") from error
    except AttributeError as error:
        raise ConfigError(f"--router-policy {name}: {error}") from error
    except TypeError as error:
        raise ConfigError(f"--router-policy {name}: the class is made without arguments: {error}") from error
    if not callable_:
        raise ConfigError(f"--router-policy {name}: {attribute}.choose cannot be called")
    maker: Callable[[], Policy] = found
    return maker
