"""`Router`: where a request goes, and why. Synchronous; it knows workers by id and nothing of how they are reached."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from dynserve.config import RouterMode
from dynserve.errors import NoWorker
from dynserve.routing.hashing import rolling_hashes
from dynserve.routing.index import PrefixIndex
from dynserve.routing.ledger import Charge, Ledger
from dynserve.routing.policy import Candidate, Choice, Policy, make_policy
from dynserve.wire.events import Cleared, KvEvent, Removed, Stored


class Target(NamedTuple):
    """A worker that could take the request."""

    worker: str
    block_size: int


class Reason(NamedTuple):
    """All that a choice was made of."""

    candidates: Sequence[Candidate]
    costs: list[float]
    prompt_blocks: int


class Placed(NamedTuple):
    """One phase of a request on one worker. `charge` must be closed when the phase has ended, however it ended."""

    worker: str
    overlap: int  # blocks that are expected to be cached there
    charge: Charge
    reason: Reason


class Router:
    """Prefix index, load ledger and policies: one for prefill (and aggregated) workers, one for decode workers."""

    def __init__(
        self, mode: RouterMode = "kv", *, prefill_weight: float = 1.0, rng: random.Random | None = None
    ) -> None:
        rng = rng or random.Random()
        self.mode = mode
        self.index = PrefixIndex()
        self.ledger = Ledger()
        self._first: Policy = make_policy(mode, prefill_weight, rng)
        self._decode: Policy = make_policy(mode, prefill_weight, rng)

    def place(self, targets: Sequence[Target], prompt: bytes, salt: str = "", *, answers: bool = True) -> Placed:
        """For the phase that reads the prompt: by overlap and load. `answers`: the same worker decodes as well.

        Raises:
            NoWorker: there are no targets.
        """
        size = self._block_size(targets)
        prompt_tokens = len(prompt) // 4
        blocks = -(-prompt_tokens // size)
        overlaps = self.index.overlap(rolling_hashes(prompt, size, salt)) if self._first.uses_overlap else {}
        choice, reason = self._choose(self._first, targets, overlaps, blocks)
        overlap = choice.candidate.overlap
        charge = self.ledger.charge(
            choice.candidate.worker,
            prefill_tokens=max(0, prompt_tokens - overlap * size),
            decode_blocks=blocks if answers else 0,
        )
        return Placed(choice.candidate.worker, overlap, charge, reason)

    def place_decode(self, targets: Sequence[Target], prompt_tokens: int) -> Placed:
        """For the phase that answers: by load alone, the cache comes with the hand-off.

        Raises:
            NoWorker: there are no targets.
        """
        size = self._block_size(targets)
        blocks = -(-prompt_tokens // size)
        choice, reason = self._choose(self._decode, targets, {}, 0)
        charge = self.ledger.charge(choice.candidate.worker, decode_blocks=blocks)
        return Placed(choice.candidate.worker, 0, charge, reason)

    def apply(self, worker: str, events: Iterable[KvEvent]) -> None:
        """What the worker says of its cache."""
        for event in events:
            match event:
                case Stored(hashes=hashes):
                    self.index.store(worker, hashes)
                case Removed(hashes=hashes):
                    self.index.remove(worker, hashes)
                case Cleared():
                    self.index.clear(worker)

    def forget(self, worker: str) -> None:
        """The worker is gone."""
        self.index.drop(worker)
        self.ledger.drop(worker)

    def _choose(
        self, policy: Policy, targets: Sequence[Target], overlaps: dict[str, int], prompt_blocks: int
    ) -> tuple[Choice, Reason]:
        candidates = []
        for worker, size in targets:
            account = self.ledger.account(worker)
            waiting = account.prefill_tokens / size
            candidates.append(
                Candidate(worker, overlaps.get(worker, 0), waiting, account.decode_blocks, account.requests)
            )
        choice = policy.choose(candidates, prompt_blocks)
        return choice, Reason(candidates, choice.costs, prompt_blocks)

    @staticmethod
    def _block_size(targets: Sequence[Target]) -> int:
        if not targets:
            raise NoWorker("no worker to place the request on")
        return targets[0].block_size
