"""`KeptAnswers`: resumable answers whose clients may come back for the rest, also over another frontend."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from dynserve.wire.requests import GenerateRequest, answer_tag, decode_request, encode

Key = tuple[str, str, str]  # owner, request id, and tag of the answer


class _Kept(NamedTuple):
    encoded: bytes
    tokens: int
    keep_s: float
    timer: asyncio.TimerHandle


class KeptAnswers:
    """Keeps answers, each for as long as it says. Beyond `max_bytes` in total, the oldest are dropped."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: dict[Key, _Kept] = {}  # oldest first
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, request: GenerateRequest) -> None:
        """Keeps an answer, unless a later state of it is kept already."""
        key, resumable = key_of(request), request.resumable
        if key is None or resumable is None:
            return
        known = self._kept.get(key)
        if known is not None and len(request.prior_tokens) < known.tokens:
            return
        self._drop(key)
        encoded = encode(request)
        if len(encoded) > self._max_bytes:
            return
        while self.num_bytes + len(encoded) > self._max_bytes:
            self._drop(next(iter(self._kept)))
        self._add(key, encoded, len(request.prior_tokens), resumable.keep_s)

    def copy(self, key: Key) -> GenerateRequest | None:
        """Returns an answer, and keeps it anew: what continues it may fail. None if it is not kept here."""
        found = self._kept.get(key)
        if found is None:
            return None
        self._drop(key)
        self._add(key, found.encoded, found.tokens, found.keep_s)
        return decode_request(found.encoded)

    def clear(self) -> None:
        for key in list(self._kept):
            self._drop(key)

    def _add(self, key: Key, encoded: bytes, tokens: int, keep_s: float) -> None:
        timer = asyncio.get_running_loop().call_later(keep_s, self._drop, key)
        self._kept[key] = _Kept(encoded, tokens, keep_s, timer)
        self.num_bytes += len(encoded)

    def _drop(self, key: Key) -> None:
        if (found := self._kept.pop(key, None)) is not None:
            found.timer.cancel()
            self.num_bytes -= len(found.encoded)


def key_of(request: GenerateRequest) -> Key | None:
    """The key of a resumable answer; None for any other."""
    if request.resumable is None:
        return None
    return request.resumable.owner, request.id, answer_tag(request.render.response_id)
