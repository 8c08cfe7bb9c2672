"""The interfaces of the planes. Each has an implementation on the network (NATS, etcd, TCP) and one in memory; one contract
test runs against both."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, NamedTuple, Protocol

from dynserve.wire.link import FromFrontend, FromWorker

Handler = Callable[[bytes], bytes | None]  # None: no reply is sent over the bus
Callback = Callable[[bytes], None]
OnReply = Callable[[int, bytes | None], None]


class Bus(Protocol):
    """Small messages between processes: requests to one subject, and publish to all subscribers.

    Subjects are NATS's: dot-separated, `*` for one part and a final `>` for the rest, in `subscribe` only.
    `serve`, `mailbox` and `subscribe` last until their block ends.
    """

    @property
    def connected(self) -> bool: ...

    @property
    def max_payload(self) -> int:
        """Largest payload in bytes that this bus carries."""
        ...

    def mailbox(self, on_reply: OnReply) -> AbstractAsyncContextManager[Mailbox]:
        """Opens a mailbox, which posts requests. Their replies are passed to `on_reply`."""
        ...

    def serve(self, subject: str, handler: Handler) -> AbstractAsyncContextManager[None]: ...

    async def publish(self, subject: str, payload: bytes) -> None:
        """Sends to all current subscribers. Lost, without an error, while the bus is down."""
        ...

    def subscribe(self, subject: str, callback: Callback) -> AbstractAsyncContextManager[None]: ...


class Mailbox(Protocol):
    async def post(self, subject: str, payload: bytes, number: int) -> None:
        """Sends a request to the process that serves `subject`. The mailbox's `on_reply` gets `number` and the reply, if
        there is one, or None when no process serves the subject.

        Raises:
            Unavailable: the bus is down, or the payload is over `max_payload`.
        """
        ...


class Put(NamedTuple):
    key: str
    value: bytes


class Deleted(NamedTuple):
    key: str


Change = Put | Deleted


class Registration(NamedTuple):
    registered: asyncio.Event  # set once the key has been written for the first time


class Registry(Protocol):
    """Discovery. Keys live as long as their process (a lease), and are written again after an outage of the registry."""

    def register(self, key: str, value: bytes) -> AbstractAsyncContextManager[Registration]:
        """Keeps the key registered until the block ends. It begins before the first write, which sets `registered`."""
        ...

    def watch(self, prefix: str, on_change: Callable[[Change], None]) -> AbstractAsyncContextManager[None]:
        """Passes every key under `prefix` to `on_change`, then every change. While the registry is down nothing changes.
        Keys that it lacks afterwards are reported as deleted after a pause, in which their owners can write them again."""
        ...


class Link(Protocol):
    """A connection of one worker and one frontend. `send` never blocks: messages are queued, and sent as one frame per turn
    of the event loop."""

    @property
    def closed(self) -> bool: ...

    def send(self, message: FromWorker | FromFrontend) -> None:
        """Queues a message. It is dropped silently when the link is closed: the peer's handler reports the loss there."""
        ...

    def send_token(self, stream: int, token_id: int, data: bytes) -> None:
        """Queues a worker's most frequent message: one `StepTokens` for all tokens of a turn. Otherwise like `send`."""
        ...

    def watch(self, suspect_s: float, silence_s: float, on_suspicion: Callable[[bool], None]) -> float:
        """Watches the peer. `on_suspicion` gets True once it has been silent for `suspect_s` seconds, and False when it is
        heard again; after `silence_s` the link ends. Returns how often the peer should ping, in seconds."""
        ...

    def ping_every(self, seconds: float) -> None:
        """Pings so often when there is nothing else to send."""
        ...

    def close(self) -> None:
        """Sends the queued messages, then closes."""
        ...

    def abort(self, reason: str) -> None: ...


class LinkHandler(Protocol):
    """Handles the events of one side of a link. Called from the event loop, one call at a time."""

    def received(self, link: Link, messages: list[Any]) -> None: ...

    def lost(self, link: Link, reason: str) -> None:
        """Called exactly once, however the link ended."""
        ...


class Links(Protocol):
    """Makes links: a frontend listens, workers dial."""

    def listen(self, host: str, port: int, accept: Callable[[Link], LinkHandler]) -> AbstractAsyncContextManager[str]:
        """Yields the address to dial. Raises ConfigError when the port is in use."""
        ...

    async def dial(self, address: str, handler: LinkHandler) -> Link:
        """Connects to a frontend. Raises Unavailable when that fails."""
        ...


# (system URL of a worker, SHA-256) -> the model file. Raises Unavailable if it is missing, too large or has another digest.
FetchFile = Callable[[str, str], Awaitable[bytes]]


class Planes(NamedTuple):
    """All planes of one process."""

    bus: Bus
    registry: Registry
    links: Links
    fetch_file: FetchFile
