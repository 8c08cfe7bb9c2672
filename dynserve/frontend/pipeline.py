"""The pipeline: a prompt goes to the workers, records come back. Placement, prefill, hand-off, decode, and what follows
from a worker that refuses or dies before it has said anything.

Ending is synchronous: cancels are queued on links, charges are given back. So it cannot be interrupted halfway.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from itertools import count
from typing import Literal

import msgspec

from dynserve.errors import ClusterError, DynserveError, NoAck, NoWorker, TimedOut, WorkerLost
from dynserve.frontend.admission import Admission, Waiting
from dynserve.frontend.decisions import Decision, DecisionLog, Placement, Predictions
from dynserve.frontend.fleet import Fleet, Model
from dynserve.frontend.metrics import FrontendMetrics
from dynserve.frontend.reply import Peer, Record, Reply, Write
from dynserve.frontend.submissions import Submissions
from dynserve.routing.router import Ask, Placed, Router, Target
from dynserve.tasks import Limit
from dynserve.transport.base import Bus
from dynserve.wire.hashing import adapter_salt
from dynserve.wire.link import Finished
from dynserve.wire.requests import (
    GenerateRequest,
    Guide,
    Handoff,
    Phase,
    Prior,
    Render,
    Sampling,
    Stop,
)  # fmt: skip

log = logging.getLogger(__name__)

Sink = Callable[[list[Record]], Awaitable[None]]

ATTEMPTS = 4  # placements of one phase


class Prompt(msgspec.Struct, frozen=True, kw_only=True):
    """One request, checked and tokenised."""

    id: str
    model: str
    tokens: bytes  # u32 little-endian
    sampling: Sampling
    stop: Stop
    render: Render
    owner: str = ""  # the API key that it came with: nobody else sees its record
    cache_salt: str = ""
    priority: int = 0  # higher ones leave the frontend's queue first
    session: str = ""
    instances: tuple[str, ...] = ()
    explain: bool = False
    guide: Guide | None = None
    pool: Literal["mean", "last"] | None = None  # the answer is an embedding
    twin: bool = False  # the same prompt is under way already: what it will find in a cache cannot be told

    @property
    def whole(self) -> bool:
        """Every position is looked at: nothing of it is taken from a cache."""
        return self.pool is not None or self.sampling.prompt_logprobs


class Pipeline:
    """What all requests of one frontend share."""

    def __init__(
        self, frontend_id: str, namespace: str, bus: Bus, fleet: Fleet, router: Router, metrics: FrontendMetrics,
        admission: Admission, *, timeout_s: float, max_stream_bytes: int,
    ) -> None:  # fmt: skip
        self.frontend_id, self.fleet, self.router = frontend_id, fleet, router
        self.submissions = Submissions(namespace, bus, metrics)
        fleet.acknowledged = self.submissions.acknowledged
        self.metrics, self.admission = metrics, admission
        self.timeout_s, self.max_stream_bytes = timeout_s, max_stream_bytes
        self.decisions, self.predictions = DecisionLog(), Predictions()
        # streams of an earlier process with the same id must never be taken for ours
        self.streams = count(time.time_ns() // 1000)

    def model(self, name: str) -> Model | None:
        return self.fleet.model(name)

    def answer(self, prompt: Prompt, deadline: float | None = None) -> Run:
        """The request runs as long as a `with` block of what this gives. Leaving it early cancels everywhere. `deadline`
        is that of the answers which belong together, of the loop's clock; None: a request's own time begins now."""
        return Run(self, prompt, deadline)


class Run:
    """One request's way through the workers."""

    def __init__(self, pipeline: Pipeline, prompt: Prompt, deadline: float | None = None) -> None:
        self._pipeline, self._prompt = pipeline, prompt
        self.metrics = pipeline.metrics.of(prompt.model)
        self._clock = asyncio.get_running_loop().time
        self.began = self._clock()
        self.deadline = self.began + pipeline.timeout_s if deadline is None else deadline
        self.decision = Decision(prompt.id, prompt.model, len(prompt.tokens) // 4, self.began, prompt.owner)
        self._adapter = pipeline.fleet.adapter(prompt.model)
        salt = adapter_salt(self._adapter, prompt.cache_salt)
        self._ask = Ask(prompt.tokens, salt, model=prompt.model, session=prompt.session, instances=prompt.instances)
        self._waiting: Waiting | None = None
        self._replies: list[Reply] = []
        self._placed: list[Placed] = []
        self._cancelled: DynserveError | None = None
        self._scope: Limit | None = None
        self.outcome = "finished"
        self.write: Write | None = None  # set by a response that has begun, and where bytes can be sent without waiting

    @property
    def tokens(self) -> list[int]:
        """All that came."""
        return [token_id for reply in self._replies for token_id in reply.tokens]

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

    async def deliver(self, sink: Sink) -> None:
        """Runs the request. `sink` gets bursts of records, in order; the last one ends with a `Finished` that is no
        hand-off. (A callable, and not an iterator: those of coroutines cost as much as the placement.)"""
        pipeline, model = self._pipeline, self._prompt.model
        await self._enter()
        pipeline.decisions.add(self.decision)  # one that is refused at the door has none
        prefillers, decoders = pipeline.fleet.targets(model, "prefill"), pipeline.fleet.targets(model, "decode")
        if not decoders or not prefillers:
            await self._phase("aggregated", "prefill_and_decode", sink)
            return
        local = () if self._prompt.whole else pipeline.router.local(self._ask, decoders, prefillers)
        if local:
            pipeline.metrics.local_prefills.inc()
            try:
                await self._phase("aggregated", "decode", sink, local=local)
                return
            except ClusterError as error:
                if self.tokens or self._clock() >= self.deadline:
                    raise
                # another decode worker would have to compute all of it: from here on as any prompt
                log.info("request %s: its local prefill did not start: %s", self._prompt.id, error)
        last = await self._phase("prefill", "prefill", sink)
        if last.handoff is not None:
            prior = Prior(self.tokens, last.logprobs or [], last.usage.cached_tokens)
            await self._phase("decode", "decode", sink, prior, last.handoff, prefilled=self._replies[-1])

    async def _enter(self) -> None:
        """Waits for its turn while all workers are over their thresholds."""
        queue = self._pipeline.admission.queue(self._prompt.model)
        self._waiting = queue.enter(self._prompt.priority)
        if self._waiting is not None:
            began = self._clock()
            try:
                await queue.wait(self._waiting, self.deadline)
            finally:
                self._waiting = None
                self.decision.queued_s = self._clock() - began
                self._pipeline.metrics.queued.labels(self._prompt.model).observe(self.decision.queued_s)

    @property
    def was_placed(self) -> bool:
        """Some worker was asked to compute it."""
        return bool(self._placed)

    def cancel(self, error: DynserveError) -> None:
        """The client has left: whoever waits for records gets `error`."""
        self.outcome = "cancelled"
        self._cancelled = error
        if self._waiting is not None:
            self._waiting.fail(error)
        for reply in self._replies:
            reply.fail(error)

    def limit(self, scope: Limit | None) -> None:
        """What ends the sending to a client who does not read; None when nothing is sent any more."""
        self._scope = scope

    def _cut(self) -> None:
        self._pipeline.metrics.slow_clients.inc()
        if self._scope is not None:
            self._scope.expire()

    def close(self) -> None:
        for reply in self._replies:
            reply.close()
        for placed in self._placed:
            placed.close()
        self._cancelled = self._scope = self._waiting = None  # errors know the frames that they came through: rings
        if self.decision.ended is None or self.outcome != "finished":
            self.decision.outcome, self.decision.ended = self.outcome, self._clock()

    def explained(self) -> bytes:
        """The decision as JSON, for an answer whose last token is there."""
        self.decision.outcome, self.decision.ended = self.outcome, self._clock()
        return self.decision.header()

    async def _phase(
        self, phase: Phase, role: str, sink: Sink, prior: Prior | None = None, handoff: Handoff | None = None,
        *, prefilled: Reply | None = None, local: Sequence[Target] = (),
    ) -> Finished:  # fmt: skip
        """One phase, placed again on another worker as long as nothing has come from the one before; its last record.
        `prefilled`: whose hand-off it goes on from. `local`: decode workers that may prefill this prompt; then there is
        one attempt."""
        pipeline, model = self._pipeline, self._prompt.model
        excluded: set[str] = set()
        error: DynserveError = NoWorker(f"no {role} worker serves {model} at the moment")
        for _ in range(1 if local else ATTEMPTS):
            if self._cancelled is not None:
                raise self._cancelled
            targets = local or [t for t in pipeline.fleet.targets(model, role) if t.worker not in excluded]
            if not targets:
                break
            if handoff is not None:
                targets = pipeline.fleet.paired(list(targets), handoff.owner)
            why = "local prefill" if local else ""
            placed = pipeline.router.place(self._ask, phase, targets, self._clock(), why=why)
            self._placed.append(placed)
            placement = self.decision.placed(placed)
            started = False
            peer = pipeline.fleet.peers[placed.worker]
            try:
                reply = await self._start(phase, peer, placed, prior, handoff)
                while burst := await reply.channel.take():
                    if not started:
                        started = True
                        placed.prefilled()
                        if prefilled is not None:
                            _took_over(reply, prefilled)
                    last = burst[-1]
                    if isinstance(last, Finished):
                        self._note_end(placed, placement, last)
                        await sink(burst)
                        return last
                    await sink(burst)
                    if reply.write is None and reply.channel.empty:
                        reply.write = self.write
                raise WorkerLost(f"worker {placed.worker} ended the stream without a last word")
            except ClusterError as failure:
                placement.failure = failure.code
                if started or (isinstance(failure, TimedOut) and not isinstance(failure, NoAck)):
                    raise
                error = failure.with_traceback(None)  # which knows this frame: a ring
                excluded.add(placed.worker)
                if (
                    not self._replies[-1].refused
                    and peer.instance is not None
                    and peer.instance.card.single_use_handoffs
                ):
                    handoff = None  # that worker may have begun to take it: a second one must not
                pipeline.metrics.replaced.inc()
                log.info("request %s: %s on %s did not start: %s", self._prompt.id, phase, placed.worker, failure)
            finally:
                placed.close()
        try:
            if isinstance(error, NoAck):
                raise TimedOut(str(error)) from error
            raise error
        finally:
            del error  # its traceback knows this frame: a ring

    def _note_end(self, placed: Placed, placement: Placement, last: Finished) -> None:
        """The phase is over: its load is given back before anyone else is woken, and its prediction judged."""
        placed.close()
        placement.usage = last.usage
        if placed.cached_tokens is not None and not self._prompt.whole and not self._prompt.twin:
            self._pipeline.predictions.note(placed.worker, placed.cached_tokens, last.usage.cached_tokens)

    async def _start(
        self, phase: Phase, peer: Peer, placed: Placed, prior: Prior | None, handoff: Handoff | None
    ) -> Reply:
        """The stream of a worker that has been asked. It ends with a ClusterError when this worker does not take the
        request, with a CallerError when none would."""
        pipeline, prompt = self._pipeline, self._prompt
        stream = next(pipeline.streams)
        reply = Reply(peer, stream, pipeline.max_stream_bytes, self.deadline, self._cut, placed.grew)
        self._replies.append(reply)
        request = GenerateRequest(
            id=prompt.id,
            stream=stream,
            reply_to=pipeline.frontend_id,
            model=peer.instance.card.model if peer.instance is not None else prompt.model,
            phase=phase,
            prompt=prompt.tokens,
            sampling=prompt.sampling,
            stop=prompt.stop,
            render=prompt.render,
            timeout_s=max(0.0, self.deadline - self._clock()),
            cache_salt=prompt.cache_salt,
            adapter=self._adapter,
            priority=prompt.priority,
            prior=prior,
            handoff=handoff,
            guide=prompt.guide,
            pool=prompt.pool,
        )
        await pipeline.submissions.submit(reply, request)
        return reply


def _took_over(decoding: Reply, prefilled: Reply) -> None:
    """A decode worker has answered: what the prefill worker keeps for it has been fetched, or never will be."""
    if decoding.handoff_declined:
        prefilled.close()
    else:
        prefilled.handoff_done()
