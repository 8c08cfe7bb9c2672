"""The pipeline: a request goes to the workers, records come back.

    placed on a worker that answers alone, or on a decode worker that lacks little of the prompt ──▶ records
    placed on a prefill worker ──▶ first record and hand-off ──placed on a decode worker──▶ the other records

Each arrow is a phase. A record is a message with some tokens of the answer, or with its end. A phase is placed again, on
another worker, until a record of it has come (`Attempt`). A worker that is lost after that interrupts the answer. It then
migrates: the prompt and all tokens so far are placed like a new prompt, and the next worker continues with the very next
token.

Ending is synchronous: cancels are queued on links, reservations are given back. So it cannot be interrupted halfway.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from itertools import count
from typing import NamedTuple

import msgspec

from dynserve.errors import (
    Cancelled,
    ClusterError,
    DynserveError,
    EngineLost,
    NoWorker,
    Overloaded,
    PoisonRequest,
    TimedOut,
    WorkerLost,
)
from dynserve.frontend.admission import Admission, Admitted, QueuedRequest
from dynserve.frontend.attempt import Attempt, Interrupted, PhaseInput, RecordSink, TryAnother
from dynserve.frontend.decisions import Decision, DecisionLog, Migration, Predictions
from dynserve.frontend.fleet import Fleet
from dynserve.frontend.inference import InferenceRequest
from dynserve.frontend.metrics import FrontendMetrics
from dynserve.frontend.reply import Reply
from dynserve.frontend.submissions import Submissions
from dynserve.routing.router import Overlaps, PlacementQuery, Router, RoutingTarget
from dynserve.tasks import Backoff, Limit
from dynserve.wire.discovery import WorkerInstance
from dynserve.wire.hashing import adapter_salt
from dynserve.wire.link import Finished, Keep
from dynserve.wire.requests import GenerateRequest, PriorOutput, Resumable, fields_of, pack_tokens

log = logging.getLogger(__name__)

ATTEMPTS = 4  # placements of one phase that fail; those that a busy worker refuses are not counted
MAX_ENGINE_DEATHS = 2  # during one request, which may have caused them
RETRY_AFTER = (
    0.05,
    1.0,
)  # seconds, the shortest and the longest, until workers that have refused a phase are tried again


class RolesChanged(Exception):
    """Raised when no worker can run the phase any more, but others can answer the request in another way."""


class PipelineLimits(NamedTuple):
    """The limits of every request. `max_wait_s`: how long a request waits for a worker, in seconds."""

    timeout_s: float
    max_stream_bytes: int
    max_migrations: int
    max_wait_s: float


class Pipeline:
    """The parts that all requests of one frontend share."""

    def __init__(
        self, frontend_id: str, fleet: Fleet, router: Router, submissions: Submissions, metrics: FrontendMetrics,
        admission: Admission, limits: PipelineLimits,
    ) -> None:  # fmt: skip
        self.frontend_id, self.fleet, self.router, self.submissions = frontend_id, fleet, router, submissions
        self.metrics, self.admission, self.limits = metrics, admission, limits
        self.decisions, self.predictions = DecisionLog(), Predictions()
        self.streams = count(1)

    def run(self, request: InferenceRequest, deadline: float | None = None) -> Run:
        """Returns the run of a request, for a `with` block: `deliver` runs it, and leaving the block early cancels it at
        every worker. `deadline` (a time of the event loop) is shared by the answers of one response; None: the time limit
        from now."""
        return Run(self, request, deadline)


class Run:
    """One request's way through the workers."""

    __slots__ = (
        "_adapter", "_admitted", "_attempts", "_cancelled", "_clock", "_engine_deaths", "_pipeline", "_prior", "_query",
        "_queued", "_request", "_send_limit", "began", "deadline", "decision", "metrics", "outcome",
    )  # fmt: skip

    def __init__(self, pipeline: Pipeline, request: InferenceRequest, deadline: float | None = None) -> None:
        self._pipeline, self._request = pipeline, request
        generation, hints = request.generation, request.hints
        self.metrics = pipeline.metrics.of(request.model)
        self._clock = asyncio.get_running_loop().time
        self.began = self._clock()
        self.deadline = self.began + pipeline.limits.timeout_s if deadline is None else deadline
        self.decision = Decision(request.id, request.model, generation.num_tokens, self.began, hints.owner)
        self._adapter = pipeline.fleet.adapter(request.model)
        self._prior = request.prior  # the output when the answer was interrupted
        self._query = self._new_query()
        self._queued: QueuedRequest | None = None
        self._admitted: Admitted | None = None
        self._attempts: list[Attempt] = []
        self._cancelled: DynserveError | None = None
        self._send_limit: Limit | None = None
        self._engine_deaths = 0
        self.outcome = "finished"

    def __enter__(self) -> Run:
        self.metrics.accepted += 1
        self.metrics.in_flight += 1
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        resumed_elsewhere = isinstance(error, Cancelled) and self.outcome != "cancelled"
        if isinstance(error, asyncio.CancelledError) or resumed_elsewhere:
            self.outcome = "cancelled"
        elif isinstance(error, Exception) and self.outcome != "cancelled":
            self.outcome = "failed"
        if not resumed_elsewhere:
            self._keep_unfinished()
        self.close()
        self.metrics.in_flight -= 1
        self.metrics.ended[self.outcome] += 1

    @property
    def tokens(self) -> list[int]:
        """All tokens received, of all phases and workers; of a resumed answer those since it was."""
        return [token_id for attempt in self._attempts for token_id in attempt.reply.tokens]

    @property
    def was_placed(self) -> bool:
        """Whether the request was placed on a worker."""
        return bool(self.decision.placements)

    async def deliver(self, sink: RecordSink) -> None:
        """Runs the request. `sink` gets bursts of records, in order; the last one ends with a `Finished` that is no
        hand-off. (A callable, and not an iterator: iterators of coroutines cost as much as the placement.)"""
        if self._prior is None:  # a resumed answer continues at once, like an interrupted one
            await self._wait_for_room()
        self._pipeline.decisions.add(self.decision)  # a request that the queue refuses has none
        while True:
            worker, cause = "", None
            try:
                await self._answer(sink)
                return
            except Interrupted as lost:
                worker, cause = lost.worker, lost.cause
            except RolesChanged:
                log.info("request %s: its phase has no workers left, and others answer it", self._request.id)
            try:
                if cause is not None:
                    self._note_migration(worker, cause)
            finally:
                del cause  # its traceback refers to this frame: a reference cycle
            self._continue_from_here()

    async def _answer(self, sink: RecordSink) -> None:
        """Runs all phases, or, after an interruption, those that are still needed. Raises Interrupted and RolesChanged."""
        pipeline, model, prior = self._pipeline, self._request.model, self._prior
        lineup = pipeline.fleet.lineup(model)
        if lineup.alone or self._only_events:
            await self._phase(PhaseInput("aggregated", lineup.alone_role, prior), sink)
            return
        overlaps: Overlaps | None = None
        if prior is not None or not self._request.generation.needs_whole_prompt:
            local, overlaps = pipeline.router.local(self._query, lineup.decode, lineup.prefill)
            if local:
                if await self._try_local_prefill(local, overlaps, sink):
                    return
                overlaps = None  # stale by now
        last = await self._phase(PhaseInput("prefill", "prefill", prior), sink, overlaps)
        if last.handoff is not None:
            prefill = self._attempts[-1].reply
            await self._phase(PhaseInput("decode", "decode", self._output(), last.handoff, prefill), sink)

    async def _wait_for_room(self) -> None:
        """Waits for the request's turn while all workers are over their thresholds, or none is there."""
        pipeline, model = self._pipeline, self._request.model
        queue = pipeline.admission.queue(pipeline.fleet.base(model))
        entry = queue.enter(self._request.hints.priority)
        if isinstance(entry, Admitted):
            self._admitted = entry
        else:
            self._queued, began = entry, self._clock()
            try:
                self._admitted = await queue.wait(entry, self.deadline)
            finally:
                del entry  # its error refers to this frame: a reference cycle
                self._queued = None
                self.decision.queued_s = self._clock() - began
                pipeline.metrics.queued.labels(model).observe(self.decision.queued_s)

    async def _try_local_prefill(
        self, targets: Sequence[RoutingTarget], overlaps: Overlaps | None, sink: RecordSink
    ) -> bool:
        """Runs the whole request on one of these decode workers. Returns False if the worker sent no record."""
        self._pipeline.metrics.local_prefills.inc()
        phase = PhaseInput("aggregated", "decode", self._prior, reason="local prefill")
        try:
            await self._attempt(phase, targets, sink, overlaps)
        except TryAnother as failed:
            self._note_retry(phase, failed)
        else:
            return True
        if self._clock() >= self.deadline:
            raise TimedOut("the request took longer than its time limit")
        # another decode worker would have to compute all of it: continue as for any prompt
        return False

    async def _phase(self, phase: PhaseInput, sink: RecordSink, overlaps: Overlaps | None = None) -> Finished:
        """Runs one phase, on one worker after the other until one sends a record; returns its last record."""
        pipeline = self._pipeline
        nobody = f"no worker serves {self._request.model} at the moment"
        error: ClusterError = NoWorker(nobody)
        excluded: set[str] = set()
        failures, until = 0, min(self.deadline, self._clock() + pipeline.limits.max_wait_s)
        backoff = Backoff(*RETRY_AFTER)
        try:
            while True:
                while not (targets := self._targets(phase, excluded)):
                    again = self._clock() + backoff.next()
                    if not await pipeline.fleet.changed.wait(min(until, again)) and again >= until:
                        raise error if excluded else NoWorker(nobody)
                    excluded.clear()
                try:
                    return await self._attempt(phase, targets, sink, overlaps)
                except TryAnother as failed:
                    error, overlaps = failed.cause, None
                    excluded.add(failed.worker)
                    if not failed.handoff_intact:
                        phase = phase._replace(handoff=None)
                    self._note_retry(phase, failed)
                    failures += not isinstance(error, Overloaded)
                if failures == ATTEMPTS:  # not within `except`: the error would refer to what was caught
                    raise error
        finally:
            del error  # its traceback refers to this frame: a reference cycle

    def _targets(self, phase: PhaseInput, excluded: set[str]) -> Sequence[RoutingTarget]:
        """Returns the workers that can run the phase now.

        Raises:
            RolesChanged: there are none, but the request can be answered in another way.
        """
        if self._cancelled is not None:
            raise self._cancelled
        fleet, model = self._pipeline.fleet, self._request.model
        lineup = fleet.lineup(model)
        found = lineup.alone if phase.phase == "aggregated" else fleet.targets(model, phase.role)
        if self._only_events:
            found = lineup.generating
        if not found and lineup.anyone:
            raise RolesChanged
        targets = [t for t in found if t.worker not in excluded] if excluded else found
        return fleet.paired(targets, phase.handoff.owner) if phase.handoff is not None else targets

    async def _attempt(
        self, phase: PhaseInput, targets: Sequence[RoutingTarget], sink: RecordSink, overlaps: Overlaps | None
    ) -> Finished:
        """Places the phase on one of `targets` and runs it there; returns its last record. Raises errors of `Attempt`."""
        if self._cancelled is not None:
            raise self._cancelled
        pipeline = self._pipeline
        reservation = pipeline.router.place(
            self._query, phase.phase, targets, self._clock(), why=phase.reason, overlaps=overlaps
        )
        if self._admitted is not None:
            self._admitted.placed(decoding=phase.phase != "prefill")
        peer = pipeline.fleet.peers[reservation.worker]
        reply = Reply(
            peer,
            next(pipeline.streams),
            pipeline.limits.max_stream_bytes,
            self.deadline,
            self._end_slow_client,
            reservation.add_tokens,
        )
        attempt = Attempt(phase, reservation, self.decision.placed(reservation), reply)
        self._attempts.append(attempt)
        try:
            request = self._generate_request(phase, reply.stream, peer.instance)
            await pipeline.submissions.submit(reply, request)
            last = await attempt.deliver(sink)
            self._note_prediction(reservation.worker, reservation.cached_tokens, last)
            return last
        except ClusterError as error:
            raise attempt.error_after(error) from None
        finally:
            attempt.release()

    def _generate_request(self, phase: PhaseInput, stream: int, instance: WorkerInstance | None) -> GenerateRequest:
        request = self._request
        return GenerateRequest(
            **fields_of(request.generation),
            id=request.id,
            stream=stream,
            reply_to=self._pipeline.frontend_id,
            model=instance.card.model if instance is not None else request.model,
            phase=phase.phase,
            timeout_s=max(0.0, self.deadline - self._clock()),
            cache_salt=request.hints.cache_salt,
            adapter=self._adapter,
            priority=request.hints.priority,
            session=request.hints.session,
            trace_headers=request.hints.trace_headers,
            prior=phase.prior,
            handoff=phase.handoff,
            resumable=self._resumable(),
        )

    def _resumable(self) -> Resumable | None:
        """Returns the terms of a resumable stream. The events that the client lacks are sent again only once."""
        resumable = self._request.resumable
        if resumable is None or resumable.after is None or not any(a.has_record for a in self._attempts):
            return resumable
        return msgspec.structs.replace(resumable, after=None)

    @property
    def _only_events(self) -> bool:
        """True if nothing of a resumed answer is missing but events."""
        resumable = self._request.resumable
        return resumable is not None and resumable.ending is not None

    def _new_query(self) -> PlacementQuery:
        hints, prompt = self._request.hints, self._request.generation.prompt
        return PlacementQuery(
            prompt if self._prior is None else prompt + pack_tokens(self._prior.token_ids),
            adapter_salt(self._adapter, hints.cache_salt),
            model=self._request.model,
            session=hints.session,
            instances=hints.instances,
        )

    def _note_prediction(self, worker: str, predicted: int | None, last: Finished) -> None:
        """Compares the cached tokens that the router predicted with those that the worker found. A continued answer reports
        those of its first prefill."""
        request = self._request
        if predicted is None or self._prior is not None or request.in_flight_duplicate:
            return
        if not request.generation.needs_whole_prompt:
            self._pipeline.predictions.note(worker, predicted, last.usage.cached_tokens)

    # interruptions

    def _output(self) -> PriorOutput | None:
        """Returns all output so far; None if there is none."""
        replies = [attempt.reply for attempt in self._attempts]
        before = self._request.prior
        if before is None:
            cached = next((reply.cached_tokens for reply in replies if reply.tokens), 0)
            before = PriorOutput([], [], cached)
        output = before.followed_by(self.tokens, [entry for reply in replies for entry in reply.logprobs])
        return output if output.token_ids else None

    def _continue_from_here(self) -> None:
        """Prepares the request to be placed with all output so far. Nothing of it stays at the earlier workers."""
        for attempt in self._attempts:
            attempt.close()
        self._prior = self._output()
        self._query = self._new_query()

    def _note_migration(self, worker: str, cause: WorkerLost) -> None:
        """Records that the answer migrates from a lost worker. Raises `cause` if it may not."""
        pipeline, sampling, migrations = self._pipeline, self._request.generation.sampling, self.decision.migrations
        self._note_engine_death(cause)
        too_large = any(attempt.reply.logprobs_dropped for attempt in self._attempts)
        if len(migrations) >= pipeline.limits.max_migrations or self._clock() >= self.deadline or too_large:
            try:
                raise cause
            finally:
                del cause  # its traceback refers to this frame: a reference cycle
        exact = sampling.greedy or self._attempts[-1].draws_by_position
        migrations.append(Migration(worker, cause.code, len(self.tokens), exact, self._clock() - self.began))
        pipeline.metrics.migrated.labels(cause.code).inc()
        log.info("request %s: continued elsewhere after %d tokens: %s", self._request.id, len(self.tokens), cause)

    def _note_retry(self, phase: PhaseInput, failed: TryAnother) -> None:
        self._pipeline.metrics.replaced.inc()
        self._attempts.pop().close()  # without a record nothing of it is needed
        log.info("request %s: %s on %s sent no record: %s", self._request.id, phase.phase, failed.worker, failed.cause)
        self._note_engine_death(failed.cause)

    def _note_engine_death(self, cause: ClusterError) -> None:
        """Counts engines that died during the request. Raises PoisonRequest for one too many: it may have killed them."""
        self._engine_deaths += isinstance(cause, EngineLost)
        if self._engine_deaths >= MAX_ENGINE_DEATHS:
            self._pipeline.metrics.poison.inc()
            raise PoisonRequest(
                f"{self._engine_deaths} engines died while they ran this request; it is not tried again"
            )

    def _keep_unfinished(self) -> None:
        """Has a worker keep a resumable answer that ends before its last event was sent."""
        if self._request.resumable is None or self.outcome == "finished" or (output := self._output()) is None:
            return
        peers = (*(attempt.reply.peer for attempt in reversed(self._attempts)), *self._pipeline.fleet.peers.values())
        peer = next((peer for peer in peers if peer.usable), None)
        if peer is not None and peer.link is not None:
            peer.link.send(Keep(self._generate_request(PhaseInput("aggregated", "", output), 0, peer.instance)))

    # the client, and the end

    def cancel(self, error: DynserveError) -> None:
        """Cancels the request of a client that disconnected: the reader of its records gets `error`."""
        self.outcome = "cancelled"
        self._cancelled = error
        if self._queued is not None:
            self._queued.fail(error)
        for attempt in self._attempts:
            attempt.reply.fail(error)

    def note_first_token(self) -> None:
        """Notes that the first token has arrived."""
        if self._admitted is not None:
            self._admitted.answering()

    def limit_sending(self, limit: Limit | None) -> None:
        """`limit` ends the sending to a client that does not read; None when nothing is sent any more."""
        self._send_limit = limit

    def _end_slow_client(self) -> None:
        self._pipeline.metrics.slow_clients.inc()
        if self._send_limit is not None:
            self._send_limit.expire()

    def close(self) -> None:
        """Ends the request at every worker, and gives all reserved load back. Safe to repeat."""
        for attempt in self._attempts:
            attempt.close()
        if self._admitted is not None:
            self._admitted.close(finished=self.outcome == "finished")
            self._admitted = None
        # errors refer to the frames that they came through: reference cycles
        self._cancelled = self._send_limit = self._queued = None
        if self.decision.ended is None or self.outcome != "finished":
            self.decision.outcome, self.decision.ended = self.outcome, self._clock()

    def finish_decision(self) -> bytes:
        """Ends the decision, and returns it as JSON. Called when the answer's last token has arrived."""
        self.decision.outcome, self.decision.ended = self.outcome, self._clock()
        return self.decision.header()
