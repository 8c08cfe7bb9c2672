"""The pipeline: a request goes to the workers, records come back.

    placed on an aggregated worker, or on a decode worker that lacks little of the prompt ──▶ records
    placed on a prefill worker ──▶ first record and hand-off ──placed on a decode worker──▶ the other records

Each arrow is a phase. A record is a message with some tokens of the answer, or with its end. A phase is placed again, on
another worker, until a record of it has come (`Attempt`). A worker that is lost after that ends the request with an error,
since its client may have read a part of the answer.

Ending is synchronous: cancels are queued on links, reservations are given back. So it cannot be interrupted halfway.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from itertools import count

from dynserve.errors import ClusterError, DynserveError, NoWorker
from dynserve.frontend.admission import Admission, QueuedRequest
from dynserve.frontend.attempt import Attempt, PhaseInput, RecordSink, TryAnother
from dynserve.frontend.decisions import Decision, DecisionLog, Predictions
from dynserve.frontend.fleet import Fleet
from dynserve.frontend.inference import InferenceRequest
from dynserve.frontend.metrics import FrontendMetrics
from dynserve.frontend.reply import Reply
from dynserve.frontend.submissions import Submissions
from dynserve.routing.router import Overlaps, PlacementQuery, Router, RoutingTarget
from dynserve.tasks import Limit
from dynserve.wire.hashing import adapter_salt
from dynserve.wire.link import Finished
from dynserve.wire.requests import GenerateRequest, PriorOutput, fields_of

log = logging.getLogger(__name__)

ATTEMPTS = 4  # placements of one phase; a local prefill that fails is not one of them


class Pipeline:
    """The parts that all requests of one frontend share."""

    def __init__(
        self, frontend_id: str, fleet: Fleet, router: Router, submissions: Submissions, metrics: FrontendMetrics,
        admission: Admission, *, timeout_s: float, max_stream_bytes: int,
    ) -> None:  # fmt: skip
        self.frontend_id, self.fleet, self.router, self.submissions = frontend_id, fleet, router, submissions
        self.metrics, self.admission = metrics, admission
        self.timeout_s, self.max_stream_bytes = timeout_s, max_stream_bytes
        self.decisions, self.predictions = DecisionLog(), Predictions()
        self.streams = count(1)

    def run(self, request: InferenceRequest, deadline: float | None = None) -> Run:
        """Returns the run of a request, for a `with` block: `deliver` runs it, and leaving the block early cancels it at
        every worker. `deadline` (a time of the event loop) is shared by the answers of one response; None: `timeout_s`
        from now."""
        return Run(self, request, deadline)


class Run:
    """One request's way through the workers."""

    __slots__ = (
        "_adapter", "_attempts", "_cancelled", "_clock", "_pipeline", "_query", "_queued", "_request", "_send_limit",
        "began", "deadline", "decision", "metrics", "outcome",
    )  # fmt: skip

    def __init__(self, pipeline: Pipeline, request: InferenceRequest, deadline: float | None = None) -> None:
        self._pipeline, self._request = pipeline, request
        generation, hints = request.generation, request.hints
        self.metrics = pipeline.metrics.of(request.model)
        self._clock = asyncio.get_running_loop().time
        self.began = self._clock()
        self.deadline = self.began + pipeline.timeout_s if deadline is None else deadline
        self.decision = Decision(request.id, request.model, generation.num_tokens, self.began, hints.owner)
        self._adapter = pipeline.fleet.adapter(request.model)
        self._query = PlacementQuery(
            generation.prompt,
            adapter_salt(self._adapter, hints.cache_salt),
            model=request.model,
            session=hints.session,
            instances=hints.instances,
        )
        self._queued: QueuedRequest | None = None
        self._attempts: list[Attempt] = []
        self._cancelled: DynserveError | None = None
        self._send_limit: Limit | None = None
        self.outcome = "finished"

    def __enter__(self) -> Run:
        self.metrics.accepted += 1
        self.metrics.in_flight += 1
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, asyncio.CancelledError):
            self.outcome = "cancelled"
        elif isinstance(error, Exception) and self.outcome != "cancelled":
            self.outcome = "failed"
        self.close()
        self.metrics.in_flight -= 1
        self.metrics.ended[self.outcome] += 1

    @property
    def tokens(self) -> list[int]:
        """All tokens received, of all phases."""
        return [token_id for attempt in self._attempts for token_id in attempt.reply.tokens]

    @property
    def was_placed(self) -> bool:
        """Whether the request was placed on a worker."""
        return bool(self._attempts)

    async def deliver(self, sink: RecordSink) -> None:
        """Runs the request. `sink` gets bursts of records, in order; the last one ends with a `Finished` that is no
        hand-off. (A callable, and not an iterator: iterators of coroutines cost as much as the placement.)"""
        pipeline, model = self._pipeline, self._request.model
        await self._wait_for_room()
        pipeline.decisions.add(self.decision)  # a request that the queue refuses has none
        prefillers, decoders = pipeline.fleet.targets(model, "prefill"), pipeline.fleet.targets(model, "decode")
        if not decoders or not prefillers:
            await self._phase(PhaseInput("aggregated", "aggregated"), sink)
            return
        overlaps: Overlaps | None = None
        if not self._request.generation.needs_whole_prompt:
            local, overlaps = pipeline.router.local(self._query, decoders, prefillers)
            if local:
                if await self._try_local_prefill(local, overlaps, sink):
                    return
                overlaps = None  # stale by now
        last = await self._phase(PhaseInput("prefill", "prefill"), sink, overlaps)
        if last.handoff is not None:
            prior = PriorOutput(self.tokens, last.logprobs or [], last.usage.cached_tokens)
            prefill = self._attempts[-1].reply
            await self._phase(PhaseInput("decode", "decode", prior, last.handoff, prefill), sink)

    async def _wait_for_room(self) -> None:
        """Waits for the request's turn while all workers are over their thresholds."""
        pipeline, model = self._pipeline, self._request.model
        queue = pipeline.admission.queue(model, pipeline.fleet.has_room)
        self._queued = queue.enter(self._request.hints.priority)
        if self._queued is not None:
            began = self._clock()
            try:
                await queue.wait(self._queued, self.deadline)
            finally:
                self._queued = None
                self.decision.queued_s = self._clock() - began
                pipeline.metrics.queued.labels(model).observe(self.decision.queued_s)

    async def _try_local_prefill(
        self, targets: Sequence[RoutingTarget], overlaps: Overlaps | None, sink: RecordSink
    ) -> bool:
        """Runs the whole request on one of these decode workers. Returns False if the worker sent no record."""
        self._pipeline.metrics.local_prefills.inc()
        phase = PhaseInput("aggregated", "decode", reason="local prefill")
        try:
            await self._attempt(phase, targets, sink, overlaps)
        except TryAnother as failed:
            self._pipeline.metrics.replaced.inc()
            if self._clock() >= self.deadline:
                raise failed.cause from None
            # another decode worker would have to compute all of it: continue as for any prompt
            log.info("request %s: its local prefill sent no record: %s", self._request.id, failed.cause)
            return False
        return True

    async def _phase(self, phase: PhaseInput, sink: RecordSink, overlaps: Overlaps | None = None) -> Finished:
        """Runs one phase, on one worker after the other until one sends a record; returns its last record."""
        pipeline, model = self._pipeline, self._request.model
        error: ClusterError = NoWorker(f"no {phase.role} worker serves {model} at the moment")
        excluded: set[str] = set()
        try:
            for _ in range(ATTEMPTS):
                targets = [t for t in pipeline.fleet.targets(model, phase.role) if t.worker not in excluded]
                if not targets:
                    break
                if phase.handoff is not None:
                    targets = pipeline.fleet.paired(targets, phase.handoff.owner)
                try:
                    return await self._attempt(phase, targets, sink, overlaps)
                except TryAnother as failed:
                    error, overlaps = failed.cause, None
                    excluded.add(failed.worker)
                    if not failed.handoff_intact:
                        phase = phase._replace(handoff=None)
                    pipeline.metrics.replaced.inc()
                    log.info(
                        "request %s: %s on %s sent no record: %s", self._request.id, phase.phase, failed.worker, error
                    )
            raise error
        finally:
            del error  # its traceback refers to this frame: a reference cycle

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
        peer = pipeline.fleet.peers[reservation.worker]
        reply = Reply(
            peer,
            next(pipeline.streams),
            pipeline.max_stream_bytes,
            self.deadline,
            self._end_slow_client,
            reservation.add_tokens,
        )
        attempt = Attempt(phase, reservation, self.decision.placed(reservation), reply)
        self._attempts.append(attempt)
        try:
            await pipeline.submissions.submit(reply, self._generate_request(phase, reply))
            last = await attempt.deliver(sink)
            self._note_prediction(reservation.worker, reservation.cached_tokens, last)
            return last
        except ClusterError as error:
            raise attempt.error_after(error) from None
        finally:
            attempt.release()

    def _generate_request(self, phase: PhaseInput, reply: Reply) -> GenerateRequest:
        request, instance = self._request, reply.peer.instance
        return GenerateRequest(
            **fields_of(request.generation),
            id=request.id,
            stream=reply.stream,
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
        )

    def _note_prediction(self, worker: str, predicted: int | None, last: Finished) -> None:
        """Compares the cached tokens that the router predicted with those that the worker found."""
        request = self._request
        if predicted is not None and not request.generation.needs_whole_prompt and not request.in_flight_duplicate:
            self._pipeline.predictions.note(worker, predicted, last.usage.cached_tokens)

    # the client, and the end

    def cancel(self, error: DynserveError) -> None:
        """Cancels the request of a client that disconnected: the reader of its records gets `error`."""
        self.outcome = "cancelled"
        self._cancelled = error
        if self._queued is not None:
            self._queued.fail(error)
        for attempt in self._attempts:
            attempt.reply.fail(error)

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
        # errors refer to the frames that they came through: reference cycles
        self._cancelled = self._send_limit = self._queued = None
        if self.decision.ended is None or self.outcome != "finished":
            self.decision.outcome, self.decision.ended = self.outcome, self._clock()

    def finish_decision(self) -> bytes:
        """Ends the decision, and returns it as JSON. Called when the answer's last token has arrived."""
        self.decision.outcome, self.decision.ended = self.outcome, self._clock()
        return self.decision.header()
