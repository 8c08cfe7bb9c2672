"""Hostile peers are disconnected with one line in the log, whatever they send, and other peers are not affected."""

from __future__ import annotations

import asyncio
import logging
import random
import struct
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynserve.cluster import Cluster
from dynserve.transport.link import MAX_FRAME, TcpLink, TcpLinks
from dynserve.transport.memory import MemoryLink
from dynserve.wire import link
from dynserve.wire.discovery import FrontendInstance
from dynserve.wire.requests import Accepted, Busy, TokenLogprob
from dynserve.worker.frontend_links import FrontendLink
from tests.conftest import MODEL, make_request, until
from tests.transport.test_link import End

ASK = {"model": MODEL, "messages": [{"role": "user", "content": "What is 3+4?"}], "max_tokens": 8}


def from_worker(r: random.Random, streams: list[int]) -> Any:
    """Returns a message as a worker might send it, about streams that are open, closed or unknown."""
    stream = r.choice([*streams, 0, 2**62])
    usage = link.Usage(r.randrange(9), r.randrange(9), r.randrange(9))
    return r.choice(
        [
            link.Hello(r.choice(["w", "prefill-x", ""]), r.randrange(3)),
            link.Tokens(stream, b"data: {}", [1, 2, 2**31], [TokenLogprob(1, float("nan"), [(2, -1.0)])]),
            link.StepTokens([stream, 2**62, stream], [5, 6, 7], [b"data: {}", b"", b""]),
            link.StepTokens([stream], [5, 6], []),
            link.Finished(stream, b"", [5], r.choice(["stop", "handoff", ""]), usage),
            link.Failed(stream, r.choice(["internal_error", "no_such_code", "cancelled"]), "x"),
            link.SubmitReply(stream, r.choice([Accepted(), Busy(3)])),
            link.Snapshot(r.randrange(3), r.randrange(9), [r.randrange(2**64) for _ in range(5)], r.random() < 0.5),
            link.WorkerPing(),
        ]
    )


def from_frontend(r: random.Random, _: list[int]) -> Any:
    prompt = [r.randrange(5000) for _ in range(r.randrange(1, 40))]
    request = make_request(
        prompt, stream=r.randrange(5), reply_to=r.choice(["f", "other"]), model=r.choice([MODEL, "x"])
    )
    return r.choice(
        [
            link.Welcome("f"),
            link.Cancel(r.randrange(5)),
            link.Submit(request),
            link.SnapshotRequest(r.randrange(3)),
            link.FrontendPing(),
        ]
    )


def frame(r: random.Random, make: Callable[[random.Random, list[int]], Any], streams: list[int]) -> bytes:
    """Returns valid messages, often with bytes flipped, cut off or doubled."""
    raw = bytearray(msgspec.msgpack.encode([make(r, streams) for _ in range(r.randint(1, 4))]))
    for _ in range(r.choice([0, 0, 1, 1, 2, 8])):
        raw[r.randrange(len(raw))] = r.randrange(256)
    if r.random() < 0.15:
        del raw[r.randrange(len(raw)) :]
    if r.random() < 0.1:
        raw += bytes(raw)
    return bytes(raw)


async def test_a_frontend_survives_hostile_workers() -> None:
    r = random.Random(5)
    async with Cluster(prefill=1, decode=1, executor="simulated", engine={"speed": 0}) as c, c.client() as client:
        address = c.planes.links.addresses[0]
        for round_ in range(400):
            hostile = await c.planes.links.dial(address, End())
            assert isinstance(hostile, MemoryLink)
            if r.random() < 0.8:
                hostile.send(link.Hello(f"hostile-{round_ % 7}", round_, c.frontend.id))
            for _ in range(r.randint(1, 10)):
                streams = [s for peer in c.frontend.fleet.peers.values() for s in peer.replies]
                hostile.write(bytes(4) + frame(r, from_worker, streams))
            await asyncio.sleep(0)
            if round_ % 40 == 0:
                answer = await client.post("/v1/chat/completions", json=ASK)
                assert answer.status_code == 200
            hostile.close()
        answer = await client.post("/v1/chat/completions", json=ASK)
        assert answer.status_code == 200 and len(c.frontend.health()["instances"]) == 2
        assert all(
            peer.id.startswith(("prefill-", "decode-")) for peer in c.frontend.fleet.peers.values() if peer.linked
        )


async def test_a_worker_survives_hostile_frontends() -> None:
    r = random.Random(6)
    async with Cluster(aggregated=1, executor="simulated", engine={"speed": 0}) as c, c.client() as client:
        (worker,) = c.workers
        for round_ in range(300):
            frontend, theirs = MemoryLink(worker_side=False), MemoryLink(worker_side=True)
            frontend.peer, theirs.peer = theirs, frontend
            instance = FrontendInstance(id="f", host="h", pid=1, link_address="memory:", http_url="")
            theirs.start(FrontendLink(instance, worker, c.planes.links))  # type: ignore[arg-type]
            frontend.start(End())  # type: ignore[arg-type]
            worker.linked("f", theirs)  # type: ignore[arg-type]
            for _ in range(r.randint(1, 8)):
                frontend.write(bytes(4) + frame(r, from_frontend, []))
            await asyncio.sleep(0)
            if round_ % 30 == 0:
                assert (await client.post("/v1/chat/completions", json=ASK)).status_code == 200
            frontend.close()
            await until(lambda: "f" not in worker.links)
        assert (await client.post("/v1/chat/completions", json=ASK)).status_code == 200
        await until(lambda: worker.executor.load().free_blocks == worker.executor.load().total_blocks)


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n",
        struct.pack("<I", MAX_FRAME + 1),
        struct.pack("<I", 3) + b"\xc1\xc1\xc1",
        struct.pack("<I", 1) + b"\x80",
        bytes(64),
        b"\xff" * 64,
    ],
)
async def test_a_peer_of_another_protocol_is_disconnected_with_one_log_line(
    garbage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with Cluster(aggregated=1, executor="simulated", engine={"speed": 0}) as c:
        async with TcpLinks().listen("127.0.0.1", 0, c.frontend.fleet.accept) as address:
            host, port = address.rsplit(":", 1)
            reader, writer = await asyncio.open_connection(host, int(port))
            with caplog.at_level(logging.INFO):
                writer.write(garbage)
                async with asyncio.timeout(5):
                    assert await _to_the_end(reader) == b""
                await asyncio.sleep(0)
            writer.close()
        assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1
        assert "Traceback" not in caplog.text


async def _to_the_end(reader: asyncio.StreamReader) -> bytes:
    """Returns the bytes that arrive before the connection ends, without pings."""
    arrived = b""
    try:
        while part := await reader.read(1000):
            arrived += part
    except ConnectionError:
        pass
    return arrived.replace(struct.pack("<I", 3) + msgspec.msgpack.encode([link.FrontendPing()]), b"")


async def test_a_handler_that_raises_closes_only_its_link(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(End):
        def received(self, link: Any, messages: list[Any]) -> None:
            raise RuntimeError("did not expect that")

    here, there = Failing(), End()
    links = TcpLinks()
    async with links.listen("127.0.0.1", 0, here.accept) as address:
        peer = await links.dial(address, there)
        peer.send(link.Hello("w", 1))
        await until(lambda: bool(there.reasons))
        assert here.reasons == ["sent messages that cannot be handled"]
        again = await links.dial(address, End())
        assert not again.closed
        again.close()


@given(st.lists(st.integers(0, 300), max_size=8), st.lists(st.integers(1, 90), min_size=1, max_size=9))
def test_frames_are_reassembled_however_their_bytes_are_split(sizes: list[int], cuts: list[int]) -> None:
    async def pass_through() -> list[Any]:
        heard = End()
        peer = TcpLink(worker_side=False)
        peer.start(heard)  # type: ignore[arg-type]
        sent = [link.Tokens(size, b"x" * size, [size]) for size in sizes]
        raw = b"".join(struct.pack("<I", len(f)) + f for f in (msgspec.msgpack.encode([message]) for message in sent))
        at, turn = 0, 0
        while at < len(raw):
            size = cuts[turn % len(cuts)]
            peer.data_received(raw[at : at + size])
            at, turn = at + size, turn + 1
        peer.ended("done")
        assert not peer._rest
        assert [message for burst in heard.bursts for message in burst] == sent
        return sent

    asyncio.run(pass_through())
