"""`KeptAnswers`: resumable answers whose clients may come back for the rest, also over another frontend."""

from __future__ import annotations

import asyncio

from dynserve.wire.requests import GenerateRequest, encode

Key = tuple[str, str]  # owner and request id


class KeptAnswers:
    """Keeps answers, each for as long as it says. Beyond `max_bytes` in total, the oldest are dropped."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: dict[Key, tuple[GenerateRequest, int, asyncio.TimerHandle]] = {}  # oldest first
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, request: GenerateRequest) -> None:
        """Keeps an answer in the place of an earlier state of it."""
        if request.resumable is None:
            return
        key = (request.resumable.owner, request.id)
        self.take(key)
        size = len(encode(request))
        if size > self._max_bytes:
            return
        while self.num_bytes + size > self._max_bytes:
            self.take(next(iter(self._kept)))
        timer = asyncio.get_running_loop().call_later(request.resumable.keep_s, self.take, key)
        self._kept[key] = (request, size, timer)
        self.num_bytes += size

    def take(self, key: Key) -> GenerateRequest | None:
        """Removes and returns an answer; None if it is not kept here."""
        found = self._kept.pop(key, None)
        if found is None:
            return None
        request, size, timer = found
        timer.cancel()
        self.num_bytes -= size
        return request

    def clear(self) -> None:
        for key in list(self._kept):
            self.take(key)
