"""Hand-offs on the worker that owns them: from the end of a prefill to exactly one of delivered, expired, cancelled.

      OPEN ──begin: request id and sequence hash match──▶ SENDING ──confirmed by the receiver──▶ delivered
       │ ▲                                                │     │
       │ └────── broken: the receiver may retry ──────────┘     └──deliver, ttl over, cancel: once it stopped──▶ that end
       ├──deliver, by an engine that sends by itself──▶ delivered
       ├──ttl over──▶ expired
       └──cancel────▶ cancelled

When a hand-off ends, `release` is called once, and its owner frees the blocks: `Scheduler.release_held` those of our
engines. TensorRT-LLM frees its own by itself, and `TrtllmExecutor._handoff_ended` counts them until then. Blocks that are
being sent stay allocated until the sending has stopped. A carrier's receiver may read on for a moment: before it uses the
data, it receives notice that the hand-off has ended (`carriers.py`). The blocks of the decode worker belong to its
sequence, like those of other requests.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from itertools import count

from xxhash import xxh3_64_intdigest

from dynserve.errors import HandoffGone, HandoffMismatch
from dynserve.wire.hashing import adapter_salt, sequence_hash
from dynserve.wire.requests import GenerateRequest, Handoff


class HandoffEnd(StrEnum):
    DELIVERED = "delivered"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


@dataclass(slots=True)
class Entry:
    handoff: Handoff
    ticket: int
    blocks: list[int]
    timer: asyncio.TimerHandle
    stop_sending: Callable[[], object] | None = None
    overdue: HandoffEnd | None = None  # the end that was requested while sending


class HandoffTable:
    """All open hand-offs of one executor. `release(ticket, how)` frees a prefill's blocks."""

    def __init__(self, owner: str, ttl_s: float, release: Callable[[int, HandoffEnd], None]) -> None:
        self._owner, self._ttl_s, self._release = owner, ttl_s, release
        self._open: dict[int, Entry] = {}
        self._by_ticket: dict[int, int] = {}
        # unique over all workers: the upper bits name the owner, the lower ones count
        self._ids = count((xxh3_64_intdigest(owner.encode()) >> 33 << 32) | 1)
        self.ended: Counter[HandoffEnd] = Counter()

    def __len__(self) -> int:
        return len(self._open)

    def open(
        self, ticket: int, request: GenerateRequest, blocks: list[int], num_bytes: int, state: bytes, id_: int = 0
    ) -> Handoff:
        """Opens a hand-off of the request's prompt and prior output. `id_` is an id that the executor has assigned already;
        0 means the next one."""
        num_tokens = request.num_tokens + len(request.prior_tokens)
        handoff = Handoff(
            id=id_ or next(self._ids),
            owner=self._owner,
            request_id=request.id,
            sequence_hash=_sequence(request, num_tokens),
            num_tokens=num_tokens,
            num_bytes=num_bytes,
            ttl_s=self._ttl_s,
            state=state,
        )
        timer = asyncio.get_running_loop().call_later(self._ttl_s, self._end_or_stop, handoff.id, HandoffEnd.EXPIRED)
        self._open[handoff.id] = Entry(handoff, ticket, blocks, timer)
        self._by_ticket[ticket] = handoff.id
        return handoff

    def cancel(self, ticket: int) -> bool:
        """Cancels the hand-off of a prefill. Returns False when it has none open."""
        id_ = self._by_ticket.get(ticket)
        if id_ is not None:
            self._end_or_stop(id_, HandoffEnd.CANCELLED)
        return id_ is not None

    def deliver(self, ticket: int) -> bool:
        """Ends a hand-off as delivered, for executors that do not see the transfer. False when none is open."""
        id_ = self._by_ticket.get(ticket)
        if id_ is not None:
            self._end_or_stop(id_, HandoffEnd.DELIVERED)
        return id_ is not None

    def cancel_all(self) -> None:
        for id_ in list(self._open):
            self._end_or_stop(id_, HandoffEnd.CANCELLED)

    @contextmanager
    def sending(
        self, id_: int, request_id: str, sequence_hash: int, stop: Callable[[], object]
    ) -> Iterator[tuple[list[int], Callable[[], None]]]:
        """Yields the blocks to send, and the function to call once the receiver has confirmed them. `stop` stops the send.

        Raises:
            HandoffGone: it has ended, never existed, or is being sent already.
            HandoffMismatch: it belongs to another request or prompt.
        """
        entry = self._open.get(id_)
        if entry is None:
            raise HandoffGone(f"hand-off {id_} is not open here: delivered, expired or cancelled")
        if entry.stop_sending is not None:
            raise HandoffGone(f"hand-off {id_} is being sent already")
        if (entry.handoff.request_id, entry.handoff.sequence_hash) != (request_id, sequence_hash):
            raise HandoffMismatch(f"hand-off {id_} belongs to another request or prompt")
        entry.stop_sending = stop
        try:
            yield entry.blocks, lambda: self._end(entry, HandoffEnd.DELIVERED)
        finally:
            entry.stop_sending = None
            if entry.overdue is not None:
                self._end(entry, entry.overdue)

    def _end_or_stop(self, id_: int, how: HandoffEnd) -> None:
        if (entry := self._open.get(id_)) is None:
            return
        if entry.stop_sending is None:
            self._end(entry, how)
        elif entry.overdue is None:
            entry.overdue = how
            entry.stop_sending()

    def _end(self, entry: Entry, how: HandoffEnd) -> None:
        if self._open.pop(entry.handoff.id, None) is not None:
            del self._by_ticket[entry.ticket]
            entry.timer.cancel()
            self.ended[how] += 1
            self._release(entry.ticket, how)


def belongs(handoff: Handoff, request: GenerateRequest) -> bool:
    """Whether the hand-off is of this request, and of its prompt with a part of its prior output."""
    if not request.num_tokens <= handoff.num_tokens <= request.num_tokens + len(request.prior_tokens):
        return False
    return (handoff.request_id, handoff.sequence_hash) == (request.id, _sequence(request, handoff.num_tokens))


def _sequence(request: GenerateRequest, num_tokens: int) -> int:
    return sequence_hash(request.computed(num_tokens), adapter_salt(request.adapter, request.cache_salt))
