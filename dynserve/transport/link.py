"""The link over TCP: length-prefixed msgpack frames, coalesced per turn of the event loop, with a heartbeat both ways.

    frame   = u32 little-endian length, then a msgpack array of messages (wire/link.py)

A peer that says nothing for `SILENCE` seconds is gone. A peer that reads so slowly that `MAX_UNSENT` bytes wait is cut:
one stuck process must not hold another's memory.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

from dynserve.config import host_port
from dynserve.errors import ConfigError, Unavailable, translate
from dynserve.transport.base import Link, LinkHandler
from dynserve.wire import MALFORMED
from dynserve.wire import link as wire
from dynserve.wire.link import FromFrontend, FromWorker

HEARTBEAT = 0.5  # seconds between pings, and between looks at how long the peer has been silent
SILENCE = 3.0  # seconds without a byte after which the peer is gone
MAX_FRAME = 64 << 20  # bytes; a longer frame is a broken or hostile peer
MAX_UNSENT = 64 << 20  # bytes
DIAL_TIMEOUT = 2.0  # seconds

log = logging.getLogger(__name__)

_length = struct.Struct("<I")


class Framed:
    """What a link is over any carrier: frames out once per turn, frames in, the heartbeat, the one end.

    A carrier sets `write` and `hang_up`, and calls `feed` and `ended`.
    """

    def __init__(self, *, worker_side: bool) -> None:
        self._decode = wire.decode_from_frontend if worker_side else wire.decode_from_worker
        self._ping: FromWorker | FromFrontend = wire.WorkerPing() if worker_side else wire.FrontendPing()
        self._loop = asyncio.get_running_loop()
        self._outbox: list[Any] = []
        self._handler: LinkHandler | None = None
        self._reason = ""
        self._closed = False
        self._heard = self._due = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None

    def write(self, frame: bytes | bytearray) -> None:
        raise NotImplementedError

    def hang_up(self, *, at_once: bool) -> None:
        raise NotImplementedError

    def start(self, handler: LinkHandler) -> None:
        self._handler = handler
        self._heard = self._loop.time()
        self._beat_in()

    @property
    def closed(self) -> bool:
        return self._closed

    def send(self, message: FromWorker | FromFrontend) -> None:
        if self._closed:
            return
        if not self._outbox:
            self._loop.call_soon(self._flush)
        self._outbox.append(message)

    def send_token(self, stream: int, token_id: int, data: bytes) -> None:
        step = self._outbox[-1] if self._outbox else None
        if type(step) is not wire.Step:
            step = wire.Step([], [], [])
            self.send(step)
        step.streams.append(stream)
        step.token_ids.append(token_id)
        step.data.append(data)

    def close(self) -> None:
        if not self._closed:
            self._flush()
            self._closed = True
            self._reason = self._reason or "closed"
            self.hang_up(at_once=False)

    def abort(self, reason: str) -> None:
        if not self._closed:
            self._closed = True
            self._reason = reason
            self._outbox.clear()
            self.hang_up(at_once=True)

    def feed(self, payloads: Sequence[bytes | memoryview]) -> None:
        """Whole frames without their lengths; their messages are handled together: one who is behind catches up."""
        self._heard = self._loop.time()
        messages: list[Any] = []
        try:
            for payload in payloads:
                messages += self._decode(payload)
        except MALFORMED as error:
            self._handle(messages)
            self.abort(f"sent something that is no frame: {error}")
        else:
            self._handle(messages)

    def _handle(self, messages: list[Any]) -> None:
        if self._handler is not None and messages:
            try:
                self._handler.received(cast(Link, self), messages)
            except Exception:  # one peer's messages must not take the process along, whatever is in them
                log.exception("a link is cut: its messages cannot be handled")
                self.abort("sent messages that cannot be handled")

    def ended(self, reason: str) -> None:
        """The carrier is gone, for whatever reason; the first one said stays."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        handler, self._handler = self._handler, None
        if handler is not None:
            handler.lost(cast(Link, self), self._reason or reason)

    def _flush(self) -> None:
        if self._outbox and not self._closed:
            frame = bytearray(4)
            wire.encode_into(self._outbox, frame, 4)
            self._outbox.clear()
            _length.pack_into(frame, 0, len(frame) - 4)
            self.write(frame)

    def _beat_in(self) -> None:
        self._due = self._loop.time() + HEARTBEAT
        self._timer = self._loop.call_at(self._due, self._beat)

    def _beat(self) -> None:
        now = self._loop.time()
        # When this very process was stalled, the peer's bytes may lie unread in the socket: judge at the next beat.
        stalled = now - self._due > HEARTBEAT
        if not stalled and now - self._heard > SILENCE:
            self.abort(f"silent for {now - self._heard:.1f} s")
            return
        self.send(self._ping)
        self._beat_in()


class TcpLink(Framed, asyncio.Protocol):
    """One TCP connection as a link."""

    def __init__(self, *, worker_side: bool, accept: Callable[[Link], LinkHandler] | None = None) -> None:
        super().__init__(worker_side=worker_side)
        self._accept = accept
        self._transport: asyncio.Transport | None = None
        self._rest = bytearray()  # the beginning of a frame
        self._need = 4  # bytes of it, to go on

    def write(self, frame: bytes | bytearray) -> None:
        transport = self._transport
        if transport is not None:
            transport.write(frame)
            if transport.get_write_buffer_size() > MAX_UNSENT:
                self.abort(f"does not read: over {MAX_UNSENT >> 20} MiB unsent")

    def hang_up(self, *, at_once: bool) -> None:
        if self._transport is not None:
            (self._transport.abort if at_once else self._transport.close)()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if (sock := transport.get_extra_info("socket")) is not None:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if self._accept is not None:
            self.start(self._accept(cast(Link, self)))

    def data_received(self, data: bytes) -> None:
        if self._rest:
            self._rest += data
            if len(self._rest) < self._need:
                return  # or a large frame would be copied with every piece of it
            data = bytes(self._rest)
            self._rest.clear()
        view, at, end = memoryview(data), 0, len(data)
        self._need, size = 4, 0
        frames: list[bytes | memoryview] = []
        while end - at >= 4:
            (size,) = _length.unpack_from(view, at)
            if size > MAX_FRAME:
                break
            if end - at - 4 < size:
                self._need = 4 + size
                break
            frames.append(view[at + 4 : at + 4 + size])
            at += 4 + size
        if frames:
            self.feed(frames)
        if size > MAX_FRAME:
            self.abort(f"sent a frame of {size} bytes; the most is {MAX_FRAME}")
        elif at < end and not self._closed:
            self._rest += view[at:]

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended(str(exc) if exc else "closed by the peer")


class TcpLinks:
    """`Links` over TCP."""

    @asynccontextmanager
    async def listen(self, host: str, port: int, accept: Callable[[Link], LinkHandler]) -> AsyncIterator[str]:
        loop = asyncio.get_running_loop()
        links: set[TcpLink] = set()

        def connected() -> TcpLink:
            link = TcpLink(worker_side=False, accept=accept)
            links.add(link)
            return link

        with translate({OSError: ConfigError}, f"cannot listen for links on {host}:{port}"):
            server = await loop.create_server(connected, host, port)
        try:
            bound = server.sockets[0].getsockname()
            yield f"{bound[0]}:{bound[1]}"
        finally:
            server.close()
            for link in links:
                link.close()

    async def dial(self, address: str, handler: LinkHandler) -> Link:
        host, port = host_port(address, "link address", 7000)
        loop = asyncio.get_running_loop()
        with translate({OSError: Unavailable, TimeoutError: Unavailable}, f"cannot reach the frontend at {address}"):
            async with asyncio.timeout(DIAL_TIMEOUT):
                _, link = await loop.create_connection(lambda: TcpLink(worker_side=True), host, port)
        link.start(handler)
        return cast(Link, link)
