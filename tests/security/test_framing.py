"""The end of a request: an answer must never reach another client, whichever proxy is in front of this server."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from dynserve.errors import ConfigError
from dynserve.server.heads import HttpLimits, allowed_hosts
from dynserve.server.protocol import MAX_PIPELINED
from dynserve.server.serving import bind, serving
from tests.security.streams import Generator, Harness, Seen, differs, read_by_h11

# `make differential` reads 100,000
STREAMS = int(os.environ.get("DIFFERENTIAL_STREAMS", "2000"))
HOST = b"Host: localhost\r\n"


@pytest.fixture(autouse=True)
def _short_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynserve.server.protocol.DRAIN", 0.1)


async def test_generated_streams_are_read_as_h11_reads_them() -> None:
    generator, harness = Generator(seed=STREAMS), Harness()
    whole = refused = 0
    for _ in range(STREAMS):
        packets = generator.packets()
        stream = b"".join(packets)
        ours, theirs = await harness.read(packets), read_by_h11(stream)
        assert not (why := differs(ours, theirs, stream)), f"{why}: {packets}\nours: {ours}\nh11: {theirs}"
        whole += len(ours.requests)
        refused += ours.refused
    print(f"{STREAMS:,} streams: {whole:,} requests with the same bodies, {refused:,} streams refused")
    assert whole > STREAMS / 2 and refused > STREAMS / 10  # the generator makes both kinds


@pytest.mark.parametrize("upgrade", [b"h2c", b"websocket", b"h2c,foo", b"h2c;q=1", b"TLS/1.0", b"H2C", b""])
@pytest.mark.parametrize("together", [True, False])
async def test_an_upgrade_header_does_not_lose_the_body(upgrade: bytes, together: bool) -> None:
    head = b"POST /a HTTP/1.1\r\n" + HOST + b"Connection: Upgrade\r\nUpgrade: " + upgrade + b"\r\n"
    smuggled = b"GET /smuggled HTTP/1.1\r\n" + HOST + b"\r\n"
    length = b"Content-Length: %d\r\n\r\n" % len(smuggled)
    then = b"GET /b HTTP/1.1\r\n" + HOST + b"\r\n"
    packets = [head + length + smuggled + then] if together else [head + length, smuggled, then]
    reading = await Harness().read(packets)
    assert reading.requests == [Seen(b"POST", b"/a", smuggled), Seen(b"GET", b"/b", b"")] and not reading.refused


async def test_no_byte_of_a_chunked_body_is_changed() -> None:
    chunk = b"a\r\nupgrade: h2c\r\nb"
    head = b"POST /a HTTP/1.1\r\n" + HOST + b"Upgrade: h2c\r\nConnection: Upgrade\r\nTransfer-Encoding: chunked\r\n\r\n"
    body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(chunk), chunk)
    for packets in ([head + body], [head, body], [head + body[:6], body[6:]], [head, body + head + body]):
        reading = await Harness().read(packets)
        assert {seen.body for seen in reading.requests} == {chunk} and not reading.refused


REFUSED = {
    "no Host": (b"GET /live HTTP/1.1\r\n\r\n", 400),
    "two Hosts": (b"GET /live HTTP/1.1\r\n" + HOST + HOST + b"\r\n", 400),
    "an empty Host": (b"GET /live HTTP/1.1\r\nHost:\r\n\r\n", 400),
    "a Host with a path": (b"GET /live HTTP/1.1\r\nHost: localhost/x\r\n\r\n", 400),
    "a Host with a user": (b"GET /live HTTP/1.1\r\nHost: a@localhost\r\n\r\n", 400),
    "another coding": (b"POST /a HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: gzip\r\n\r\n", 501),
    "two codings": (b"POST /a HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 400),
    "a coding twice": (b"POST /a HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n" * 2 + b"\r\n0\r\n\r\n", 400),
    "a coding in HTTP/1.0": (b"POST /a HTTP/1.0\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "a coding and a length": (
        b"POST /a HTTP/1.1\r\n" + HOST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400,
    ),
    "HTTP/0.9": (b"GET /live HTTP/0.9\r\n" + HOST + b"\r\n", 505),
    "HTTP/2.0 in words": (b"GET /live HTTP/2.0\r\n" + HOST + b"\r\n", 505),
    "no version": (b"GET /live\r\n\r\n", 505),
    "a tunnel": (b"CONNECT localhost:22 HTTP/1.1\r\n" + HOST + b"\r\n", 405),
    "another server's name": (b"GET /live HTTP/1.1\r\nHost: rebound.example\r\n\r\n", 421),
    "another server's name as the target": (b"GET http://rebound.example/live HTTP/1.1\r\n" + HOST + b"\r\n", 421),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
async def test_requests_that_can_be_read_in_two_ways_are_refused(case: str) -> None:
    request, status = REFUSED[case]
    answer = await exchange(request + b"GET /live HTTP/1.1\r\n" + HOST + b"\r\n")
    assert answer.startswith(b"HTTP/1.1 %d " % status) and answer.count(b"content-type") == 1, answer
    assert b"connection: close" in answer and b'"message"' in answer


@pytest.mark.parametrize(
    "host", [b"localhost", b"LOCALHOST:8000", b"127.0.0.1:8000", b"[::1]:8000", b"10.0.0.7", b"api.localhost"]
)
async def test_host_names_of_this_machine_and_ip_addresses_are_accepted(host: bytes) -> None:
    answer = await exchange(b"GET /live HTTP/1.1\r\nConnection: close\r\nHost: " + host + b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")


def test_all_hosts_are_allowed_on_public_addresses_unless_configured() -> None:
    assert allowed_hosts(None, "0.0.0.0") is None and allowed_hosts("*", "127.0.0.1") is None
    assert allowed_hosts("API.example, b.example", "127.0.0.1") == {"api.example", "b.example"}
    for loopback in ("127.0.0.1", "127.5.0.1", "::1", "localhost"):
        names = allowed_hosts(None, loopback)
        assert names is not None and "localhost" in names and "rebound.example" not in names
    with pytest.raises(ConfigError, match="--allowed-hosts"):
        allowed_hosts(" , ", "127.0.0.1")


async def test_complete_requests_before_an_invalid_one_are_answered() -> None:
    good = b"GET /live HTTP/1.1\r\n" + HOST + b"\r\n"
    answer = await exchange(good * 2 + b"GET /live HTTP/9.9\r\n" + HOST + b"\r\n" + good)
    assert answer.count(b"HTTP/1.1 200 ") == 2 and answer.count(b"HTTP/1.1 ") == 2


async def test_the_number_of_pipelined_requests_is_bounded() -> None:
    good = b"GET /live HTTP/1.1\r\n" + HOST + b"\r\n"
    answer = await exchange(good * 5000)
    assert answer.count(b"HTTP/1.1 200 ") == 1 + MAX_PIPELINED


async def test_a_large_body_after_an_unanswered_request_is_not_buffered() -> None:
    good = b"GET /live HTTP/1.1\r\n" + HOST + b"\r\n"
    answer = await exchange(good + b"POST /a HTTP/1.1\r\n" + HOST + b"Content-Length: 200000\r\n\r\n" + b"x" * 200_000)
    assert answer.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize(
    "head",
    [
        b"GET /live HTTP/1.1\r\n" + HOST + b"a:\r\n" * 300,
        b"GET /live HTTP/1.1\r\n" + HOST + b"Connection: upgrade\r\nUpgrade: x\r\n" + b"a:\r\n" * 300,
        b"POST /live HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n" + b"a:\r\n" * 300,
    ],
)
async def test_headers_are_bounded_in_number(head: bytes) -> None:
    answer = await exchange(head + b"\r\n")
    assert answer.startswith(b"HTTP/1.1 431 ") and answer.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize("target", [b"http://localhost", b"http://"])
async def test_an_invalid_target_does_not_prevent_answers_to_earlier_requests(target: bytes) -> None:
    good = b"GET /live HTTP/1.1\r\n" + HOST + b"\r\n"
    assert (await exchange(b"GET " + target + b" HTTP/1.1\r\n" + HOST + b"\r\n")).startswith(b"HTTP/1.1 4")
    answer = await exchange(good * 2 + b"GET " + target + b" HTTP/1.1\r\n" + HOST + b"\r\n")
    assert answer.count(b"HTTP/1.1 200 ") == 2 and answer.count(b"HTTP/1.1 ") == 2


async def test_answered_pipelined_bodies_no_longer_count_against_the_bound() -> None:
    """A client that always has a few requests on their way is served for ever."""
    post = b"POST /a HTTP/1.1\r\n" + HOST + b"Content-Length: 9000\r\n\r\n" + b"x" * 9000
    async with slow_server() as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post * 3)
        for _ in range(20):
            writer.write(post)
            async with asyncio.timeout(10):
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        writer.close()


async def test_clients_that_disconnect_from_a_pipeline_cause_no_error(caplog: pytest.LogCaptureFixture) -> None:
    good = b"GET /live HTTP/1.1\r\n" + HOST + b"\r\n"
    async with slow_server() as port:
        for _ in range(5):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(good * 3)
            await asyncio.sleep(0.001)
            writer.transport.abort()
        await asyncio.sleep(0.05)
    assert not caplog.records


async def test_nothing_follows_the_answer_to_a_request_whose_body_is_invalid() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    sock = bind("127.0.0.1", 0, "--http-port")
    async with serving(app, sock, HttpLimits()):
        reader, writer = await asyncio.open_connection("127.0.0.1", sock.getsockname()[1])
        writer.write(b"POST /a HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n")
        answer = await reader.readuntil(b"\r\n\r\n")
        writer.write(b"nonsense\r\n")
        async with asyncio.timeout(10):
            assert answer.startswith(b"HTTP/1.1 200 ") and await reader.read() == b""
        writer.close()


@asynccontextmanager
async def slow_server() -> AsyncIterator[int]:
    """A server that takes a moment for each answer, so that requests which come together wait behind each other."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        await asyncio.sleep(0.002)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    sock = bind("127.0.0.1", 0, "--http-port")
    async with serving(app, sock, HttpLimits(hosts=allowed_hosts(None, "127.0.0.1"))):
        yield sock.getsockname()[1]


async def exchange(request: bytes) -> bytes:
    """Returns the answer of a server on loopback, up to the end of the connection."""
    async with slow_server() as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        answer = b""
        try:
            async with asyncio.timeout(10):
                while data := await reader.read(65536):
                    answer += data
        except ConnectionError:
            pass  # a connection that was still sending may be reset behind its last answer
        writer.close()
    return answer
