"""The seams of the planes. Each has a real side (NATS, etcd, TCP) and one in memory, and one contract test for both."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, NamedTuple, Protocol

from dynserve.wire.link import FromFrontend, FromWorker

Handler = Callable[[bytes], bytes | None]  # None: there is no reply, or it goes another way
Callback = Callable[[bytes], None]
OnReply = Callable[[int, bytes | None], None]


class Bus(Protocol):
    """Small messages between processes: requests to one address, and publish to whoever listens.

    Subjects are NATS's: dot-separated, `*` for one part and a final `>` for the rest, in `subscribe` only.
    Leaving the block of `serve`, `mailbox` or `subscribe` ends it.
    """

    @property
    def connected(self) -> bool: ...

    @property
    def max_payload(self) -> int:
        """Largest payload in bytes that this bus carries."""
        ...

    def mailbox(self, on_reply: OnReply) -> AbstractAsyncContextManager[Mailbox]:
        """Where requests are posted, and what is replied to them arrives."""
        ...

    def serve(self, subject: str, handler: Handler) -> AbstractAsyncContextManager[None]: ...

    async def publish(self, subject: str, payload: bytes) -> None:
        """To everyone who listens now. Lost, without an error, while the bus is down."""
        ...

    def subscribe(self, subject: str, callback: Callback) -> AbstractAsyncContextManager[None]: ...


class Mailbox(Protocol):
    async def post(self, subject: str, payload: bytes, number: int) -> None:
        """A request to the one that serves `subject`. Its reply, if there is one, comes with `number`; None comes when
        nobody serves it.

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
    registered: asyncio.Event  # set once the key is there for the first time


class Registry(Protocol):
    """Who is there. Keys live as long as their process (a lease), and come back by themselves after an outage."""

    def register(self, key: str, value: bytes) -> AbstractAsyncContextManager[Registration]:
        """Entering does not wait for the registry; `registered` does. Leaving removes the key."""
        ...

    def watch(self, prefix: str, on_change: Callable[[Change], None]) -> AbstractAsyncContextManager[None]:
        """Every key under `prefix` now, then every change. An outage of the registry by itself changes nothing."""
        ...


class Link(Protocol):
    """One worker, one frontend. `send` never blocks: it queues, and one frame leaves per turn of the loop."""

    @property
    def closed(self) -> bool: ...

    def send(self, message: FromWorker | FromFrontend) -> None:
        """Dropped silently when the link is closed: the other end hears of the loss from its own handler."""
        ...

    def send_token(self, stream: int, token_id: int, data: bytes) -> None:
        """A worker's most frequent message, one `StepTokens` for all of a turn; as `send` otherwise."""
        ...

    def close(self) -> None:
        """Sends what is queued, then closes."""
        ...

    def abort(self, reason: str) -> None: ...


class LinkHandler(Protocol):
    """What a side does with its link. Calls come from the loop, one after the other."""

    def received(self, link: Link, messages: list[Any]) -> None: ...

    def lost(self, link: Link, reason: str) -> None:
        """Exactly once, however the link ended."""
        ...


class Links(Protocol):
    """Makes links: a frontend listens, workers dial."""

    def listen(self, host: str, port: int, accept: Callable[[Link], LinkHandler]) -> AbstractAsyncContextManager[str]:
        """Yields the address to dial. Raises ConfigError when the port is taken."""
        ...

    async def dial(self, address: str, handler: LinkHandler) -> Link:
        """Raises Unavailable."""
        ...


# (system URL of a worker, SHA-256) -> a model file with that digest. Raises Unavailable for none, too large or another one.
FetchFile = Callable[[str, str], Awaitable[bytes]]


class Planes(NamedTuple):
    """All planes of one process."""

    bus: Bus
    registry: Registry
    links: Links
    fetch_file: FetchFile
