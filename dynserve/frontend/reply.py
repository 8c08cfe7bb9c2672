"""`Peer` and `Reply`: the frontend's record of a worker, and one stream of its link.

A reply's records go to the task that reads them, or, once that task has nothing more to read and the client can be written
to, straight from the link's callback to the client's socket.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from dynserve.errors import DynserveError, SlowClient, TimedOut
from dynserve.routing.router import RoutingTarget
from dynserve.server.exchange import ChunkWriter
from dynserve.streams import Channel
from dynserve.transport.base import Link
from dynserve.wire.discovery import WorkerInstance
from dynserve.wire.events import Load
from dynserve.wire.link import Cancel, Finished, HandoffDone, StepTokens, Tokens
from dynserve.wire.requests import TokenLogprob

Record = Tokens | Finished
COUNT_EVERY = 16  # tokens of one answer: how far the ledger may be behind
MAX_LOGPROBS = 50_000  # values of one answer that are kept: 5 MB
RECORD_BYTES = 32  # of a record in a channel, beside its data


@dataclass(slots=True)
class Peer:
    """One worker process. It is a routing target while it is linked, described in discovery and without a problem."""

    id: str
    instance: WorkerInstance | None = None
    link: Link | None = None
    leaving: bool = False  # removed from discovery, link still up: it finishes its requests
    stopping: bool = False  # it has said so over the link
    suspected: bool = False  # silent for longer than --suspect-s
    epoch: int = 0  # of the process
    avoid_bus_until: float = 0.0  # requests to it go over the link until then
    load: Load | None = None
    loaded_at: float = 0.0  # when `load` was reported
    problem: str = ""  # why it is not a target although it is linked
    target: RoutingTarget | None = None
    replies: dict[int, Reply] = field(default_factory=dict)  # by stream

    @property
    def usable(self) -> bool:
        away = self.leaving or self.stopping or self.suspected
        return self.target is not None and self.linked and not away and not self.problem

    @property
    def linked(self) -> bool:
        return self.link is not None and not self.link.closed

    @property
    def state(self) -> str:
        if self.leaving or self.stopping:
            return "draining"
        return self.problem or ("suspected" if self.suspected else "ready")


class Reply:
    """One stream of one worker.

    `bound` is the upper bound of bytes that wait for the client; `on_slow` is called when it is exceeded. `on_tokens` gets
    the number of new tokens, from time to time. The stream fails at `deadline`, of the loop's clock.
    """

    __slots__ = (
        "_counted", "_on_slow", "_on_tokens", "_timer", "_values", "cached_tokens", "channel", "handoff_declined",
        "logprobs", "logprobs_dropped", "peer", "refused", "stream", "tokens", "write",
    )  # fmt: skip

    def __init__(
        self,
        peer: Peer,
        stream: int,
        bound: int,
        deadline: float,
        on_slow: Callable[[], None],
        on_tokens: Callable[[int], None],
    ) -> None:
        self.peer, self.stream, self._on_slow, self._on_tokens = peer, stream, on_slow, on_tokens
        self.tokens: list[int] = []  # all tokens received
        self.logprobs: list[TokenLogprob] = []  # all log-probabilities received
        self._values, self.logprobs_dropped = 0, False  # how many they are; too many to continue the answer elsewhere
        self.cached_tokens = 0  # of the prompt, as the worker has reported
        self._counted = 0
        self.channel: Channel[Record] = Channel(bound)
        self.refused = False  # the worker has refused the request
        self.handoff_declined = False  # the worker computes the prompt itself, and does not fetch the hand-off
        # writes to the client in the link's own callback, where the reader has read everything: no task is woken then
        self.write: ChunkWriter | None = None
        peer.replies[stream] = self
        self._timer = asyncio.get_running_loop().call_at(deadline, self._overdue)

    def deliver(self, record: Tokens) -> None:
        """Writes the record to the client at once; or queues it for the reader, and from then on all records until the
        reader has caught up."""
        self.tokens += record.token_ids
        if record.logprobs is not None:
            self._keep_logprobs(record.logprobs)
        if record.cached_tokens:
            self.cached_tokens = record.cached_tokens
        self.count()
        write = self.write
        if write is None or (record.data and not write(record.data)):
            self.write = None
            self.queue(record, len(record.data) + RECORD_BYTES)

    def _keep_logprobs(self, entries: list[TokenLogprob]) -> None:
        """Keeps log-probabilities for workers that continue the answer: as many as memory and a frame may hold."""
        self._values += sum(1 + len(entry.top) for entry in entries)
        if self._values > MAX_LOGPROBS:
            self.logprobs_dropped = True
            self.logprobs.clear()
        else:
            self.logprobs += entries

    def finish(self, record: Finished) -> None:
        """The stream's last record. Without a hand-off nothing of the stream stays at the worker."""
        self.tokens += record.token_ids
        if record.logprobs is not None:
            self._keep_logprobs(record.logprobs)
        self.cached_tokens = record.usage.cached_tokens
        if record.handoff is None:
            del self.peer.replies[self.stream]
        self.queue(record, 0)
        self.channel.close()

    def count(self) -> None:
        """Reports the tokens received since the last call."""
        now = len(self.tokens)
        self._on_tokens(now - self._counted)
        self._counted = now

    def queue(self, record: Record, size: int) -> None:
        """Queues a record for the reader. A client that does not read is cut here, so that its answer does not fill the
        frontend's memory."""
        if not self.channel.put(record, size):
            self.fail(SlowClient("the client does not read its answer"))
            self._on_slow()

    def fail(self, error: DynserveError) -> None:
        """Ends the stream for the reader, and at the worker at once: the reader may be busy for long."""
        self._cancel_at_worker()
        self.channel.close(error)

    def refuse(self, error: DynserveError) -> None:
        """Ends the stream of a worker that has not begun it, and will not if another copy of the request reaches it."""
        self.refused = True
        self.fail(error)

    @property
    def answering(self) -> bool:
        """Whether tokens are still expected: it is not the stream of a prefill whose hand-off is open."""
        return not self.channel.closed

    @property
    def open(self) -> bool:
        """Whether the worker may still send something."""
        return self.peer.replies.get(self.stream) is self

    def handoff_done(self) -> None:
        """Reports to the worker that the stream's hand-off is not needed any more."""
        if self.peer.replies.pop(self.stream, None) is not None and self.peer.link is not None:
            self.peer.link.send(HandoffDone(self.stream))

    def close(self) -> None:
        """Cancels at the worker what remains of this stream: the answer, or a hand-off that the worker holds."""
        self._timer.cancel()
        self._cancel_at_worker()
        self.channel.drop()
        # their owners refer to this reply: a reference cycle would wait for the garbage collector, which runs rarely
        self._on_slow, self._on_tokens, self.write = _ignore, _ignore, None

    def _overdue(self) -> None:
        self.fail(TimedOut("the request took longer than its time limit"))

    def _cancel_at_worker(self) -> None:
        if self.peer.replies.pop(self.stream, None) is not None and self.peer.link is not None:
            self.peer.link.send(Cancel(self.stream))


def deliver_steps(replies: dict[int, Reply], steps: list[StepTokens]) -> None:
    """Delivers the tokens of engine steps to their streams. Several steps come together to a frontend that is behind: each
    stream gets one record for all of them."""
    if len(steps) == 1:
        _deliver_step(replies, steps[0])
        return
    tokens: dict[int, Tokens] = {}
    for step in steps:
        for stream, token_id, data in zip(step.streams, step.token_ids, step.data, strict=True):
            record = tokens.get(stream)
            if record is None:
                tokens[stream] = Tokens(stream, data, [token_id])
            else:
                record.data += data
                record.token_ids.append(token_id)
    for stream, record in tokens.items():
        if (reply := replies.get(stream)) is not None:
            reply.deliver(record)


def _deliver_step(replies: dict[int, Reply], step: StepTokens) -> None:
    """Runs for every token. `Reply.deliver` is spelled out: most tokens need no record, and no call but the writing."""
    get = replies.get
    for stream, token_id, data in zip(step.streams, step.token_ids, step.data, strict=True):
        reply = get(stream)
        if reply is None:
            continue
        tokens = reply.tokens
        tokens.append(token_id)
        if not len(tokens) % COUNT_EVERY:
            reply.count()
        write = reply.write
        if write is None or (data and not write(data)):
            reply.write = None
            reply.queue(Tokens(stream, data, [token_id]), len(data) + RECORD_BYTES)


def _ignore(*args: object) -> None:
    pass
