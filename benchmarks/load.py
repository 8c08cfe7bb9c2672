"""The load of the benchmarks: closed loops of raw HTTP connections, cheap enough to leave the machine to what is measured.

Each connection asks again as soon as it is answered, with a prompt that nobody has asked for before (a number in front), so
that no cache of whole prompts helps anyone.
"""

from __future__ import annotations

import asyncio
import json
import time
from itertools import count
from typing import Any, NamedTuple, cast

import uvloop

WATCHED = 16  # connections whose gaps between two reads are kept
MOST_GAPS = 2_000_000
_NUMBER = b"00000000"
_numbers = count(1)


class PlacementQuery(NamedTuple):
    """What every request asks for."""

    model: str
    prompt: str
    max_tokens: int
    stream: bool = True
    chat: bool = False

    def encoded(self) -> bytes:
        """The request with a number that `numbered` replaces."""
        prompt = f"{_NUMBER.decode()} {self.prompt}"
        body: dict[str, Any] = {"model": self.model, "max_tokens": self.max_tokens, "stream": self.stream}
        body |= {"ignore_eos": True, "temperature": 0.0}
        body |= {"messages": [{"role": "user", "content": prompt}]} if self.chat else {"prompt": prompt}
        data = json.dumps(body).encode()
        path = "/v1/chat/completions" if self.chat else "/v1/completions"
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        return head.encode() + data


def numbered(request: bytes) -> bytes:
    return request.replace(_NUMBER, b"%08d" % next(_numbers), 1)


class Answered(NamedTuple):
    """What a load has seen."""

    requests: int
    tokens: int  # chunks with data, at most `max_tokens` of each answer
    seconds: float
    first_s: list[float]  # times to the first chunk of a body, sorted
    gaps_s: list[float]  # between two chunks of the watched connections, sorted
    odd: int  # streamed answers with another number of chunks than the first one had


def at(values: list[float], part: float) -> float:
    """A quantile of sorted values; 0 where there are none."""
    return values[min(len(values) - 1, int(len(values) * part))] if values else 0.0


class _Connection(asyncio.Protocol):
    """One request at a time, until `stop`."""

    def __init__(self, request: bytes, limit: int, stop: float, *, watched: bool) -> None:
        self._request, self._limit, self._stop, self._watched = request, limit, stop, watched
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.requests = self.tokens = self.odd = 0
        self.first: list[float] = []
        self.gaps: list[float] = []
        self._chunks = 0  # of the first answer
        self._streaming = False
        self._buffer = self._tail = b""
        self._seen, self._began, self._last = 0, 0.0, 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own classes are no subclasses
        self._ask()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_exception(SystemExit("the server closed a connection"))

    def data_received(self, data: bytes) -> None:
        if not self._streaming:
            self._buffer += data
            self._read_head()
            return
        self._seen += data.count(b"data: {")
        if self._watched:
            now = time.perf_counter()
            self.gaps.append(now - self._last)
            self._last = now
        tail = data if len(data) >= 5 else (self._tail + data)[-5:]
        if tail.endswith(b"0\r\n\r\n"):
            self._end_stream()
        self._tail = tail

    def _ask(self) -> None:
        if (now := time.perf_counter()) >= self._stop:
            self.ended.set_result(None)
            self._transport.close()
            return
        self._began, self._buffer, self._streaming, self._seen, self._tail = now, b"", False, 0, b""
        self._transport.write(numbered(self._request))

    def _read_head(self) -> None:
        head, end, body = self._buffer.partition(b"\r\n\r\n")
        if not end:
            return
        if b" 200 " not in head.split(b"\r\n", 1)[0]:
            self.ended.set_exception(SystemExit(f"not a 200: {self._buffer[:300]!r}"))
            self._transport.close()
            return
        lower = head.lower()
        if b"content-length:" in lower:
            if len(body) >= int(lower.split(b"content-length:")[1].split(b"\r\n")[0]):
                self.requests += 1
                self._ask()
        elif body:
            self._streaming = True
            self._last = time.perf_counter()
            self.first.append(self._last - self._began)
            self._seen, self._tail = body.count(b"data: {"), body[-5:]
            if body.endswith(b"0\r\n\r\n"):
                self._end_stream()

    def _end_stream(self) -> None:
        self.requests += 1
        self.tokens += min(self._seen, self._limit)
        self._chunks = self._chunks or self._seen
        self.odd += self._seen != self._chunks
        del self.gaps[MOST_GAPS:]
        self._ask()


async def _run(port: int, ask: PlacementQuery, clients: int, seconds: float) -> Answered:
    loop, request, began = asyncio.get_running_loop(), ask.encoded(), time.perf_counter()

    async def one(number: int) -> _Connection:
        watched = number < WATCHED
        made = lambda: _Connection(request, ask.max_tokens, began + seconds, watched=watched)  # noqa: E731
        _, connection = await loop.create_connection(made, "127.0.0.1", port)
        await connection.ended
        return connection

    done = await asyncio.gather(*(one(number) for number in range(clients)))
    return Answered(
        sum(c.requests for c in done),
        sum(c.tokens for c in done),
        time.perf_counter() - began,
        sorted(first for c in done for first in c.first),
        sorted(gap for c in done for gap in c.gaps),
        sum(c.odd for c in done),
    )


def run(port: int, ask: PlacementQuery, clients: int, seconds: float) -> Answered:
    """Raises SystemExit for an answer that is none."""
    return uvloop.run(_run(port, ask, clients, seconds))
