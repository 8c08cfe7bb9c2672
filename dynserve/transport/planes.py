"""The real planes of one process, opened together from its configuration."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import httpx

from dynserve.config import PlanesConfig
from dynserve.errors import Unavailable, translate
from dynserve.model_files import verified
from dynserve.transport.base import Planes
from dynserve.transport.etcd_registry import EtcdRegistry
from dynserve.transport.link import TcpLinks
from dynserve.transport.nats_bus import open_nats

FETCH_TIMEOUT = 30.0  # seconds, one model file
MAX_FILE = 256 << 20  # bytes; the largest tokenizers have 20 MB


@asynccontextmanager
async def open_planes(config: PlanesConfig, name: str) -> AsyncIterator[Planes]:
    """NATS, etcd, TCP and HTTP. Waits for NATS; etcd is waited for where it is needed."""
    async with AsyncExitStack() as stack:
        registry = EtcdRegistry(config.etcd_url)  # a wrong URL is an error before anything is waited for
        bus = await stack.enter_async_context(open_nats(config.nats_url, name))
        client = await stack.enter_async_context(httpx.AsyncClient(timeout=FETCH_TIMEOUT, trust_env=False))

        async def fetch(system_url: str, digest: str) -> bytes:
            return await fetch_model_file(client, system_url, digest)

        yield Planes(bus, registry, TcpLinks(), fetch)


async def fetch_model_file(client: httpx.AsyncClient, system_url: str, digest: str) -> bytes:
    """A model file from a worker's system server, read no further than `MAX_FILE` bytes.

    Raises:
        Unavailable: the worker did not send it within `FETCH_TIMEOUT`, or sent too much or another content.
    """
    content = bytearray()
    with translate({httpx.HTTPError: Unavailable, TimeoutError: Unavailable}, f"model file from {system_url}"):
        async with asyncio.timeout(FETCH_TIMEOUT):
            # unpacked, a small body could be of any size
            async with client.stream(
                "GET", f"{system_url}/files/{digest}", headers={"accept-encoding": "identity"}
            ) as response:
                response.raise_for_status()
                async for part in response.aiter_raw():
                    content += part
                    if len(content) > MAX_FILE:
                        raise Unavailable(f"{system_url} sends a model file of over {MAX_FILE:,} bytes")
    return verified(bytes(content), digest, system_url)
