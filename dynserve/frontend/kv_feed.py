"""The KV feed: what workers say of their caches, in order and without gaps, or known to be neither.

Events carry consecutive ids per worker and start (epoch). Whatever does not follow is answered with a wish for a
snapshot; until that is in, the worker's index is DEGRADED: it may lack blocks, or name some that are gone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from dynserve.routing.router import Router
from dynserve.wire.events import Cleared, KvEvents, Stored
from dynserve.wire.link import Snapshot

MAX_HELD = 2_000  # batches that wait for a snapshot; beyond, a newer snapshot is asked for


@dataclass(slots=True)
class _Feed:
    epoch: int
    next_id: int = 0
    exact: bool = False
    held: list[KvEvents] = field(default_factory=list)
    parts: list[list[int]] = field(default_factory=list)


class KvFeeds:
    """Applies events to the router's index. `ask(worker)` sends a snapshot request over the worker's link."""

    def __init__(self, router: Router, ask: Callable[[str], None]) -> None:
        self._router, self._ask = router, ask
        self._feeds: dict[str, _Feed] = {}

    def exact(self, worker: str) -> bool:
        return worker in self._feeds and self._feeds[worker].exact

    def joined(self, worker: str, epoch: int) -> None:
        """Its link is up: from here on its cache can be known."""
        self._resync(worker, epoch)

    def left(self, worker: str) -> None:
        self._feeds.pop(worker, None)
        self._router.forget(worker)

    def events(self, batch: KvEvents) -> None:
        feed = self._feeds.get(batch.instance_id)
        if feed is None:
            return  # not linked: nothing can be sent there anyway
        if batch.epoch != feed.epoch:
            if batch.epoch > feed.epoch:
                self._resync(batch.instance_id, batch.epoch)
            return
        if not feed.exact:
            feed.held.append(batch)
            if len(feed.held) > MAX_HELD:
                self._resync(batch.instance_id, batch.epoch)
            return
        if not self._follow(batch.instance_id, feed, batch):
            self._resync(batch.instance_id, batch.epoch)

    def snapshot(self, worker: str, part: Snapshot) -> None:
        feed = self._feeds.get(worker)
        if feed is None or feed.exact or part.epoch != feed.epoch:
            return
        feed.parts.append(part.hashes)
        if not part.last:
            return
        self._router.apply(worker, [Cleared(), *(Stored(None, hashes) for hashes in feed.parts)])
        held, feed.held, feed.parts = feed.held, [], []
        feed.next_id, feed.exact = part.event_id + 1, True
        for batch in held:
            self.events(batch)

    def _follow(self, worker: str, feed: _Feed, batch: KvEvents) -> bool:
        """False when events are missing before this batch. Ids that were seen already are skipped."""
        if batch.first_id > feed.next_id:
            return False
        self._router.apply(worker, batch.events[feed.next_id - batch.first_id :])
        feed.next_id = max(feed.next_id, batch.first_id + len(batch.events))
        return True

    def _resync(self, worker: str, epoch: int) -> None:
        self._feeds[worker] = _Feed(epoch)
        self._ask(worker)
