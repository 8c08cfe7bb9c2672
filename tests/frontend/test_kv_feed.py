from __future__ import annotations

import random

from dynserve.frontend.kv_feed import KvFeeds
from dynserve.routing.policy import IndexState
from dynserve.routing.router import Router
from dynserve.wire.events import KvEvent, KvEvents, Removed, Stored
from dynserve.wire.link import Snapshot
from dynserve.worker.journal import KvJournal


class World:
    """One worker's journal and one frontend's feed."""

    def __init__(self) -> None:
        self.router = Router()
        self.requested = 0
        self.feeds = KvFeeds(self.router, self.request_snapshot, lambda: 0.0)
        self.start(1)

    def start(self, epoch: int) -> None:
        self.epoch = epoch
        self.journal = KvJournal("w", epoch, lambda: None)

    def request_snapshot(self, worker: str, request: int) -> None:
        self.requested += 1
        self.request = request

    def say(self, *events: KvEvent) -> KvEvents:
        self.journal.add(list(events))
        batch = self.journal.next_batch()
        assert batch is not None
        return batch

    def snapshot(self) -> None:
        for part in self.journal.snapshot(self.request):
            self.feeds.snapshot("w", part)

    def join(self) -> None:
        self.feeds.joined("w", self.epoch)
        self.snapshot()

    def known(self) -> set[int]:
        return {hash_ for hash_ in range(100) if self.router.index.overlap([hash_])}


def test_the_snapshot_contains_all_events_from_before_a_frontend_joined() -> None:
    world = World()
    world.say(Stored(None, [1, 2, 3]), Removed([3]))
    world.join()
    assert world.known() == {1, 2} and world.feeds.exact("w")


def test_events_that_come_before_the_snapshot_are_applied_after_it() -> None:
    world = World()
    world.feeds.joined("w", 1)
    world.feeds.events(world.say(Stored(None, [1])))
    assert not world.feeds.exact("w")
    world.snapshot()
    world.feeds.events(world.say(Stored(1, [2])))
    assert world.known() == {1, 2} and world.requested == 1


def test_a_gap_in_the_events_is_repaired_by_a_snapshot() -> None:
    world = World()
    world.join()
    world.say(Stored(None, [1]))  # lost
    world.feeds.events(world.say(Stored(1, [2])))
    assert not world.feeds.exact("w") and world.requested == 2
    world.snapshot()
    assert world.known() == {1, 2} and world.feeds.exact("w")


def test_a_duplicate_batch_changes_nothing() -> None:
    world = World()
    world.join()
    first = world.say(Stored(None, [1]))
    second = world.say(Removed([1]))
    for batch in (first, second, first):
        world.feeds.events(batch)
    assert world.known() == set() and world.feeds.exact("w")


def test_a_restarted_worker_begins_with_an_empty_index() -> None:
    world = World()
    world.join()
    world.feeds.events(world.say(Stored(None, [1])))
    world.start(2)
    world.feeds.events(world.say(Stored(None, [2])))
    world.snapshot()
    assert world.known() == {2}


def test_the_index_of_a_departed_worker_is_removed() -> None:
    world = World()
    world.say(Stored(None, [1]))
    world.join()
    world.feeds.departed("w")
    assert world.known() == set() and not world.feeds.exact("w")


def test_with_random_losses_the_index_equals_the_cache_in_the_end() -> None:
    r = random.Random(5)
    world, cache = World(), set[int]()
    world.join()
    for _ in range(500):
        hashes = r.sample(range(100), 3)
        if r.random() < 0.5:
            batch, cache = world.say(Stored(None, hashes)), cache | set(hashes)
        else:
            batch, cache = world.say(Removed(hashes)), cache - set(hashes)
        if r.random() < 0.9:
            world.feeds.events(batch)
        if not world.feeds.exact("w") and r.random() < 0.3:
            world.snapshot()
    world.say(Stored(None, [1]))
    world.feeds.events(world.say(Stored(None, [1])))
    world.snapshot()
    assert world.known() == cache | {1}


def test_a_lost_last_batch_is_detected_by_the_second_load_report() -> None:
    world = World()
    world.join()
    lost = world.say(Stored(None, [1]))
    world.feeds.reported("w", 1, world.journal.published)
    assert world.requested == 1  # the report may have overtaken the events
    world.feeds.reported("w", 1, world.journal.published)
    assert world.requested == 2 and not world.feeds.exact("w")
    world.snapshot()
    assert world.known() == {1} and world.feeds.exact("w")
    world.feeds.events(lost)  # it was only late: its content is known
    assert world.known() == {1} and world.feeds.exact("w")


def test_load_reports_that_overtake_events_cause_no_snapshot() -> None:
    world = World()
    world.join()
    for hash_ in range(5):
        batch = world.say(Stored(None, [hash_]))
        world.feeds.reported("w", 1, world.journal.published)
        world.feeds.events(batch)
    assert world.requested == 1 and world.feeds.exact("w")


def test_batches_in_the_wrong_order_are_repaired_by_a_snapshot() -> None:
    world = World()
    world.join()
    first, second = world.say(Stored(None, [1])), world.say(Removed([1]), Stored(None, [2]))
    world.feeds.events(second)
    world.feeds.events(first)
    world.snapshot()
    assert world.known() == {2} and world.feeds.exact("w")


def test_the_state_of_the_index_is_set_on_the_routers_target() -> None:
    world = World()
    world.feeds.joined("w", 1)
    target = world.router.join("w", 32, 100, 0.0)
    world.feeds.placeable(target)
    assert target.index is IndexState.DEGRADED
    world.snapshot()
    assert target.index is IndexState.EXACT
    world.say(Stored(None, [1]))
    world.feeds.events(world.say(Stored(None, [2])))
    assert target.index == IndexState.DEGRADED


def test_the_index_of_a_worker_without_events_stays_approximate() -> None:
    world = World()
    world.feeds.joined("w", 1)
    target = world.router.join("w", 32, 100, 0.0, events=False)
    world.feeds.placeable(target)
    world.router.index.store("w", [7])
    world.snapshot()
    assert target.index is IndexState.APPROX and world.known() == {7}


def test_an_index_over_its_memory_limit_is_degraded_until_there_is_room() -> None:
    world = World()
    world.router.index._max_bytes = 64 * world.router.index._max_bytes // world.router.index.capacity
    world.join()
    target = world.router.join("w", 32, 100, 0.0)
    world.feeds.events(world.say(Stored(None, list(range(100)))))
    world.feeds.resync_degraded()
    assert not world.feeds.exact("w") and target.index is IndexState.DEGRADED
    world.feeds.events(world.say(Removed(list(range(80)))))
    world.feeds.resync_degraded()
    world.snapshot()
    assert world.feeds.exact("w") and world.known() == set(range(80, 100))


def test_a_long_journal_is_published_in_consecutive_batches() -> None:
    world = World()
    world.join()
    world.journal.add([Stored(None, [i % 100]) for i in range(5_000)])
    batches = []
    while (batch := world.journal.next_batch()) is not None:
        batches.append(batch)
    assert len(batches) > 1
    for batch in batches:
        world.feeds.events(batch)
    assert world.requested == 1 and world.known() == set(range(100))


def test_parts_of_an_abandoned_snapshot_do_not_complete_the_next_one() -> None:
    world = World()
    world.say(Stored(None, [1, 2, 3, 4]))
    world.feeds.joined("w", 1)
    first = world.request
    world.feeds.joined("w", 1)  # requested again while the first is on its way
    world.feeds.snapshot("w", Snapshot(1, 1, [1, 2], False, first))
    world.feeds.snapshot("w", Snapshot(1, 1, [3], True, first))
    assert not world.feeds.exact("w")
    world.snapshot()
    assert world.feeds.exact("w") and world.known() == {1, 2, 3, 4}
