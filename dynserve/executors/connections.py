"""`Connection`: one TCP connection between two transceivers, plain or with mutual TLS.

asyncio has no TLS for plain sockets, and its streams copy every byte: here blocks go from and into their own memory. TLS
runs in memory (`ssl.MemoryBIO`), in records of at most `RECORDS` bytes before the loop gets a turn.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from contextlib import suppress

from dynserve.addresses import host_port
from dynserve.errors import ConfigError, HandoffBroken, translate
from dynserve.plane_tls import TLS_SCHEME, PlaneTls, check_tls_of

CONNECT_TIMEOUT = 2.0  # seconds, with the handshake
RECORDS = 1 << 18  # bytes that are encrypted at once; 0.1 to 0.3 ms

_length = struct.Struct("<I")


class Connection:
    """A connected socket, which is not blocking. One task may send while another one receives."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    async def send(self, data: bytes | memoryview) -> None:
        """Sends all of `data`. Raises OSError."""
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def receive_some(self, view: memoryview) -> int:
        """Receives into `view`, and returns the number of bytes; 0 at the end. Raises OSError."""
        return await asyncio.get_running_loop().sock_recv_into(self.sock, view)

    async def receive(self, view: memoryview) -> None:
        """Fills `view`. Raises OSError, ConnectionResetError if the connection ends before."""
        while view:
            received = await self.receive_some(view)
            if received == 0:
                raise ConnectionResetError("the peer closed the connection")
            view = view[received:]

    async def receive_byte(self) -> bytes:
        """Returns one byte, or an empty string at the end."""
        view = memoryview(bytearray(1))
        return bytes(view) if await self.receive_some(view) else b""

    async def send_message(self, payload: bytes) -> None:
        """Sends a message of up to 4 GiB, with its length before it."""
        await self.send(_length.pack(len(payload)) + payload)

    async def receive_message(self, limit: int) -> bytes:
        """Receives a message. Raises OSError if it is longer than `limit` bytes."""
        head = bytearray(4)
        await self.receive(memoryview(head))
        (size,) = _length.unpack(head)
        if size > limit:
            raise OSError(f"a message of {size} bytes is over the limit of {limit}")
        body = bytearray(size)
        await self.receive(memoryview(body))
        return bytes(body)

    def shut(self) -> None:
        """Ends all sends and receives; the other side may have ended the connection before."""
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.sock.close()


class TlsConnection(Connection):
    """A connection with mutual TLS. `handshake` comes first."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, server_side: bool) -> None:
        super().__init__(sock)
        self._received, self._unsent = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._received, self._unsent, server_side=server_side)
        self._buffer = bytearray(RECORDS)

    async def handshake(self) -> None:
        """Raises OSError, which says why the peer is refused, or that it has refused this side."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush()
                if not await self._read():
                    raise ConnectionResetError("the peer closed the connection in the TLS handshake") from None
                continue
            except ssl.SSLError:
                with suppress(OSError):
                    await self._flush()  # the alert
                raise
            await self._flush()
            return

    async def send(self, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        while view:
            view = view[self._tls.write(view[:RECORDS]) :]
            await self._flush()

    async def receive_some(self, view: memoryview) -> int:
        view = view.cast("B")
        while True:
            try:
                return int(self._tls.read(len(view), view))  # with a buffer it returns a number
            except ssl.SSLWantReadError:
                if not await self._read():
                    return 0
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return 0

    async def _read(self) -> bool:
        received = await asyncio.get_running_loop().sock_recv_into(self.sock, self._buffer)
        if received == 0:
            self._received.write_eof()
            return False
        self._received.write(memoryview(self._buffer)[:received])
        return True

    async def _flush(self) -> None:
        if self._unsent.pending:
            await asyncio.get_running_loop().sock_sendall(self.sock, self._unsent.read())


async def connect(address: str, tls: PlaneTls | None) -> Connection:
    """Connects to a transceiver.

    Raises:
        HandoffBroken: this is not an address, or one side has TLS and the other one has not.
        OSError, TimeoutError: it cannot be reached, or refuses this side.
    """
    loop = asyncio.get_running_loop()
    with translate({ConfigError: HandoffBroken}, "the hand-off"):
        check_tls_of(address, tls, "the prefill worker")
        host, port = host_port(address, "address", 0)
    async with asyncio.timeout(CONNECT_TIMEOUT):
        (family, _, _, _, target), *_ = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            await loop.sock_connect(sock, target)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if tls is None:
                return Connection(sock)
            connection = TlsConnection(sock, tls.client, server_side=False)
            await connection.handshake()
        except BaseException:
            sock.close()
            raise
    return connection


async def accepted(sock: socket.socket, tls: PlaneTls | None) -> Connection:
    """Returns the connection of an accepted socket, after the handshake. Raises OSError if the peer is refused."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if tls is None:
        return Connection(sock)
    connection = TlsConnection(sock, tls.server, server_side=True)
    await connection.handshake()
    return connection


def address_scheme(tls: PlaneTls | None) -> str:
    return "" if tls is None else TLS_SCHEME
