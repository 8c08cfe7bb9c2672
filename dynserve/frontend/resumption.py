"""Resumption: finds the answer of a client that has lost its connection and comes back for the rest.

Workers keep such answers, because frontends die, and clients come back over another one. All linked workers are asked; of
several states of one answer the longest is used.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Mapping
from itertools import count

import msgspec

from dynserve.errors import BadRequest, NothingToResume
from dynserve.frontend.inference import InferenceRequest
from dynserve.frontend.reply import Peer
from dynserve.wire.link import Adopt
from dynserve.wire.requests import EventId, GenerateRequest, Resumable

REPLY_TIMEOUT = 1.0  # seconds for all workers to reply
_EVENT_ID = re.compile(r"(\d{1,9})\.(\d{1,9})\.(\w{1,12})")


def wants_resumption(headers: Mapping[str, str]) -> bool:
    """Returns True for a request with `x-dynserve-resumable`."""
    return headers.get("x-dynserve-resumable", "") in ("1", "true")


class Resumption:
    """Prepares resumable requests. `peers` returns the workers, `keep_s` is how long they keep answers, in seconds."""

    def __init__(self, peers: Callable[[], Iterable[Peer]], keep_s: float) -> None:
        self._peers, self._keep_s = peers, keep_s
        self._numbers = count(1)
        self._open: dict[int, _Search] = {}

    async def prepare(self, request: InferenceRequest, headers: Mapping[str, str], owner: str) -> InferenceRequest:
        """Returns a request whose stream can be resumed; with Last-Event-ID, one for the rest of an earlier stream.

        Raises:
            BadRequest: it is not a stream, or one of several answers, or the event id is not one of ours.
            NothingToResume: no worker keeps the earlier stream.
        """
        render = request.generation.render
        if not render.stream or render.part:
            raise BadRequest("x-dynserve-resumable needs a streamed request with one answer")
        if (given := headers.get("last-event-id", "")) == "":
            generation = msgspec.structs.replace(
                request.generation, render=msgspec.structs.replace(render, event_ids=True)
            )
            resumable = Resumable(owner=owner, keep_s=self._keep_s)
            return msgspec.structs.replace(request, generation=generation, resumable=resumable)
        after, tag = _event_id(given)
        kept = await self._adopt(owner, request.id, tag)
        known = 0 if kept is None else len(kept.prior_tokens)
        if kept is not None and (kept.render.kind, kept.render.model) != (render.kind, render.model):
            raise BadRequest(f"the stream {request.id!r} is another API's or model's")
        if kept is None or kept.resumable is None or after[0] > known + 1:
            raise NothingToResume(
                f"nothing is kept of the stream {request.id!r}: it was never resumable, or its rest was kept for "
                f"{self._keep_s:g} s"
            )
        fields = {name: getattr(kept, name) for name in request.generation.__struct_fields__}
        generation = msgspec.structs.replace(request.generation, **fields)
        resumable = msgspec.structs.replace(kept.resumable, after=after)
        return msgspec.structs.replace(request, generation=generation, resumable=resumable, prior=kept.prior)

    def adopted(self, number: int, kept: GenerateRequest | None) -> None:
        """Handles the reply of one worker."""
        if (search := self._open.get(number)) is not None:
            search.note(kept)

    async def _adopt(self, owner: str, request_id: str, tag: str) -> GenerateRequest | None:
        links = [peer.link for peer in self._peers() if peer.link is not None and peer.linked]
        number = next(self._numbers)
        search = self._open[number] = _Search(len(links))
        try:
            for link in links:
                link.send(Adopt(number, owner, request_id, tag))
            return await search.result(REPLY_TIMEOUT)
        finally:
            del self._open[number]


class _Search:
    """The replies of `expected` workers about one answer."""

    def __init__(self, expected: int) -> None:
        self._missing, self._found = expected, list[GenerateRequest]()
        self._complete = asyncio.Event()
        if not expected:
            self._complete.set()

    def note(self, kept: GenerateRequest | None) -> None:
        if kept is not None:
            self._found.append(kept)
        self._missing -= 1
        if not self._missing:
            self._complete.set()

    async def result(self, timeout_s: float) -> GenerateRequest | None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._complete.wait()
        except TimeoutError:
            pass  # a worker that does not reply may have had it
        return max(self._found, key=_length, default=None)


def _length(kept: GenerateRequest) -> tuple[int, bool]:
    return len(kept.prior_tokens), kept.resumable is not None and kept.resumable.ending is not None


def _event_id(text: str) -> tuple[EventId, str]:
    """Returns an event's number, and the tag of its answer. Raises BadRequest."""
    found = _EVENT_ID.fullmatch(text)
    if found is None:
        raise BadRequest(f"Last-Event-ID: {text[:40]!r} is not the id of an event of this server")
    return (int(found[1]), int(found[2])), found[3]
