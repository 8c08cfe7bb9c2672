"""`Exchange`: one HTTP request and its response, with more than ASGI offers for them.

Our own server puts a `DirectExchange` (`shortcuts.py`) into `scope["dynserve"]`. Under any other ASGI server an application
gets an `Exchange`, which uses nothing but ASGI.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from secrets import token_hex
from typing import Any

Scope = Any  # ASGI's: a mapping
Receive = Callable[[], Awaitable[Any]]
Headers = list[tuple[bytes, bytes]]
ChunkWriter = Callable[[bytes], bool]  # False: nothing was written, because the client is behind

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Exchange:
    """The request's headers and id, and the exchange's end, under any ASGI server."""

    __slots__ = ("_headers", "_request_id", "_scope")

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._headers: dict[str, str] | None = None
        self._request_id = ""

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers by lower-case name; of several with one name the first."""
        if self._headers is None:
            raw = reversed(self._scope["headers"])
            self._headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in raw}
        return self._headers

    @property
    def request_id(self) -> str:
        """The client's `x-request-id`, or a random one where it sent none or one of another form."""
        if not self._request_id:
            given = self.headers.get("x-request-id", "")
            self._request_id = given if _REQUEST_ID.fullmatch(given) else token_hex(16)
        return self._request_id

    def small_body(self) -> bytes | None:
        """A small body that came along with its headers. None for any other body: it has to be received."""
        return None

    def on_disconnect(self, receive: Receive, callback: Callable[[], None]) -> Callable[[], None]:
        """Calls `callback` once the client has disconnected, until the function that this returns is called."""

        async def disconnected() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled():
                callback()

        waiting = asyncio.ensure_future(disconnected())
        waiting.add_done_callback(ended)

        def unsubscribe() -> None:
            waiting.cancel()

        return unsubscribe

    def chunk_writer(self) -> ChunkWriter | None:
        """A function that writes one chunk of a body that has begun, now or not at all. None where only `send` does."""
        return None

    def respond(self, send: object, status: int, headers: Headers, body: bytes) -> bool:
        """Writes a whole response at once, if nothing has to be waited for. False: nothing was written, use `send`.

        `headers` have the content's length. `send` is the function that the application was given.
        """
        return False

    def abort(self) -> None:
        """Ends the connection without waiting for a client that does not read."""


def exchange_of(scope: Scope) -> Exchange:
    """The exchange of an ASGI request."""
    found = scope.get("dynserve")
    if found is None:
        found = scope["dynserve"] = Exchange(scope)
    exchange: Exchange = found
    return exchange
