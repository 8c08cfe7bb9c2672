"""Shortcuts past ASGI: small bodies, disconnects, chunks and whole responses, without a task or a message for each.

They rely on attributes of uvicorn's `RequestResponseCycle`, which `tests/server/test_uvicorn_contract.py` names.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
from collections.abc import Callable
from itertools import chain
from typing import Any, Protocol, cast
from weakref import ref

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from dynserve.server.exchange import ChunkWriter, Exchange, Headers, Receive, Scope

log = logging.getLogger(__name__)

TCP_CLOSE = 7  # of the states in Linux' tcp_info
SMALL_BODY = 1 << 16  # bytes; for a larger one reading may have been paused

_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_SIZES = [b"%x\r\n" % size for size in range(1024)]


class Connection(Protocol):
    """The part of a connection's protocol that its exchanges need."""

    @property
    def transport(self) -> asyncio.Transport: ...

    def watch(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Calls back once the client has disconnected, until the function that this returns is called."""
        ...


class DirectExchange(Exchange):
    """An exchange under our own server."""

    __slots__ = ("_connection", "_cycle")

    def __init__(self, scope: Scope, cycle: RequestResponseCycle, connection: Connection) -> None:
        super().__init__(scope)
        self._cycle = ref(cycle)  # the cycle refers to the scope: a strong reference would be a reference cycle
        self._connection = connection

    def small_body(self) -> bytes | None:
        cycle = self._cycle()
        if cycle is None or cycle.more_body or len(cycle.body) > SMALL_BODY or cycle.waiting_for_100_continue:
            return None
        return bytes(cycle.body)

    def on_disconnect(self, receive: Receive, callback: Callable[[], None]) -> Callable[[], None]:
        return self._connection.watch(callback)

    def chunk_writer(self) -> ChunkWriter | None:
        cycle = self._cycle()
        if cycle is None or not cycle.chunked_encoding:
            return None
        transport = cast(ResponseTransport, cycle.transport)
        transport.flush()
        write, flow = transport.write_now, cycle.flow

        def write_chunk(data: bytes) -> bool:
            if flow.write_paused or cycle.disconnected or cycle.response_complete:
                return False
            size = len(data)
            try:
                write((_SIZES[size] if size < len(_SIZES) else b"%x\r\n" % size) + data + b"\r\n")
            except Exception:  # one client's connection must not end the worker's link
                log.exception("a connection cannot be written to")
                return False
            return True

        return write_chunk

    def respond(self, send: object, status: int, headers: Headers, body: bytes) -> bool:
        cycle = self._cycle()
        sender: object = getattr(send, "__self__", None)
        # if `send` is not the server's own, a middleware wraps the application and must see every message
        if cycle is None or sender is not cycle:
            return False
        if cycle.response_started or cycle.disconnected or cycle.flow.write_paused:
            return False
        if cycle.scope["method"] == "HEAD" or _CONTROL.search(b"".join(chain.from_iterable(headers))):
            return False  # ASGI's own path handles these
        content = [STATUS_LINE[status]]
        for name, value in chain(cycle.default_headers, headers):
            content += (name, b": ", value, b"\r\n")
        content.append(b"\r\n" if cycle.keep_alive else b"connection: close\r\n\r\n")
        content.append(body)
        cycle.response_started = cycle.response_complete = True
        cycle.waiting_for_100_continue = False
        transport = cast(ResponseTransport, cycle.transport)
        transport.flush()  # "100 Continue", say
        transport.write_now(b"".join(content))
        cycle.message_event.set()
        if not cycle.keep_alive:
            transport.close()
        cycle.on_response()
        return True

    def abort(self) -> None:
        self._connection.transport.abort()


def body_of(app: Any) -> Any:
    """The app for a HEAD request: it answers as to a GET, and the server leaves the body out."""

    async def as_get(scope: Scope, receive: Receive, send: Any) -> None:
        await app({**scope, "method": "GET"}, receive, send)

    return as_get


def send_without_chunks(cycle: RequestResponseCycle) -> None:
    """Sends a response in the form of HTTP/1.0, whose body ends with the connection; uvicorn would send it in chunks."""
    send = cycle.send

    async def unframed(message: Any) -> None:
        cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    cycle.chunked_encoding = False
    cycle.send = unframed  # type: ignore[method-assign]


def can_detect_resets() -> bool:
    """Whether `is_reset` can tell: on Linux only."""
    return hasattr(socket, "TCP_INFO")


def is_reset(transport: asyncio.Transport) -> bool:
    """Whether the peer has reset a connection that is not read any more."""
    sock = transport.get_extra_info("socket")
    if sock is None:
        return False
    try:
        state: int = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    except OSError:
        return True
    return state == TCP_CLOSE


class ResponseTransport:
    """A connection's transport, as one response sees it.

    A response's head waits for the beginning of its body, if that comes in the same turn of the loop: one write, and the
    client is woken once. A response `without_body` has only a head, and the next write may be another response's.
    `close` asks the connection to close, which it does when the client can have read the response.
    """

    def __init__(
        self, transport: asyncio.Transport, close: Callable[[], None], loop: Any, *, without_body: bool
    ) -> None:
        self.is_closing, self.write_now = transport.is_closing, transport.write
        self._close, self._loop = close, loop
        self._head = b""
        self._begun = without_body

    def write(self, data: bytes) -> None:
        if not self._begun:
            self._begun, self._head = True, data
            self._loop.call_soon(self.flush)
            return
        if self._head:
            data, self._head = self._head + data, b""
        self.write_now(data)

    def flush(self) -> None:
        """Writes a head that still waits for its body."""
        head, self._head = self._head, b""
        if head and not self.is_closing():
            self.write_now(head)

    def close(self) -> None:
        self.flush()
        self._close()
