"""The contracts of Bus and Registry, on the real servers and in memory, and faults that only the real ones can have."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from secrets import token_hex

import httpx
import pytest

from dynserve.errors import Unavailable, translate
from dynserve.local.embedded import free_ports
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


class Replies:
    """The replies that a mailbox received."""

    def __init__(self) -> None:
        self.came: list[tuple[int, bytes | None]] = []

    def __call__(self, number: int, payload: bytes | None) -> None:
        self.came.append((number, payload))


async def test_a_request_gets_its_reply(bus: Bus) -> None:
    subject, replies = f"t.{token_hex(4)}", Replies()
    async with bus.serve(subject, lambda payload: payload + b"!"), bus.mailbox(replies) as mailbox:
        for number in (7, 2**62, 8):
            await mailbox.post(subject, b"%d" % number, number)
        await until(lambda: len(replies.came) == 3)
    assert replies.came == [(7, b"7!"), (2**62, b"%d!" % 2**62), (8, b"8!")]


async def test_a_handler_may_send_no_reply(bus: Bus) -> None:
    subject, replies, heard = f"t.{token_hex(4)}", Replies(), list[bytes]()

    def handler(payload: bytes) -> bytes | None:
        heard.append(payload)
        return payload if payload == b"2" else None

    async with bus.serve(subject, handler), bus.mailbox(replies) as mailbox:
        await mailbox.post(subject, b"1", 1)
        await mailbox.post(subject, b"2", 2)
        await until(lambda: bool(replies.came))
    assert heard == [b"1", b"2"] and replies.came == [(2, b"2")]


async def test_a_request_without_a_subscriber_is_reported_at_once(bus: Bus) -> None:
    subject, replies = f"t.{token_hex(4)}", Replies()
    async with bus.mailbox(replies) as mailbox:
        await mailbox.post(subject, b"", 3)
        await until(lambda: replies.came == [(3, None)])
        async with bus.serve(subject, lambda payload: payload):
            pass
        await mailbox.post(subject, b"", 4)  # serving has ended
        await until(lambda: replies.came[1:] == [(4, None)])


async def test_a_payload_over_the_limit_is_refused_before_it_is_sent(bus: Bus) -> None:
    subject, replies = f"t.{token_hex(4)}", Replies()
    async with bus.serve(subject, lambda payload: b"came"), bus.mailbox(replies) as mailbox:
        await mailbox.post(subject, bytes(bus.max_payload), 1)
        with pytest.raises(Unavailable, match="over"):
            await mailbox.post(subject, bytes(bus.max_payload + 1), 2)
        await until(lambda: replies.came == [(1, b"came")])


async def test_a_reply_to_a_closed_mailbox_is_dropped(bus: Bus) -> None:
    subject, replies, others = f"t.{token_hex(4)}", Replies(), Replies()
    async with bus.serve(subject, lambda payload: payload):
        async with bus.mailbox(replies) as mailbox:
            pass
        with contextlib.suppress(Unavailable):
            await mailbox.post(subject, b"late", 1)
        async with bus.mailbox(others) as other:
            await other.post(subject, b"now", 2)
            await until(lambda: others.came == [(2, b"now")])
    assert not replies.came


async def test_subscribers_receive_messages_in_order(bus: Bus) -> None:
    name, heard, others = token_hex(4), list[bytes](), list[bytes]()
    async with bus.subscribe(f"t.{name}.*.kv", heard.append), bus.subscribe(f"t.{name}.*.load", others.append):
        for i in range(5):
            await bus.publish(f"t.{name}.w{i % 2}.kv", bytes([i]))
        await until(lambda: len(heard) == 5)
    assert heard == [bytes([i]) for i in range(5)] and others == []


def test_subjects_match_as_in_nats() -> None:
    assert matches("a.*.c", "a.b.c") and matches("a.>", "a.b.c")
    assert not matches("a.*", "a.b.c") and not matches("a.>", "a") and not matches("a.b", "a.c")


async def test_a_watcher_receives_existing_new_and_deleted_keys(registry: Registry) -> None:
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


# only the real servers


async def test_nats_is_awaited_at_the_start_and_reconnected_after_its_death(
    tmp_path: Path,
) -> None:
    server = Server("nats", tmp_path)

    async def start_later() -> None:
        await asyncio.sleep(0.3)
        await asyncio.to_thread(server.start)

    starting = asyncio.create_task(start_later())
    async with open_nats(server.url, "test") as bus:
        await starting
        replies = Replies()
        async with bus.serve("t.x", lambda payload: payload), bus.mailbox(replies) as mailbox:
            await mailbox.post("t.x", b"1", 1)
            await until(lambda: replies.came == [(1, b"1")])
            server.kill()
            await until(lambda: not bus.connected)
            with pytest.raises(Unavailable):
                await mailbox.post("t.x", b"2", 2)
            await bus.publish("t.y", b"lost")
            await asyncio.to_thread(server.start)
            await until(lambda: bus.connected)
            async with asyncio.timeout(5):
                while (3, b"3") not in replies.came:  # the subscriptions are on their way
                    await mailbox.post("t.x", b"3", 3)
                    await asyncio.sleep(0.05)
    server.kill()


async def test_an_etcd_that_restarts_empty_changes_no_watchers_view(
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


async def test_a_nats_that_accepts_but_does_not_answer_yet_is_awaited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is just starting on a busy machine behaves like this."""
    monkeypatch.setattr(nats_bus, "CONNECT_TIMEOUT", 0.2)
    server = Server("nats", tmp_path)
    writers: list[asyncio.StreamWriter] = []
    silent = await asyncio.start_server(lambda _, writer: writers.append(writer), "127.0.0.1", server.port)

    async def opened() -> bool:
        async with nats_bus.open_nats(server.url, "late") as bus:
            return bus.connected

    opening = asyncio.create_task(opened())
    await until(lambda: len(writers) >= 4)  # probed twice, tried twice
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


# several addresses, users


async def test_a_registry_uses_a_member_of_the_etcd_cluster_that_answers(servers: tuple[str, str]) -> None:
    (dead,) = free_ports(1)
    registry, prefix = EtcdRegistry(f"127.0.0.1:{dead},{servers[0]}"), f"t/{token_hex(4)}/"
    changes: list[Change] = []
    async with registry.watch(prefix, changes.append), registry.register(f"{prefix}a", b"1"):
        await until(lambda: changes == [Put(f"{prefix}a", b"1")], 10)


async def test_a_bus_uses_a_nats_server_of_several_that_answers(servers: tuple[str, str]) -> None:
    (dead,) = free_ports(1)
    async with open_nats(f"nats://127.0.0.1:{dead}, {servers[1]}", "test") as bus:
        assert bus.connected


async def read(registry: EtcdRegistry, key: str) -> None:
    async with registry.client() as client:
        with translate(etcd_registry._ERRORS, "etcd"):
            await client.get(key.encode())


async def test_a_registry_logs_in_with_user_and_password(tmp_path: Path) -> None:
    etcd = Server("etcd", tmp_path)
    etcd.start()
    try:
        async with httpx.AsyncClient(base_url=f"{etcd.url}/v3/auth/", trust_env=False) as client:
            for path, body in (
                ("user/add", {"name": "root", "password": "s3cret,"}),
                ("user/grant", {"user": "root", "role": "root"}),
                ("enable", {}),
            ):
                assert (await client.post(path, json=body)).status_code == 200
        changes: list[Change] = []
        allowed = EtcdRegistry(etcd.url.replace("//", "//root:s3cret%2C@"))
        async with allowed.watch("t/", changes.append), allowed.register("t/a", b"1"):
            await until(lambda: changes == [Put("t/a", b"1")], 10)
        with pytest.raises(Unavailable, match="user name is empty"):
            await read(EtcdRegistry(etcd.url), "t/a")
    finally:
        etcd.kill()


@pytest.mark.parametrize(
    ("flags", "login"), [(["--user", "u", "--pass", "s3cret"], "u:s3cret"), (["--auth", "t0ken"], "t0ken")]
)
async def test_a_bus_logs_in_with_user_and_password_or_with_a_token(
    tmp_path: Path, flags: list[str], login: str
) -> None:
    nats = Server("nats", tmp_path)
    nats._command += flags
    nats.start()
    try:
        async with open_nats(nats.url.replace("//", f"//{login}@"), "test") as bus:
            assert bus.connected
    finally:
        nats.kill()
