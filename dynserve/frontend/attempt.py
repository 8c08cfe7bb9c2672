"""`Attempt`: one phase of a request on one worker, from its reservation to its last record."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple

from dynserve.errors import ClusterError, NoAck, TimedOut, WorkerLost
from dynserve.frontend.decisions import PlacementRecord
from dynserve.frontend.reply import Record, Reply
from dynserve.routing.router import Reservation
from dynserve.server.exchange import ChunkWriter
from dynserve.wire.link import Finished
from dynserve.wire.requests import Handoff, Phase, PriorOutput

# Receives a burst of records, in order. Returns a function that writes the next bytes to the client directly, or None.
RecordSink = Callable[[list[Record]], Awaitable[ChunkWriter | None]]


class TryAnother(Exception):
    """A worker has sent no record of a phase, so that another worker may run it.

    `handoff_intact`: whether another worker can fetch the hand-off that the phase continues from. It cannot if the
    hand-off can be used only once and this worker may have begun to fetch it.
    """

    def __init__(self, worker: str, cause: ClusterError, *, handoff_intact: bool) -> None:
        super().__init__(worker, cause)
        self.worker, self.cause, self.handoff_intact = worker, cause, handoff_intact


class Interrupted(Exception):
    """Raised when a worker was lost after it had sent records of an answer, which other workers can continue."""

    def __init__(self, worker: str, cause: WorkerLost) -> None:
        super().__init__(worker, cause)
        self.worker, self.cause = worker, cause


class PhaseInput(NamedTuple):
    """The input of one phase, whichever worker runs it."""

    phase: Phase
    role: str  # of the workers that may run it
    prior: PriorOutput | None = None
    handoff: Handoff | None = None
    prefill: Reply | None = None  # the stream that produced the hand-off
    reason: str = ""  # of the placement, where it is not the policy's


class Attempt:
    """One phase on one worker. It ends in one of these ways:

    the last record        the phase is complete
    `TryAnother`           the worker refused, did not acknowledge, or was lost before its first record
    `Interrupted`          the worker was lost after its first record
    `ClusterError`         the request's time is up, or the worker has failed it after its first record
    `CallerError`          no worker would accept the request
    `InternalError`        the worker failed in a way that another one could repeat
    """

    __slots__ = ("_phase", "_record", "_reservation", "has_record", "reply")

    def __init__(self, phase: PhaseInput, reservation: Reservation, record: PlacementRecord, reply: Reply) -> None:
        self._phase, self._reservation, self._record = phase, reservation, record
        self.reply = reply
        self.has_record = False  # from then on another worker must continue the answer, and cannot run the phase

    async def deliver(self, sink: RecordSink) -> Finished:
        """Gives the worker's records to `sink`, and returns the last of them."""
        reply = self.reply
        while burst := await reply.channel.receive():
            if not self.has_record:
                self._note_first_record()
            last = burst[-1]
            if isinstance(last, Finished):
                # the load is released before any other task is woken
                self._reservation.close()
                self._record.usage = last.usage
                await sink(burst)
                return last
            writer = await sink(burst)
            if reply.write is None and reply.channel.empty:
                reply.write = writer
        raise WorkerLost(f"worker {reply.peer.id} ended the stream without a last record")

    def error_after(self, error: ClusterError) -> ClusterError | TryAnother | Interrupted:
        """Returns the error to raise after `error`: itself, `TryAnother` if another worker may still run the phase, or
        `Interrupted` if one may continue the answer."""
        self._record.failure = error.code
        if self.has_record and isinstance(error, WorkerLost):
            return Interrupted(self.reply.peer.id, error.with_traceback(None))
        if self.has_record or (isinstance(error, TimedOut) and not isinstance(error, NoAck)):
            return error
        instance = self.reply.peer.instance
        may_have_fetched = not self.reply.refused and instance is not None and instance.card.single_use_handoffs
        return TryAnother(self.reply.peer.id, error.with_traceback(None), handoff_intact=not may_have_fetched)

    @property
    def draws_by_position(self) -> bool:
        """True if another worker continues a sampled answer with the tokens that this one would have drawn."""
        instance = self.reply.peer.instance
        return instance is not None and instance.card.draws_by_position

    def release(self) -> None:
        """Releases the reserved load. Safe to repeat."""
        self._reservation.close()

    def close(self) -> None:
        """Ends the stream at the worker, and any hand-off that the worker still holds for it. Safe to repeat."""
        self.reply.close()
        self._reservation.close()

    def _note_first_record(self) -> None:
        """Handles the first record: the prompt is computed, and the hand-off was fetched or never will be."""
        self.has_record = True
        self._reservation.prefilled()
        prefill = self._phase.prefill
        if prefill is None:
            return
        if self.reply.handoff_declined:
            prefill.close()
        else:
            prefill.handoff_done()
