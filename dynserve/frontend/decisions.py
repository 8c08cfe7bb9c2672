"""Decisions: the records of the latest requests, with the reason of each placement and its outcome."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from dynserve.routing.policy import Candidate
from dynserve.routing.router import PlacementReason, Reservation
from dynserve.wire.link import Usage

log = logging.getLogger(__name__)

KEPT = 10_000  # requests
MAX_CANDIDATES = 32  # of one placement; the cheapest are kept
MAX_PLACEMENTS = 32  # of one request; the first and the last are kept
IN_HEADER = 8  # candidates of one placement in the response header, where proxies allow 8 kB

DRIFT = 0.25  # relative difference that predicted and reported cached tokens may have
DRIFT_TOKENS = 2_000  # predicted or reported, below which a ratio is not significant
MEMORY = 0.98  # weight of the past in the running sums, per request

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(tuple[list[Candidate], list[float]]).decode


@dataclass(slots=True)
class PlacementRecord:
    """One placement of one phase, and its outcome so far. Candidates are packed, because many records are kept."""

    phase: str
    why: str
    worker: str
    prompt_blocks: int
    predicted: int | None  # cached tokens; None for a decode, or if the policy does not use overlaps
    packed: bytes  # candidates and their costs
    omitted: int
    usage: Usage | None = None  # reported by the worker at the end of the phase
    failure: str = ""

    @staticmethod
    def of(reservation: Reservation) -> PlacementRecord:
        reason, worker = reservation.reason, reservation.worker
        # a custom policy may return any number of costs: a record must not fail a request
        if len(reason.costs) != len(reason.candidates):
            reason = reason._replace(costs=[])
        candidates, costs = _cheapest(reason)
        return PlacementRecord(
            reason.phase, reason.why, worker, reason.prompt_blocks, reservation.cached_tokens,
            _encode((candidates, [float(cost) for cost in costs])), len(reason.candidates) - len(candidates),
        )  # fmt: skip

    def as_dict(self, max_candidates: int) -> dict[str, Any]:
        candidates, costs = _decode(self.packed)
        margin, runner_up = self._margin(candidates, costs)
        shown = [
            {
                "worker": c.worker, "overlap_blocks": c.overlap, "waiting_prefill_blocks": round(c.waiting_prefill, 2),
                "decode_blocks": round(c.decode_blocks, 2), "requests": c.requests, "ramp": round(c.ramp, 2),
                "cost": _number(costs[i]) if costs else None, "index": c.index,
                "index_age_s": round(c.index_age_s, 3),
            }
            for i, c in enumerate(candidates[:max_candidates])
        ]  # fmt: skip
        found: dict[str, Any] = {
            "phase": self.phase, "why": self.why, "worker": self.worker, "runner_up": runner_up,
            "margin": _number(margin), "prompt_blocks": self.prompt_blocks,
            "predicted_cached_tokens": self.predicted, "candidates": shown,
        }  # fmt: skip
        if omitted := self.omitted + len(candidates) - len(shown):
            found["candidates_omitted"] = omitted
        if self.usage is not None:
            found["reported"] = {
                "cached_tokens": self.usage.cached_tokens, "queue_s": round(self.usage.queue_s, 6),
                "prefill_s": round(self.usage.prefill_s, 6), "transfer_s": round(self.usage.transfer_s, 6),
            }  # fmt: skip
        if self.failure:
            found["failure"] = self.failure
        return found

    def _margin(self, candidates: Sequence[Candidate], costs: Sequence[float]) -> tuple[float | None, str | None]:
        """Returns how much cheaper the choice was than the best other worker, and that worker's id."""
        others = [(cost, c.worker) for c, cost in zip(candidates, costs, strict=False) if c.worker != self.worker]
        own = next((cost for c, cost in zip(candidates, costs, strict=False) if c.worker == self.worker), None)
        if not others or own is None:
            return None, None
        least, runner_up = min(others)
        return least - own, runner_up


class Migration(NamedTuple):
    """An answer that another worker has continued after `tokens` tokens, `at` seconds after the request began.

    `exact`: the lost worker would have drawn the same tokens. Otherwise the engine's generator is in another state.
    """

    worker: str
    cause: str  # code of the error
    tokens: int
    exact: bool
    at: float

    def as_dict(self) -> dict[str, Any]:
        sampling = "continued" if self.exact else "restarted"
        return {
            "from": self.worker, "cause": self.cause, "after_tokens": self.tokens, "sampling": sampling,
            "at_s": round(self.at, 6),
        }  # fmt: skip


class Decision:
    """The record of one request, filled while it runs. `owner` is the name of the request's API key."""

    __slots__ = (
        "began",
        "ended",
        "migrations",
        "model",
        "outcome",
        "owner",
        "placements",
        "prompt_tokens",
        "queued_s",
        "request_id",
        "ttft_s",
    )

    def __init__(self, request_id: str, model: str, prompt_tokens: int, began: float, owner: str = "") -> None:
        self.owner = owner
        self.request_id, self.model, self.prompt_tokens, self.began = request_id, model, prompt_tokens, began
        self.placements: list[PlacementRecord] = []
        self.migrations: list[Migration] = []
        self.outcome = "running"
        self.queued_s = 0.0  # in the frontend's own queue
        self.ttft_s: float | None = None
        self.ended: float | None = None

    def placed(self, reservation: Reservation) -> PlacementRecord:
        record = PlacementRecord.of(reservation)
        self.placements.append(record)
        if len(self.placements) > MAX_PLACEMENTS:  # of a request that many workers have refused
            del self.placements[MAX_PLACEMENTS // 2]
        return record

    def as_dict(self, max_candidates: int = MAX_CANDIDATES) -> dict[str, Any]:
        return {
            "request_id": self.request_id, "model": self.model, "prompt_tokens": self.prompt_tokens,
            "outcome": self.outcome, "queued_s": round(self.queued_s, 6),
            "ttft_s": None if self.ttft_s is None else round(self.ttft_s, 6),
            "duration_s": None if self.ended is None else round(self.ended - self.began, 6),
            "placements": [placement.as_dict(max_candidates) for placement in self.placements],
            "migrations": [migration.as_dict() for migration in self.migrations],
        }  # fmt: skip

    def header(self) -> bytes:
        return msgspec.json.encode(self.as_dict(IN_HEADER))


class DecisionLog:
    """The latest `kept` decisions by owner and request id. A repeated id replaces the earlier decision."""

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._decisions: OrderedDict[tuple[str, str], Decision] = OrderedDict()

    def __len__(self) -> int:
        return len(self._decisions)

    def add(self, decision: Decision) -> None:
        key = (decision.owner, decision.request_id)
        self._decisions[key] = decision
        self._decisions.move_to_end(key)
        if len(self._decisions) > self._kept:
            self._decisions.popitem(last=False)

    def get(self, request_id: str, owner: str = "") -> Decision | None:
        return self._decisions.get((owner, request_id))


@dataclass(slots=True)
class _RunningSums:
    predicted: float = 0.0
    reported: float = 0.0
    drifting: bool = False


class Predictions:
    """Compares predicted with reported cached tokens per worker, over roughly its last fifty requests."""

    def __init__(self) -> None:
        self._sums: dict[str, _RunningSums] = {}

    def ratios(self) -> dict[str, float]:
        """Returns predicted divided by reported cached tokens, by worker; 1 without data."""
        return {worker: _ratio(sums) for worker, sums in self._sums.items()}

    def drifting(self, worker: str) -> bool:
        return worker in self._sums and self._sums[worker].drifting

    def note(self, worker: str, predicted: int, reported: int) -> None:
        sums = self._sums.setdefault(worker, _RunningSums())
        sums.predicted = MEMORY * sums.predicted + predicted
        sums.reported = MEMORY * sums.reported + reported
        drifting = max(sums.predicted, sums.reported) > DRIFT_TOKENS and abs(_ratio(sums) - 1) > DRIFT
        if drifting and not sums.drifting:
            log.warning(
                "CACHE_PREDICTION_DRIFT: for worker %s the index predicts %.0f cached tokens, the worker reports %.0f; "
                "check whether KV events of its cache are missing, or other clients use it",
                worker, sums.predicted, sums.reported,
            )  # fmt: skip
        sums.drifting = drifting

    def forget(self, worker: str) -> None:
        self._sums.pop(worker, None)


def _ratio(sums: _RunningSums) -> float:
    # a few tokens are added on both sides, so that small numbers do not count as drift
    return (sums.predicted + 100) / (sums.reported + 100)


def _cheapest(reason: PlacementReason) -> tuple[Sequence[Candidate], list[float]]:
    if len(reason.candidates) <= MAX_CANDIDATES:
        return reason.candidates, reason.costs
    if not reason.costs:
        return reason.candidates[:MAX_CANDIDATES], []
    order = sorted(range(len(reason.costs)), key=reason.costs.__getitem__)[:MAX_CANDIDATES]
    return [reason.candidates[i] for i in order], [reason.costs[i] for i in order]


def _number(value: float | None) -> float | None:
    """Rounds a cost. An infinite one, of an excluded candidate, becomes None: JSON has no infinity."""
    return None if value is None or value in (float("inf"), float("-inf")) else round(value, 3)
