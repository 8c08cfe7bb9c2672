"""The transfer of model files to a frontend, and outages of the in-memory registry."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import httpx
import pytest

from dynserve import Cluster
from dynserve.errors import Unavailable
from dynserve.transport import planes
from dynserve.transport.base import Change, Deleted, Put
from dynserve.transport.memory import MemoryPlanes
from dynserve.transport.planes import fetch_model_file

CONTENT = b'{"a": "tokenizer"}'
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@asynccontextmanager
async def serving(*parts: bytes, headers: str = "", pause: float = 0.0) -> AsyncIterator[str]:
    """The URL of a system server that answers anything with these parts."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 200 OK\r\nconnection: close\r\n{headers}\r\n".encode())
        for part in parts:
            if not writer.is_closing():
                writer.write(part)
                await asyncio.sleep(pause)
        writer.close()

    writers: list[asyncio.StreamWriter] = []
    sock = socket.create_server(("127.0.0.1", 0))
    async with await asyncio.start_server(answer, sock=sock):
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        for writer in writers:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()


async def fetch(url: str) -> bytes:
    async with httpx.AsyncClient(trust_env=False) as client:
        return await fetch_model_file(client, url, DIGEST)


async def test_a_model_file_with_the_right_digest_is_returned_unchanged() -> None:
    async with serving(CONTENT[:5], CONTENT[5:]) as url:
        assert await fetch(url) == CONTENT


async def test_a_model_file_with_another_digest_is_refused() -> None:
    async with serving(CONTENT + b" ") as url:
        with pytest.raises(Unavailable, match=f"does not have the expected SHA-256 {DIGEST[:12]}"):
            await fetch(url)


async def test_a_model_file_is_not_read_beyond_the_size_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planes, "MAX_FILE", len(CONTENT))
    async with serving(CONTENT) as url:
        assert await fetch(url) == CONTENT
    async with serving(CONTENT, *[b"x"] * 1000, pause=0.05) as url:  # all of it would take most of a minute
        async with asyncio.timeout(10):
            with pytest.raises(Unavailable, match="over 18 bytes"):
                await fetch(url)


async def test_a_compressed_model_file_is_not_decompressed() -> None:
    async with serving(gzip.compress(CONTENT), headers="content-encoding: gzip\r\n") as url:
        with pytest.raises(Unavailable, match="SHA-256"):
            await fetch(url)


async def test_a_model_file_that_arrives_too_slowly_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planes, "FETCH_TIMEOUT", 0.2)
    async with serving(*[b"x"] * 1000, pause=0.05) as url:
        with pytest.raises(Unavailable, match=f"model file from {url}"):
            await fetch(url)


async def test_the_in_memory_planes_check_the_digest_of_a_model_file() -> None:
    world = MemoryPlanes()
    world.files[DIGEST] = CONTENT
    assert await world.open().fetch_file("memory:", DIGEST) == CONTENT
    world.files[DIGEST] = b"{{ another template }}"
    with pytest.raises(Unavailable, match="SHA-256"):
        await world.open().fetch_file("memory:", DIGEST)
    with pytest.raises(Unavailable, match="no worker has"):
        await world.open().fetch_file("memory:", "0" * 64)


async def test_a_registry_reports_the_changes_of_an_outage_when_it_is_back() -> None:
    world, seen = MemoryPlanes(), list[Change]()
    registry = world.registry
    async with registry.watch("a/", seen.append), registry.register("a/1", b"1"):
        assert seen == [Put("a/1", b"1")]
        world.registry_up = False
        late = list[Change]()
        async with registry.watch("a/", late.append), registry.register("a/2", b"2") as registration:
            async with registry.register("a/3", b"3"):
                registry.lose("a/1")
            assert seen[1:] == late == [] and not registration.registered.is_set()
            world.registry_up = True
            assert seen[1:] == [Deleted("a/1"), Put("a/2", b"2")] and late == [Put("a/2", b"2")]
            assert registration.registered.is_set()


async def test_an_outage_of_the_registry_alone_fails_no_request() -> None:
    async with Cluster(prefill=1, decode=1, executor="simulated") as c, c.client() as client:
        c.planes.registry_up = False
        answer = await client.post("/v1/completions", json={"model": c.model, "prompt": "x", "max_tokens": 3})
        assert answer.status_code == 200
        assert len(c.frontend.health()["instances"]) == 2
