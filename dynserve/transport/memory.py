"""The planes in one process, for tests, notebooks and simulations: the same contracts, the same bytes, no sockets.

All users of one `MemoryPlanes` are connected with each other. Its switches (`bus_up`, `registry_up`) stop a plane and start
it again, for tests of outages.
"""

from __future__ import annotations

import asyncio
import fnmatch
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from itertools import count
from typing import cast

from dynserve.errors import Unavailable
from dynserve.model_files import verified
from dynserve.transport.base import (
    Callback,
    Change,
    Deleted,
    Handler,
    Link,
    LinkHandler,
    Mailbox,
    OnReply,
    Planes,
    Put,
    Registration,
)
from dynserve.transport.link import FramedLink


class MemoryPlanes:
    """`Bus`, `Registry` and `Links` of one process, and the model files of its workers by their SHA-256."""

    def __init__(self, max_payload: int = 1 << 20) -> None:
        self.bus = MemoryBus(max_payload)
        self.registry = MemoryRegistry()
        self.links = MemoryLinks()
        self.files: dict[str, bytes] = {}

    @property
    def bus_up(self) -> bool:
        """Switches the bus. While it is down, posting raises Unavailable and everything published is lost."""
        return self.bus.connected

    @bus_up.setter
    def bus_up(self, up: bool) -> None:
        self.bus.connected = up

    @property
    def registry_up(self) -> bool:
        """Switches the registry. While it is down, no key is registered and no change is reported; both happen when it is
        up again."""
        return self.registry.up

    @registry_up.setter
    def registry_up(self, up: bool) -> None:
        self.registry.up = up

    def open(self) -> Planes:
        """Returns the planes for one process of the cluster."""
        return Planes(self.bus, self.registry, self.links, self._fetch)

    async def _fetch(self, system_url: str, digest: str) -> bytes:
        if digest not in self.files:
            raise Unavailable(f"no worker has a model file {digest[:12]}")
        return verified(self.files[digest], digest, system_url)


class MemoryBus:
    """`Bus` of one process."""

    def __init__(self, max_payload: int) -> None:
        self.connected = True
        self.max_payload = max_payload
        self.handlers: dict[str, Handler] = {}  # by subject
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
        self.handlers[subject] = handler
        try:
            yield
        finally:
            self.handlers.pop(subject, None)

    async def publish(self, subject: str, payload: bytes) -> None:
        if not self.connected or len(payload) > self.max_payload:
            return
        for pattern, callback in list(self._subscribers.values()):
            if matches(pattern, subject):
                self.carry(callback, payload)

    def carry(self, deliver: Callable[..., object], *args: object) -> None:
        """Delivers one message, a turn of the loop later. Tests of losses and delays override it."""
        asyncio.get_running_loop().call_soon(deliver, *args)

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
            raise Unavailable(f"{len(payload)} bytes are over the bus's limit of {bus.max_payload}")
        bus.carry(self._deliver, bus.handlers.get(subject), payload, number)

    def _deliver(self, handler: Handler | None, payload: bytes, number: int) -> None:
        reply = None if handler is None else handler(payload)
        if self.open and (handler is None or reply is not None):
            self._on_reply(number, reply)


def matches(pattern: str, subject: str) -> bool:
    """Whether a subject matches a pattern, by NATS's rule: `*` is one part, a final `>` one part or more."""
    wanted, parts = pattern.split("."), subject.split(".")
    if wanted[-1] == ">":
        wanted, parts = wanted[:-1], parts[: len(wanted) - 1] if len(parts) >= len(wanted) else [""]
    return len(wanted) == len(parts) and all(fnmatch.fnmatchcase(p, w) for w, p in zip(wanted, parts, strict=True))


class _Watcher:
    """One view of one prefix: the keys and values that were reported to `on_change`."""

    def __init__(self, prefix: str, on_change: Callable[[Change], None]) -> None:
        self._prefix, self._on_change = prefix, on_change
        self._known: dict[str, bytes] = {}

    def update(self, entries: Mapping[str, bytes], key: str) -> None:
        """Reports one key if it has changed."""
        value = entries.get(key)
        if not key.startswith(self._prefix) or value == self._known.get(key):
            return
        if value is None:
            del self._known[key]
            self._on_change(Deleted(key))
        else:
            self._known[key] = value
            self._on_change(Put(key, value))

    def update_all(self, entries: Mapping[str, bytes]) -> None:
        for key in [*self._known, *entries]:
            self.update(entries, key)


class MemoryRegistry:
    """`Registry` of one process. `up` is the switch of an outage."""

    def __init__(self) -> None:
        self.entries: dict[str, bytes] = {}
        self._waiting: list[Registration] = []  # made while the registry is down
        self._watchers: dict[int, _Watcher] = {}
        self._ids = count()
        self._up = True

    @property
    def up(self) -> bool:
        return self._up

    @up.setter
    def up(self, up: bool) -> None:
        self._up = up
        if up:
            for registration in self._waiting:
                registration.registered.set()
            self._waiting.clear()
            for watcher in list(self._watchers.values()):
                watcher.update_all(self.entries)

    def lose(self, key: str) -> bytes:
        """Removes the entry of a live owner, like an expired lease. Returns the value, for `put`."""
        value = self.entries.pop(key)
        self._changed(key)
        return value

    def put(self, key: str, value: bytes) -> None:
        self.entries[key] = value
        self._changed(key)

    @asynccontextmanager
    async def register(self, key: str, value: bytes) -> AsyncIterator[Registration]:
        registration = Registration(asyncio.Event())
        self.put(key, value)
        if self._up:
            registration.registered.set()
        else:
            self._waiting.append(registration)
        try:
            yield registration
        finally:
            if registration in self._waiting:
                self._waiting.remove(registration)
            self.remove(key)

    def remove(self, key: str) -> None:
        """Removes the entry of an owner that has ended. Tests in which a lease outlives its owner override it."""
        self.entries.pop(key, None)
        self._changed(key)

    @asynccontextmanager
    async def watch(self, prefix: str, on_change: Callable[[Change], None]) -> AsyncIterator[None]:
        number, watcher = next(self._ids), _Watcher(prefix, on_change)
        if self._up:
            watcher.update_all(self.entries)
        self._watchers[number] = watcher
        try:
            yield
        finally:
            del self._watchers[number]

    def _changed(self, key: str) -> None:
        if self._up:
            for watcher in list(self._watchers.values()):
                watcher.update(self.entries, key)


class MemoryLinks:
    """`Links` of one process. Addresses are names."""

    def __init__(self) -> None:
        self._listeners: dict[str, Callable[[Link], LinkHandler]] = {}
        self._names = count(1)

    @property
    def addresses(self) -> list[str]:
        """The addresses that can be dialled now, oldest first."""
        return list(self._listeners)

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


class MemoryLink(FramedLink):
    """One side of a link. Frames reach the other side as bytes, one turn of the loop later. `silence` stops both directions
    without closing the link, like a machine that lost power."""

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
