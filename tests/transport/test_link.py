"""The contract of links, over TCP and in memory."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dynserve.errors import ConfigError, Unavailable
from dynserve.transport import link as link_module
from dynserve.transport.base import Link, Links
from dynserve.transport.link import TcpLinks
from dynserve.transport.memory import MemoryLink, MemoryLinks
from dynserve.wire.link import Cancel, FrontendPing, HandoffDeclined, Hello, StepTokens, Tokens, WorkerPing
from tests.certificates import Authority
from tests.conftest import until


class End:
    """Records the messages that one side receives."""

    def __init__(self) -> None:
        self.links: list[Link] = []
        self.bursts: list[list[Any]] = []
        self.reasons: list[str] = []

    def accept(self, link: Link) -> End:
        self.links.append(link)
        return self

    def received(self, link: Link, messages: list[Any]) -> None:
        relevant = [m for m in messages if not isinstance(m, WorkerPing | FrontendPing)]
        if relevant:
            self.bursts.append(relevant)

    def lost(self, link: Link, reason: str) -> None:
        self.reasons.append(reason)


@pytest.fixture(params=["tcp", "tls", "memory"])
def links(request: pytest.FixtureRequest, authority: Authority) -> Links:
    if request.param == "memory":
        return MemoryLinks()
    return TcpLinks(tls=authority.tls if request.param == "tls" else None)


async def test_messages_go_both_ways_in_order(links: Links) -> None:
    frontend, worker = End(), End()
    async with links.listen("127.0.0.1", 0, frontend.accept) as address:
        link = await links.dial(address, worker)
        link.send(Hello("w", 1))
        await until(lambda: frontend.bursts == [[Hello("w", 1)]])
        frontend.links[0].send(Cancel(5))
        await until(lambda: worker.bursts == [[Cancel(5)]])
        link.close()


async def test_messages_of_one_iteration_of_the_event_loop_are_one_frame(links: Links) -> None:
    frontend, worker = End(), End()
    async with links.listen("127.0.0.1", 0, frontend.accept) as address:
        link = await links.dial(address, worker)
        link.send(Hello("w", 1))
        await until(lambda: len(frontend.bursts) == 1)
        for i in range(100):
            link.send(Tokens(i, b"x" * 1000, [i]))
        await until(lambda: len(frontend.bursts) == 2)
        assert [m.stream for m in frontend.bursts[1]] == list(range(100))
        link.close()


async def test_tokens_of_one_loop_iteration_are_one_message_and_keep_their_order(links: Links) -> None:
    frontend, worker = End(), End()
    async with links.listen("127.0.0.1", 0, frontend.accept) as address:
        link = await links.dial(address, worker)
        link.send_token(1, 10, b"a")
        link.send_token(2, 20, b"")
        link.send(HandoffDeclined(3))
        link.send_token(3, 30, b"c")
        link.send_token(1, 11, b"d")
        await until(lambda: len(frontend.bursts) == 1)
        link.send_token(1, 12, b"e")
        await until(lambda: len(frontend.bursts) == 2)
        first = [
            StepTokens([1, 2], [10, 20], [b"a", b""]),
            HandoffDeclined(3),
            StepTokens([3, 1], [30, 11], [b"c", b"d"]),
        ]
        assert frontend.bursts == [first, [StepTokens([1], [12], [b"e"])]]
        link.close()
        link.send_token(1, 13, b"f")
        link.send_token(1, 14, b"g")
        await until(lambda: bool(frontend.reasons))
        assert len(frontend.bursts) == 2


async def test_closing_flushes_messages_and_notifies_both_sides_once(links: Links) -> None:
    frontend, worker = End(), End()
    async with links.listen("127.0.0.1", 0, frontend.accept) as address:
        link = await links.dial(address, worker)
        await until(lambda: bool(frontend.links))
        link.send(Hello("w", 1))
        link.close()
        link.close()
        link.send(Hello("w", 2))
        await until(lambda: len(frontend.reasons) == len(worker.reasons) == 1)
        assert frontend.bursts == [[Hello("w", 1)]] and link.closed


async def test_closing_the_listener_ends_its_links(links: Links) -> None:
    frontend, worker = End(), End()
    async with links.listen("127.0.0.1", 0, frontend.accept) as address:
        await links.dial(address, worker)
        await until(lambda: bool(frontend.links))
    await until(lambda: len(worker.reasons) == 1)


async def test_dialling_a_closed_port_fails_with_the_address(links: Links) -> None:
    with pytest.raises(Unavailable, match="127.0.0.1:1"):
        await links.dial("127.0.0.1:1", End())


async def test_a_silent_peer_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "HEARTBEAT", 0.02)
    monkeypatch.setattr(link_module, "SILENCE", 0.1)
    frontend, worker, links = End(), End(), MemoryLinks()
    async with links.listen("", 0, frontend.accept) as address:
        link = await links.dial(address, worker)
        assert isinstance(link, MemoryLink)
        link.silence()
        await until(lambda: bool(frontend.reasons))
        assert "silent" in frontend.reasons[0]


async def test_a_watched_peer_is_suspected_heard_again_and_lost(links: Links, monkeypatch: pytest.MonkeyPatch) -> None:
    frontend, worker = End(), End()
    suspicions: list[bool] = []
    async with links.listen("127.0.0.1", 0, frontend.accept) as address:
        link: Any = await links.dial(address, worker)
        link.send(Hello("w", 1))
        await until(lambda: bool(frontend.bursts))
        ping_s = frontend.links[0].watch(0.2, 1.0, suspicions.append)
        assert 0 < ping_s < 0.1
        link.ping_every(ping_s)
        await asyncio.sleep(0.5)
        assert suspicions == []  # its pings are enough
        with monkeypatch.context() as frozen:
            frozen.setattr(link, "_beat", link._beat_in)  # it neither pings nor sends
            link._timer.cancel()
            await until(lambda: suspicions == [True])
            assert not frontend.reasons
        link.send(HandoffDeclined(3))
        link._beat_in()
        await until(lambda: suspicions == [True, False])
        link._timer.cancel()
        await until(lambda: bool(frontend.reasons))
        assert suspicions == [True, False, True] and "silent for 1." in frontend.reasons[0]


async def test_an_idle_peer_that_sends_heartbeats_stays_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "HEARTBEAT", 0.02)
    monkeypatch.setattr(link_module, "SILENCE", 0.1)
    frontend, worker, links = End(), End(), TcpLinks()
    async with links.listen("127.0.0.1", 0, frontend.accept) as address:
        link = await links.dial(address, worker)
        await asyncio.sleep(0.3)
        assert not link.closed and not frontend.reasons
        link.close()


@pytest.mark.parametrize("nonsense", [b"\xff\xff\xff\xff", b"\x01\x00\x00\x00\xc1", b"\x02\x00\x00\x00\x91\x90"])
async def test_a_peer_that_sends_invalid_frames_is_disconnected(nonsense: bytes) -> None:
    frontend = End()
    async with TcpLinks().listen("127.0.0.1", 0, frontend.accept) as address:
        host, port = address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(nonsense)
        try:
            await reader.read()
        except ConnectionResetError:
            pass
        writer.close()
        await until(lambda: len(frontend.reasons) == 1)
        assert "sent" in frontend.reasons[0]


async def test_frames_may_arrive_in_any_pieces() -> None:
    frontend = End()
    async with TcpLinks().listen("127.0.0.1", 0, frontend.accept) as address:
        host, port = address.split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        frame = bytearray(4)
        link_module.wire.encode_into([Hello("w", 1)], frame, 4)
        frame[:4] = (len(frame) - 4).to_bytes(4, "little")
        for i in range(len(frame) * 2):
            writer.write((bytes(frame) * 2)[i : i + 1])
            await writer.drain()
            await asyncio.sleep(0)
        await until(lambda: len(frontend.bursts) == 2)
        writer.close()
        await until(lambda: bool(frontend.reasons))


async def test_a_port_in_use_is_a_configuration_error() -> None:
    async with TcpLinks().listen("127.0.0.1", 0, End().accept) as address:
        with pytest.raises(ConfigError, match="cannot listen"):
            async with TcpLinks().listen("127.0.0.1", int(address.split(":")[1]), End().accept):
                pass


@pytest.mark.parametrize("host", ["0.0.0.0", "::1", "localhost"])
async def test_a_worker_reaches_a_frontend_at_the_address_that_it_advertises(host: str) -> None:
    frontend, worker = End(), End()
    links = TcpLinks()
    async with links.listen(host, 0, frontend.accept) as address:
        assert "0.0.0.0" not in address
        link = await links.dial(address, worker)
        link.send(Hello("w", 1))
        await until(lambda: frontend.bursts == [[Hello("w", 1)]])
        link.close()


async def test_a_frontend_behind_another_address_advertises_that_one() -> None:
    async with TcpLinks("frontend.example").listen("0.0.0.0", 0, End().accept) as address:
        assert address.startswith("frontend.example:")
