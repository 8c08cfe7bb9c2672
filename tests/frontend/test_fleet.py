"""Workers that fall silent, stop, or cannot be reached over the bus."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import Any

import pytest

from dynserve import Cluster, clock
from dynserve.transport.memory import MemoryLink
from dynserve.worker.worker import Worker
from tests.conftest import MODEL, until
from tests.test_cluster import assert_all_freed

BODY: dict[str, Any] = {"model": MODEL, "prompt": "x", "max_tokens": 60, "ignore_eos": True}


@asynccontextmanager
async def cluster(**how: Any) -> Any:
    """A cluster of two workers in virtual time, with a client, and the choices that every answer to `BODY` should have."""
    options = {"aggregated": 2, "executor": "simulated", "engine": {"step_ms": 50}}
    async with Cluster(**(options | how)) as c, c.client() as client:
        expected = (await client.post("/v1/completions", json=BODY)).json()["choices"]
        yield c, client, expected


def busy(c: Cluster) -> Worker:
    return next(w for w in c.workers if w.executor.load().running)


def peer_of(c: Cluster, worker: Worker) -> Any:
    return c.frontend.fleet.peers[worker.id]


def freeze(c: Cluster, worker: Worker) -> Any:
    """Mutes the worker's link in both directions. Returns a function that lets it be heard again."""
    link = peer_of(c, worker).link
    assert isinstance(link, MemoryLink) and link.peer is not None
    muted = (link, link.peer)
    for side in muted:
        side.mute = True

    def thaw() -> None:
        for side in muted:
            side.mute = False

    return thaw


async def answering(client: Any) -> asyncio.Task[Any]:
    """Asks for an answer, and returns in the middle of it."""
    asking = asyncio.create_task(client.post("/v1/completions", json=BODY))
    await asyncio.sleep(0.5)
    return asking


async def now() -> float:
    return asyncio.get_running_loop().time()


def suspicions(c: Cluster, end: str) -> float:
    return float(c.frontend.metrics.suspicions.labels(end)._value.get())


def test_a_worker_that_is_silent_for_a_moment_gets_nothing_new_and_keeps_its_answers() -> None:
    async def main() -> None:
        async with cluster() as (c, client, expected):
            asking = await answering(client)
            silent, began = busy(c), await now()
            accepted = silent.counts["accepted"]
            thaw = freeze(c, silent)
            await until(lambda: peer_of(c, silent).suspected)
            assert 0.3 < await now() - began <= 0.7  # the last ping may have come before
            assert peer_of(c, silent).state == "suspected" and not peer_of(c, silent).usable
            other = await client.post("/v1/completions", json=BODY | {"max_tokens": 2})
            assert other.status_code == 200 and silent.counts["accepted"] == accepted
            thaw()
            await until(lambda: not peer_of(c, silent).suspected)
            assert (await asking).json()["choices"] == expected
            assert (suspicions(c, "returned"), suspicions(c, "lost")) == (1, 0)
            assert c.frontend.metrics.migrated.labels("worker_lost")._value.get() == 0
            await assert_all_freed(c)

    clock.run(main())


def test_a_frozen_workers_answers_migrate_and_it_drops_them_when_it_is_back() -> None:
    async def main() -> None:
        async with cluster() as (c, client, _):
            long = BODY | {"max_tokens": 300}
            expected = (await client.post("/v1/completions", json=long)).json()["choices"]
            asking = asyncio.create_task(client.post("/v1/completions", json=long))
            await asyncio.sleep(0.5)
            frozen, began = busy(c), await now()
            thaw = freeze(c, frozen)
            await until(lambda: not peer_of(c, frozen).linked)
            assert 1.7 < await now() - began <= 2.3
            assert frozen.busy  # it does not know yet
            thaw()
            frozen_link = next(iter(frozen.links.values()))
            frozen_link.abort("a reset, as TCP sends it for an ended connection")
            await until(lambda: not frozen.busy)
            await until(lambda: peer_of(c, frozen).usable)
            assert (suspicions(c, "lost"), suspicions(c, "relinked")) == (1, 1)
            assert (await asking).json()["choices"] == expected
            await assert_all_freed(c)

    clock.run(main())


def test_requests_wait_while_the_only_worker_is_suspected() -> None:
    async def main() -> None:
        async with cluster(aggregated=1) as (c, client, expected):
            thaw = freeze(c, c.workers[0])
            await until(lambda: peer_of(c, c.workers[0]).suspected)
            asking = asyncio.create_task(client.post("/v1/completions", json=BODY))
            await asyncio.sleep(0.5)
            assert c.frontend.health()["queued"] == {MODEL: 1}
            thaw()
            assert (await asking).json()["choices"] == expected

    clock.run(main())


def test_times_of_silence_are_options_and_workers_ping_as_often_as_these_need() -> None:
    async def main() -> None:
        async with cluster(options={"suspect_s": 5.0, "silence_s": 9.0}) as (c, _, _expected):
            silent, began = c.workers[0], await now()
            freeze(c, silent)
            await until(lambda: peer_of(c, silent).suspected)
            assert 4.4 < await now() - began < 5.6
            await until(lambda: not peer_of(c, silent).linked)
            assert 8.4 < await now() - began < 9.6
            assert peer_of(c, c.workers[1]).usable

    clock.run(main())


@pytest.mark.parametrize("mode", ["finish", "migrate"])
def test_a_stopping_worker_finishes_its_answers_or_has_them_continued(mode: Any) -> None:
    async def main() -> None:
        async with cluster(aggregated=1) as (c, client, expected):
            asking, leaving = await answering(client), c.workers[0]
            await c.add_worker("aggregated")
            await until(lambda: peer_of(c, c.workers[1]).usable)
            object.__setattr__(leaving.config, "drain_mode", mode)
            began = await now()
            leaving.leave()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert peer_of(c, leaving).state == "draining"  # although discovery still lists it
            late = asyncio.create_task(client.post("/v1/completions", json=BODY | {"max_tokens": 1}))
            await leaving.drain()
            assert (await late).status_code == 200 and leaving.counts["accepted"] == 2
            if mode == "migrate":
                assert await now() - began < 0.2
                assert leaving.counts["cancelled"] == 1
                assert c.frontend.metrics.migrated.labels("worker_left")._value.get() == 1
            else:
                assert 2.0 < await now() - began < 3.5
                assert leaving.counts["finished"] == 2
            assert (await asking).json()["choices"] == expected
            await assert_all_freed(c)

    clock.run(main())


def test_answers_that_outlast_the_drain_time_migrate() -> None:
    async def main() -> None:
        async with cluster(aggregated=1) as (c, client, expected):
            asking, leaving = await answering(client), c.workers[0]
            await c.add_worker("aggregated")
            await until(lambda: peer_of(c, c.workers[1]).usable)
            object.__setattr__(leaving.config, "drain_timeout_s", 1.0)
            leaving.leave()
            began = await now()
            await leaving.drain()
            assert 1.0 <= await now() - began < 1.3
            assert (await asking).json()["choices"] == expected

    clock.run(main())


def silence_bus(c: Cluster, silent: bool) -> None:
    """Loses everything on the bus, which stays connected."""
    bus: Any = c.planes.bus
    if silent:
        bus.carry = lambda deliver, *args: None
    else:
        del bus.carry


def test_one_unacknowledged_request_is_enough_to_avoid_a_silent_bus() -> None:
    async def main() -> None:
        async with cluster(engine={"step_ms": 1}) as (c, client, _):
            silence_bus(c, True)
            waits = []
            for _ in range(5):
                began = await now()
                assert (await client.post("/v1/completions", json=BODY | {"max_tokens": 1})).status_code == 200
                waits.append(await now() - began)
            assert sum(wait > 0.5 for wait in waits) <= 1 and max(waits) <= 1.1
            assert not c.frontend.health()["planes"]["nats"]
            silence_bus(c, False)
            await asyncio.sleep(2.1)
            assert c.frontend.health()["planes"]["nats"]
            by_link = c.frontend.metrics.link_fallbacks._value.get()
            assert (await client.post("/v1/completions", json=BODY | {"max_tokens": 1})).status_code == 200
            assert c.frontend.metrics.link_fallbacks._value.get() == by_link

    clock.run(main())


@pytest.mark.parametrize("outage", ["silent", "down"])
def test_loads_and_kv_events_go_over_the_link_while_the_bus_is_out(outage: str) -> None:
    async def main() -> None:
        async with cluster(aggregated=1, engine={"step_ms": 1, "num_blocks": 64}) as (c, client, _):
            if outage == "silent":
                silence_bus(c, True)
            else:
                c.planes.bus_up = False
            await asyncio.sleep(3)
            resyncs = c.frontend.fleet.feeds.resyncs
            for i in range(30):  # more than the cache holds
                ask = BODY | {"prompt": [400 + i] * 200, "max_tokens": 2}
                assert (await client.post("/v1/completions", json=ask)).status_code == 200
            await asyncio.sleep(1)
            (instance,) = c.frontend.health()["instances"]
            held = c.workers[0]._journal._hashes
            assert instance["index"] == "exact" and instance["cached_blocks"] == len(held) > 0
            assert instance["load_age_s"] <= 0.6 and instance["load"]["total_blocks"] == 64
            assert c.frontend.fleet.feeds.resyncs == resyncs  # the numbering goes on
            again = await client.post("/v1/completions", json=BODY | {"prompt": [429] * 200, "max_tokens": 2})
            assert json.loads(again.text)["usage"]["prompt_tokens_details"]["cached_tokens"] == 192
            if outage == "silent":
                silence_bus(c, False)
            else:
                c.planes.bus_up = True
            await asyncio.sleep(3)
            assert not c.workers[0]._by_link and c.frontend.health()["planes"]["nats"]

    clock.run(main())


def test_a_load_report_is_not_believed_for_ever() -> None:
    async def main() -> None:
        async with cluster(aggregated=1) as (c, _, _expected):
            silence_bus(c, True)
            c.workers[0]._send_by_link = lambda message: None  # type: ignore[method-assign]
            await asyncio.sleep(7)
            (instance,) = c.frontend.health()["instances"]
            assert instance["load"] is None and instance["load_age_s"] is None
            assert c.frontend.router.ledger.account(c.workers[0].id).held_tokens is None

    clock.run(main())
