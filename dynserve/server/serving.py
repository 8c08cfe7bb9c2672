"""Serving an ASGI app from inside a running program: uvicorn without its signal handlers and its exit."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from http import HTTPStatus
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, cast
from weakref import ref

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from dynserve.errors import BadRequest, ConfigError, error_object, translate
from dynserve.server.heads import Fault, Limits, allowed_hosts, fault_of

log = logging.getLogger(__name__)

DRAIN = 2.0  # seconds that a body may still take to arrive after its request was answered
SMALL_BODY = 1 << 16  # bytes; for a larger one reading may have been paused
MAX_PIPELINED = 64  # requests of one connection that wait behind the one that is being answered
MAX_PIPELINED_BODY = 1 << 16  # bytes of the bodies of those
MAX_HEADERS = 256  # of a request, and as many trailers
MAX_IGNORED = 1 << 20  # bytes that a connection may still send after its last request
GOODBYE = 5  # seconds that open connections get when the server stops


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # the program has its own idea of SIGTERM


def bind(host: str, port: int, flag: str, *, shared: bool = False) -> socket.socket:
    """A bound socket; others of this user may bind a `shared` one as well, and the kernel spreads connections over those
    that listen. Raises ConfigError that names the flag when the port is taken."""
    with translate({OSError: ConfigError}, f"{flag}: cannot listen on {host}:{port}"):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            # connections that have just ended must not keep the port from being bound again
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if shared:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
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


class _NoMoreRequests(Exception):
    """Ends the parsing of a connection from within one of the parser's callbacks."""


class _Protocol(HttpToolsProtocol):
    """uvicorn's, with bounds in size, number and time on what a connection sends around bodies, and errors as JSON.

    One timer watches over all waiting that is not uvicorn's own (its keep-alive): for headers, and for the rest of a body
    that nobody wants any more. Bodies that are wanted have the application's bounds.

    Reading is paused only while the body of the request that is being answered arrives faster than it is taken: a
    connection that is not read from cannot tell that its client has left.
    """

    limits = Limits()
    _timer: asyncio.TimerHandle | None = None
    _in_headers = _in_body = False
    _size = 0  # of headers or trailers that are arriving in several pieces
    _some_body = _began = False  # in this piece
    _last = False  # the connection ends with the rest of the body
    _write_timer: asyncio.TimerHandle | None = None
    _upgrading = False  # the parser has stopped behind headers that offer another protocol
    _ignoring = False  # the connection has sent its last request: what follows is not looked at
    _ignored = 0  # bytes
    _accepted_host: bytes | None = None  # the Host header that was checked last
    _answering: RequestResponseCycle | None = None
    _pipelined_body = 0  # bytes of the bodies of requests that wait behind the one that is being answered

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watchers: list[Callable[[], None]] = []
        self._start_timer(self.limits.header_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self.resume_writing()
        answering, self._answering = self._answering, None
        if answering is not None and not answering.response_complete:  # uvicorn looks at the newest request only
            answering.disconnected = True
            answering.message_event.set()
        super().connection_lost(exc)
        self.pipeline.clear()
        self.cycle = None  # type: ignore[assignment]  # which knows this connection: a reference cycle
        watchers, self._watchers = self._watchers, []
        for left in watchers:
            left()

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._ignoring:
            self._ignored += len(data)
            if self._ignored > MAX_IGNORED:
                self.transport.abort()
            return
        headers, body = self._in_headers, self._in_body
        self._some_body = self._began = False
        self._parse(data)
        # all of it was headers, or (where a body has come to an end) trailers
        if (headers and self._in_headers and not self._began) or (body and self._in_body and not self._some_body):
            with suppress(_NoMoreRequests):
                self._grow(len(data))
        # headers that are not complete; or an empty line, say, that ended uvicorn's wait for a next request
        waits = self._in_headers or (not self._in_body and self._idle and self.timeout_keep_alive_task is None)
        if waits and self._timer is None:
            self._start_timer(self.limits.header_s)

    def _parse(self, data: bytes) -> None:
        try:
            while data:
                try:
                    self.parser.feed_data(data)
                    return
                except httptools.HttpParserUpgrade as upgrade:
                    data = data[upgrade.args[0] :]
                    if self.transport.is_closing():
                        return
                    self._decline_upgrade()
        except httptools.HttpParserError:
            self._refuse(400, "this is not a valid HTTP request")

    def _decline_upgrade(self) -> None:
        """Goes on as if no other protocol had been offered, as RFC 9110, section 7.8 allows. Some clients always offer
        HTTP/2 (Java's, curl --http2). The parser ends a request with such headers behind them, so a new one begins
        with the same headers without the offer, and then gets the body."""
        head = [f"{self.scope['method']} ".encode(), self.url, f" HTTP/{self.parser.get_http_version()}\r\n".encode()]
        for name, value in self.headers:
            if name != b"upgrade":
                head += (name, b": ", value, b"\r\n")
        head.append(b"\r\n")
        self._upgrading = False
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        self.parser.feed_data(b"".join(head))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["dynserve.abort"] = self.transport.abort  # type: ignore[typeddict-unknown-key]
        self._in_headers, self._began, self._size = True, True, 0

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_headers:
            self._grow(
                len(name) + len(value) + self.limits.header_bytes // MAX_HEADERS
            )  # a trailer: nobody asks for it
        elif len(self.headers) < MAX_HEADERS:
            super().on_header(name, value)
        else:
            self._refuse(431, f"the request has more than {MAX_HEADERS} headers")
            raise _NoMoreRequests

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
            self.scope["method"] = self.parser.get_method().decode("ascii")
            self._upgrading = True
            return
        if (refused := self._fault()) is not None:
            self._refuse(*refused)
            raise _NoMoreRequests
        self._stop_timer()
        if self.transport.is_closing():
            raise _NoMoreRequests
        if len(self.pipeline) >= MAX_PIPELINED:
            self._end_with(self.pipeline[0][0])
            raise _NoMoreRequests
        super().on_headers_complete()  # which raises an error for a target that is none
        self._in_headers, self._in_body, self._size = False, True, 0
        if self.pipeline:
            self.flow.resume_reading()  # or nobody would notice that the client has left
        else:
            self._answering = self.cycle
        self._last = False
        if self.expect_100_continue:  # whoever gets another answer may send the body, or may not
            self.cycle.keep_alive = False
        polite = _Polite(self.transport, self._close_politely, self.loop, bodiless=self.scope["method"] == "HEAD")
        self.cycle.transport = polite  # type: ignore[assignment]
        cycle = ref(self.cycle)  # which knows the scope: a ring would stay until the garbage collector comes by
        ways: dict[str, Any] = {
            "dynserve.chunks": partial(_chunks_of, cycle),
            "dynserve.body": partial(_whole_body, cycle),
            "dynserve.whole": partial(_answered_at_once, cycle),
            "dynserve.watch": self._watch,
        }
        self.scope.update(ways)  # type: ignore[typeddict-item]

    def _fault(self) -> Fault | None:
        method, version = self.parser.get_method(), self.parser.get_http_version()
        fault, self._accepted_host = fault_of(
            method, self.url, version, self.headers, limits=self.limits, accepted=self._accepted_host
        )
        return fault

    def _end_with(self, cycle: RequestResponseCycle) -> None:
        """The answer to `cycle` is the connection's last. A client that sends many requests before it has read an answer
        has to expect that the connection ends before all of them are answered."""
        cycle.keep_alive = False
        self.cycle, self._ignoring = cycle, True
        self._in_headers = self._in_body = False
        self._stop_timer()

    def on_body(self, body: bytes) -> None:
        self._some_body, self._size = True, 0
        if self.cycle is None or self.transport.is_closing():
            return
        if self.pipeline:
            self._pipelined_body += len(body)
            if self._pipelined_body > MAX_PIPELINED_BODY:
                self._drop_newest()
                raise _NoMoreRequests
        super().on_body(body)
        if self.pipeline:
            self.flow.resume_reading()

    def _drop_newest(self) -> None:
        """The request whose body is arriving is given up; the connection ends with the answer to the one before it."""
        self.pipeline.popleft()
        before = self.pipeline[0][0] if self.pipeline else self._answering
        assert before is not None  # a request only waits while another one is being answered
        self._end_with(before)

    def on_message_complete(self) -> None:
        if self._upgrading:
            return
        self._in_body = False
        self._stop_timer()
        if self.cycle is not None and not self.transport.is_closing():
            super().on_message_complete()
            # a large body paused the reading, and it is not asked for again once all of it is there
            self.flow.resume_reading()
            if self._last:
                self.transport.close()

    def on_response_complete(self) -> None:
        newest = not self.pipeline  # what `_in_body` is about
        self._answering = self.pipeline[-1][0] if self.pipeline else None
        if self._answering is not None:  # it does not wait any more, and nobody has taken anything of its body yet
            self._pipelined_body = max(0, self._pipelined_body - len(self._answering.body))
        super().on_response_complete()
        if newest and self._in_body and not self.transport.is_closing():
            self._start_timer(DRAIN)  # who is still sending may read the answer first

    def _watch(self, left: Callable[[], None]) -> Callable[[], None]:
        """`left` is called once the client has gone; what this gives back takes that back. It spares a task that waits."""
        if self.transport.is_closing():
            self.loop.call_soon(left)
            return lambda: None
        self._watchers.append(left)

        def unwatch() -> None:
            if left in self._watchers:
                self._watchers.remove(left)

        return unwatch

    def _close_politely(self) -> None:
        """The answer was the last one. A client that is still sending would never read it if this was the end."""
        if (self._in_body or self._ignoring) and not self.pipeline and not self.transport.is_closing():
            self._last = True
            self._start_timer(DRAIN)
        else:
            self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.limits.write_s, self.transport.abort)

    def resume_writing(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "this is not a valid HTTP request")

    @property
    def _idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _grow(self, size: int) -> None:
        self._size += size
        if self._size > self.limits.header_bytes:
            self._refuse(431, "the request's headers are too large")
            raise _NoMoreRequests

    def _start_timer(self, seconds: float) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, self._too_slow)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        if self._last:
            self.transport.close()
        elif not self._idle:  # the next request is not complete while this one is being answered: look again later
            self._start_timer(self.limits.header_s)
        elif self._in_body:
            self.transport.close()
        else:
            self._refuse(408, "the request did not arrive in time")

    def _refuse(self, status: int, message: str) -> None:
        """The last word on this connection; not into the middle of an answer. Complete requests before the one that is
        refused are still answered."""
        if self.transport.is_closing() or self._ignoring:
            return
        if self._in_body and self.pipeline:
            self._drop_newest()
            return
        if self._in_body and self._idle:  # it has been answered already
            self.transport.close()
            return
        if not self._in_body and not self._idle:
            self._end_with(self.cycle)
            return
        if self._idle or not (self.cycle.response_started or self.pipeline):
            body = json.dumps(error_object(BadRequest(message))).encode()
            head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
            head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            self.transport.write(head.encode() + body)
        if not self._idle:
            self.cycle.disconnected = True  # nothing more is written
            self.cycle.message_event.set()
        self.transport.close()


def _chunks_of(of: ref[RequestResponseCycle]) -> Callable[[bytes], bool] | None:
    """A way past ASGI for a body that has begun, where it is sent in chunks: one of them, written now or not at all. A
    message to `send` costs more than the rest of a token."""
    cycle = of()
    if cycle is None or not cycle.chunked_encoding:
        return None
    polite = cast(_Polite, cycle.transport)
    polite.flush()
    write, flow = polite._write, cycle.flow

    def chunk(data: bytes) -> bool:
        if flow.write_paused or cycle.disconnected or cycle.response_complete:
            return False
        size = len(data)
        try:
            write((_SIZES[size] if size < len(_SIZES) else b"%x\r\n" % size) + data + b"\r\n")
        except Exception:  # one client's connection must not cost the others their worker
            log.exception("a connection cannot be written to")
            return False
        return True

    return chunk


def _answered_at_once(
    of: ref[RequestResponseCycle], send: object, status: int, headers: list[tuple[bytes, bytes]], body: bytes
) -> bool:
    """A way past ASGI for an answer that is known as a whole: one write, where nothing has to be waited for, or False and
    none. `headers` have the content's length. `send` is what the application was given: where that is not the server's own,
    somebody wants to see what is sent."""
    cycle = of()
    sender: object = getattr(send, "__self__", None)
    if cycle is None or sender is not cycle:
        return False
    if cycle.response_started or cycle.disconnected or cycle.flow.write_paused:
        return False
    if cycle.scope["method"] == "HEAD" or _CONTROL.search(b"".join(chain.from_iterable(headers))):
        return False  # ASGI's way knows what to do with it
    content = [STATUS_LINE[status]]
    for name, value in chain(cycle.default_headers, headers):
        content += (name, b": ", value, b"\r\n")
    content.append(b"\r\n" if cycle.keep_alive else b"connection: close\r\n\r\n")
    content.append(body)
    cycle.response_started = cycle.response_complete = True
    cycle.waiting_for_100_continue = False
    polite = cast(_Polite, cycle.transport)
    polite.flush()  # "100 Continue", say
    polite._write(b"".join(content))
    cycle.message_event.set()
    if not cycle.keep_alive:
        polite.close()
    cycle.on_response()
    return True


_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_SIZES = [b"%x\r\n" % size for size in range(1024)]


def _whole_body(of: ref[RequestResponseCycle]) -> bytes | None:
    """A small body that came along with its headers; any other is to be received."""
    cycle = of()
    if cycle is None or cycle.more_body or len(cycle.body) > SMALL_BODY or cycle.waiting_for_100_continue:
        return None
    return bytes(cycle.body)


class _Polite:
    """The transport as an answer sees it: it may be told to close, and does so in its own time. An answer's head waits for
    the beginning of its body, if that comes in the same turn of the loop: one write, and the client is woken once. Where no
    body comes, the head is all, and what is written next may be another's."""

    def __init__(
        self,
        transport: asyncio.Transport,
        close: Callable[[], None],
        loop: asyncio.AbstractEventLoop,
        *,
        bodiless: bool,
    ) -> None:
        self.is_closing = transport.is_closing
        self._write, self._close, self._loop = transport.write, close, loop
        self._head = b""
        self._begun = bodiless

    def write(self, data: bytes) -> None:
        if not self._begun:
            self._begun, self._head = True, data
            self._loop.call_soon(self.flush)
            return
        if self._head:
            data, self._head = self._head + data, b""
        self._write(data)

    def flush(self) -> None:
        head, self._head = self._head, b""
        if head and not self.is_closing():
            self._write(head)

    def close(self) -> None:
        self.flush()
        self._close()


def tls_of(certificate: str | None, key: str | None) -> Tls | None:
    """None where there is none. Raises what `check_tls` raises."""
    if certificate is None or key is None:
        return None
    check_tls(tls := Tls(certificate, key))
    return tls


def check_tls(tls: Tls) -> None:
    """Raises ConfigError for files that are not there, not PEM, not a pair, or need a password."""

    def no_password() -> str:
        raise ConfigError(f"--tls-key {tls.key} is encrypted; give one without a password")

    for flag, path in (("--tls-certificate", tls.certificate), ("--tls-key", tls.key)):
        with translate({OSError: ConfigError}, f"{flag} {path}"):
            Path(path).read_bytes()
    with translate({OSError: ConfigError}, f"--tls-certificate {tls.certificate} and --tls-key {tls.key} are no pair"):
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(tls.certificate, tls.key, no_password)


@asynccontextmanager
async def serving(
    app: Any, sock: socket.socket, limits: Limits | None = None, tls: Tls | None = None
) -> AsyncIterator[None]:
    """Serves `app` on `sock` as long as the block lives; open connections get a few seconds at the end.

    Raises:
        ConfigError: the certificate or its key cannot be used.
    """
    bounds = limits or Limits(hosts=allowed_hosts(None, sock.getsockname()[0]))
    config = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=GOODBYE, server_header=False,
        proxy_headers=False,
        http=type("_Bounded", (_Protocol,), {"limits": bounds}), ws="none",
        ssl_certfile=tls.certificate if tls else None, ssl_keyfile=tls.key if tls else None,
    )  # fmt: skip
    if tls is not None:
        check_tls(tls)
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
