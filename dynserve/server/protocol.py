"""`BoundedProtocol`: uvicorn's HTTP protocol with bounds for all but the contents of bodies, and refusals as JSON.

The states of a connection's reading side, and their transitions:

    IDLE ──first byte of a request──▶ HEADERS ──complete──▶ BODY ──complete──▶ IDLE
                                        │  ▲                  │
           headers offer another protocol  │                  └──answered by the connection's last response──▶ DRAINING
                                        ▼  │ declined
                                      UPGRADE                 DRAINING ──complete, or after DRAIN seconds──▶ closed

    any ──the last request that will be answered has been read, or a later one is refused──▶ IGNORING

One timer bounds all waiting that is not uvicorn's own (its keep-alive): for headers, and for the rest of a body that is no
longer needed. Bodies that the application receives have the application's bounds.

Reading is paused only while the body of the request that is being answered arrives faster than it is consumed: a paused
connection cannot detect that its client has disconnected.

A client that closes its sending side only (`shutdown`, or `nc` at the end of its input) gets the answers to its complete
requests; see `eof_received`.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from enum import Enum, auto
from http import HTTPStatus
from typing import cast

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from dynserve.errors import BadRequest, Overloaded, error_object
from dynserve.log_limit import LimitedLog
from dynserve.server.heads import Fault, HttpLimits, fault_of
from dynserve.server.shortcuts import (
    DirectExchange,
    ResponseTransport,
    body_of,
    can_detect_resets,
    is_reset,
    send_without_chunks,
)

DRAIN = 2.0  # seconds that a body may still take to arrive after its request was answered
MAX_PIPELINED = 64  # requests of one connection that wait behind the one that is being answered
MAX_PIPELINED_BODY = 1 << 16  # bytes of the bodies of these requests
MAX_HEADERS = 256  # of a request, and as many trailers
MAX_TURNED_AWAY = 64  # connections that get a 503 at a time because too many are open; further ones are closed at once
MAX_IGNORED = 1 << 20  # bytes that a connection may still send after its last request
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"  # the one interim response that every client skips
EMPTY_EVENT = b"3\r\n:\n\n\r\n"  # a comment, as a chunk
# seconds between checks that a client which has sent all is still there: one that is gone resets the connection as soon as
# anything reaches it
CLIENT_CHECKS = (0.02, 0.08, 0.4, 1.5, 3.0)

limited = LimitedLog(logging.getLogger(__name__))


class Reading(Enum):
    """The part of a request that a connection reads next."""

    IDLE = auto()
    HEADERS = auto()
    UPGRADE = auto()  # headers are complete and offer another protocol, which is about to be declined
    BODY = auto()
    DRAINING = auto()  # the rest of a body that is not needed; the connection ends after it
    IGNORING = auto()  # nothing any more: further bytes are dropped


class _NoMoreRequests(Exception):
    """Ends the parsing of a connection from within one of the parser's callbacks."""


class BoundedProtocol(HttpToolsProtocol):
    """The protocol of one connection."""

    limits = HttpLimits()
    _reading = Reading.IDLE
    _size = 0  # of headers or trailers that arrive in several packets
    _progressed = False  # this packet had something else in it than more headers or trailers
    _ignored = 0  # bytes that came while IGNORING
    _accepted_host: bytes | None = None  # the Host header that was checked last
    _answering: RequestResponseCycle | None = None
    _pipelined_body = 0  # bytes of the bodies of requests that wait behind the one that is being answered
    _timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _client_timer: asyncio.TimerHandle | None = None  # after the end of what the client sends

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watchers: list[Callable[[], None]] = []
        if len(self.connections) > self.limits.connections:
            self._turn_away()
        else:
            self._start_timer(self.limits.header_s)

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client sends no more. It may have closed only its sending side, and then gets its answers. A client that is
        gone looks alike, until something is sent to it: so something is that clients ignore. To a client of HTTP/1.0
        nothing can be sent; that it is gone is found out when its answer is written."""
        if self._idle or self._reading not in (Reading.IDLE, Reading.IGNORING) or not can_detect_resets():
            return False  # nothing that is complete is unanswered
        if self.scope["scheme"] == "https":  # TLS cannot be closed on one side
            return False
        self.cycle.keep_alive = False
        answering = self._answering  # which may be an earlier request than the newest one
        if answering is not None and answering.scope["http_version"] == "1.1":
            if not answering.response_started:
                self.transport.write(CONTINUE)
            elif answering.chunked_encoding:  # only streams of events are
                cast(ResponseTransport, answering.transport).flush()
                self.transport.write(EMPTY_EVENT)
        self._check_client(CLIENT_CHECKS)
        return True

    def _check_client(self, waits: Sequence[float]) -> None:
        """Closes the connection if its client has turned out to be gone; looks again after each of `waits` seconds."""
        if self._idle or self.transport.is_closing():
            return
        if is_reset(self.transport):
            self.transport.abort()
        elif waits:
            self._client_timer = self.loop.call_later(waits[0], self._check_client, waits[1:])

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        if self._client_timer is not None:
            self._client_timer.cancel()
        self.resume_writing()
        answering, self._answering = self._answering, None
        if answering is not None and not answering.response_complete:  # uvicorn checks only the newest request
            answering.disconnected = True
            answering.message_event.set()
        super().connection_lost(exc)
        self.pipeline.clear()
        self.cycle = None  # type: ignore[assignment]  # which refers to this connection: a reference cycle
        watchers, self._watchers = self._watchers, []
        for callback in watchers:
            callback()

    def _turn_away(self) -> None:
        """Answers a connection that is one too many. Its client is about to send a request, and would not read the answer
        if the connection closed now."""
        limited.warning(
            "connections", "", "refusing connections: over %d are open; the limit of open files (ulimit -n) allows no more",
            self.limits.connections,
        )  # fmt: skip
        if len(self.connections) > self.limits.connections + MAX_TURNED_AWAY:
            self.transport.abort()
            return
        self.transport.write(_refusal(503, "this server has too many open connections; try again soon"))
        self._reading = Reading.IGNORING
        self._start_timer(DRAIN)

    def watch(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Calls back once, when the client disconnects. Returns a function that withdraws the callback."""
        if self.transport.is_closing():
            self.loop.call_soon(callback)
            return lambda: None
        self._watchers.append(callback)

        def unwatch() -> None:
            if callback in self._watchers:
                self._watchers.remove(callback)

        return unwatch

    # reading

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._reading is Reading.IGNORING:
            self._ignored += len(data)
            if self._ignored > MAX_IGNORED:
                self.transport.abort()
            return
        before, self._progressed = self._reading, False
        self._parse(data)
        # all of it was headers, or (where a body has come to an end) trailers
        if self._reading is before and before in _GROWING and not self._progressed:
            with suppress(_NoMoreRequests):
                self._count_head_bytes(len(data))
        # headers are incomplete; or an empty line has ended uvicorn's wait for a next request
        awaiting = self._reading is Reading.IDLE and self._idle and self.timeout_keep_alive_task is None
        if (self._reading is Reading.HEADERS or awaiting) and self._timer is None:
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
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        self.parser.feed_data(b"".join(head))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._reading, self._progressed, self._size = Reading.HEADERS, True, 0

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._reading is not Reading.HEADERS:  # a trailer, which is ignored
            self._count_head_bytes(len(name) + len(value) + self.limits.header_bytes // MAX_HEADERS)
        elif len(self.headers) < MAX_HEADERS:
            super().on_header(name, value)
        else:
            self._refuse(431, f"the request has more than {MAX_HEADERS} headers")
            raise _NoMoreRequests

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
            self.scope["method"] = self.parser.get_method().decode("ascii")
            self._reading = Reading.UPGRADE
            return
        if (fault := self._fault()) is not None:
            self._refuse(*fault)
            raise _NoMoreRequests
        self._stop_timer()
        if self.transport.is_closing():
            raise _NoMoreRequests
        if len(self.pipeline) >= MAX_PIPELINED:
            self._end_with(self.pipeline[0][0])
            raise _NoMoreRequests
        head = self.parser.get_method() == b"HEAD"
        self.app = body_of(self.config.loaded_app) if head else self.config.loaded_app
        super().on_headers_complete()  # which raises an error for a target that cannot be parsed
        self._reading, self._size = Reading.BODY, 0
        if self.scope["raw_path"][-1:] == b"/" and len(self.scope["path"]) > 1:
            self.scope["path"] = self.scope["path"][:-1]  # served: a redirection would trust the Host header
        if self.pipeline:
            self.flow.resume_reading()  # otherwise a disconnect would not be detected
        else:
            self._answering = self.cycle
        if self.expect_100_continue:  # after an answer instead of a "100 Continue" a client may omit the body
            self.cycle.keep_alive = False
        self.cycle.transport = ResponseTransport(  # type: ignore[assignment]
            self.transport, self._linger_and_close, self.loop, without_body=head
        )
        if self.scope["http_version"] == "1.0":
            send_without_chunks(self.cycle)
        self.scope["dynserve"] = DirectExchange(self.scope, self.cycle, self)  # type: ignore[typeddict-unknown-key]

    def _fault(self) -> Fault | None:
        method, version = self.parser.get_method(), self.parser.get_http_version()
        fault, self._accepted_host = fault_of(
            method, self.url, version, self.headers, limits=self.limits, accepted=self._accepted_host
        )
        return fault

    def on_body(self, body: bytes) -> None:
        self._progressed, self._size = True, 0
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

    def on_message_complete(self) -> None:
        if self._reading is Reading.UPGRADE:
            return
        draining = self._reading is Reading.DRAINING
        self._reading = Reading.IDLE
        self._stop_timer()
        if self.cycle is not None and not self.transport.is_closing():
            super().on_message_complete()
            # a large body paused the reading, and uvicorn does not resume it once all of it has arrived
            self.flow.resume_reading()
            if draining:
                self.transport.close()

    # the connection's end

    def _end_with(self, cycle: RequestResponseCycle) -> None:
        """The answer to `cycle` is the connection's last. A client that sends many requests before it has read an answer
        has to expect that the connection ends before all of them are answered."""
        cycle.keep_alive = False
        self.cycle, self._reading = cycle, Reading.IGNORING
        self._stop_timer()

    def _drop_newest(self) -> None:
        """Drops the request whose body is arriving; the connection ends with the answer to the request before it."""
        self.pipeline.popleft()
        before = self.pipeline[0][0] if self.pipeline else self._answering
        assert before is not None  # a request only waits while another one is being answered
        self._end_with(before)

    def _linger_and_close(self) -> None:
        """The last response was written. A client that is still sending would not read it if the connection closed now."""
        if self.pipeline or self.transport.is_closing():
            self.transport.close()
        elif self._reading is Reading.IGNORING:
            self._start_timer(DRAIN)
        elif self._in_body:
            self._reading = Reading.DRAINING
            self._start_timer(DRAIN)
        else:
            self.transport.close()

    def on_response_complete(self) -> None:
        newest = not self.pipeline  # it is the request whose reading `_reading` describes
        self._answering = self.pipeline[-1][0] if self.pipeline else None
        if self._answering is not None:  # it waits no longer, and none of its body is consumed yet
            self._pipelined_body = max(0, self._pipelined_body - len(self._answering.body))
        super().on_response_complete()
        if newest and self._in_body and not self.transport.is_closing():
            self._start_timer(DRAIN)  # a client that is still sending may read the answer first

    # writing

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.limits.write_s, self.transport.abort)

    def resume_writing(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().resume_writing()

    # bounds

    @property
    def _idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def _in_body(self) -> bool:
        return self._reading in (Reading.BODY, Reading.DRAINING)

    def _count_head_bytes(self, size: int) -> None:
        """Adds bytes of headers or trailers. Raises _NoMoreRequests beyond their bound."""
        self._size += size
        if self._size > self.limits.header_bytes:
            self._refuse(431, "the request's headers are too large")
            raise _NoMoreRequests

    def _start_timer(self, seconds: float) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, self._timed_out)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _timed_out(self) -> None:
        self._timer = None
        if self._reading in (Reading.DRAINING, Reading.IGNORING):
            self.transport.close()
        elif not self._idle:  # the next request is not complete while this one is being answered
            self._start_timer(self.limits.header_s)
        elif self._in_body:
            self.transport.close()
        else:
            self._refuse(408, "the request did not arrive in time")

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "this is not a valid HTTP request")

    def _refuse(self, status: int, message: str) -> None:
        """Refuses the request that is arriving, and ends the connection, but not within a response. Complete requests
        before the refused one are still answered."""
        if self.transport.is_closing() or self._reading is Reading.IGNORING:
            return
        if self._in_body and self.pipeline:  # a body that waits behind other requests
            self._drop_newest()
        elif self._in_body and self._idle:  # its answer was sent already
            self.transport.close()
        elif not self._in_body and not self._idle:  # headers after a request that is being answered
            self._end_with(self.cycle)
        else:  # nothing before it is unanswered
            self._close_with(status, message)

    def _close_with(self, status: int, message: str) -> None:
        if self._idle or not (self.cycle.response_started or self.pipeline):
            self.transport.write(_refusal(status, message))
        if not self._idle:
            self.cycle.disconnected = True  # nothing more is written
            self.cycle.message_event.set()
        self.transport.close()


def _refusal(status: int, message: str) -> bytes:
    """A whole response, after which the connection ends."""
    error = Overloaded(message) if status == HTTPStatus.SERVICE_UNAVAILABLE else BadRequest(message)
    body = json.dumps(error_object(error)).encode()
    head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
    head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    return head.encode() + body


_GROWING = (Reading.HEADERS, Reading.BODY, Reading.DRAINING)
