"""Policies: each chooses one of the candidates for one phase of one request. They are plain classes with one method.

A custom policy is a class without constructor arguments that has `choose`: `--router-policy package.module:Class`.
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
    """The accuracy of the index of a worker's cache."""

    EXACT = "exact"  # every event applied, none missing
    DEGRADED = "degraded"  # events are missing, or entries were evicted: a snapshot is due
    APPROX = "approx"  # the worker sends no events: prompts placed there are assumed to be cached there


class Candidate(msgspec.Struct, gc=False, array_like=True):
    """One worker as a policy sees it. Blocks are KV blocks of the model's size."""

    worker: str
    overlap: int  # leading blocks of the prompt that it holds, or will hold when it starts this request
    waiting_prefill: float  # blocks placed on it and not yet computed
    decode_blocks: float  # blocks of requests that it is answering
    requests: int
    ramp: float = 1.0  # share of full load for a worker that joined recently, rising to 1
    index: str = IndexState.EXACT.value
    index_age_s: float = 0.0  # since its index was last confirmed to be exact


class PolicyInput(NamedTuple):
    """The properties of a request that a policy can use."""

    phase: Phase
    prompt_blocks: int
    session: str = ""  # header x-dynserve-session
    instances: tuple[str, ...] = ()  # header x-dynserve-instance


class PolicyChoice(NamedTuple):
    candidate: Candidate
    costs: list[float]  # of all candidates, in their order; empty if the policy computes none


class Policy(Protocol):
    def choose(self, policy_input: PolicyInput, candidates: Sequence[Candidate]) -> PolicyChoice:
        """Returns one of `candidates`, which is never empty. A policy that reads `overlap` sets `uses_overlap = True`."""
        ...


class KvWeights(NamedTuple):
    """The weights of `Kv`. The defaults come from `benchmarks/replay.py --sweep`; `benchmarks/README.md` has its table."""

    prefill: float = 1.0  # one block to prefill, in decode blocks
    overlap: float = 8.0  # one uncached block of this prompt, in blocks that wait before it
    transfer: float = 0.1  # one block to transfer to a decode worker, in decode blocks
    herd: float = 4.0  # a cached prefix attracts requests until its wait is this many times the shortest
    temperature: float = 0.0  # 0: the cheapest worker; above: a random one, cheaper ones more often


class Kv:
    """Chooses the worker with the fewest blocks of work: prefill of this prompt, waiting prefill, and running decodes.

        cost = (prefill · (waiting + overlap · new) + decode blocks) / ramp      new = prompt blocks − cached blocks

    Waiting blocks delay this request. New blocks delay it as well, and all requests behind it; therefore they have their
    own weight. Decode blocks slow every step that the request is part of. For a decode worker, `new` counts the blocks to
    transfer.

    A worker with cached blocks is excluded if its `waiting + new` is over `herd` times the smallest of all. So a burst of
    requests with a common prefix spills over to another worker, which then has the prefix, too. Ties are broken at
    random; otherwise idle workers would fill up in the order of their names.
    """

    uses_overlap = True

    def __init__(self, weights: KvWeights = KvWeights(), rng: random.Random | None = None) -> None:  # noqa: B008
        self.weights, self._rng = weights, rng or random.Random()

    def choose(self, policy_input: PolicyInput, candidates: Sequence[Candidate]) -> PolicyChoice:
        weights, prompt = self.weights, policy_input.prompt_blocks
        if policy_input.phase == "decode":
            transfer = weights.transfer
            costs = [(c.decode_blocks + transfer * (prompt - c.overlap)) / c.ramp for c in candidates]
        else:
            prefill, again = weights.prefill, weights.overlap
            costs = [
                (prefill * (c.waiting_prefill + again * (prompt - c.overlap)) + c.decode_blocks) / c.ramp
                for c in candidates
            ]
            self._exclude_herds(prompt, candidates, costs)
        if weights.temperature > 0:
            return PolicyChoice(self._draw(candidates, costs), costs)
        least = min(costs)
        if costs.count(least) == 1:
            return PolicyChoice(candidates[costs.index(least)], costs)
        best = [c for c, cost in zip(candidates, costs, strict=True) if cost == least]
        return PolicyChoice(self._rng.choice(best), costs)

    def _exclude_herds(self, prompt: int, candidates: Sequence[Candidate], costs: list[float]) -> None:
        # prompt - overlap is never 0: one token is always computed
        delays = [c.waiting_prefill + prompt - c.overlap for c in candidates]
        max_delay = self.weights.herd * min(delays)  # the smallest itself never exceeds it
        if max(delays) > max_delay:
            for i, delay in enumerate(delays):
                if delay > max_delay and candidates[i].overlap:
                    costs[i] = math.inf

    def _draw(self, candidates: Sequence[Candidate], costs: list[float]) -> Candidate:
        """Draws by a softmax over the costs, scaled to their mean, so that one temperature fits short and long prompts."""
        finite = [cost for cost in costs if cost < math.inf]
        scale = self.weights.temperature * (sum(finite) / len(finite) or 1.0)
        least = min(finite)
        odds = [math.exp((least - cost) / scale) for cost in costs]
        return self._rng.choices(candidates, odds)[0]


class RoundRobin:
    uses_overlap = False

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, policy_input: PolicyInput, candidates: Sequence[Candidate]) -> PolicyChoice:
        self._turn += 1
        return PolicyChoice(candidates[self._turn % len(candidates)], [])


class Random:
    uses_overlap = False

    def __init__(self, rng: random.Random | None = None) -> None:
        self._rng = rng or random.Random()

    def choose(self, policy_input: PolicyInput, candidates: Sequence[Candidate]) -> PolicyChoice:
        return PolicyChoice(self._rng.choice(candidates), [])


class LeastLoaded:
    """Chooses the worker with the fewest blocks waiting and being decoded; ignores caches."""

    uses_overlap = False

    def __init__(self, rng: random.Random | None = None) -> None:
        self._rng = rng or random.Random()

    def choose(self, policy_input: PolicyInput, candidates: Sequence[Candidate]) -> PolicyChoice:
        costs = [(c.waiting_prefill + c.decode_blocks) / c.ramp for c in candidates]
        least = min(costs)
        best = [c for c, cost in zip(candidates, costs, strict=True) if cost == least]
        return PolicyChoice(self._rng.choice(best), costs)


class PowerOfTwo:
    """Chooses the less loaded of two random workers: nearly as even as `LeastLoaded`, and no herd when loads are stale."""

    uses_overlap = False

    def __init__(self, rng: random.Random | None = None) -> None:
        self._rng = rng or random.Random()
        self._least = LeastLoaded(self._rng)

    def choose(self, policy_input: PolicyInput, candidates: Sequence[Candidate]) -> PolicyChoice:
        two = self._rng.sample(candidates, min(2, len(candidates)))
        return PolicyChoice(self._least.choose(policy_input, two).candidate, [])


class Direct:
    """Chooses the instance that the request names, or the least loaded worker if it names none of this role."""

    uses_overlap = False

    def __init__(self, rng: random.Random | None = None) -> None:
        self._least = LeastLoaded(rng)

    def choose(self, policy_input: PolicyInput, candidates: Sequence[Candidate]) -> PolicyChoice:
        if not policy_input.instances:
            raise BadRequest("router mode direct: name an instance in the header x-dynserve-instance")
        for candidate in candidates:
            if candidate.worker in policy_input.instances:
                return PolicyChoice(candidate, [])
        role = "decode-" if policy_input.phase == "decode" else "prefill-"
        if policy_input.phase != "aggregated" and not any(name.startswith(role) for name in policy_input.instances):
            return self._least.choose(policy_input, candidates)
        raise NoWorker(f"no such instance here at the moment: {', '.join(policy_input.instances)}")


def policy_maker(mode: RouterMode, own: str | None, weights: KvWeights, rng: random.Random) -> Callable[[], Policy]:
    """Returns a function that creates a pool's policy: an instance of the class that `own` names, else the mode's policy.

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
        raise ConfigError(f"--router-policy {name}: the class must be callable without arguments: {error}") from error
    if not callable_:
        raise ConfigError(f"--router-policy {name}: {attribute}.choose cannot be called")
    maker: Callable[[], Policy] = found
    return maker
