"""The shortcuts from the server to the generating routes, and from the link to the client's socket."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import httpx
import pytest

from dynserve import Cluster
from dynserve.frontend.app import GenerationApp
from dynserve.frontend.pipeline import InferenceRequest, Run
from dynserve.frontend.reply import Reply
from dynserve.frontend.response import TokenResponse
from dynserve.server.serving import bind, serving
from dynserve.wire.link import HandoffDeclined, StepTokens
from dynserve.wire.requests import Busy
from tests.conftest import MODEL, reference_cycles, until

ASK: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "What is 3+4?"}], "seed": 1}


def simulated(**how: Any) -> Cluster:
    return Cluster(**({"aggregated": 1, "executor": "simulated", "engine": {"speed": 0}} | how))


@pytest.mark.parametrize(
    ("path", "body", "headers"),
    [
        ("/v1/chat/completions", ASK, {}),
        ("/v1/chat/completions", ASK | {"stream": True}, {}),
        ("/v1/chat/completions", ASK | {"temperatur": 1}, {}),
        ("/v1/chat/completions", ASK | {"n": 3}, {"x-request-id": "mine"}),
        ("/v1/completions", {"model": MODEL, "prompt": [5, 6], "max_tokens": 3}, {"x-request-id": "a b"}),
        ("/v1/chat/completions", ASK | {"temperature": 9}, {}),
        ("/v1/chat/completions", b"{", {}),
        ("/v1/chat/completions", ASK | {"model": "nobody"}, {}),
        ("/v1/messages", {"model": MODEL, "messages": []}, {}),
        ("/v1/embeddings", {"model": MODEL, "input": "x"}, {}),
        ("/v1/responses", {"model": MODEL, "input": "What is 3+4?"}, {}),
    ],
)
async def test_the_shortcut_and_the_full_application_give_the_same_answer(
    path: str, body: Any, headers: dict[str, str]
) -> None:
    """Ids and times are not compared."""
    async with simulated() as c:
        apps = c.apps[0]
        assert isinstance(apps.served, GenerationApp)
        found = []
        for app in (apps.app, apps.served):
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://c", headers=headers) as client:
                content = body if isinstance(body, bytes) else json.dumps(body)
                answer = await client.post(path, content=content)
            names = {name for name in answer.headers if name not in ("date", "content-length")}
            found.append((answer.status_code, names, answer.headers.get("content-type"), shape(answer.text)))
        assert found[0] == found[1]


def shape(text: str) -> Any:
    """Returns the answer without ids and times."""
    parts = [line.removeprefix("data: ") for line in text.splitlines() if line and line != "data: [DONE]"]
    return [cleaned(json.loads(part)) if part.startswith("{") else part for part in parts]


def cleaned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: cleaned(item) for key, item in value.items() if key not in ("id", "created", "created_at")}
    return [cleaned(item) for item in value] if isinstance(value, list) else value


async def test_with_cors_origins_the_shortcut_is_not_used() -> None:
    async with simulated(options={"cors_origins": "https://a.example"}) as c:
        assert c.apps[0].served is c.apps[0].app


async def read_slowly(port: int, body: dict[str, Any], pause: Any) -> bytes:
    """Returns the response as read by a client with a small receive buffer that pauses between reads."""
    loop = asyncio.get_running_loop()
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await loop.sock_connect(sock, ("127.0.0.1", port))
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(content)}\r\nconnection: close\r\n\r\n"
    await loop.sock_sendall(sock, head.encode() + content)
    data = bytearray()
    with sock:
        while got := await loop.sock_recv(sock, 4096):
            data += got
            if pause is not None:
                await pause(len(data))
    return bytes(data)


async def test_a_slow_client_that_catches_up_misses_no_token() -> None:
    body = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 6000, "ignore_eos": True, "stream": True, "logprobs": 1}
    async with simulated(engine={"speed": 0, "num_blocks": 1000, "max_seq_len": 8000}) as c:
        sock = bind("127.0.0.1", 0, "--http-port")
        port = sock.getsockname()[1]
        async with serving(c.apps[0].served, sock):
            (worker,) = c.workers
            running = worker.executor.load

            async def until_it_has_piled_up(read: int) -> None:
                if read < 200_000 and not read % 3:
                    await asyncio.sleep(0.002)

            async def first_stop(read: int) -> None:
                if read <= 4096:  # nothing is read until the engine has finished
                    await until(lambda: not running().running)

            texts = []
            for pause in (None, until_it_has_piled_up, first_stop):
                data = await read_slowly(port, body, pause)
                lines = [line[6:] for line in data.split(b"\n") if line.startswith(b"data: {")]
                texts.append("".join(json.loads(line)["choices"][0]["text"] for line in lines))
                assert data.count(b"data: [DONE]") == 1
    assert texts[0] == texts[1] == texts[2] and len(texts[0]) > 6000


async def test_most_tokens_of_a_client_that_keeps_up_wake_no_task(monkeypatch: pytest.MonkeyPatch) -> None:
    from dynserve.streams import Channel

    receives = 0
    receive = Channel.receive

    async def counted(self: Any) -> Any:
        nonlocal receives
        receives += 1
        return await receive(self)

    monkeypatch.setattr(Channel, "receive", counted)
    body = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 200, "ignore_eos": True, "stream": True}
    async with simulated(engine={"step_ms": 1}) as c:
        sock = bind("127.0.0.1", 0, "--http-port")
        port = sock.getsockname()[1]
        async with serving(c.apps[0].served, sock):
            receives = 0
            data = await read_slowly(port, body, None)
    assert data.count(b"data: {") >= 200
    assert receives < 30


async def test_streams_that_end_at_different_times_lose_no_token() -> None:
    """Ends and tokens of several streams come in one frame."""
    async with simulated(engine={"speed": 0, "num_blocks": 4000}) as c:
        sock = bind("127.0.0.1", 0, "--http-port")
        port = sock.getsockname()[1]
        async with serving(c.apps[0].served, sock):

            async def one(number: int) -> None:
                length = 20 + 7 * number
                body = {"model": MODEL, "prompt": [300 + number] * 9, "max_tokens": length, "ignore_eos": True}
                data = await read_slowly(port, body | {"stream": True, "logprobs": 0}, None)
                lines = [json.loads(line[6:]) for line in data.split(b"\n") if line.startswith(b"data: {")]
                entries = [line["choices"][0]["logprobs"] for line in lines]
                assert sum(len(entry["tokens"]) for entry in entries if entry) == length

            for _ in range(5):
                await asyncio.gather(*(one(number) for number in range(40)))


@pytest.mark.parametrize(
    ("end", "stream"),
    [
        ("finished", True),
        ("finished", False),
        ("refused", False),
        ("moved", True),
        ("fanned", False),
        ("lost", True),
        ("invalid", False),
        ("left", True),
    ],
)
async def test_a_request_leaves_no_reference_cycle(end: str, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The garbage collector runs so rarely that cycles of requests would fill the memory first."""
    body = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 20, "ignore_eos": True, "stream": stream}
    workers = 2 if end == "moved" else 1
    async with simulated(aggregated=workers, engine={"speed": 1 if end in ("lost", "left") else 0}) as c:
        sock = bind("127.0.0.1", 0, "--http-port")
        port = sock.getsockname()[1]
        async with serving(c.apps[0].served, sock):
            assert b" 200 " in await posted(port, body)
            if end in ("refused", "moved", "fanned"):
                body["n"] = 2 if end == "fanned" else 1
                monkeypatch.setattr(c.workers[0], "start", lambda request: Busy(7))
            elif end == "invalid":
                body["temperature"] = 9
            else:
                body["max_tokens"] = 20 if end == "finished" else 1500
            with reference_cycles(Run, Reply, InferenceRequest, TokenResponse) as cyclic:
                for _ in range(5):
                    await request_ending(end, c, port, body)
                await until(lambda: not any(peer.replies for peer in c.frontend.fleet.peers.values()))
                await asyncio.sleep(0.01)
            assert cyclic == []


async def request_ending(end: str, c: Cluster, port: int, body: dict[str, Any]) -> None:
    """Sends a request that ends in this way."""
    if end not in ("lost", "left"):
        await posted(port, body)
        return
    pending = asyncio.ensure_future(posted(port, body))
    await until(
        lambda: any(reply.tokens for peer in c.frontend.fleet.peers.values() for reply in peer.replies.values())
    )
    if end == "lost":
        next(iter(c.workers[0].links.values())).abort("cut")
        assert b" 200 " not in await pending or body["stream"]
        await until(lambda: c.frontend.fleet.serves(MODEL))
    else:
        pending.cancel()
        await asyncio.wait([pending])


async def posted(port: int, body: dict[str, Any]) -> bytes:
    """Returns the whole response, read from a new connection."""
    content = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
        writer.write(head % len(content) + content)
        return await reader.read()
    finally:
        writer.close()


async def test_tokens_of_frames_received_together_are_written_together() -> None:
    """A frontend that fell behind writes the tokens of several frames at once."""
    async with simulated() as c:
        fleet, written = c.frontend.fleet, list[bytes]()
        (peer,) = fleet.peers.values()
        loop = asyncio.get_running_loop()
        replies = [Reply(peer, n, 1 << 20, loop.time() + 60, lambda: None, lambda count: None) for n in (901, 902)]
        for reply in replies:
            reply.write = lambda data, stream=reply.stream: written.append(b"%d:%b" % (stream, data)) is None  # type: ignore[misc]
        assert peer.link is not None
        steps = [
            StepTokens([901, 902, 77], [1, 2, 3], [b"a", b"", b"-"]),
            StepTokens([902, 901], [4, 5], [b"b", b"c"]),
            HandoffDeclined(902),
            StepTokens([901], [6], [b"d"]),
        ]
        fleet.received(peer.link, list(steps))
        assert written == [b"901:ac", b"902:b", b"901:d"]
        assert [reply.tokens for reply in replies] == [[1, 5, 6], [2, 4]] and replies[1].handoff_declined
        replies[0].write = lambda data: False  # the client is behind now: records wait in the channel for their reader
        fleet.received(peer.link, [StepTokens([901], [7], [b"e"])])
        fleet.received(peer.link, [StepTokens([901], [8], [b"f"])])
        assert replies[0].write is None
        assert [record.data for record in await replies[0].channel.receive()] == [b"e", b"f"]  # type: ignore[union-attr]
        for reply in replies:
            reply.close()
