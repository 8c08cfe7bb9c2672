"""`Router`: chooses the worker for each phase of a request, and records why. It is synchronous, identifies workers by
id, and opens no connections.

All times are seconds of the caller's clock; the router reads no clock itself.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from dynserve.config import RouterMode
from dynserve.errors import NoWorker
from dynserve.routing.assumed import AssumedCaches, PendingPrompts
from dynserve.routing.index import PrefixIndex
from dynserve.routing.ledger import Account, Charge, Ledger
from dynserve.routing.policy import (
    Candidate,
    IndexState,
    KvWeights,
    Policy,
    PolicyChoice,
    PolicyInput,
    policy_maker,
)
from dynserve.routing.sessions import Sessions
from dynserve.wire.events import Cleared, KvEvent, Removed, Stored
from dynserve.wire.hashing import rolling_hashes
from dynserve.wire.requests import Phase, num_tokens

Overlaps = dict[str, int]  # worker -> leading blocks of a prompt that it holds, or will hold when it starts the prompt

PREFILL_STEPS = 16  # full steps of waiting prefill tokens that a worker may have by default
UNKNOWN_SLOTS = 1 << 20  # of a worker that does not say how many requests it runs at once
SPARE = 8  # one in so many requests may wait in a worker, so that its engine never waits for one

SLOWEST = 0.1  # share of its full load that a worker gets right after it joined


class RouterOptions(NamedTuple):
    """The options of a router. `FrontendConfig` has one flag for each."""

    mode: RouterMode = "kv"
    policy: str | None = None  # package.module:Class, instead of a mode
    weights: KvWeights = KvWeights()
    slow_start_s: float = 10.0
    session_ttl_s: float = 300.0
    assume_ttl_s: float = 120.0
    index_bytes: int = 1 << 30
    local_prefill_tokens: int = 1024  # a decode worker prefills at most so many uncached tokens; 0: never
    local_prefill_toll: int = 1024  # a prefill worker is preferred unless it is slower by more tokens than this
    busy_prefill_tokens: int = 0  # a worker with more waiting prefill tokens is over its threshold; 0: `PREFILL_STEPS`
    busy_kv_fraction: float = 1.0  # so is a worker whose answers fill more than this part of its KV blocks


@dataclass(slots=True, eq=False)
class RoutingTarget:
    """A worker that requests can be placed on. `Router.join` creates it; the KV feed updates `index` and `confirmed_at`."""

    worker: str
    block_size: int
    num_blocks: int
    since: float  # when it joined
    account: Account
    index: IndexState
    confirmed_at: float  # when `index` was last confirmed to be exact
    slots: int = UNKNOWN_SLOTS  # requests that it runs at once, with some that wait for the next step
    max_prefill: float = math.inf  # prefill tokens that may wait there
    capacity: int = field(init=False)  # tokens

    def __post_init__(self) -> None:
        self.capacity = self.num_blocks * self.block_size


class PlacementQuery:
    """The properties of a request that its placement needs. Block hashes are computed once, when they are first used."""

    __slots__ = ("_hashes", "_size", "instances", "model", "prompt", "salt", "session")

    def __init__(
        self, prompt: bytes, salt: str = "", *, model: str = "", session: str = "", instances: tuple[str, ...] = ()
    ) -> None:
        self.prompt, self.salt, self.model, self.session, self.instances = prompt, salt, model, session, instances
        self._hashes: list[int] = []
        self._size = 0

    @property
    def tokens(self) -> int:
        return num_tokens(self.prompt)

    def hashes(self, block_size: int) -> list[int]:
        if self._size != block_size:
            self._hashes, self._size = rolling_hashes(self.prompt, block_size, self.salt), block_size
        return self._hashes

    def reusable(self, block_size: int) -> Sequence[int]:
        """Hashes of the blocks that can be reused from a cache; at least one token is always computed."""
        return self.hashes(block_size)[: (self.tokens - 1) // block_size]


class PlacementReason(NamedTuple):
    """The inputs of a placement decision, for its record."""

    phase: Phase
    why: str  # name of the policy's class, or `session`, or `local prefill`
    candidates: Sequence[Candidate]
    costs: list[float]  # empty where no costs were compared
    prompt_blocks: int


class Reservation:
    """The load of one phase of a request, reserved on one worker. It must be closed however the phase ends."""

    __slots__ = ("_charge", "_hashes", "_pending", "cached_tokens", "reason", "worker")

    def __init__(
        self,
        charge: Charge,
        cached_tokens: int | None,
        reason: PlacementReason,
        pending: PendingPrompts,
        hashes: Sequence[int],
    ) -> None:
        self.worker, self.cached_tokens, self.reason = charge.worker, cached_tokens, reason
        self._charge, self._pending, self._hashes = charge, pending, hashes
        if hashes:
            pending.add(charge.worker, hashes)

    def prefilled(self) -> None:
        """Releases the prefill load: the first token has arrived, and KV events report the blocks from now on."""
        self._charge.prefilled()
        if self._hashes:
            self._pending.discard(self.worker, self._hashes)
            self._hashes = ()

    def add_tokens(self, tokens: int) -> None:
        self._charge.add_tokens(tokens)

    def close(self) -> None:
        self.prefilled()
        self._charge.close()


class Router:
    """Prefix index, load ledger, and a policy for each pool of workers."""

    def __init__(self, options: RouterOptions = RouterOptions(), rng: random.Random | None = None) -> None:  # noqa: B008
        self.options = options
        self._make_policy = policy_maker(options.mode, options.policy, options.weights, rng or random.Random())
        self.policies: dict[tuple[str, Phase], Policy] = {}  # one per pool: pools must not share a round-robin turn
        self.index = PrefixIndex(options.index_bytes)
        self.ledger = Ledger()
        self.sessions = Sessions(options.session_ttl_s)
        self.targets: dict[str, RoutingTarget] = {}
        self._oldest = 0.0  # when the oldest target joined
        self.pending = PendingPrompts()
        self._assumed = AssumedCaches(self.index, options.assume_ttl_s)

    def policy(self, model: str, phase: Phase) -> Policy:
        found = self.policies.get((model, phase))
        if found is None:
            found = self.policies[model, phase] = self._make_policy()
        return found

    # workers

    def join(
        self, worker: str, block_size: int, num_blocks: int, now: float, *, events: bool = True, slots: int = 0,
        max_num_tokens: int = 0,
    ) -> RoutingTarget:  # fmt: skip
        """Makes the worker a routing target. `events`: it publishes KV events of its cache. `slots` and `max_num_tokens`
        are the requests and the tokens of one step; 0: not known."""
        state = IndexState.DEGRADED if events else IndexState.APPROX
        target = RoutingTarget(
            worker, block_size, num_blocks, now, self.ledger.account(worker), state, now,
            slots + slots // SPARE or UNKNOWN_SLOTS,
            self.options.busy_prefill_tokens or PREFILL_STEPS * max_num_tokens or math.inf,
        )  # fmt: skip
        self.targets[worker] = target
        self._oldest = min(t.since for t in self.targets.values())
        return target

    def forget(self, worker: str) -> None:
        """Removes a lost worker, with its index entries and its load."""
        self.targets.pop(worker, None)
        self._oldest = min((t.since for t in self.targets.values()), default=0.0)
        self.index.drop(worker)
        self._assumed.forget(worker)
        self.ledger.drop(worker)

    def apply(self, worker: str, events: Iterable[KvEvent]) -> None:
        """Applies a worker's KV events to the index."""
        for event in events:
            match event:
                case Stored(hashes=hashes):
                    self.index.store(worker, hashes)
                case Removed(hashes=hashes):
                    self.index.remove(worker, hashes)
                case Cleared():
                    self.index.clear(worker)

    def expire(self, now: float) -> None:
        """Drops expired assumptions and tidies the index. Call it every few seconds."""
        self._assumed.expire(now)
        self.index.tidy()

    # requests

    def has_room(self, targets: Sequence[RoutingTarget], phase: Phase, expected: int = 0) -> bool:
        """Whether these workers can run one more request at once, and `expected` ones that are about to be placed."""
        free = -expected
        for target in targets:
            if self._under_thresholds(target, phase):
                free += max(0, target.slots - target.account.requests)
                if free > 0:
                    return True
        return False

    def _under_thresholds(self, target: RoutingTarget, phase: Phase) -> bool:
        account = target.account
        if phase != "decode" and account.prefill_tokens > target.max_prefill:
            return False
        if phase == "prefill":
            return True
        return account.full_tokens <= self.options.busy_kv_fraction * target.capacity

    def local(
        self, query: PlacementQuery, decoders: Sequence[RoutingTarget], prefillers: Sequence[RoutingTarget]
    ) -> tuple[list[RoutingTarget], Overlaps | None]:
        """Returns the decode workers that should prefill this prompt themselves, without a hand-off, and the overlaps that
        were computed for it, to be passed to `place`. There are no such workers if the policy does not use overlaps, or
        `local_prefill_tokens` is 0.

        Such a worker has at most `local_prefill_tokens` to compute, with the prefills that wait there, so that its answers
        are hardly delayed. It would produce the first token sooner than any prefill worker, even with
        `local_prefill_toll` added for the delay of its answers. All quantities are tokens to compute.
        """
        limit, toll = self.options.local_prefill_tokens, self.options.local_prefill_toll
        if not limit or not decoders or not uses_overlap(self.policy(query.model, "prefill")):
            return [], None
        size, tokens = decoders[0].block_size, query.tokens
        overlaps = self._overlaps(query, size)
        if tokens - max(overlaps.values(), default=0) * size > limit:
            return [], overlaps

        def delay(target: RoutingTarget) -> int:
            return target.account.prefill_tokens + tokens - overlaps.get(target.worker, 0) * size

        near = [t for t in decoders if delay(t) <= limit and self.has_room((t,), "decode")]
        if near:
            max_delay = min(map(delay, prefillers), default=limit + toll) - toll
            near = [t for t in near if delay(t) <= max_delay]
        return near, overlaps

    def place(
        self,
        query: PlacementQuery,
        phase: Phase,
        targets: Sequence[RoutingTarget],
        now: float,
        *,
        why: str = "",
        overlaps: Overlaps | None = None,
    ) -> Reservation:
        """Reserves load for one phase on one of `targets`. `why` replaces the policy's name in the record; `overlaps` are
        the result of a call of `local` just before.

        Raises:
            NoWorker: there are no targets. A policy may raise errors of its own.
        """
        if not targets:
            raise NoWorker("no worker to place the request on")
        policy = self.policy(query.model, phase)
        size, tokens = targets[0].block_size, query.tokens
        wants_overlap = uses_overlap(policy)
        if not wants_overlap:
            overlaps = {}
        elif phase == "decode":
            overlaps = self.index.overlap(query.reusable(size))
        else:
            overlaps = self._overlaps(query, size) if overlaps is None else overlaps
        candidates = self._candidates(targets, phase, overlaps, now)
        policy_input = PolicyInput(phase, -(-tokens // size), query.session, query.instances)
        # a local prefill and a decode share one pool: both leave the session's cache on the same worker
        pool = "decode" if why else phase
        choice, chosen_by = self._choose(policy, policy_input, candidates, f"{query.model}/{pool}", now)
        worker = choice.candidate.worker
        cached = overlaps.get(worker, 0) * size
        charge = self.ledger.charge(
            worker,
            prefill_tokens=tokens - cached if phase != "decode" else 0,
            decode_tokens=tokens if phase != "prefill" else 0,
        )
        approx = self.targets[worker].index is IndexState.APPROX
        if wants_overlap and approx:
            self._assumed.note_prompt(worker, query.hashes(size), self.targets[worker].num_blocks, now)
        reason = PlacementReason(phase, why or chosen_by, candidates, choice.costs, policy_input.prompt_blocks)
        if not wants_overlap or phase == "decode":
            return Reservation(charge, None, reason, self.pending, ())
        return Reservation(charge, cached, reason, self.pending, () if approx else query.reusable(size))

    def _overlaps(self, query: PlacementQuery, size: int) -> Overlaps:
        """Leading blocks of the prompt that each worker holds, or will hold after the prompts already placed there."""
        hashes = query.reusable(size)
        found = self.index.overlap(hashes)
        self.pending.extend(found, hashes)
        return found

    def _candidates(
        self, targets: Sequence[RoutingTarget], phase: Phase, overlaps: Overlaps, now: float
    ) -> list[Candidate]:
        """Returns the candidates under their thresholds, or all if none is. Runs for every worker of every placement."""
        options, size, get = self.options, targets[0].block_size, overlaps.get
        # no slow start while all workers are new: no older worker could carry their load
        slow = options.slow_start_s if now - self._oldest >= options.slow_start_s else 0.0
        prefills = phase != "decode"
        max_decode = math.inf if phase == "prefill" else options.busy_kv_fraction
        roomy: list[Candidate] = []
        busy: list[Candidate] = []
        for t in targets:
            account, age = t.account, now - t.since
            waiting, decoding = account.prefill_tokens, account.decode_tokens
            candidate = Candidate(
                t.worker,
                get(t.worker, 0),
                waiting / size,
                decoding / size,
                account.requests,
                1.0 if age >= slow else max(SLOWEST, age / slow),
                t.index,
                now - t.confirmed_at,
            )
            bound = max_decode * t.capacity
            full = decoding > bound and account.full_tokens > bound
            full |= account.requests >= t.slots or (prefills and waiting > t.max_prefill)
            (busy if full else roomy).append(candidate)
        return roomy or busy

    def _choose(
        self, policy: Policy, policy_input: PolicyInput, candidates: list[Candidate], pool: str, now: float
    ) -> tuple[PolicyChoice, str]:
        if not policy_input.session or policy_input.instances:
            return policy.choose(policy_input, candidates), type(policy).__name__
        known = self.sessions.worker(policy_input.session, pool, now)
        found = next((c for c in candidates if c.worker == known), None)
        choice = PolicyChoice(found, []) if found is not None else policy.choose(policy_input, candidates)
        self.sessions.note(policy_input.session, pool, choice.candidate.worker, now)
        return choice, "session" if found is not None else type(policy).__name__


def uses_overlap(policy: Policy) -> bool:
    """Whether the policy uses overlaps. A policy without this attribute does not."""
    return getattr(policy, "uses_overlap", False)
