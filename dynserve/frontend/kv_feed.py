"""The KV feed: applies workers' KV events to the index in order, and detects gaps.

Events carry consecutive ids per worker and start (epoch). After a gap a snapshot is requested; until it has arrived, the
worker's index is DEGRADED: it may lack blocks, or list some that are no longer cached. Load reports carry the id of the
last published event, so that a loss is also detected when no event follows it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from dynserve.routing.policy import IndexState
from dynserve.routing.router import Router, RoutingTarget
from dynserve.wire.events import Cleared, KvEvents, Stored
from dynserve.wire.link import Snapshot

MAX_HELD = 2_000  # event batches that wait for a snapshot; beyond, a newer snapshot is requested


@dataclass(slots=True)
class _Feed:
    epoch: int
    request: int  # number of the expected snapshot: parts of an earlier one may still arrive
    next_id: int = 0
    exact: bool = False
    suspected: int = -1  # an event id of a load report that had not arrived by then
    held: list[KvEvents] = field(default_factory=list)
    parts: list[list[int]] = field(default_factory=list)


class KvFeeds:
    """Applies events to the router's index. `request_snapshot(worker, number)` sends a request
    for a snapshot over the worker's link."""

    def __init__(
        self, router: Router, request_snapshot: Callable[[str, int], None], clock: Callable[[], float]
    ) -> None:
        self._router, self._request_snapshot, self._clock = router, request_snapshot, clock
        self._feeds: dict[str, _Feed] = {}
        self.resyncs = 0

    def exact(self, worker: str) -> bool:
        return worker in self._feeds and self._feeds[worker].exact and worker not in self._router.index.degraded

    def joined(self, worker: str, epoch: int) -> None:
        """Starts the feed of a worker whose link is up, with a snapshot."""
        self._resync(worker, epoch)

    def placeable(self, target: RoutingTarget) -> None:
        """Handles a worker that became a target, which shows its index state from now on. Without events it has no feed."""
        if target.index is IndexState.APPROX:
            self._feeds.pop(target.worker, None)
            self._router.index.clear(target.worker)
        else:
            self._update_target(target.worker)

    def departed(self, worker: str) -> None:
        self._feeds.pop(worker, None)
        self._router.forget(worker)

    def reported(self, worker: str, epoch: int, event_id: int) -> None:
        """Checks the last event id of a load report. Reports and events may overtake each other, so an event counts as lost
        at the second report."""
        feed = self._feeds.get(worker)
        if feed is None or not feed.exact or epoch != feed.epoch:
            return
        if feed.next_id <= feed.suspected:
            self._resync(worker, epoch)
        elif event_id >= feed.next_id:
            feed.suspected = event_id
        else:
            self._update_target(worker)

    def resync_degraded(self) -> None:
        """Requests snapshots for workers with evicted entries, once the index has room. Call it every few seconds."""
        index = self._router.index
        for worker in list(index.degraded):
            feed = self._feeds.get(worker)
            if feed is not None and feed.exact and len(index) < index.capacity * 3 // 4:
                self._resync(worker, feed.epoch)
            else:
                self._update_target(worker)

    def events(self, batch: KvEvents) -> None:
        feed = self._feeds.get(batch.instance_id)
        if feed is None:
            return  # not linked: no request can be placed there
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
        if feed is None or feed.exact or (part.epoch, part.request) != (feed.epoch, feed.request):
            return
        feed.parts.append(part.hashes)
        if not part.last:
            return
        self._router.apply(worker, [Cleared(), *(Stored(None, hashes) for hashes in feed.parts)])
        held, feed.held, feed.parts = feed.held, [], []
        feed.next_id, feed.exact, feed.suspected = part.event_id + 1, True, -1
        self._update_target(worker)
        for batch in held:
            self.events(batch)

    def _follow(self, worker: str, feed: _Feed, batch: KvEvents) -> bool:
        """Applies a batch; returns False if events before it are missing. Events that were applied already are skipped."""
        if batch.first_id > feed.next_id:
            return False
        self._router.apply(worker, batch.events[feed.next_id - batch.first_id :])
        self._router.index.tidy()
        feed.next_id = max(feed.next_id, batch.first_id + len(batch.events))
        self._update_target(worker)
        return True

    def _resync(self, worker: str, epoch: int) -> None:
        self.resyncs += 1
        self._feeds[worker] = _Feed(epoch, self.resyncs)
        self._update_target(worker)
        self._request_snapshot(worker, self.resyncs)

    def _update_target(self, worker: str) -> None:
        target = self._router.targets.get(worker)
        if target is not None and target.index is not IndexState.APPROX:
            if self.exact(worker):
                target.index, target.confirmed_at = IndexState.EXACT, self._clock()
            else:
                target.index = IndexState.DEGRADED
