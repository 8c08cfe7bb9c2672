from __future__ import annotations

import random

from dynserve.frontend.kv_feed import KvFeeds
from dynserve.routing.router import Router
from dynserve.wire.events import KvEvent, KvEvents, Removed, Stored
from dynserve.worker.journal import Journal


class World:
    """One worker's journal and one frontend's feed."""

    def __init__(self) -> None:
        self.router = Router()
        self.asked = 0
        self.feeds = KvFeeds(self.router, self.ask, lambda: 0.0)
        self.start(1)

    def start(self, epoch: int) -> None:
        self.epoch = epoch
        self.journal = Journal("w", epoch, lambda: None)

    def ask(self, worker: str) -> None:
        self.asked += 1

    def say(self, *events: KvEvent) -> KvEvents:
        self.journal.add(list(events))
        batch = self.journal.take()
        assert batch is not None
        return batch

    def snapshot(self) -> None:
        for part in self.journal.snapshot():
            self.feeds.snapshot("w", part)

    def join(self) -> None:
        self.feeds.joined("w", self.epoch)
        self.snapshot()

    def known(self) -> set[int]:
        return {hash_ for hash_ in range(100) if self.router.index.overlap([hash_])}


def test_a_late_joiner_learns_everything_from_the_snapshot() -> None:
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
    assert world.known() == {1, 2} and world.asked == 1


def test_a_gap_is_noticed_and_healed() -> None:
    world = World()
    world.join()
    world.say(Stored(None, [1]))  # lost
    world.feeds.events(world.say(Stored(1, [2])))
    assert not world.feeds.exact("w") and world.asked == 2
    world.snapshot()
    assert world.known() == {1, 2} and world.feeds.exact("w")


def test_a_batch_that_comes_twice_changes_nothing() -> None:
    world = World()
    world.join()
    first = world.say(Stored(None, [1]))
    second = world.say(Removed([1]))
    for batch in (first, second, first):
        world.feeds.events(batch)
    assert world.known() == set() and world.feeds.exact("w")


def test_a_restarted_worker_begins_with_nothing() -> None:
    world = World()
    world.join()
    world.feeds.events(world.say(Stored(None, [1])))
    world.start(2)
    world.feeds.events(world.say(Stored(None, [2])))
    world.snapshot()
    assert world.known() == {2}


def test_a_worker_that_left_is_forgotten() -> None:
    world = World()
    world.say(Stored(None, [1]))
    world.join()
    world.feeds.left("w")
    assert world.known() == set() and not world.feeds.exact("w")


def test_with_random_losses_the_index_ends_as_the_cache() -> None:
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
