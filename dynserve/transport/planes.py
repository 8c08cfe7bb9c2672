"""All planes of one process in one value, opened together: real ones from a configuration, or those of one memory world."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import NamedTuple

import httpx

from dynserve.config import Planes as PlanesConfig
from dynserve.errors import Unavailable, translate
from dynserve.transport.base import Bus, Links, Registry
from dynserve.transport.etcd_registry import EtcdRegistry
from dynserve.transport.link import TcpLinks
from dynserve.transport.memory import MemoryPlanes
from dynserve.transport.nats_bus import open_nats

FETCH_TIMEOUT = 10.0  # seconds, one model file
MAX_FILE = 256 << 20  # bytes

FetchFile = Callable[[str, str], Awaitable[bytes]]


class Planes(NamedTuple):
    bus: Bus
    registry: Registry
    links: Links
    fetch_file: FetchFile  # (system url, SHA-256) -> content of a model file


@asynccontextmanager
async def open_planes(config: PlanesConfig, name: str) -> AsyncIterator[Planes]:
    """NATS, etcd, TCP and HTTP. Waits for NATS; etcd is waited for where it is needed."""
    async with AsyncExitStack() as stack:
        registry = EtcdRegistry(config.etcd_url)  # a wrong URL is an error before anything is waited for
        bus = await stack.enter_async_context(open_nats(config.nats_url, name))
        client = await stack.enter_async_context(httpx.AsyncClient(timeout=FETCH_TIMEOUT, trust_env=False))

        async def fetch(system_url: str, digest: str) -> bytes:
            with translate({httpx.HTTPError: Unavailable}, f"model file from {system_url}"):
                response = await client.get(f"{system_url}/files/{digest}")
                response.raise_for_status()
            return response.content

        yield Planes(bus, registry, TcpLinks(), fetch)


class MemoryWorld:
    """What all processes of an in-process cluster share."""

    def __init__(self) -> None:
        self.planes = MemoryPlanes()
        self.files: dict[str, bytes] = {}

    def open(self) -> Planes:
        async def fetch(system_url: str, digest: str) -> bytes:
            try:
                return self.files[digest]
            except KeyError:
                raise Unavailable(f"nobody has a model file {digest[:12]}") from None

        return Planes(self.planes.bus, self.planes.registry, self.planes.links, fetch)
