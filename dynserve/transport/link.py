"""The link over TCP: length-prefixed msgpack frames, coalesced per turn of the event loop, with a heartbeat both ways.

    frame   = u32 little-endian length, then a msgpack array of messages (wire/link.py)

A worker pings from its event loop as often as its frontend asks for. One that sends nothing is first suspected, then lost
(`watch`). A frontend may be silent for longer: it has one event loop for all its clients, and a worker that closes its link
interrupts every answer on it. TCP itself detects that a frontend's machine is down. A peer that reads so slowly that
`MAX_UNSENT` bytes wait is disconnected: one stuck process must not use up another's memory. A connection that has not said
hello may send `MAX_HELLO` bytes. Addresses of frontends with mutual TLS begin with `tls://`.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

from dynserve.addresses import advertised, host_port, join_host_port
from dynserve.errors import ConfigError, Unavailable, translate
from dynserve.log_limit import LimitedLog
from dynserve.plane_tls import HANDSHAKE_TIMEOUT, TLS_SCHEME, PlaneTls, check_tls_of
from dynserve.tls_listener import tls_listener
from dynserve.transport.base import Link, LinkHandler
from dynserve.wire import MALFORMED
from dynserve.wire import link as wire
from dynserve.wire.link import FromFrontend, FromWorker

HEARTBEAT = 0.5  # seconds between pings, and between checks of the time since the peer's last bytes
CHECKS = 4  # of a worker's silence, in the time after which it is suspected
PINGS = 4  # of a worker in that time
SILENCE = 3.0  # seconds without a byte after which a worker is lost, unless the frontend's `watch` sets another time
FRONTEND_SILENCE = 30.0  # the same for a frontend, and for bytes that TCP does not acknowledge
MAX_HELLO = 64 << 10  # bytes of the first frame, which identifies the worker
HELLO_TIMEOUT = 3.0  # seconds from the connection to that frame
MAX_UNGREETED = 256  # connections that have not said hello; beyond that the oldest is closed
MAX_FRAME = 64 << 20  # bytes; only a broken or hostile peer sends a longer frame
MAX_UNSENT = 64 << 20  # bytes
DIAL_TIMEOUT = 2.0  # seconds

log = LimitedLog(logging.getLogger(__name__))

_length = struct.Struct("<I")


class FramedLink:
    """A link over any carrier: sends frames once per turn of the loop, receives frames, sends pings, and ends once.

    A carrier implements `write` and `hang_up`, and calls `feed` and `ended`.
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
        self._received_at = self._written_at = self._due = self._loop.time()
        self._beat_s = self._ping_s = HEARTBEAT
        self._suspect_s = float("inf")
        self._on_suspicion: Callable[[bool], None] | None = None
        self._suspected = False
        self._timer: asyncio.TimerHandle | None = None

    def write(self, frame: bytes | bytearray) -> None:
        raise NotImplementedError

    def hang_up(self, *, at_once: bool) -> None:
        raise NotImplementedError

    def start(self, handler: LinkHandler) -> None:
        self._handler = handler
        self._received_at = self._loop.time()
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

    def watch(self, suspect_s: float, silence_s: float, on_suspicion: Callable[[bool], None]) -> float:
        self._suspect_s, self._silence, self._on_suspicion = suspect_s, silence_s, on_suspicion
        self._beat_every(suspect_s / CHECKS)
        return suspect_s / PINGS

    def ping_every(self, seconds: float) -> None:
        self._ping_s = min(HEARTBEAT, seconds)
        self._beat_every(seconds)

    def _beat_every(self, seconds: float) -> None:
        self._beat_s = min(HEARTBEAT, seconds)
        if self._timer is not None:
            self._timer.cancel()
            self._beat_in()

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
        """Handles the messages of whole frames (without their lengths) in one call, so that a slow handler catches up.
        Returns the number of messages."""
        self._received_at = self._loop.time()
        if self._suspected:
            self._suspect(False)
        messages: list[Any] = []
        try:
            for payload in payloads:
                messages += self._decode(payload)
        except MALFORMED as error:
            self._handle(messages)
            self.abort(f"sent a frame that cannot be decoded: {error}")
        else:
            self._handle(messages)
        return len(messages)

    def _handle(self, messages: list[Any]) -> None:
        if self._handler is not None and messages:
            try:
                self._handler.received(cast(Link, self), messages)
            except Exception:  # one peer's messages must not end the process, whatever they hold
                log.exception("link", "handled", "a link is closed: its messages cannot be handled")
                self.abort("sent messages that cannot be handled")

    def ended(self, reason: str) -> None:
        """Called when the carrier has ended. An earlier reason of `close` or `abort` wins over `reason`."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        handler, self._handler, self._on_suspicion = self._handler, None, None
        if handler is not None:
            handler.lost(cast(Link, self), self._reason or reason)

    def _flush(self) -> None:
        if self._outbox and not self._closed:
            frame = bytearray(4)
            wire.encode_into(self._outbox, frame, 4)
            self._outbox.clear()
            self._written_at = self._loop.time()
            _length.pack_into(frame, 0, len(frame) - 4)
            self.write(frame)

    def _beat_in(self) -> None:
        self._due = self._loop.time() + self._beat_s
        self._timer = self._loop.call_at(self._due, self._beat)

    def _beat(self) -> None:
        now = self._loop.time()
        # When this process was stalled, the peer's bytes may be unread in the socket: check at the next beat.
        stalled, silent = now - self._due > self._beat_s, now - self._received_at
        if not stalled and silent > self._silence:
            self.abort(f"silent for {silent:.1f} s")
            return
        if not stalled and silent > self._suspect_s and not self._suspected:
            self._suspect(True)
        if now - self._written_at >= self._ping_s / 2:  # any bytes are a sign of life
            self.send(self._ping)
        self._beat_in()

    def _suspect(self, suspected: bool) -> None:
        self._suspected = suspected
        if self._on_suspicion is not None:
            self._on_suspicion(suspected)


class TcpLink(FramedLink, asyncio.Protocol):
    """One TCP connection as a link. The listening side gives `accept`, which makes the handler of a new connection, and
    `settled`, which is called once the peer has said hello, and when the connection has ended."""

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
        self._rest = bytearray()  # the bytes received so far of an incomplete frame
        self._need = 4  # bytes that it must have before it is parsed

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
        if self._closed:  # during the TLS handshake
            self._transport.abort()
            return
        if (sock := transport.get_extra_info("socket")) is not None:
            _watch_peer(sock)
        if self._accept is not None:
            self._greeting = self._loop.call_later(HELLO_TIMEOUT, self.abort, "did not say hello in time")
            self.start(self._accept(cast(Link, self)))

    def data_received(self, data: bytes) -> None:
        if self._rest:
            self._rest += data
            if len(self._rest) < self._need:
                return  # otherwise a large frame would be copied with every piece of it
            data = bytes(self._rest)
            self._rest.clear()
        view, at, end = memoryview(data), 0, len(data)
        self._need, size = 4, 0
        frames: list[bytes | memoryview] = []
        max_size = MAX_HELLO if self._ungreeted else MAX_FRAME
        while end - at >= 4:
            (size,) = _length.unpack_from(view, at)
            if size > max_size:
                break
            if end - at - 4 < size:
                self._need = 4 + size
                break
            frames.append(view[at + 4 : at + 4 + size])
            at += 4 + size
            if self._ungreeted:  # the limits of the next frame depend on this one
                if not self.feed([frames.pop()]):
                    self.abort("sent no message in its first frame")
                if self._closed:
                    return
                self._greeted()
                max_size = MAX_FRAME
        if frames:
            self.feed(frames)
        if size > max_size:
            self.abort(f"sent a frame of {size} bytes; the maximum is {max_size}")
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
    """Lets the kernel detect that the peer's machine is down. The kernel of a busy peer still answers its probes."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if (number := getattr(socket, "TCP_USER_TIMEOUT", None)) is not None:  # Linux
        sock.setsockopt(socket.IPPROTO_TCP, number, int(FRONTEND_SILENCE * 1000))


def _listener(host: str, port: int, *, shared: bool) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, reuse_port=shared)


@asynccontextmanager
async def _listening(server: asyncio.Server) -> AsyncIterator[Any]:
    """Yields the address that the server is bound to."""
    try:
        yield server.sockets[0].getsockname()
    finally:
        server.close()


@asynccontextmanager
async def _listening_with_tls(
    listener: socket.socket, connected: Callable[[], TcpLink], tls: PlaneTls
) -> AsyncIterator[Any]:
    """Like `_listening`. A link that never gets its connection ends."""
    address = listener.getsockname()

    def failed(link: TcpLink, reason: object) -> None:
        log.warning("handshake", "failed", "a connection to the link port is refused: %r", reason)
        link.connection_lost(None)

    async with tls_listener(
        listener, connected, tls.server, failed, timeout=HANDSHAKE_TIMEOUT, max_pending=MAX_UNGREETED
    ):
        yield address


class TcpLinks:
    """`Links` over TCP, with mutual TLS if `tls` is given. `advertise_host`: see `addresses.advertised`. `shared`: other
    processes may listen on the same port, such as the one that this one replaces."""

    def __init__(self, advertise_host: str | None = None, tls: PlaneTls | None = None, *, shared: bool = False) -> None:
        self._advertise_host, self._tls, self._shared = advertise_host, tls, shared

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
            if self._tls is None:
                listening = _listening(await loop.create_server(connected, host, port, reuse_port=self._shared or None))
            else:
                listening = _listening_with_tls(_listener(host, port, shared=self._shared), connected, self._tls)
        async with listening as bound:
            try:
                scheme = "" if self._tls is None else TLS_SCHEME
                yield scheme + join_host_port(advertised(bound[0], self._advertise_host), bound[1])
            finally:
                for link in list(links):
                    link.close()

    async def dial(self, address: str, handler: LinkHandler) -> Link:
        with translate({ConfigError: Unavailable}, "an entry in discovery"):
            host, port = host_port(address, "link address", 7000)
            check_tls_of(address, self._tls, f"the frontend at {address}")
        loop = asyncio.get_running_loop()
        with translate({OSError: Unavailable, TimeoutError: Unavailable}, f"cannot reach the frontend at {address}"):
            async with asyncio.timeout(DIAL_TIMEOUT):
                _, link = await loop.create_connection(
                    lambda: TcpLink(worker_side=True), host, port, ssl=None if self._tls is None else self._tls.client
                )
        link.start(handler)
        return cast(Link, link)
