"""Connections and the memory behind them: pipelines, bodies that do not end, clients that disconnect."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from dynserve.cluster import Cluster
from dynserve.frontend.bodies import RequestBodies
from dynserve.server.heads import HttpLimits
from dynserve.server.serving import bind, serving
from dynserve.server.shortcuts import SMALL_BODY
from tests.conftest import MODEL, until

POST = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


@asynccontextmanager
async def served(engine: dict[str, Any] | None = None, **options: Any) -> AsyncIterator[tuple[int, Cluster]]:
    async with Cluster(aggregated=1, executor="simulated", engine=engine or {"speed": 0}, options=options) as cluster:
        sock = bind("127.0.0.1", 0, "--http-port")
        async with serving(cluster.apps[0].served, sock, HttpLimits()):
            yield sock.getsockname()[1], cluster


@pytest.mark.parametrize("kind", ["prompt", "many prompts", "pipelined"])
async def test_a_disconnect_after_a_large_body_is_detected(kind: str) -> None:
    """Reading is paused while a large body arrives, and a disconnect that is not read goes undetected."""
    async with served({"step_ms": 200}) as (port, cluster):
        prompt: Any = ["one two"] * 8 if kind == "many prompts" else "one two"
        body = json.dumps({"model": MODEL, "prompt": prompt, "max_tokens": 500, "user": "x" * 60_000}).encode()
        body += b" " * 300_000
        request = POST + b"content-length: %d\r\n\r\n" % len(body) + body
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        if kind == "pipelined":
            writer.write(b"GET /live HTTP/1.1\r\nhost: localhost\r\n\r\n" * 3)
        await until(lambda: cluster.workers[0].executor.load().running > 0)
        writer.transport.abort()
        await until(lambda: cluster.frontend.gate.open_requests.count == 0)
        await until(lambda: cluster.workers[0].executor.load().running == 0)


async def test_the_slowest_bodies_are_refused_when_the_memory_budget_is_spent() -> None:
    async with served(max_bodies_bytes=4_000_000, max_body_bytes=2_000_000) as (port, cluster):
        slow = []
        for _ in range(4):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(POST + b"content-length: 1500000\r\n\r\n" + b" " * 1_400_000)
            slow.append((reader, writer))
            await asyncio.sleep(0.05)
        async with asyncio.timeout(10):
            refused = await asyncio.gather(*(reader.readuntil(b"\r\n\r\n") for reader, _ in slow[:2]))
        assert all(head.startswith(b"HTTP/1.1 429") and b"retry-after" in head for head in refused)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            ask = {"model": MODEL, "prompt": "one two", "max_tokens": 2}
            small = await client.post("/v1/completions", json=ask)
            large = await client.post("/v1/completions", content=json.dumps(ask).encode() + b" " * 1_500_000)
        assert (small.status_code, large.status_code) == (200, 200)
        for _, writer in slow:
            writer.transport.abort()
        await until(lambda: cluster.frontend.gate.open_requests.count == 0)


async def test_the_memory_budget_is_restored_when_all_clients_disconnected() -> None:
    async with served(max_body_bytes=2_000_000) as (port, cluster):
        bodies = _bodies_of(cluster)
        writers = []
        for _ in range(5):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(POST + b"content-length: 1500000\r\n\r\n" + b" " * 1_000_000)
            writers.append(writer)
        await until(lambda: bodies.used == 5 * (1_000_000 - SMALL_BODY))
        for writer in writers:
            writer.transport.abort()
        await until(lambda: bodies.used == 0)


def _bodies_of(cluster: Cluster) -> RequestBodies:
    bodies = cluster.apps[0].served._edge.bodies  # type: ignore[attr-defined]
    assert isinstance(bodies, RequestBodies)
    return bodies
