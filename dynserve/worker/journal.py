"""The KV journal: changes of a worker's prefix cache as numbered events, with a snapshot for frontends that missed some."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from dynserve.wire.events import Cleared, KvEvent, KvEvents, Removed, Stored
from dynserve.wire.link import Snapshot

SNAPSHOT_PART = 50_000  # hashes per message: under 0.5 MB
MAX_PENDING = 10_000  # events; beyond that a snapshot is cheaper than the events
MAX_BATCH = 2_000  # events per message: under NATS's megabyte unless prompts are enormous (then a snapshot heals it)


class KvJournal:
    """Numbers events from 1, keeps the set of cached hashes that results from them, and queues events until they are
    published."""

    def __init__(self, instance_id: str, epoch: int, wake: Callable[[], None]) -> None:
        self._instance_id, self._epoch, self._wake = instance_id, epoch, wake
        self._hashes: dict[int, None] = {}
        self._last_id = 0
        self._pending: list[KvEvent] = []

    def add(self, events: list[KvEvent]) -> None:
        for event in events:
            match event:
                case Stored(hashes=hashes):
                    self._hashes.update(dict.fromkeys(hashes))
                case Removed(hashes=hashes):
                    for hash_ in hashes:
                        self._hashes.pop(hash_, None)
                case Cleared():
                    self._hashes.clear()
        self._last_id += len(events)
        self._pending += events
        if len(self._pending) > MAX_PENDING:
            self._pending.clear()  # the gap in ids makes every frontend request a snapshot
        self._wake()

    @property
    def published(self) -> int:
        """The id of the last event that `next_batch` returned, or that was dropped."""
        return self._last_id - len(self._pending)

    def next_batch(self) -> KvEvents | None:
        """Removes and returns the next events to publish, or None."""
        if not self._pending:
            return None
        first = self.published + 1
        events, self._pending = self._pending[:MAX_BATCH], self._pending[MAX_BATCH:]
        return KvEvents(self._instance_id, self._epoch, first, events)

    def snapshot(self, request: int = 0) -> Iterator[Snapshot]:
        hashes = list(self._hashes)
        parts = range(0, max(1, len(hashes)), SNAPSHOT_PART)
        for at in parts:
            last = at == parts[-1]
            yield Snapshot(self._epoch, self._last_id, hashes[at : at + SNAPSHOT_PART], last, request)
