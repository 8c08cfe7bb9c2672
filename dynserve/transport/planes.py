"""The planes of one process on NATS, etcd, TCP and HTTP, opened from its configuration."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import httpx

from dynserve.config import PlanesConfig
from dynserve.errors import Unavailable, translate
from dynserve.model_files import verified
from dynserve.plane_tls import plane_tls, server_tls
from dynserve.transport.base import Planes
from dynserve.transport.etcd_registry import EtcdRegistry, etcd_credentials
from dynserve.transport.link import TcpLinks
from dynserve.transport.nats_bus import open_nats

FETCH_TIMEOUT = 30.0  # seconds, one model file
MAX_FILE = 256 << 20  # bytes; the largest tokenizer files have 20 MB


@asynccontextmanager
async def open_planes(config: PlanesConfig, name: str, *, shared: bool = False) -> AsyncIterator[Planes]:
    """Opens the planes. Waits for NATS, but not for etcd: `register` and `watch` retry until it answers. With `shared`,
    other processes may listen on the same port for links."""
    async with AsyncExitStack() as stack:
        # first, so that a wrong URL or file is an error before the wait for NATS
        tls, registry = plane_tls(config), EtcdRegistry(config.etcd_url, etcd_credentials(config))
        bus = await stack.enter_async_context(open_nats(config.nats_url, name, server_tls(config)))
        opened = httpx.AsyncClient(timeout=FETCH_TIMEOUT, trust_env=False, verify=True if tls is None else tls.client)
        client = await stack.enter_async_context(opened)

        async def fetch(system_url: str, digest: str) -> bytes:
            if tls is not None and not system_url.startswith("https://"):
                raise Unavailable(
                    f"the worker at {system_url} has no mutual TLS: set --plane-tls-certificate on all or none"
                )
            return await fetch_model_file(client, system_url, digest)

        yield Planes(bus, registry, TcpLinks(config.advertise_host, tls, shared=shared), fetch)


async def fetch_model_file(client: httpx.AsyncClient, system_url: str, digest: str) -> bytes:
    """Fetches a model file from a worker's system server. Reads at most `MAX_FILE` bytes.

    Raises:
        Unavailable: the file did not arrive within `FETCH_TIMEOUT`, is too large, or has another digest.
    """
    content = bytearray()
    with translate({httpx.HTTPError: Unavailable, TimeoutError: Unavailable}, f"model file from {system_url}"):
        async with asyncio.timeout(FETCH_TIMEOUT):
            # uncompressed, because a small compressed body could expand to any size
            async with client.stream(
                "GET", f"{system_url}/files/{digest}", headers={"accept-encoding": "identity"}
            ) as response:
                response.raise_for_status()
                async for part in response.aiter_raw():
                    content += part
                    if len(content) > MAX_FILE:
                        raise Unavailable(f"{system_url} sent a model file of over {MAX_FILE:,} bytes")
    return verified(bytes(content), digest, system_url)
