"""The planes in one process: for tests, notebooks and simulations. The same contracts, the same bytes, no sockets.

A `MemoryPlanes` is one world; every bus, registry and link made from it meets the others. Its switches (`bus_up`,
`registry_up`) take a plane away, as a test of an outage needs it.
"""

from __future__ import annotations

import asyncio
import fnmatch
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import count
from typing import cast

from dynserve.errors import Unavailable
from dynserve.transport.base import (
    Callback,
    Change,
    Deleted,
    Handler,
    Link,
    LinkHandler,
    Mailbox,
    OnReply,
    Put,
    Registration,
)
from dynserve.transport.link import Framed


class MemoryPlanes:
    """`Bus`, `Registry` and `Links` of one process."""

    def __init__(self, max_payload: int = 1 << 20) -> None:
        self.bus = MemoryBus(max_payload)
        self.registry = MemoryRegistry()
        self.links = MemoryLinks()


class MemoryBus:
    def __init__(self, max_payload: int) -> None:
        self.connected = True
        self.max_payload = max_payload
        self._handlers: dict[str, Handler] = {}
        self._subscribers: dict[int, tuple[str, Callback]] = {}
        self._ids = count()

    @asynccontextmanager
    async def mailbox(self, on_reply: OnReply) -> AsyncIterator[Mailbox]:
        mailbox = _MemoryMailbox(self, on_reply)
        try:
            yield mailbox
        finally:
            mailbox.open = False

    @asynccontextmanager
    async def serve(self, subject: str, handler: Handler) -> AsyncIterator[None]:
        self._handlers[subject] = handler
        try:
            yield
        finally:
            self._handlers.pop(subject, None)

    async def publish(self, subject: str, payload: bytes) -> None:
        if not self.connected or len(payload) > self.max_payload:
            return
        loop = asyncio.get_running_loop()
        for pattern, callback in list(self._subscribers.values()):
            if matches(pattern, subject):
                loop.call_soon(callback, payload)

    @asynccontextmanager
    async def subscribe(self, subject: str, callback: Callback) -> AsyncIterator[None]:
        number = next(self._ids)
        self._subscribers[number] = (subject, callback)
        try:
            yield
        finally:
            del self._subscribers[number]


class _MemoryMailbox:
    def __init__(self, bus: MemoryBus, on_reply: OnReply) -> None:
        self._bus, self._on_reply = bus, on_reply
        self.open = True

    async def post(self, subject: str, payload: bytes, number: int) -> None:
        bus = self._bus
        if not bus.connected:
            raise Unavailable("the bus is down")
        if len(payload) > bus.max_payload:
            raise Unavailable(f"{len(payload)} bytes are over the bus's {bus.max_payload}")
        asyncio.get_running_loop().call_soon(self._carry, bus._handlers.get(subject), payload, number)

    def _carry(self, handler: Handler | None, payload: bytes, number: int) -> None:
        reply = None if handler is None else handler(payload)
        if self.open and (handler is None or reply is not None):
            self._on_reply(number, reply)


def matches(pattern: str, subject: str) -> bool:
    """NATS's rule: `*` is one part, a final `>` one part or more."""
    wanted, parts = pattern.split("."), subject.split(".")
    if wanted[-1] == ">":
        wanted, parts = wanted[:-1], parts[: len(wanted) - 1] if len(parts) >= len(wanted) else [""]
    return len(wanted) == len(parts) and all(fnmatch.fnmatchcase(p, w) for w, p in zip(wanted, parts, strict=True))


class MemoryRegistry:
    def __init__(self) -> None:
        self._entries: dict[str, bytes] = {}
        self._watchers: dict[int, tuple[str, Callable[[Change], None]]] = {}
        self._ids = count()

    @asynccontextmanager
    async def register(self, key: str, value: bytes) -> AsyncIterator[Registration]:
        registration = Registration(asyncio.Event())
        self._entries[key] = value
        self._tell(Put(key, value))
        registration.registered.set()
        try:
            yield registration
        finally:
            self._entries.pop(key, None)
            self._tell(Deleted(key))

    @asynccontextmanager
    async def watch(self, prefix: str, on_change: Callable[[Change], None]) -> AsyncIterator[None]:
        for key, value in self._entries.items():
            if key.startswith(prefix):
                on_change(Put(key, value))
        number = next(self._ids)
        self._watchers[number] = (prefix, on_change)
        try:
            yield
        finally:
            del self._watchers[number]

    def _tell(self, change: Change) -> None:
        for prefix, on_change in list(self._watchers.values()):
            if change.key.startswith(prefix):
                on_change(change)


class MemoryLinks:
    """Links by name; `silence` makes one side deaf and mute without closing it, like a machine that lost power."""

    def __init__(self) -> None:
        self._listeners: dict[str, Callable[[Link], LinkHandler]] = {}
        self._names = count(1)

    @asynccontextmanager
    async def listen(self, host: str, port: int, accept: Callable[[Link], LinkHandler]) -> AsyncIterator[str]:
        address = f"memory:{next(self._names)}"
        links: list[Link] = []

        def accepted(link: Link) -> LinkHandler:
            links[:] = [known for known in links if not known.closed]
            links.append(link)
            return accept(link)

        self._listeners[address] = accepted
        try:
            yield address
        finally:
            del self._listeners[address]
            for link in links:
                link.close()

    async def dial(self, address: str, handler: LinkHandler) -> Link:
        accept = self._listeners.get(address)
        if accept is None:
            raise Unavailable(f"cannot reach the frontend at {address}")
        worker, frontend = MemoryLink(worker_side=True), MemoryLink(worker_side=False)
        worker.peer, frontend.peer = frontend, worker
        worker.start(handler)
        frontend.start(accept(cast(Link, frontend)))
        return cast(Link, worker)


class MemoryLink(Framed):
    """Half of a pair; frames cross as bytes, one turn of the loop later."""

    peer: MemoryLink | None = None
    mute = False

    def write(self, frame: bytes | bytearray) -> None:
        if self.peer is not None and not self.mute:
            self._loop.call_soon(self.peer._arrive, bytes(frame[4:]))

    def hang_up(self, *, at_once: bool) -> None:
        peer, self.peer = self.peer, None
        self._loop.call_soon(self.ended, "closed")
        if peer is not None and not self.mute:
            self._loop.call_soon(peer._peer_ended)

    def silence(self) -> None:
        self.mute = True

    def _arrive(self, payload: bytes) -> None:
        if not self._closed and not self.mute:
            self.feed([payload])

    def _peer_ended(self) -> None:
        if self.peer is not None and not self.mute:
            self.peer = None
            self.ended("closed by the peer")
