"""`Registry` on etcd.

A key has a lease of `TTL` seconds. After an outage of etcd, or when etcd has lost its data and with them the lease, the
loop that keeps the lease requests a new one and writes the key again. A key that an operator deletes stays deleted, since
its lease remains.

A watch that breaks is resumed by a new read and a diff. Keys that the new read lacks stay in the view for `GRACE` seconds,
because their owners may be about to write them again; then they are reported as deleted.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import aetcd
import grpc
from aetcd import rpc, watcher
from aetcd.rtypes import EventKind

from dynserve.addresses import redacted, servers
from dynserve.config import PlanesConfig
from dynserve.errors import Unavailable, translate
from dynserve.log_limit import LimitedLog
from dynserve.plane_tls import server_tls
from dynserve.tasks import Outage, running, within
from dynserve.transport.base import Change, Deleted, Put, Registration

log = logging.getLogger(__name__)
limited = LimitedLog(log)

TTL = 10  # seconds
GRACE = TTL + 2  # seconds that a key stays in the view after a read without it
CALL_TIMEOUT = 3  # seconds, one call to etcd
RESYNC = 15.0  # seconds without an event after which a watch is made anew: a watch can end silently

_ERRORS: dict[type[BaseException], Any] = {
    aetcd.ClientError: Unavailable,
    TimeoutError: Unavailable,
    OSError: Unavailable,
}
_CHANNEL = {
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.min_reconnect_backoff_ms": 100,
    "grpc.max_reconnect_backoff_ms": 1000,
    "grpc.enable_http_proxy": 0,
}


class EtcdRegistry:
    """The registry on an etcd cluster. `url` has the addresses of its members, with commas; the next one is used when one
    fails. `http://user:password@host:port` logs in, `https://` uses TLS with `credentials`."""

    def __init__(self, url: str, credentials: grpc.ChannelCredentials | None = None) -> None:
        self._url = redacted(url)
        self._servers, self._turn = servers(url, "ETCD_URL", 2379), 0
        self._credentials = credentials or grpc.ssl_channel_credentials()

    @asynccontextmanager
    async def register(self, key: str, value: bytes) -> AsyncIterator[Registration]:
        registration = Registration(asyncio.Event())
        async with running(self._keep(key, value, registration)):
            yield registration

    @asynccontextmanager
    async def watch(self, prefix: str, on_change: Callable[[Change], None]) -> AsyncIterator[None]:
        async with running(_Watch(self, prefix, on_change).run()):
            yield

    async def _keep(self, key: str, value: bytes, registration: Registration) -> None:
        outage = _outage(self._url, f"to register {key.rsplit('/', 1)[-1]}")
        while True:
            try:
                async with self.client() as client:
                    with translate(_ERRORS, "etcd"):
                        lease = await client.lease(TTL)
                        await client.put(key.encode(), value, lease=lease)
                    outage.over()
                    registration.registered.set()
                    try:
                        await self._refresh(client, lease, key)
                    except asyncio.CancelledError:
                        await within(1.0, lease.revoke(), "removing this process from discovery")
                        raise
            except Unavailable as error:
                await outage.wait(error)

    async def _refresh(self, client: aetcd.Client, lease: aetcd.Lease, key: str) -> None:
        """Renews the lease until it is lost. An etcd that answers but no longer has the lease returns a TTL of 0.

        Raises:
            Unavailable: the lease is lost, or etcd does not answer.
        """
        while True:
            await asyncio.sleep(TTL / 4)
            with translate(_ERRORS, "etcd"):
                answer = await client.refresh_lease(lease.id)
            if answer.TTL <= 0:
                log.warning("etcd no longer has the lease of %s; registering again", key)
                raise Unavailable("etcd has lost the lease")

    @asynccontextmanager
    async def client(self) -> AsyncIterator[aetcd.Client]:
        """Yields a new client. An aetcd client does not recover from every broken watch; a new one always works. When the
        block fails, the next client is of the next server."""
        server = self._servers[self._turn % len(self._servers)]
        host = f"[{server.host}]" if ":" in server.host else server.host
        kind = partial(_TlsClient, self._credentials) if server.scheme == "https" else aetcd.Client
        client = kind(host, server.port, server.user, server.password, timeout=CALL_TIMEOUT, options=_CHANNEL)
        try:
            yield client
        except Unavailable:
            self._turn += 1
            raise
        finally:
            await within(1.0, client.close(), "closing the etcd connection")


class _TlsClient(aetcd.Client):  # type: ignore[misc]  # aetcd has no annotations
    """An etcd client with TLS, which aetcd 1.0 does not have: only the channel differs."""

    def __init__(self, credentials: grpc.ChannelCredentials, host: str, port: int, *args: Any, **options: Any) -> None:
        super().__init__(host, port, *args, **options)
        self._credentials, self._target = credentials, f"{host}:{port}"

    async def connect(self) -> None:
        if self._connected.is_set():
            return
        self.channel = grpc.aio.secure_channel(self._target, self._credentials, list(_CHANNEL.items()))
        with translate({grpc.RpcError: Unavailable}, "etcd"):
            if self._username is not None and self._password is not None:
                login = rpc.AuthenticateRequest(name=self._username, password=self._password)
                answer = await rpc.AuthStub(self.channel).Authenticate(login, timeout=CALL_TIMEOUT)
                self.metadata = (("token", answer.token),)
        self.kvstub, self.leasestub = rpc.KVStub(self.channel), rpc.LeaseStub(self.channel)
        self._watcher = watcher.Watcher(rpc.WatchStub(self.channel), timeout=CALL_TIMEOUT, metadata=self.metadata)
        self._connected.set()


def etcd_credentials(config: PlanesConfig) -> grpc.ChannelCredentials:
    """Returns the credentials for etcd with `https://`, verified by `--plane-tls-ca`, or else by the CAs of this machine.

    Raises:
        ConfigError: a file cannot be used.
    """
    server_tls(config)  # gRPC would find out at the first connection only that a file cannot be used
    files = (config.plane_tls_ca, config.plane_tls_key, config.plane_tls_certificate)
    return grpc.ssl_channel_credentials(*(Path(file).read_bytes() if file else None for file in files))


class _Watch:
    """One view of one prefix: the entries that were reported to `on_change`, and those that may have to be removed."""

    def __init__(self, registry: EtcdRegistry, prefix: str, on_change: Callable[[Change], None]) -> None:
        self._registry, self._prefix, self._on_change = registry, prefix, on_change
        self._known: dict[str, bytes] = {}
        self._doubtful: dict[str, float] = {}  # key -> loop time at which it is removed unless it is found
        self._outage = _outage(registry._url, "to discover other processes")

    async def run(self) -> None:
        while True:
            try:
                await self._follow()
            except Unavailable as error:
                await self._outage.wait(error)

    async def _follow(self) -> None:
        async with self._registry.client() as client:
            with translate(_ERRORS, "etcd"):
                found = await client.get_prefix(self._prefix.encode())
                self._reconcile({_name(kv.key): kv.value for kv in found.kvs})
                self._outage.over()
                watch = await client.watch_prefix(self._prefix.encode(), start_revision=found.header.revision + 1)
                events = aiter(watch)
                while True:
                    try:
                        async with asyncio.timeout(self._time_to_resync()):
                            event = await anext(events)
                    except (TimeoutError, StopAsyncIteration):
                        return  # no event for long, or a key is due for removal: read again
                    key = _name(event.kv.key)
                    if event.kind == EventKind.PUT:
                        self._put(key, event.kv.value)
                    else:
                        self._delete(key)

    def _reconcile(self, found: dict[str, bytes]) -> None:
        now = asyncio.get_running_loop().time()
        for key, value in found.items():
            self._put(key, value)
        for key in list(self._known):
            if key not in found and now >= self._doubtful.setdefault(key, now + GRACE):
                self._delete(key)

    def _time_to_resync(self) -> float:
        now = asyncio.get_running_loop().time()
        return min([RESYNC, *(max(0.05, due - now) for due in self._doubtful.values())])

    def _put(self, key: str, value: bytes) -> None:
        self._doubtful.pop(key, None)
        if self._known.get(key) != value:
            self._known[key] = value
            self._notify(Put(key, value))

    def _delete(self, key: str) -> None:
        self._doubtful.pop(key, None)
        if self._known.pop(key, None) is not None:
            self._notify(Deleted(key))

    def _notify(self, change: Change) -> None:
        try:
            self._on_change(change)
        except Exception:  # any etcd client can write an entry: a bad one must not end the processes that read it
            limited.exception("entry", change.key, "an entry in discovery cannot be handled: %r", change.key[:200])


def _name(key: bytes) -> str:
    """Decodes a key. Keys that are not UTF-8 are not from dynserve, and get a printable name."""
    return key.decode("utf-8", "backslashreplace")


def _outage(url: str, purpose: str) -> Outage:
    return Outage(f"etcd at {url}", purpose, max_wait_s=1.0)
