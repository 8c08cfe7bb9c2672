"""Bodies of requests while they are received, with one budget of bytes for all of them together.

The part of a body beyond 64 KiB, decompressed, is charged to the budget until the request's prompt is prepared. When the
budget is spent, the body that has been arriving for the longest time is aborted: at an ordinary pace a body is complete
long before that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request

from dynserve.api.body_encoding import check_media_type, coding_of, decompress
from dynserve.config import FrontendConfig
from dynserve.errors import BodyTooLarge, Cancelled, Overloaded, SlowBody, UnsupportedMediaType
from dynserve.server.exchange import Exchange, exchange_of
from dynserve.server.shortcuts import SMALL_BODY

Body = TypeVar("Body", bytes, bytearray, bytes | bytearray)
MAX_DECOMPRESSING = 4  # bodies at a time
INLINE = 4 << 10  # bytes that are decompressed on the event loop; they can become a few MiB, in a few milliseconds


class RequestBodies:
    """The request bodies of one frontend."""

    def __init__(self, config: FrontendConfig) -> None:
        self._config = config
        self.used = 0  # bytes
        self.decompressing = asyncio.Semaphore(MAX_DECOMPRESSING)
        self._arriving: dict[RequestBody, None] = {}  # oldest first

    def small(self, exchange: Exchange) -> bytes | None:
        """Returns a small body that came with its headers; None for any other, which has to be received. Raises
        UnsupportedMediaType for a body that is not JSON."""
        headers = exchange.headers
        check_media_type(headers)
        found = exchange.small_body()
        if found is None or len(found) > self._config.max_body_bytes or headers.get("content-encoding"):
            return None
        return _json(found, headers)

    def receive(self, request: Request) -> RequestBody:
        """Returns a context manager. In its block `content` is complete, and charged to the budget until the block ends."""
        return RequestBody(self, request, self._config)

    def charge(self, body: RequestBody, size: int) -> None:
        """Charges `size` bytes. Raises Overloaded when the budget is spent and no other body can be aborted."""
        self.used += size
        body.charged += size
        while self.used > self._config.max_bodies_bytes:
            oldest = next((other for other in self._arriving if other is not body), None)
            if oldest is None:
                raise _spent()
            self._arriving.pop(oldest)
            oldest.give_up()


class RequestBody:
    """The body of one request."""

    def __init__(self, bodies: RequestBodies, request: Request, config: FrontendConfig) -> None:
        self._bodies, self._request, self._config = bodies, request, config
        self.content: bytes | bytearray = b""
        self.charged = 0
        self._scope: asyncio.Timeout | None = None
        self._given_up = False

    async def __aenter__(self) -> RequestBody:
        """Receives the whole body and decompresses it. Raises BodyTooLarge for a body over the limit, before all of it is
        read; SlowBody after the timeout; Overloaded if the budget has no room for it; Cancelled if the client disconnects;
        UnsupportedMediaType or BadRequest for a body that is not JSON, or cannot be decompressed."""
        exchange = exchange_of(self._request.scope)
        if (small := self._bodies.small(exchange)) is not None:
            self.content = small
            return self
        try:
            coding = coding_of(exchange.headers)
            await self._receive()
            self._bodies._arriving.pop(self, None)  # from here on it needs what it is charged for
            if coding:
                await self._decompress(coding)
            _json(self.content, exchange.headers)
        except BaseException:
            self.close()
            raise
        finally:
            self._bodies._arriving.pop(self, None)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Refunds the budget. Closing twice is safe."""
        self.content = b""
        self._bodies.used -= self.charged
        self.charged = 0

    def give_up(self) -> None:
        self._given_up = True
        self.content = b""
        self._bodies.used -= self.charged
        self.charged = 0
        if self._scope is not None:
            with suppress(RuntimeError):  # its own timeout has just expired
                self._scope.reschedule(asyncio.get_running_loop().time())

    async def _decompress(self, coding: str) -> None:
        work = partial(decompress, self.content, coding, self._config.max_body_bytes)
        if len(self.content) <= INLINE:
            self.content = work()
        else:
            async with self._bodies.decompressing:  # what they decode to is charged afterwards only
                self.content = await asyncio.to_thread(work)
        self._bodies.charge(self, max(0, len(self.content) - SMALL_BODY - self.charged))

    async def _receive(self) -> None:
        max_bytes = self._config.max_body_bytes
        announced = exchange_of(self._request.scope).headers.get("content-length", "")
        if announced.isdecimal() and len(announced) < 20 and int(announced) > max_bytes:
            raise _too_large(max_bytes)
        content = bytearray()
        self.content = content
        self._bodies._arriving[self] = None
        try:
            async with asyncio.timeout(self._config.receive_timeout_s) as self._scope:
                async for part in self._request.stream():
                    if self._given_up:
                        break
                    if len(content) + len(part) > max_bytes:
                        raise _too_large(max_bytes)
                    content += part
                    self._bodies.charge(self, max(0, len(content) - SMALL_BODY) - self.charged)
        except TimeoutError:
            if not self._given_up:
                raise SlowBody(f"the body did not arrive within {self._config.receive_timeout_s:.0f} s") from None
        except ClientDisconnect:
            raise Cancelled("the client disconnected before its request was complete") from None
        finally:
            self._scope = None
        if self._given_up:
            raise _spent()


def _json(content: Body, headers: Mapping[str, str]) -> Body:
    """Returns the body. Raises UnsupportedMediaType for one without a type that does not begin like a JSON object."""
    if "content-type" not in headers and not content[:64].lstrip().startswith(b"{"):
        raise UnsupportedMediaType("the Content-Type is missing, and the body is not JSON: send it as application/json")
    return content


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body is larger than {max_bytes:,} bytes")


def _spent() -> Overloaded:
    return Overloaded("the bodies of other requests use all the memory reserved for bodies; try again soon")
