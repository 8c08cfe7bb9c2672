"""The contracts of Bus and Registry, on the real servers and in memory; and what only the real ones can suffer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from secrets import token_hex

import pytest

from dynserve.errors import NoWorker, TimedOut, Unavailable
from dynserve.transport import etcd_registry, nats_bus
from dynserve.transport.base import Bus, Change, Deleted, Put, Registry
from dynserve.transport.etcd_registry import EtcdRegistry
from dynserve.transport.memory import MemoryPlanes, matches
from dynserve.transport.nats_bus import open_nats
from tests.conftest import Server, until


@pytest.fixture(params=["nats", "memory"])
async def bus(request: pytest.FixtureRequest, servers: tuple[str, str]) -> AsyncIterator[Bus]:
    if request.param == "memory":
        yield MemoryPlanes().bus
    else:
        async with open_nats(servers[1], "test") as opened:
            yield opened


@pytest.fixture(params=["etcd", "memory"])
async def registry(request: pytest.FixtureRequest, servers: tuple[str, str]) -> Registry:
    return MemoryPlanes().registry if request.param == "memory" else EtcdRegistry(servers[0])


async def test_a_request_gets_its_reply(bus: Bus) -> None:
    subject = f"t.{token_hex(4)}"
    async with bus.serve(subject, lambda payload: payload + b"!"):
        assert await bus.request(subject, b"hello", 1.0) == b"hello!"


async def test_a_request_to_nobody_fails_at_once(bus: Bus) -> None:
    with pytest.raises(NoWorker):
        await bus.request(f"t.{token_hex(4)}", b"", 5.0)


async def test_a_request_after_serving_has_ended_finds_nobody(bus: Bus) -> None:
    subject = f"t.{token_hex(4)}"
    async with bus.serve(subject, lambda payload: payload):
        pass
    with pytest.raises(NoWorker):
        await bus.request(subject, b"", 5.0)


async def test_a_payload_over_the_limit_is_refused_before_it_is_sent(bus: Bus) -> None:
    subject = f"t.{token_hex(4)}"
    async with bus.serve(subject, lambda payload: b""):
        await bus.request(subject, bytes(bus.max_payload), 1.0)
        with pytest.raises(Unavailable, match="over"):
            await bus.request(subject, bytes(bus.max_payload + 1), 1.0)


async def test_everyone_who_listens_hears_in_order(bus: Bus) -> None:
    name, heard, others = token_hex(4), list[bytes](), list[bytes]()
    async with bus.subscribe(f"t.{name}.*.kv", heard.append), bus.subscribe(f"t.{name}.*.load", others.append):
        for i in range(5):
            await bus.publish(f"t.{name}.w{i % 2}.kv", bytes([i]))
        await until(lambda: len(heard) == 5)
    assert heard == [bytes([i]) for i in range(5)] and others == []


def test_subjects_match_as_in_nats() -> None:
    assert matches("a.*.c", "a.b.c") and matches("a.>", "a.b.c")
    assert not matches("a.*", "a.b.c") and not matches("a.>", "a") and not matches("a.b", "a.c")


async def test_a_watcher_sees_what_is_there_and_what_comes_and_goes(registry: Registry) -> None:
    prefix, seen = f"t/{token_hex(4)}/", list[Change]()
    async with registry.register(prefix + "old", b"1") as registration:
        await registration.registered.wait()
        async with registry.watch(prefix, seen.append):
            await until(lambda: seen == [Put(prefix + "old", b"1")])
            async with registry.register(prefix + "new", b"2") as second:
                await second.registered.wait()
                await until(lambda: seen[1:] == [Put(prefix + "new", b"2")])
            await until(lambda: seen[2:] == [Deleted(prefix + "new")])


async def test_keys_outside_the_prefix_are_not_seen(registry: Registry) -> None:
    prefix, seen = f"t/{token_hex(4)}/", list[Change]()
    async with registry.watch(prefix, seen.append), registry.register(f"t/{token_hex(4)}/x", b"1") as one:
        await one.registered.wait()
        async with registry.register(prefix + "x", b"2"):
            await until(lambda: bool(seen))
    assert seen[0] == Put(prefix + "x", b"2")


# only the real ones


async def test_nats_that_starts_last_is_waited_for_and_one_that_dies_is_reported_and_found_again(
    tmp_path: Path,
) -> None:
    server = Server("nats", tmp_path)

    async def start_later() -> None:
        await asyncio.sleep(0.3)
        await asyncio.to_thread(server.start)

    starting = asyncio.create_task(start_later())
    async with open_nats(server.url, "test") as bus:
        await starting
        async with bus.serve("t.x", lambda payload: payload):
            assert await bus.request("t.x", b"1", 1.0) == b"1"
            server.kill()
            await until(lambda: not bus.connected)
            with pytest.raises(Unavailable):
                await bus.request("t.x", b"2", 1.0)
            await bus.publish("t.y", b"lost")
            await asyncio.to_thread(server.start)
            await until(lambda: bus.connected)
            async with asyncio.timeout(5):
                while True:
                    try:
                        assert await bus.request("t.x", b"3", 1.0) == b"3"
                        break
                    except (NoWorker, TimedOut):
                        await asyncio.sleep(0.05)  # the subscription is on its way
    server.kill()


async def test_an_etcd_that_dies_and_forgets_everything_changes_no_view(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd_registry, "TTL", 2)
    first = Server("etcd", tmp_path / "one")
    (tmp_path / "one").mkdir()
    first.start()
    registry, seen = EtcdRegistry(first.url), list[Change]()
    async with registry.watch("t/", seen.append), registry.register("t/a", b"1") as registration:
        await registration.registered.wait()
        await until(lambda: seen == [Put("t/a", b"1")])
        first.kill()
        await asyncio.sleep(2.5)  # longer than the lease
        assert seen == [Put("t/a", b"1")]
        import shutil

        shutil.rmtree(tmp_path / "one" / "etcd")
        await asyncio.to_thread(first.start)
        observer = list[Change]()
        async with EtcdRegistry(first.url).watch("t/", observer.append):
            await until(lambda: observer == [Put("t/a", b"1")], 15)
        assert seen == [Put("t/a", b"1")]
    first.kill()


async def test_a_nats_that_accepts_and_does_not_answer_yet_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one does that is just starting on a busy machine."""
    monkeypatch.setattr(nats_bus, "CONNECT_TIMEOUT", 0.2)
    server = Server("nats", tmp_path)
    writers: list[asyncio.StreamWriter] = []
    silent = await asyncio.start_server(lambda _, writer: writers.append(writer), "127.0.0.1", server.port)

    async def opened() -> bool:
        async with nats_bus.open_nats(server.url, "late") as bus:
            return bus.connected

    opening = asyncio.create_task(opened())
    await until(lambda: len(writers) >= 4)  # looked at twice, tried twice
    assert not opening.done()
    silent.close()
    for writer in writers:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    monkeypatch.setattr(nats_bus, "CONNECT_TIMEOUT", 2)
    server.start()
    try:
        assert await asyncio.wait_for(opening, 10)
    finally:
        server.kill()
