"""`Bus` on NATS."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import nats
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from dynserve.addresses import Server, redacted, servers, several
from dynserve.errors import ClusterError, DynserveError, TimedOut, Unavailable, translate
from dynserve.tasks import persist, within
from dynserve.transport.base import Callback, Handler, Mailbox, OnReply

log = logging.getLogger(__name__)

CONNECT_TIMEOUT = 2  # seconds, one attempt
NO_RESPONDERS = "503"  # NATS's status
PING_EVERY = 5  # seconds; after two missed pongs the connection is closed

_ERRORS: dict[type[BaseException], type[DynserveError]] = {
    nats.errors.TimeoutError: TimedOut,
    TimeoutError: TimedOut,
    nats.errors.Error: Unavailable,
    OSError: Unavailable,
}


class _Client(Client):
    """A client that refuses servers without TLS if an address begins with `tls://`. The library would go on without it."""

    def __init__(self, urls: list[str]) -> None:
        super().__init__()
        self._demands_tls = any(url.startswith("tls://") for url in urls)

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        if self._demands_tls and not info.get("tls_required"):
            raise nats.errors.Error("the address says tls://, but the server does not require TLS")
        await super()._process_info(info, initial_connection)


class NatsBus:
    """A bus over one NATS connection, which the NATS client makes again whenever it breaks."""

    def __init__(self, client: Client) -> None:
        self._client = client

    @property
    def connected(self) -> bool:
        return self._client.is_connected

    @property
    def max_payload(self) -> int:
        return self._client.max_payload

    @asynccontextmanager
    async def mailbox(self, on_reply: OnReply) -> AsyncIterator[Mailbox]:
        inbox = self._client.new_inbox()

        async def deliver(message: Msg) -> None:
            number = message.subject.rpartition(".")[2]
            not_served = (message.headers or {}).get("Status") == NO_RESPONDERS
            if number.isdecimal():
                on_reply(int(number), None if not_served else message.data)

        subscription = await self._client.subscribe(f"{inbox}.*", cb=deliver)
        await self._flush()
        try:
            yield _NatsMailbox(self, self._client, inbox)
        finally:
            await within(1.0, subscription.unsubscribe(), f"unsubscribing from {inbox}")

    @asynccontextmanager
    async def serve(self, subject: str, handler: Handler) -> AsyncIterator[None]:
        async def answer(message: Msg) -> None:
            reply = handler(message.data)
            if reply is not None:
                await message.respond(reply)

        subscription = await self._client.subscribe(subject, cb=answer)
        await self._flush()
        try:
            yield
        finally:
            await within(1.0, subscription.unsubscribe(), f"unsubscribing from {subject}")

    async def publish(self, subject: str, payload: bytes) -> None:
        # a disconnected client would buffer the message, and late events are useless
        if self.connected and len(payload) <= self.max_payload:
            with translate(_ERRORS, f"publish to {subject}"):
                await self._client.publish(subject, payload)

    @asynccontextmanager
    async def subscribe(self, subject: str, callback: Callback) -> AsyncIterator[None]:
        async def deliver(message: Msg) -> None:
            callback(message.data)

        subscription = await self._client.subscribe(subject, cb=deliver)
        await self._flush()
        try:
            yield
        finally:
            await within(1.0, subscription.unsubscribe(), f"unsubscribing from {subject}")

    async def _flush(self) -> None:
        # a subscription is sure only once the server has answered; a server that is down gets it when it is up again
        if self.connected:
            with translate(_ERRORS, "NATS"):
                await self._client.flush(timeout=CONNECT_TIMEOUT)


class _NatsMailbox:
    """Posts requests. The NATS server itself replies for a subject that no process serves."""

    def __init__(self, bus: NatsBus, client: Client, inbox: str) -> None:
        self._bus, self._client, self._inbox = bus, client, inbox

    async def post(self, subject: str, payload: bytes, number: int) -> None:
        if not self._bus.connected:
            raise Unavailable("NATS is down")
        if len(payload) > self._bus.max_payload:
            raise Unavailable(f"{len(payload)} bytes are over NATS's limit of {self._bus.max_payload}")
        try:  # on every request's path: `translate` would cost as much as the rest
            await self._client.publish(subject, payload, reply=f"{self._inbox}.{number}")
        except tuple(_ERRORS) as error:
            with translate(_ERRORS, f"request to {subject}"):
                raise error


def _credentials(servers: Sequence[Server]) -> dict[str, Any]:
    """The options for the user of all servers, whose name and password may be percent-encoded in the address: nats-py would
    send them as they stand there. Servers with different users are left to it."""
    users = {(server.user, server.password) for server in servers}
    ((user, password), *others) = users
    if others or not user:
        return {}
    return {"token": user} if password is None else {"user": user, "password": password}


@asynccontextmanager
async def open_nats(url: str, name: str, tls: ssl.SSLContext | None = None) -> AsyncIterator[NatsBus]:
    """Yields a connected bus, and closes it with the block. Retries without a limit until a server answers.

    `url` may have several servers of one cluster, with commas; user and password or a token stand before the host. With
    `tls://` nothing is sent without TLS; `tls` has the CAs and the certificate for it.
    """
    reported_down, attempts = False, -1
    shown, probed = redacted(url), servers(url, "NATS_URL", 4222)
    urls = several(url)

    async def disconnected() -> None:
        nonlocal reported_down
        if not client.is_closed:
            reported_down = True
            log.warning("NATS at %s is down; requests are sent over the links until it is back", shown)

    async def reconnected() -> None:
        nonlocal reported_down
        if reported_down:
            reported_down = False
            log.warning("NATS at %s is back", shown)

    async def quiet(error: Exception) -> None:
        log.debug("nats: %s", error)

    client: Client = _Client(urls)

    async def connect() -> None:
        nonlocal client
        client = _Client(urls)  # a client whose connect failed half-way is not used again
        with translate(_ERRORS, f"NATS at {shown}"):
            async with asyncio.timeout(CONNECT_TIMEOUT + 1):
                await client.connect(
                    urls,
                    name=name,
                    connect_timeout=CONNECT_TIMEOUT,
                    allow_reconnect=True,
                    max_reconnect_attempts=-1,
                    reconnect_time_wait=0.2,  # type: ignore[arg-type]
                    ping_interval=PING_EVERY,
                    disconnected_cb=disconnected,
                    reconnected_cb=reconnected,
                    error_cb=quiet,
                    tls=tls,
                    **_credentials(probed),
                )

    async def first_connect() -> None:
        # the client's own loop would retry for ever without a log line, so one server after the other is probed first
        nonlocal attempts
        attempts += 1
        host, port, *_ = probed[attempts % len(probed)]
        with translate({OSError: Unavailable, TimeoutError: Unavailable}, f"NATS at {shown}"):
            async with asyncio.timeout(CONNECT_TIMEOUT):
                _, writer = await asyncio.open_connection(host, port)
                writer.close()
        await connect()

    # a server that has just started may accept but not answer yet: that raises TimedOut
    await persist(first_connect, retry_on=ClusterError, waiting_for=f"NATS at {shown}")
    try:
        yield NatsBus(client)
    finally:
        await within(2.0, client.close(), "closing the NATS connection")
