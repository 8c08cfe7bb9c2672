"""Submissions: requests that were sent to workers, until each is acknowledged.

A request is sent over NATS. The worker acknowledges it over the link, before the answer's first token and often in one
frame with it, so that no task is woken for it. The link is the request's fallback if NATS is down, does not accept its
size, or brings no acknowledgement. A worker accepts a request only once.

NATS may also be silent: connected, but nothing arrives. One request without an acknowledgement, or one probe without a
reply, shows that. From then on all requests go over the links, until a probe is answered.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec

from dynserve.errors import ClusterError, DynserveError, NoAck, Overloaded, TimedOut, WorkerLeft, WorkerLost, from_wire
from dynserve.frontend.metrics import FrontendMetrics
from dynserve.frontend.reply import Peer, Reply
from dynserve.tasks import Limit
from dynserve.transport.base import Bus, Mailbox
from dynserve.wire import decoded, events, requests
from dynserve.wire.link import Submit
from dynserve.wire.requests import Accepted, Ack, Busy, Draining, GenerateRequest, Refused

log = logging.getLogger(__name__)

ACK_TIMEOUT = 1.0  # seconds, on each transport
STALLED = 0.25  # seconds by which a timer may be late before acknowledgements are looked for first
AVOID = 30.0  # seconds for which requests to a worker that has not acknowledged one go over its link
PROBE_EVERY = 1.0  # seconds between probes of NATS, and for the reply to one
PROBE = 0  # number of a probe's reply; streams are numbered from 1


class _OpenSubmission(msgspec.Struct):
    reply: Reply
    request: GenerateRequest
    due: float
    by_bus: bool = False  # it may have reached the worker over NATS
    by_link: bool = False
    posting: Limit | None = None


class Submissions:
    """The submissions of one frontend that no worker has acknowledged yet."""

    def __init__(
        self, namespace: str, frontend_id: str, bus: Bus, metrics: FrontendMetrics, on_bus: Callable[[bool], None]
    ) -> None:
        """`on_bus` is called with False when NATS is down or silent, and with True when it works again."""
        self._namespace, self._bus, self._metrics, self._on_bus = namespace, bus, metrics, on_bus
        self._probed = events.probe_subject(namespace, frontend_id)
        self._probe_replied = asyncio.Event()
        self.bus_works = True
        self._avoided: list[Peer] = []  # workers that requests do not reach over NATS
        self._loop = asyncio.get_running_loop()
        self._open: dict[int, _OpenSubmission] = {}  # by stream, in the order in which they are due
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = 0.0
        self._mailbox: Mailbox | None = None

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """Receives replies over NATS while the block is open: of NATS, or of workers without a link to this frontend."""
        try:
            async with (
                self._bus.mailbox(self._replied) as self._mailbox,
                self._bus.serve(self._probed, lambda _: b"alive"),
            ):
                yield
        finally:
            self._mailbox = None
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    async def watch_bus(self) -> None:
        """Probes NATS once a second."""
        while True:
            due = self._loop.time() + PROBE_EVERY
            works = await self._probe(due)
            if not works:  # so it was NATS, and not the workers that did not acknowledge requests
                for peer in self._avoided:
                    peer.avoid_bus_until = 0.0
                self._avoided.clear()
            self._note_bus(works)
            await asyncio.sleep(max(0.0, due - self._loop.time()))

    async def _probe(self, due: float) -> bool:
        """Whether a request to this frontend itself is answered over NATS in time."""
        mailbox, bus = self._mailbox, self._bus
        if mailbox is None or not bus.connected:
            return False
        self._probe_replied.clear()
        try:
            async with asyncio.timeout_at(due):
                await mailbox.post(self._probed, b"", PROBE)
                await self._probe_replied.wait()
        except (ClusterError, TimeoutError):
            return False
        return True

    def _note_bus(self, works: bool) -> None:
        if works == self.bus_works:
            return
        self.bus_works = works
        if works:
            log.warning("NATS answers again")
        else:
            log.warning("NATS does not answer: requests, load reports and KV events go over the links until it does")
            for stream in [stream for stream, submission in self._open.items() if submission.by_bus]:
                self._send_by_link(stream)
        self._on_bus(works)

    async def submit(self, reply: Reply, request: GenerateRequest) -> None:
        """Sends a request, and returns once it is on its way. A failure is reported to `reply`."""
        peer, bus, mailbox = reply.peer, self._bus, self._mailbox
        assert peer.instance is not None
        self._expect(submission := _OpenSubmission(reply, request, self._loop.time() + ACK_TIMEOUT))
        payload = requests.encode(request)
        by_bus = self.bus_works and peer.avoid_bus_until <= self._loop.time()
        if by_bus and mailbox is not None and bus.connected and len(payload) <= bus.max_payload:
            subject = events.generate_subject(self._namespace, peer.instance.role, peer.id)
            submission.by_bus = True
            try:
                with Limit() as submission.posting:  # which expires when the acknowledgement is due
                    await mailbox.post(subject, payload, reply.stream)
                return
            except (ClusterError, TimeoutError) as error:
                submission.by_bus = isinstance(error, (TimeoutError, TimedOut))
                log.info("request %s: not sent over NATS (%s); trying the link", request.id, error)
        self._send_by_link(reply.stream)

    def acknowledged(self, stream: int, ack: Ack) -> None:
        """Handles a worker's acknowledgement from either transport. Only the first counts."""
        submission = self._open.pop(stream, None)
        if submission is None:
            return
        if submission.posting is not None:
            submission.posting.expire()  # it has arrived: NATS's client need not wait any longer
        if (error := _refusal(submission.reply.peer.id, ack)) is None:
            return
        if submission.by_bus and submission.by_link:
            submission.reply.fail(error)  # the other copy may have been accepted since
        else:
            submission.reply.refuse(error)

    def _replied(self, stream: int, payload: bytes | None) -> None:
        """Handles a reply over NATS: None if no worker received the request, or a worker without a link refuses it."""
        if stream == PROBE:
            if payload is not None:
                self._probe_replied.set()
        elif payload is None:
            if (submission := self._open.get(stream)) is not None:
                submission.by_bus = False
            self._send_by_link(stream)
        elif (ack := decoded(requests.decode_ack, payload, "an acknowledgement")) is not None:
            self.acknowledged(stream, ack)

    def _send_by_link(self, stream: int) -> None:
        submission = self._open.get(stream)
        if submission is None or submission.by_link:
            return
        reply = submission.reply
        del self._open[stream]  # `_expect` adds it again, at the end
        if not reply.open:
            return
        if reply.peer.link is None:
            reply.fail(WorkerLost(f"worker {reply.peer.id} was lost"))
            return
        self._metrics.link_fallbacks.inc()
        submission.by_link, submission.due = True, self._loop.time() + ACK_TIMEOUT
        self._expect(submission)
        reply.peer.link.send(Submit(submission.request))

    def _expect(self, submission: _OpenSubmission) -> None:
        self._open[submission.reply.stream] = submission
        if self._timer is None:
            self._expect_until(submission.due)

    def _expire_due(self) -> None:
        """Handles submissions without a timely acknowledgement. One timer serves all: most are acknowledged long before."""
        now = self._loop.time()
        if now - self._timer_due > STALLED:  # this process was stalled: acknowledgements may be unread in the sockets
            self._expect_until(now + STALLED)
            return
        for stream, submission in list(self._open.items()):
            if self._open.get(stream) is not submission or submission.due > now:
                continue  # others of them may have been sent by link, or have ended
            reply = submission.reply
            if submission.posting is not None:
                submission.posting.expire()
            if not reply.open:
                del self._open[stream]
            elif submission.by_link:
                del self._open[stream]
                reply.fail(NoAck(f"worker {reply.peer.id} did not acknowledge within {ACK_TIMEOUT} s"))
            else:
                log.info("request %s: no acknowledgement over NATS; trying the link", submission.request.id)
                self._send_by_link(stream)
                if not reply.peer.suspected:  # otherwise it is the worker that does not answer
                    reply.peer.avoid_bus_until = now + AVOID  # it may be this worker's connection alone
                    self._avoided.append(reply.peer)
                    self._note_bus(False)
        first = next(iter(self._open.values()), None)
        self._timer = None
        if first is not None:
            self._expect_until(first.due)

    def _expect_until(self, due: float) -> None:
        self._timer_due, self._timer = due, self._loop.call_at(due, self._expire_due)


def _refusal(worker: str, ack: Ack) -> DynserveError | None:
    match ack:
        case Accepted():
            return None
        case Busy(waiting=waiting):
            return Overloaded(f"worker {worker} has {waiting} requests waiting")
        case Draining():
            return WorkerLeft(f"worker {worker} is draining")
        case Refused(code=code, message=message, param=param):
            return from_wire(code, message, param)
