"""Generated HTTP byte streams, each read by two independent parsers: our server's protocol, and h11."""

from __future__ import annotations

import asyncio
import random
import re
from typing import Any, NamedTuple

import h11
import uvicorn
from uvicorn.server import ServerState

from dynserve.server.heads import HOST, HttpLimits
from dynserve.server.protocol import BoundedProtocol


class Seen(NamedTuple):
    """A request as one parser understood it."""

    method: bytes
    target: bytes
    body: bytes


class Reading(NamedTuple):
    requests: list[Seen]
    refused: bool  # the stream ends with something that is not a request
    incomplete: bool = False  # it ends in the middle of a request; reported by h11 only
    closed: bool = False  # after the last request, whatever follows; reported by h11 only


class Transport(asyncio.Transport):
    """Collects what is written; never full."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closing = False

    def write(self, data: Any) -> None:
        self.written += bytes(data)

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.closing = True

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 1) if name in ("peername", "sockname") else default


class Harness:
    """Feeds byte streams to the protocol that serves HTTP, with an application that reads every request to its end."""

    def __init__(self) -> None:
        self._seen: list[Seen] = []
        self._config = uvicorn.Config(
            self._app, log_config=None, lifespan="off", ws="none", interface="asgi3", proxy_headers=False
        )
        self._config.load()
        self._refused = False
        harness = self

        class Watched(BoundedProtocol):
            limits = HttpLimits()

            def _refuse(self, status: int, message: str) -> None:
                harness._refused = True
                super()._refuse(status, message)

        self._protocol = Watched

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message["body"]
            more = message["more_body"]
        target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
        method = scope["dynserve"]._scope["method"]  # of HEAD, the app is given GET
        self._seen.append(Seen(method.encode(), target, body))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    async def read(self, packets: list[bytes]) -> Reading:
        self._seen, self._refused = [], False
        state, transport = ServerState(), Transport()
        protocol = self._protocol(self._config, state, {})
        protocol.connection_made(transport)
        for packet in packets:
            if transport.closing:
                break
            protocol.data_received(packet)
            await self._settle(state)
        await self._settle(state)
        protocol.connection_lost(None)
        await self._settle(state)
        if protocol.timeout_keep_alive_task is not None:
            protocol.timeout_keep_alive_task.cancel()
        return Reading(self._seen, self._refused)

    @staticmethod
    async def _settle(state: ServerState) -> None:
        """Waits until every answer that can be sent has been sent."""
        still = 0
        for _ in range(400):
            before = len(state.tasks), state.total_requests
            await asyncio.sleep(0)
            still = still + 1 if (len(state.tasks), state.total_requests) == before else 0
            if still > 3:
                return


def read_by_h11(stream: bytes) -> Reading:
    seen: list[Seen] = []
    while True:
        # RFC 9112, section 2.2: a server ignores empty lines before a request
        stream = _SPACES.sub(rb"\1 \2 ", _EMPTY_LINES.sub(b"", stream), count=1)
        if not stream:
            return Reading(seen, False)
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
        connection.receive_data(stream)
        try:
            request = _one_request(connection)
        except h11.RemoteProtocolError:
            return Reading(seen, True)
        if request is None:
            return Reading(seen, False, incomplete=True)
        seen.append(request)
        if connection.our_state is h11.MUST_CLOSE:
            return Reading(seen, False, closed=True)
        stream = connection.trailing_data[0]


_EMPTY_LINES = re.compile(rb"\A[\r\n]+")


def _one_request(connection: h11.Connection) -> Seen | None:
    """Returns None for an incomplete request. Raises RemoteProtocolError for one that is invalid or refused by our rules."""
    request, body = None, b""
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            return None
        if isinstance(event, h11.Request):
            if _refused_by_rule(event):
                raise h11.RemoteProtocolError("refused by a rule")
            request = event
        elif isinstance(event, h11.Data):
            body += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            assert request is not None
            connection.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
            connection.send(h11.EndOfMessage())
            return Seen(request.method, request.target, body)


def _refused_by_rule(request: h11.Request) -> bool:
    """Whether this server refuses a request that h11 accepts, by a rule and not by a difference of parsing."""
    headers = [(bytes(name), bytes(value)) for name, value in request.headers]
    hosts = [value for name, value in headers if name == b"host"]
    codings = [value for name, value in headers if name == b"transfer-encoding"]
    lengths = [value for name, value in headers if name == b"content-length"]
    if request.method == b"CONNECT" or request.http_version not in (b"1.0", b"1.1"):
        return True
    if codings and (request.http_version == b"1.0" or lengths):
        return True
    return bool(hosts) and HOST.fullmatch(hosts[0]) is None


# Parts that this server refuses in streams that h11 accepts, as patterns of the raw bytes.
STRICTER = {
    "a line that ends without a carriage return": re.compile(rb"(?<!\r)\n"),
    "a header that goes on in the next line": re.compile(rb"\n[ \t]"),
    "a control character in a header": re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]"),
    "a length that is given twice": re.compile(rb"(?i)content-length:[^\r\n]*(?:,|\r\n(?:[^\r\n]+\r\n)*content-length:)"),
    "white space behind the size of a chunk": re.compile(rb"\r\n[0-9A-Fa-f]+[ \t]+[;\r]"),
    "a chunk extension with other than tokens": re.compile(rb"\r\n[0-9A-Fa-f]+;"),
    "a target that is not a path": re.compile(rb"(?:^|\n)[A-Z]+ [^/*\r\n][^\r\n]* HTTP/"),
}  # fmt: skip
# The only thing that it accepts and h11 does not: both ends of a proxy see the same request in it.
_SPACES = re.compile(rb"\A([A-Z]+) +([^ \r\n]+) +")
_METHODS = {b"GET", b"POST", b"PUT", b"HEAD", b"OPTIONS", b"DELETE", b"PATCH"}

_BODIES = [
    b"", b"x", b"hello world", b'{"a": "b"}', b"\r\nupgrade: h2c\r\n", b"a\r\nUpgrade: h2c\r\nb",
    b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n", b"0\r\n\r\nPOST /smuggled HTTP/1.1\r\nHost: a\r\n\r\n", b"\r\n\r\n",
    b"x" * 3000, bytes(range(256)),
]  # fmt: skip
_UPGRADES = [b"h2c", b"websocket", b"h2c,foo", b"h2c;q=1", b"TLS/1.0", b"H2C", b""]
_WRONG_HOSTS: list[list[bytes]] = [
    [], [b"a", b"b"], [b"a", b"a"], [b""], [b"a b"], [b"a/b"], [b"user@a"], [b"a:x"], [b"[::1"], [b"a,b"], [b"\xe4"],
]  # fmt: skip
_WRONG_CODINGS: list[list[bytes]] = [
    [b"gzip"], [b"gzip, chunked"], [b"chunked, chunked"], [b"chunked", b"chunked"], [b"identity"], [b"chunked;q=1"],
    [b"xchunked"], [b"chunked,"], [b"\x0bchunked"],
]  # fmt: skip
_WRONG_LENGTHS = [b"+5", b"-1", b"5, 5", b"0x5", b"", b"5 5", b"99999999999999999999999", b"1e1", b"\xb2"]


class Generator:
    """Byte streams of one to four requests, most of them well-formed, cut into packets anywhere."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def packets(self) -> list[bytes]:
        r = self._random
        stream = b"".join(self._request() for _ in range(r.choice((1, 1, 2, 3, 4))))
        if r.random() < 0.05:
            stream = stream[: r.randrange(len(stream))]  # it breaks off
        if r.random() < 0.1:
            at = r.randrange(len(stream) + 1)
            stream = stream[:at] + r.choice((b"\r\n", b"\n", b" ", b"\0", b"x", b":", b"\r", b"\xff")) + stream[at:]
        if len(stream) < 400 and r.random() < 0.1:
            return [stream[i : i + 1] for i in range(len(stream))]
        cuts = sorted(r.randrange(len(stream) + 1) for _ in range(r.choice((0, 1, 2, 5, 20))))
        return [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True) if a < b]

    def _request(self) -> bytes:
        r = self._random
        method = r.choice((b"GET", b"POST", b"POST", b"POST", b"PUT", b"HEAD", b"OPTIONS", b"DELETE", b"PATCH"))
        target = r.choice((b"/", b"/a", b"/a/b?c=d", b"/%20x", b"/a?b=/../c", b"*"))
        version = b"1.1" if r.random() < 0.9 else r.choice((b"1.0", b"0.9", b"2.0", b"1.2", b"3.0", b"1", b"11"))
        headers = [(b"Host", b"a:8000")]
        if r.random() < 0.04:
            headers = [(b"Host", value) for value in r.choice(_WRONG_HOSTS)]
        for _ in range(r.randrange(3)):
            headers.append(
                (r.choice((b"X-A", b"accept", b"Cookie")), r.choice((b"", b"b", b"upgrade: h2c", b"a, b;c")))
            )
        if r.random() < 0.3:
            headers.append((b"Upgrade", r.choice(_UPGRADES)))
        if r.random() < 0.4:
            headers.append((b"Connection", r.choice((b"Upgrade", b"upgrade, HTTP2-Settings", b"keep-alive", b"close"))))
        body = self._framed(headers)
        r.shuffle(headers)
        lines = [self._cased(name) + b":" + r.choice((b" ", b"", b"  ", b"\t")) + value for name, value in headers]
        return b"\r\n".join([b"%b %b HTTP/%b" % (method, target, version), *lines, b"", b""]) + body

    def _framed(self, headers: list[tuple[bytes, bytes]]) -> bytes:
        """Adds the headers that frame a body, and returns the body as it is sent."""
        r = self._random
        body = r.choice(_BODIES)
        kind = r.random()
        if kind < 0.3:
            return b""
        if kind < 0.6:
            headers.append((b"Content-Length", str(len(body)).encode()))
            return body
        if kind < 0.94:
            headers.append((b"Transfer-Encoding", r.choice((b"chunked", b"chunked", b"Chunked", b"CHUNKED "))))
            return self._chunked(body)
        if kind < 0.96:
            headers += [(b"Content-Length", str(len(body)).encode()), (b"Transfer-Encoding", b"chunked")]
            return self._chunked(body)
        if kind < 0.98:
            headers += [(b"Transfer-Encoding", value) for value in r.choice(_WRONG_CODINGS)]
            return self._chunked(body)
        headers.append((b"Content-Length", r.choice(_WRONG_LENGTHS)))
        return b"hello"

    def _chunked(self, body: bytes) -> bytes:
        r = self._random
        out, at = b"", 0
        while at < len(body):
            size = r.randrange(1, min(len(body) - at, 2000) + 1)
            digits = (b"%x", b"%X", b"0%x")[r.randrange(3)] % size
            out += digits + (b";a=b" if r.random() < 0.05 else b"") + b"\r\n" + body[at : at + size] + b"\r\n"
            at += size
        trailer = b"X-T: upgrade: h2c\r\n" if r.random() < 0.1 else b""
        return out + b"0\r\n" + trailer + b"\r\n"

    def _cased(self, name: bytes) -> bytes:
        return self._random.choice((name, name.lower(), name.upper()))


def differs(ours: Reading, theirs: Reading, stream: bytes) -> str:
    """Returns the contradiction between two readings of a stream, empty if there is none."""
    if ours.requests != theirs.requests[: len(ours.requests)]:
        return "other requests"
    if not ours.refused:
        if theirs.refused:
            return "accepted what h11 refuses"
        return "" if len(ours.requests) == len(theirs.requests) else "fewer requests"
    if len(ours.requests) == len(theirs.requests) and (theirs.refused or theirs.incomplete or theirs.closed):
        return ""
    if theirs.requests[len(ours.requests) :] and theirs.requests[len(ours.requests)].method not in _METHODS:
        return ""  # h11 accepts any word as a method
    return "" if any(pattern.search(stream) for pattern in STRICTER.values()) else "refused what h11 accepts"
