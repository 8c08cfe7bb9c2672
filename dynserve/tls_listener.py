"""`tls_listener`: accepts connections with TLS, and bounds the handshakes that are not done.

asyncio's own servers bound neither their number nor, below a minute, their time: whoever reaches the port could use up the
process's file descriptors without a certificate.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from dynserve.log_limit import LimitedLog
from dynserve.tasks import task_group

ACCEPT_PAUSE = 0.1  # seconds, when no connection can be accepted

log = LimitedLog(logging.getLogger(__name__))
P = TypeVar("P", bound=asyncio.BaseProtocol)


@asynccontextmanager
async def tls_listener(
    listener: socket.socket, factory: Callable[[], P], context: ssl.SSLContext, failed: Callable[[P, object], None],
    *, timeout: float, max_pending: int,
) -> AsyncIterator[None]:  # fmt: skip
    """Accepts connections on a listening socket for as long as the block, and closes it.

    Each gets a protocol of `factory`; those whose handshake fails, takes longer than `timeout` seconds, or is the oldest of
    more than `max_pending`, get no connection: `failed` is called with the protocol and the reason.
    """
    loop = asyncio.get_running_loop()
    pending: dict[asyncio.Task[None], None] = {}  # oldest first

    async def shake_hands(sock: socket.socket) -> None:
        protocol = factory()
        reason: object = "too many handshakes are not done"
        try:
            await loop.connect_accepted_socket(lambda: protocol, sock, ssl=context, ssl_handshake_timeout=timeout)
            reason = None
        except OSError as error:
            reason = error
        finally:
            if reason is not None:
                sock.close()
                failed(protocol, reason)

    async def accept() -> None:
        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError as error:  # such as no free file descriptor, which is temporary
                log.warning("accept", "port", "no connection can be accepted at the moment: %s", error)
                await asyncio.sleep(ACCEPT_PAUSE)
                continue
            task = tasks.create_task(shake_hands(sock))
            pending[task] = None
            task.add_done_callback(lambda ended: pending.pop(ended, None))
            if len(pending) > max_pending:
                next(iter(pending)).cancel()

    listener.setblocking(False)
    try:
        async with task_group() as tasks:
            tasks.create_task(accept())
            yield
    finally:
        listener.close()
