"""Serving an ASGI app from inside a running program: uvicorn without its signal handlers and its exit."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from http import HTTPStatus
from typing import Any, NamedTuple

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from dynserve.errors import ConfigError, translate

log = logging.getLogger(__name__)

GOODBYE = 5  # seconds that open connections get when the server stops


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # the program has its own idea of SIGTERM


def bind(host: str, port: int, flag: str) -> socket.socket:
    """A bound socket. Raises ConfigError that names the flag when the port is taken."""
    with translate({OSError: ConfigError}, f"{flag}: cannot listen on {host}:{port}"):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, port))
        except OSError:
            sock.close()
            raise
    return sock


def url_of(sock: socket.socket, scheme: str = "http") -> str:
    host, port = sock.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


class Tls(NamedTuple):
    """PEM files."""

    certificate: str
    key: str


class Limits(NamedTuple):
    """Of what a connection may send before it is known what it wants."""

    header_bytes: int = 64 << 10
    header_s: float = 60.0


class _Protocol(HttpToolsProtocol):
    """uvicorn's, with bounds in size and time on a request's headers, and errors as JSON."""

    limits = Limits()
    _timer: asyncio.TimerHandle | None = None
    _in_headers = False
    _size = 0  # of headers that are arriving in several pieces

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        before = self._in_headers
        super().data_received(data)
        if before and self._in_headers:  # all of it was headers
            self._size += len(data)
            if self._size > self.limits.header_bytes:
                self._refuse(431, "the request's headers are too large")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_headers, self._size = True, 0
        if self._timer is None:
            self._start_timer()

    def on_headers_complete(self) -> None:
        self._stop_timer()
        self._in_headers = False
        if sum(len(name) + len(value) for name, value in self.headers) + len(self.url) > self.limits.header_bytes:
            self._refuse(431, "the request's headers are too large")
        if not self.transport.is_closing():
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        if self.cycle is not None and not self.transport.is_closing():
            super().on_message_complete()

    def on_body(self, body: bytes) -> None:
        if self.cycle is not None and not self.transport.is_closing():
            super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "this is not a valid HTTP request")

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(self.limits.header_s, self._too_slow)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self._refuse(408, "the request did not arrive in time")

    def _refuse(self, status: int, message: str) -> None:
        if self.transport.is_closing():
            return
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": "invalid_request"}
        body = json.dumps({"error": error}).encode()
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(head.encode() + body)
        self.transport.close()


@asynccontextmanager
async def serving(
    app: Any, sock: socket.socket, limits: Limits | None = None, tls: Tls | None = None
) -> AsyncIterator[None]:
    """Serves `app` on `sock` as long as the block lives; open connections get a few seconds at the end.

    Raises:
        ConfigError: the certificate or its key cannot be used.
    """
    bounds = limits or Limits()
    config = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=GOODBYE, server_header=False,
        http=type("_Bounded", (_Protocol,), {"limits": bounds}), ws="none",
        ssl_certfile=tls.certificate if tls else None, ssl_keyfile=tls.key if tls else None,
    )  # fmt: skip
    with translate({OSError: ConfigError}, "--tls-certificate and --tls-key cannot be used"):
        config.load()  # the files are read here
    server = _Server(config)
    task = asyncio.create_task(server.serve([sock]))
    try:
        while not server.started:
            if task.done():
                task.result()
                raise ConfigError("the HTTP server did not start")
            await asyncio.sleep(0.005)
        yield
    finally:
        server.should_exit = True
        await task
        sock.close()
