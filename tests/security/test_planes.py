"""Hostile input on the planes: partial frames, invalid entries and numbers, and ports without file descriptors."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aetcd
import msgspec
import psutil
import pytest

from dynserve.addresses import host_port, redacted
from dynserve.errors import ConfigError, HandoffMismatch, Unavailable
from dynserve.executors.handoff import HandoffTable
from dynserve.executors.transceiver import HostBlocks, TcpTransceivers, _decode_reply, _FetchRequest
from dynserve.frontend.group import _without_planes
from dynserve.tasks import persist
from dynserve.transport import link as link_module
from dynserve.transport.etcd_registry import EtcdRegistry
from dynserve.transport.link import MAX_HELLO, TcpLink, TcpLinks
from dynserve.wire import MALFORMED, discovery, events, requests
from dynserve.wire import link as wire
from tests.conftest import make_request, until
from tests.transport.test_link import End

# links


async def connected(address: str, count: int, data: bytes) -> list[asyncio.StreamWriter]:
    host, port = host_port(address, "link", 0)
    writers = []
    for _ in range(count):
        _, writer = await asyncio.open_connection(host, port)
        writer.write(data)
        await writer.drain()
        writers.append(writer)
    return writers


async def test_a_connection_without_a_hello_cannot_make_a_frontend_buffer_frames() -> None:
    frontend = End()
    half = struct.pack("<I", 50 << 20) + b"x" * (4 << 20)
    async with TcpLinks().listen("127.0.0.1", 0, frontend.accept) as address:
        before = psutil.Process().memory_info().rss
        for writer in await connected(address, 20, half[:64]):
            writer.close()
        await until(lambda: len(frontend.reasons) == 20)
        assert all(f"the maximum is {MAX_HELLO}" in reason for reason in frontend.reasons)
        assert psutil.Process().memory_info().rss - before < 16 << 20


async def test_a_connection_that_does_not_say_hello_in_time_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "HELLO_TIMEOUT", 0.2)
    frontend, worker, links = End(), End(), TcpLinks()
    async with links.listen("127.0.0.1", 0, frontend.accept) as address:
        (writer,) = await connected(address, 1, struct.pack("<I", 1000))
        honest = await links.dial(address, worker)
        honest.send(wire.Hello("w", 1))
        while not frontend.reasons:  # byte by byte: it is not silent, and never completes a frame
            writer.write(b"x")
            await asyncio.sleep(0.02)
        assert frontend.reasons == ["did not say hello in time"]
        await asyncio.sleep(0.2)
        assert not honest.closed
        writer.close()
        honest.close()


async def test_an_empty_frame_is_no_hello() -> None:
    frontend = End()
    async with TcpLinks().listen("127.0.0.1", 0, frontend.accept) as address:
        (writer,) = await connected(address, 1, b"\x01\0\0\0\x90" + struct.pack("<I", 60 << 20))
        await until(lambda: bool(frontend.reasons))
        assert frontend.reasons == ["sent no message in its first frame"]
        writer.close()


async def test_a_flood_of_connections_without_a_hello_does_not_keep_workers_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(link_module, "MAX_UNGREETED", 5)
    frontend, worker, links = End(), End(), TcpLinks()
    async with links.listen("127.0.0.1", 0, frontend.accept) as address:
        writers = await connected(address, 20, b"")
        await until(lambda: len(frontend.reasons) == 15)
        honest = await links.dial(address, worker)
        honest.send(wire.Hello("w", 1))
        await until(lambda: bool(frontend.bursts))
        for writer in writers:
            writer.close()
        honest.close()


async def test_links_that_ended_are_released() -> None:
    frontend, links = End(), TcpLinks()
    made: list[TcpLink] = []

    def accept(link: Any) -> End:
        made.append(link)
        return frontend.accept(link)

    async with links.listen("127.0.0.1", 0, accept) as address:
        for number in range(10):
            link = await links.dial(address, End())
            link.send(wire.Hello("w", number))
            link.close()
        await until(lambda: len(frontend.reasons) == 10)
        settled = made[0]._settled
        assert settled is not None
        known = [cell.cell_contents for cell in settled.__closure__ or ()]  # type: ignore[attr-defined]
        assert not any(known), "a link is still held"


async def test_a_worker_keeps_its_link_to_a_frontend_that_was_stalled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "HEARTBEAT", 0.02)
    monkeypatch.setattr(link_module, "SILENCE", 0.1)
    assert link_module.FRONTEND_SILENCE >= 10 * 3
    listener = socket.create_server(("127.0.0.1", 0))  # a frontend whose loop stands still: the kernel accepts
    worker = End()
    link = await TcpLinks().dial(f"127.0.0.1:{listener.getsockname()[1]}", worker)
    await asyncio.sleep(0.5)
    assert not link.closed and not worker.reasons
    link.close()
    await until(lambda: bool(worker.reasons))
    listener.close()


# discovery


@asynccontextmanager
async def watched(servers: tuple[str, str]) -> AsyncIterator[tuple[EtcdRegistry, list[Any]]]:
    registry = EtcdRegistry(servers[0])
    seen: list[Any] = []

    def on_change(change: Any) -> None:
        seen.append(change)
        if b"poison" in getattr(change, "value", b""):
            raise ValueError("an entry that nobody expected")

    async with registry.watch("dynserve/v1/hostile/instances/", on_change):
        yield registry, seen


async def test_no_invalid_entry_in_etcd_stops_its_readers(servers: tuple[str, str]) -> None:
    prefix = b"dynserve/v1/hostile/instances/"
    entries = {b"\xff\xfe": b"\x00", b"decode/x": b"poison", b"decode/ok": b"fine"}

    async with watched(servers) as (registry, seen):

        async def write() -> None:
            async with registry.client() as client:
                for key, value in entries.items():
                    await client.put(prefix + key, value)

        await persist(write, retry_on=aetcd.ClientError, waiting_for="etcd")
        await until(lambda: any(change.key.endswith("decode/ok") for change in seen))
        async with registry.client() as client:
            for key in entries:
                await client.delete(prefix + key)


CARD = discovery.Card(model="m", block_size=32, max_seq_len=100, num_blocks=4, max_batch_size=2, eos_token_ids=[])
INSTANCE = discovery.WorkerInstance(id="decode-1", role="decode", epoch=1, host="h", pid=1, system_url="u", card=CARD)


@pytest.mark.parametrize(
    "changes", [{"block_size": 0}, {"block_size": -1}, {"max_seq_len": 0}, {"num_blocks": -4}, {"eos_token_ids": [-1]}]
)
def test_cards_with_impossible_numbers_are_ignored(changes: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    key = discovery.key("n", INSTANCE)
    assert discovery.parse(key, discovery.encode(INSTANCE)) == INSTANCE
    wrong = msgspec.structs.replace(INSTANCE, card=msgspec.structs.replace(CARD, **changes))
    assert discovery.parse(key, discovery.encode(wrong)) is None and len(caplog.records) == 1


def test_an_entry_under_the_key_of_another_instance_is_ignored(caplog: pytest.LogCaptureFixture) -> None:
    key = discovery.key("n", msgspec.structs.replace(INSTANCE, id="decode-2"))
    assert discovery.parse(key, discovery.encode(INSTANCE)) is None and "its value names" in caplog.text


async def test_dialling_an_invalid_address_raises_unavailable() -> None:
    for address in ("nowhere", "host:99999", "", "[::1"):
        with pytest.raises((Unavailable, ConfigError)) as raised:
            await TcpLinks().dial(address, End())
        assert raised.type is Unavailable


# numbers


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf"), -1.0])
def test_impossible_numbers_are_refused_when_a_message_is_decoded(number: float) -> None:
    encode = msgspec.msgpack.encode
    whole = int(number) if number == -1.0 else number
    messages: list[tuple[Any, bytes]] = [
        (events.decode_load, encode(["w", [whole, 0, 0, 0, 0, 0], 0, 0])),
        (events.decode_shares, encode(["f", True, [["w", whole, 1, 1]]])),
        (events.decode_kv, encode(["w", 1, whole, []])),
        (wire.decode_from_worker, encode([[3, 1, b"", [], "stop", [1, 1, 0, number, 0.0, 0.0, 0]]])),
        (wire.decode_from_worker, encode([[9, [whole], [1], [b""]]])),
        (wire.decode_from_frontend, encode([[22, whole]])),
    ]
    request = requests.encode(make_request([1, 2]))
    fields = msgspec.msgpack.decode(request)
    messages += [
        (requests.decode_request, encode(fields | {"timeout_s": number})),
        (requests.decode_request, encode(fields | {"sampling": {"temperature": number}})),
        (requests.decode_request, encode(fields | {"sampling": {"top_p": number}})),
        (requests.decode_request, encode(fields | {"stop": {"max_tokens": whole}})),
    ]
    for decode, payload in messages:
        with pytest.raises(MALFORMED):
            decode(payload)


# KV transfers


class Store(HostBlocks):
    layout, block_bytes = "secret-layout", 8

    def view(self, block: int) -> memoryview:
        return memoryview(bytearray(8))


async def ask(address: str, fetch: _FetchRequest) -> Any:
    host, port = host_port(address, "kv", 0)
    reader, writer = await asyncio.open_connection(host, port)
    payload = msgspec.msgpack.encode(fetch)
    writer.write(struct.pack("<I", len(payload)) + payload)
    (size,) = struct.unpack("<I", await reader.readexactly(4))
    reply = _decode_reply(await reader.readexactly(size))
    writer.close()
    return reply


def address_of(transceiver: Any) -> str:
    address: str = msgspec.msgpack.decode(transceiver.state())[0]
    return address


async def test_a_fetch_of_an_unknown_hand_off_reveals_nothing_about_the_memory() -> None:
    table = HandoffTable("p", 60, lambda ticket, how: None)
    async with TcpTransceivers().open(table, Store(), "127.0.0.1") as transceiver:
        address = address_of(transceiver)
        handoff = table.open(1, make_request([1, 2]), [0], 8, b"")
        for fetch in (
            _FetchRequest(1, "x", 1, "guess", 0, 1),
            _FetchRequest(handoff.id, "x", 1, "guess", 0, 1),
            _FetchRequest(handoff.id, handoff.request_id, handoff.sequence_hash, "guess", 0, 1),
        ):
            reply = await ask(address, fetch)
            assert reply.code and "secret" not in reply.message, reply
        assert reply.code == HandoffMismatch.code  # a fetch of a known hand-off gets the reason
        table.cancel_all()


async def test_the_kv_port_survives_having_no_file_descriptors(caplog: pytest.LogCaptureFixture) -> None:
    table = HandoffTable("p", 60, lambda ticket, how: None)
    async with TcpTransceivers().open(table, Store(), "127.0.0.1") as transceiver:
        address = address_of(transceiver)
        host, port = host_port(address, "kv", 0)
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        first = socket.create_connection((host, port))
        second = socket.socket()
        second.setblocking(False)
        lowest_free = os.dup(0)
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, before[1]))
        try:
            second.connect_ex((host, port))
            await until(lambda: "no KV transfer can be accepted" in caplog.text)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
            first.close()
            second.close()
        assert (await ask(address, _FetchRequest(1, "x", 1, "guess", 0, 1))).code == "handoff_gone"


async def test_new_idle_connections_at_the_kv_port_are_closed_to_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynserve.executors.transceiver.MAX_NEW_CONNECTIONS", 5)
    table = HandoffTable("p", 60, lambda ticket, how: None)
    async with TcpTransceivers().open(table, Store(), "127.0.0.1") as transceiver:
        address = address_of(transceiver)
        writers = await connected(address, 20, b"\x01")
        assert (await ask(address, _FetchRequest(1, "x", 1, "guess", 0, 1))).code == "handoff_gone"
        await until(lambda: len(transceiver._new_connections) <= 5)  # type: ignore[attr-defined]
        for writer in writers:
            writer.close()


# passwords


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("nats://user:secret@host:4222", "nats://***@host:4222"),
        ("user:secret@host:4222", "***@host:4222"),
        ("nats://u:secret@secret@host:4222", "nats://***@host:4222"),
        ("nats://u:secret,secret@host:4222", "nats://***@host:4222"),
        ("nats://a:secret@h1:1,nats://b:secret@h2:2", "nats://***@h1:1,nats://***@h2:2"),
        ("nats://u:secret/secret@host:4222", "nats://***@host:4222"),
        ("nats://host:4222", "nats://host:4222"),
        ("host:4222/x@y", "***@y"),  # it may be a password with a slash
        ("user:secret/secret@host:4222", "***@host:4222"),
    ],
)
def test_passwords_in_addresses_are_redacted(url: str, shown: str) -> None:
    assert redacted(url) == shown
    with pytest.raises(ConfigError) as raised:
        host_port(url.replace(":4222", ":port").replace(":1", ":port"), "NATS_URL", 4222)
    assert "secret" not in str(raised.value)


def test_processes_of_a_group_receive_addresses_by_the_environment() -> None:
    argv = ["--nats-url", "nats://u:p@h", "--workers", "2", "--etcd-url=http://u:p@h", "--namespace", "x"]
    assert _without_planes(argv) == ["--workers", "2", "--namespace", "x"]
