"""`Reply`: one stream of one worker, from the link's messages to the client's socket or to the task that reads it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from dynserve.errors import DynserveError, SlowClient, TimedOut
from dynserve.routing.router import Target
from dynserve.streams import Channel
from dynserve.transport.base import Link
from dynserve.wire.discovery import WorkerInstance
from dynserve.wire.events import Load
from dynserve.wire.link import Cancel, Finished, HandoffDone, Step, Tokens

Record = Tokens | Finished
Write = Callable[[bytes], bool]  # False: nothing was written, the client is behind
COUNT_EVERY = 16  # tokens of one answer: how far the ledger may be behind


@dataclass(slots=True)
class Peer:
    """One worker process."""

    id: str
    instance: WorkerInstance | None = None
    link: Link | None = None
    leaving: bool = False  # gone from discovery, link still up: it finishes what it has
    load: Load | None = None
    problem: str = ""  # why it is not routed to although it is there
    target: Target | None = None  # what the router knows it by, while it is linked, described and without a problem
    replies: dict[int, Reply] = field(default_factory=dict)

    @property
    def usable(self) -> bool:
        return self.target is not None and self.linked and not self.leaving and not self.problem

    @property
    def linked(self) -> bool:
        return self.link is not None and not self.link.closed

    @property
    def state(self) -> str:
        return "draining" if self.leaving else self.problem or "ready"


class Reply:
    """One stream of one worker, as the pipeline reads it."""

    __slots__ = (
        "_counted", "_cut", "_grew", "_timer", "channel", "handoff_declined", "peer", "refused", "stream", "tokens",
        "write",
    )  # fmt: skip

    def __init__(
        self, peer: Peer, stream: int, bound: int, deadline: float, cut: Callable[[], None], grew: Callable[[int], None]
    ) -> None:
        loop = asyncio.get_running_loop()
        self.peer, self.stream, self._cut, self._grew = peer, stream, cut, grew
        self.tokens: list[int] = []  # all that came
        self._counted = 0
        self.channel: Channel[Record] = Channel(bound)
        self.refused = False  # the worker has said that it does not begin
        self.handoff_declined = False  # the hand-off that it was given was not taken
        # takes bytes in the link's own callback, where the reader has read everything: no task is woken for them then
        self.write: Write | None = None
        peer.replies[stream] = self
        self._timer = loop.call_at(deadline, self._late)

    def came(self, record: Tokens) -> None:
        """To the client at once, or to the reader, and from then on to the reader until that has caught up."""
        self.tokens += record.token_ids
        self.count()
        write = self.write
        if write is None or (record.data and not write(record.data)):
            self.write = None
            self.put(record, len(record.data) + 32)

    def count(self) -> None:
        """Tells the ledger of tokens that it has not heard of."""
        now = len(self.tokens)
        self._grew(now - self._counted)
        self._counted = now

    def put(self, record: Record, size: int) -> None:
        """For the client; one who does not read is cut here, so that its answer does not fill the frontend."""
        if not self.channel.put(record, size):
            self.fail(SlowClient("the client does not read its answer"))
            self._cut()

    def fail(self, error: DynserveError) -> None:
        """Ends the stream for the reader, and at the worker at once: the reader may be busy for long."""
        self._drop()
        self.channel.close(error)

    def _late(self) -> None:
        self.fail(TimedOut("the request took longer than its time limit"))

    def refuse(self, error: DynserveError) -> None:
        """Ends the stream of a worker that has not begun it, and will not if another copy of the request reaches it."""
        self.refused = True
        self.fail(error)

    @property
    def open(self) -> bool:
        """The worker may still say something."""
        return self.peer.replies.get(self.stream) is self

    def handoff_done(self) -> None:
        """The hand-off that the stream left has done its work."""
        if self.peer.replies.pop(self.stream, None) is not None and self.peer.link is not None:
            self.peer.link.send(HandoffDone(self.stream))

    def close(self) -> None:
        """Tells the worker to drop what it still has of this stream: the answer, or a hand-off that it left."""
        self._timer.cancel()
        self._drop()
        self.channel.drop()
        # what it was made with knows it, too: a ring would stay until the garbage collector comes by, which is rarely
        self._cut, self._grew, self.write = _nothing, _nothing, None

    def _drop(self) -> None:
        if self.peer.replies.pop(self.stream, None) is not None and self.peer.link is not None:
            self.peer.link.send(Cancel(self.stream))


def pass_on(replies: dict[int, Reply], steps: list[Step]) -> None:
    """Several come to one that is behind: it sends once for all of them."""
    if len(steps) == 1:
        _pass_on_one(replies, steps[0])
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
            reply.came(record)


def _pass_on_one(replies: dict[int, Reply], step: Step) -> None:
    """Runs for every token. What `Reply.came` does is spelled out: most need no record, and no call but the writing."""
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
            reply.put(Tokens(stream, data, [token_id]), len(data) + 32)


def _nothing(*args: object) -> None:
    pass
