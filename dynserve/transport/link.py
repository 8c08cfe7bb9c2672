"""The link over TCP: length-prefixed msgpack frames, coalesced per turn of the event loop, with a heartbeat both ways.

    frame   = u32 little-endian length, then a msgpack array of messages (wire/link.py)

A worker that says nothing for `SILENCE` seconds is gone. A frontend may be silent for longer: it has one event loop for
all its clients, and a worker that cuts its link ends every answer that goes over it. That its machine is still there is
known from TCP. A peer that reads so slowly that `MAX_UNSENT` bytes wait is cut: one stuck process must not hold another's
memory. Until a worker has said hello it is a stranger, and may send `MAX_HELLO` bytes.
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
from dynserve.log_limit import LimitedLog
from dynserve.transport.base import Link, LinkHandler
from dynserve.wire import MALFORMED
from dynserve.wire import link as wire
from dynserve.wire.link import FromFrontend, FromWorker

HEARTBEAT = 0.5  # seconds between pings, and between looks at how long the peer has been silent
SILENCE = 3.0  # seconds without a byte after which a worker is gone
FRONTEND_SILENCE = 30.0  # the same for a frontend, and for bytes that TCP does not acknowledge
MAX_HELLO = 64 << 10  # bytes of the first frame, which says who it is
HELLO_TIMEOUT = 3.0  # seconds that it may take
MAX_UNGREETED = 256  # connections that have not said hello; with more, the oldest is cut
MAX_FRAME = 64 << 20  # bytes; a longer frame is a broken or hostile peer
MAX_UNSENT = 64 << 20  # bytes
DIAL_TIMEOUT = 2.0  # seconds

log = LimitedLog(logging.getLogger(__name__))

_length = struct.Struct("<I")


class FramedLink:
    """What a link is over any carrier: frames out once per turn, frames in, the heartbeat, the one end.

    A carrier sets `write` and `hang_up`, and calls `feed` and `ended`.
    """

    def __init__(self, *, worker_side: bool) -> None:
        self._decode = wire.decode_from_frontend if worker_side else wire.decode_from_worker
        self._ping: FromWorker | FromFrontend = wire.WorkerPing() if worker_side else wire.FrontendPing()
        self._silence = FRONTEND_SILENCE if worker_side else SILENCE
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
        if type(step) is not wire.StepTokens:
            step = wire.StepTokens([], [], [])
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

    def feed(self, payloads: Sequence[bytes | memoryview]) -> int:
        """Whole frames without their lengths; their messages are handled together: one who is behind catches up. Gives the
        number of messages."""
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
        return len(messages)

    def _handle(self, messages: list[Any]) -> None:
        if self._handler is not None and messages:
            try:
                self._handler.received(cast(Link, self), messages)
            except Exception:  # one peer's messages must not take the process along, whatever is in them
                log.exception("link", "handled", "a link is cut: its messages cannot be handled")
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
        if not stalled and now - self._heard > self._silence:
            self.abort(f"silent for {now - self._heard:.1f} s")
            return
        self.send(self._ping)
        self._beat_in()


class TcpLink(FramedLink, asyncio.Protocol):
    """One TCP connection as a link. `accept` and `settled` are given on the side that listens: the first makes the handler
    of a new connection, the second is called once the peer is no stranger any more, or is gone."""

    def __init__(
        self,
        *,
        worker_side: bool,
        accept: Callable[[Link], LinkHandler] | None = None,
        settled: Callable[[TcpLink], None] | None = None,
    ) -> None:
        super().__init__(worker_side=worker_side)
        self._accept, self._settled = accept, settled
        self._ungreeted = accept is not None
        self._greeting: asyncio.TimerHandle | None = None
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
            _watch_peer(sock)
        if self._accept is not None:
            self._greeting = self._loop.call_later(HELLO_TIMEOUT, self.abort, "did not say hello in time")
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
        most = MAX_HELLO if self._ungreeted else MAX_FRAME
        while end - at >= 4:
            (size,) = _length.unpack_from(view, at)
            if size > most:
                break
            if end - at - 4 < size:
                self._need = 4 + size
                break
            frames.append(view[at + 4 : at + 4 + size])
            at += 4 + size
            if self._ungreeted:  # what it may send next depends on what it says now
                if not self.feed([frames.pop()]):
                    self.abort("said nothing in its first frame")
                if self._closed:
                    return
                self._greeted()
                most = MAX_FRAME
        if frames:
            self.feed(frames)
        if size > most:
            self.abort(f"sent a frame of {size} bytes; the most is {most}")
        elif at < end and not self._closed:
            self._rest += view[at:]

    def connection_lost(self, exc: Exception | None) -> None:
        self._rest = bytearray()
        self.ended(str(exc) if exc else "closed by the peer")
        self._greeted()

    def _greeted(self) -> None:
        self._ungreeted = False
        if self._greeting is not None:
            self._greeting.cancel()
            self._greeting = None
        if self._settled is not None:
            self._settled(self)


def _watch_peer(sock: socket.socket) -> None:
    """Lets the kernel find out that the peer's machine is gone; that of a peer which is only busy goes on answering."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if (number := getattr(socket, "TCP_USER_TIMEOUT", None)) is not None:  # Linux
        sock.setsockopt(socket.IPPROTO_TCP, number, int(FRONTEND_SILENCE * 1000))


class TcpLinks:
    """`Links` over TCP."""

    @asynccontextmanager
    async def listen(self, host: str, port: int, accept: Callable[[Link], LinkHandler]) -> AsyncIterator[str]:
        loop = asyncio.get_running_loop()
        links: set[TcpLink] = set()
        ungreeted: dict[TcpLink, None] = {}  # oldest first

        def settled(link: TcpLink) -> None:
            ungreeted.pop(link, None)
            if link.closed:
                links.discard(link)

        def connected() -> TcpLink:
            link = TcpLink(worker_side=False, accept=accept, settled=settled)
            links.add(link)
            ungreeted[link] = None
            if len(ungreeted) > MAX_UNGREETED:
                oldest = next(iter(ungreeted))
                del ungreeted[oldest]
                oldest.abort("too many connections have not said hello")
            return link

        with translate({OSError: ConfigError}, f"cannot listen for links on {host}:{port}"):
            server = await loop.create_server(connected, host, port)
        try:
            bound = server.sockets[0].getsockname()
            yield f"{bound[0]}:{bound[1]}"
        finally:
            server.close()
            for link in list(links):
                link.close()

    async def dial(self, address: str, handler: LinkHandler) -> Link:
        with translate({ConfigError: Unavailable}, "an entry in discovery"):
            host, port = host_port(address, "link address", 7000)
        loop = asyncio.get_running_loop()
        with translate({OSError: Unavailable, TimeoutError: Unavailable}, f"cannot reach the frontend at {address}"):
            async with asyncio.timeout(DIAL_TIMEOUT):
                _, link = await loop.create_connection(lambda: TcpLink(worker_side=True), host, port)
        link.start(handler)
        return cast(Link, link)
