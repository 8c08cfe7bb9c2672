"""The cache transceiver: moves the blocks of a hand-off from the prefill worker's memory into the decode worker's.

`TcpTransceiver` uses TCP between the two workers, directly from and into the block tensors, with mutual TLS if the cluster
has it. Where both sides have a carrier (`carriers.py`) in common that can reach the other side, the carrier moves the
bytes.

    decode                                   prefill
    Fetch{id, request, hash, layout} ──────▶ is it open, of this request, and of the same memory layout?
                       ◀────────────────────  Reply{error, or the carrier's name}
                       ◀────────────────────  the blocks, one after the other
    one byte: received ────────────────────▶  delivered
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, suppress
from typing import Any, Protocol

import msgspec

from dynserve.addresses import advertised, join_host_port
from dynserve.errors import ConfigError, HandoffBroken, HandoffError, HandoffMismatch, from_wire, translate
from dynserve.executors.carriers import Carrier, CarrierFailed
from dynserve.executors.connections import Connection, accepted, address_scheme, connect
from dynserve.executors.handoff import HandoffTable
from dynserve.log_limit import LimitedLog
from dynserve.plane_tls import PlaneTls
from dynserve.tasks import OwnedTasks, task_group
from dynserve.wire import MALFORMED
from dynserve.wire.numbers import BlockHash, Count
from dynserve.wire.requests import Handoff

log = LimitedLog(logging.getLogger(__name__))

IDLE_CONNECTIONS = 4  # kept open per peer
IDLE_TIMEOUT = 300.0  # seconds a server keeps a connection without a fetch
FIRST_FETCH_TIMEOUT = 10.0  # seconds a server keeps a connection that has not fetched anything yet
MAX_NEW_CONNECTIONS = 256  # connections that have not fetched anything; with more, the oldest is closed
ACCEPT_PAUSE = 0.1  # seconds, when no connection can be accepted
MAX_MESSAGE = 1 << 16  # bytes
MAX_CARRIER_MESSAGE = 1 << 22  # bytes of a carrier's message, sent after the hand-off was checked
MAX_FAILED = 1024  # stored pairs of address and failed carrier
CONFIRM = b"\x06"


class BlockStore(Protocol):
    """The memory behind the block numbers."""

    @property
    def layout(self) -> str:
        """The properties that must be equal on both sides: model, dtype, heads, block size."""
        ...

    @property
    def block_bytes(self) -> int: ...

    def outgoing(self, blocks: Sequence[int]) -> AsyncGenerator[memoryview]:
        """Yields the bytes of these blocks in order, in pieces. A piece is valid until the next one is requested."""
        ...

    def incoming(self, blocks: Sequence[int]) -> AsyncGenerator[memoryview]:
        """Yields memory to write the bytes of these blocks to, in order, in pieces. A piece is stored in its blocks once
        the next one, or the end, is requested."""
        ...


class HostBlocks:
    """The base of a `BlockStore` in host memory. Its pieces are views of the blocks: nothing is copied."""

    def view(self, block: int) -> memoryview:
        """The block's bytes, writable."""
        raise NotImplementedError

    async def outgoing(self, blocks: Sequence[int]) -> AsyncGenerator[memoryview]:
        for block in blocks:
            yield self.view(block)

    async def incoming(self, blocks: Sequence[int]) -> AsyncGenerator[memoryview]:
        for block in blocks:
            yield self.view(block)


class Transceiver(Protocol):
    @property
    def carriers(self) -> Sequence[str]:
        """The carriers by which blocks can be fetched, best first."""
        ...

    def state(self) -> bytes:
        """Returns the state with which a hand-off's `fetch` on another worker finds this one."""
        ...

    async def fetch(self, handoff: Handoff, blocks: list[int], skip: int) -> None:
        """Fills our `blocks` with the hand-off's, from its block `skip` on. The caller sets the deadline.

        Raises:
            HandoffMismatch, HandoffGone, HandoffBroken: the content of `blocks` is undefined then.
        """
        ...


class Transceivers(Protocol):
    def open(self, table: HandoffTable, store: BlockStore, host: str) -> AbstractAsyncContextManager[Transceiver]: ...


class _TransceiverState(msgspec.Struct, frozen=True, array_like=True):
    address: str
    layout: str


class _FetchRequest(msgspec.Struct, frozen=True, array_like=True):
    id: BlockHash
    request_id: str
    sequence_hash: BlockHash
    layout: str
    skip: Count
    count: Count
    carriers: dict[str, bytes] = {}  # names of the receiver's carriers, best first, and their hellos


class _FetchReply(msgspec.Struct, frozen=True, array_like=True):
    code: str = ""
    message: str = ""
    carrier: str = ""  # the one that moves the blocks; empty: they follow on this connection


_encode = msgspec.msgpack.Encoder().encode
_decode_state = msgspec.msgpack.Decoder(_TransceiverState).decode
_decode_fetch = msgspec.msgpack.Decoder(_FetchRequest).decode
_decode_reply = msgspec.msgpack.Decoder(_FetchReply).decode

_BROKEN: dict[type[BaseException], Any] = dict.fromkeys((OSError, *MALFORMED), HandoffBroken)


def parse_state(state: bytes, layout: str) -> str:
    """Returns the address in a hand-off's state.

    Raises:
        HandoffMismatch: the other side's memory layout differs; the message names both layouts.
    """
    with translate(dict.fromkeys(MALFORMED, HandoffMismatch), "the hand-off is not one of this executor's"):
        found = _decode_state(state)
    if found.layout != layout:
        raise HandoffMismatch(f"KV layouts differ: prefill has {found.layout}, decode has {layout}")
    return found.address


class TcpTransceivers:
    """Opens a server on a free port of `host`, and closes all connections at the end of the block. The first of
    `carriers` that can reach the other side moves the bytes; TLS does not encrypt what a carrier moves."""

    def __init__(
        self, carriers: Sequence[Carrier] = (), advertise_host: str | None = None, tls: PlaneTls | None = None
    ) -> None:
        self._carriers, self._advertise_host, self._tls = carriers, advertise_host, tls

    @asynccontextmanager
    async def open(self, table: HandoffTable, store: BlockStore, host: str) -> AsyncIterator[Transceiver]:
        with translate({OSError: ConfigError}, f"cannot listen for KV transfers on {host}"):
            listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        listener.setblocking(False)
        try:
            async with task_group() as tasks:
                transceiver = TcpTransceiver(
                    table, store, listener, tasks, self._carriers, self._advertise_host, self._tls
                )
                tasks.create_task(transceiver.serve())
                try:
                    yield transceiver
                finally:
                    transceiver.close()
        finally:
            listener.close()


class TcpTransceiver:
    def __init__(
        self, table: HandoffTable, store: BlockStore, listener: socket.socket, tasks: OwnedTasks,
        carriers: Sequence[Carrier] = (), advertise_host: str | None = None, tls: PlaneTls | None = None,
    ) -> None:  # fmt: skip
        self._table, self._store, self._listener, self._tasks, self._tls = table, store, listener, tasks, tls
        self._carriers = {carrier.name: carrier for carrier in carriers}
        self._in_use: Counter[str] = Counter()  # connections, by address
        self._failed: set[tuple[str, str]] = set()  # address and carrier that did not work together
        self.carried: Counter[str] = Counter()  # transfers that were begun, by carrier
        host, port = listener.getsockname()[:2]
        address = address_scheme(tls) + join_host_port(advertised(host, advertise_host), port)
        self._state = _encode(_TransceiverState(address, store.layout))
        self._idle: dict[str, list[Connection]] = {}
        self._new_connections: dict[asyncio.Task[None], None] = {}  # oldest first

    @property
    def carriers(self) -> Sequence[str]:
        return [*self._carriers, "tcp"]

    def state(self) -> bytes:
        return self._state

    async def fetch(self, handoff: Handoff, blocks: list[int], skip: int) -> None:
        address = parse_state(handoff.state, self._store.layout)
        with translate(_BROKEN, f"KV transfer from {address}"):
            while not await self._fetched(address, handoff, blocks, skip):
                pass

    async def _fetched(self, address: str, handoff: Handoff, blocks: list[int], skip: int) -> bool:
        """Tries the fetch once. Returns False when it should be retried: on a new connection, or by another carrier."""
        self._in_use[address] += 1
        kept: Connection | None = None
        try:
            connection, reused = await self._connection(address)
            try:
                await self._fetch_over(connection, address, handoff, blocks, skip)
                kept = connection
            except (OSError, EOFError):
                if not reused:
                    raise
                return False  # an idle connection may have been closed by the peer long ago
            except CarrierFailed as error:  # the peer's hand-off is open again once the connection is closed
                self._warn_of(address, error)
                return False
            except HandoffError:
                kept = connection
                raise
            finally:
                if kept is None:
                    connection.close()
        finally:
            self._in_use[address] -= 1
            if kept is not None:
                self._keep(address, kept)
            self._release_peer(address)
        return True

    def _warn_of(self, address: str, error: CarrierFailed) -> None:
        name = str(error.args[0])
        if len(self._failed) > MAX_FAILED:  # most are of workers that no longer exist
            self._failed.clear()
        self._failed.add((address, name))
        log.warning("carrier", name, "KV blocks of %s cannot be fetched by %s: %s", address, name, error.__cause__)

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(self._listener)
            except OSError as error:  # such as no free file descriptor, which is temporary
                log.warning("accept", "port", "no KV transfer can be accepted at the moment: %s", error)
                await asyncio.sleep(ACCEPT_PAUSE)
                continue
            task = self._tasks.create_task(self._serve_one(sock))
            self._new_connections[task] = None
            task.add_done_callback(self._identified)
            if len(self._new_connections) > MAX_NEW_CONNECTIONS:
                next(iter(self._new_connections)).cancel()

    def _identified(self, task: asyncio.Task[None]) -> None:
        """Removes a connection that has made a valid fetch, or has ended, from the new ones."""
        self._new_connections.pop(task, None)

    def close(self) -> None:
        for address, connections in list(self._idle.items()):
            for connection in list(connections):
                self._end_idle(address, connection)

    async def _connection(self, address: str) -> tuple[Connection, bool]:
        if idle := self._idle.get(address):
            connection = idle.pop()
            asyncio.get_running_loop().remove_reader(connection.sock)
            return connection, True
        return await connect(address, self._tls), False

    def _keep(self, address: str, connection: Connection) -> None:
        idle = self._idle.setdefault(address, [])
        if len(idle) < IDLE_CONNECTIONS:
            idle.append(connection)
            # the peer sends nothing on it unrequested: it becomes readable only when it ends
            asyncio.get_running_loop().add_reader(connection.sock, self._end_idle, address, connection)
        else:
            connection.close()

    def _end_idle(self, address: str, connection: Connection) -> None:
        asyncio.get_running_loop().remove_reader(connection.sock)
        connection.close()
        self._idle[address].remove(connection)
        self._release_peer(address)

    def _release_peer(self, address: str) -> None:
        """Notifies the carriers when no connection to a worker remains."""
        if self._idle.get(address) or self._in_use[address]:
            return
        self._idle.pop(address, None)
        del self._in_use[address]
        for carrier in self._carriers.values():
            carrier.lost(address)

    async def _fetch_over(
        self, connection: Connection, address: str, handoff: Handoff, blocks: list[int], skip: int
    ) -> None:
        hellos = {
            name: c.hello() for name, c in self._carriers.items() if blocks and (address, name) not in self._failed
        }
        fetch = _FetchRequest(
            handoff.id, handoff.request_id, handoff.sequence_hash, self._store.layout, skip, len(blocks), hellos
        )
        await connection.send_message(_encode(fetch))
        reply = _decode_reply(await connection.receive_message(MAX_MESSAGE))
        if reply.code:
            raise from_wire(reply.code, reply.message)
        self.carried[reply.carrier or "tcp"] += 1
        if reply.carrier:
            await self._receive_by(reply.carrier, blocks, _Channel(connection, address))
            return
        async with aclosing(self._store.incoming(blocks)) as pieces:
            async for piece in pieces:
                await connection.receive(piece)
        await connection.send(CONFIRM)

    async def _receive_by(self, name: str, blocks: list[int], channel: _Channel) -> None:
        carrier = self._carriers.get(name)
        if carrier is None:
            raise ConnectionResetError(f"the peer sends by the carrier {name}, which was not offered")
        try:
            await carrier.receive(blocks, channel)
        except CarrierFailed as error:
            raise CarrierFailed(name) from error.__cause__
        await channel.connection.send(CONFIRM)
        if await channel.connection.receive_byte() != CONFIRM:
            raise ConnectionResetError("the hand-off ended before all its blocks were received")

    async def _serve_one(self, sock: socket.socket) -> None:
        """Answers fetches on one connection until the peer disconnects. An error of the peer ends this connection only."""
        with sock, suppress(OSError, EOFError, *MALFORMED, TimeoutError):
            task = asyncio.current_task()
            connection = await self._accepted(sock)
            while True:
                async with asyncio.timeout(FIRST_FETCH_TIMEOUT if task in self._new_connections else IDLE_TIMEOUT):
                    fetch = _decode_fetch(await connection.receive_message(MAX_MESSAGE))
                await self._answer(connection, fetch)

    async def _accepted(self, sock: socket.socket) -> Connection:
        try:
            async with asyncio.timeout(FIRST_FETCH_TIMEOUT):
                return await accepted(sock, self._tls)
        except OSError as error:
            log.warning("handshake", "failed", "a connection for KV transfers is refused: %r", error)
            raise

    async def _answer(self, connection: Connection, fetch: _FetchRequest) -> None:
        try:
            stop = connection.shut
            with self._table.sending(fetch.id, fetch.request_id, fetch.sequence_hash, stop) as (blocks, delivered):
                if (task := asyncio.current_task()) is not None:
                    self._identified(task)  # it has sent the hand-off's id and hash
                if fetch.layout != self._store.layout:
                    raise HandoffMismatch("the KV layouts of the two workers differ")
                if fetch.skip + fetch.count != len(blocks):
                    raise HandoffMismatch(
                        f"{fetch.skip}+{fetch.count} blocks requested from a hand-off of {len(blocks)}"
                    )
                carrier = self._carrier_for(fetch.carriers)
                try:
                    await self._send_blocks(connection, blocks[fetch.skip :], carrier)
                except (OSError, EOFError):
                    raise
                except Exception as error:  # such as out of memory: it fails this transfer, not the worker
                    log.warning("sending", type(error).__name__, "KV blocks could not be sent: %r", error)
                    raise EOFError from error
                if carrier is not None:
                    # a cancellation shuts this connection: the byte confirms that there was none
                    await connection.send(CONFIRM)
                delivered()
        except HandoffError as error:
            log.warning("refused", error.code, "refused a KV transfer: %s", error)
            await connection.send_message(_encode(_FetchReply(error.code, str(error))))

    def _carrier_for(self, offered: Mapping[str, bytes]) -> Carrier | None:
        for name, carrier in self._carriers.items():
            if name in offered and carrier.reaches(offered[name]):
                return carrier
        return None

    async def _send_blocks(self, connection: Connection, blocks: list[int], carrier: Carrier | None) -> None:
        if carrier is not None:
            await connection.send_message(_encode(_FetchReply(carrier=carrier.name)))
            await carrier.send(blocks, _Channel(connection, ""))
        else:
            await connection.send_message(_encode(_FetchReply()))
            async with aclosing(self._store.outgoing(blocks)) as pieces:
                async for piece in pieces:
                    await connection.send(piece)
        confirmed = await connection.receive_byte()
        if confirmed != CONFIRM:
            raise EOFError("the receiver disconnected before it confirmed the blocks")


class _Channel:
    """`CarrierChannel` over a transfer's TCP connection."""

    def __init__(self, connection: Connection, peer: str) -> None:
        self.connection, self.peer = connection, peer

    async def send(self, message: bytes) -> None:
        await self.connection.send_message(message)

    async def receive(self) -> bytes:
        return await self.connection.receive_message(MAX_CARRIER_MESSAGE)


class MemoryTransceivers:
    """Opens transceivers of one process, which find each other by name; blocks are copied from memory to memory."""

    def __init__(self) -> None:
        self._open: dict[str, MemoryTransceiver] = {}

    @asynccontextmanager
    async def open(self, table: HandoffTable, store: BlockStore, host: str) -> AsyncIterator[Transceiver]:
        name = f"memory:{len(self._open) + 1}"
        self._open[name] = MemoryTransceiver(name, table, store, self._open)
        try:
            yield self._open[name]
        finally:
            self._open[name].closed = True


class MemoryTransceiver:
    def __init__(self, name: str, table: HandoffTable, store: BlockStore, others: dict[str, MemoryTransceiver]) -> None:
        self._table, self._store, self._others = table, store, others
        self._state = _encode(_TransceiverState(name, store.layout))
        self.closed = False
        self.carriers = ("memory",)

    def state(self) -> bytes:
        return self._state

    async def fetch(self, handoff: Handoff, blocks: list[int], skip: int) -> None:
        owner = self._others.get(parse_state(handoff.state, self._store.layout))
        if owner is None or owner.closed:
            raise HandoffBroken("the prefill worker has been closed")
        stopped = asyncio.Event()
        sending = owner._table.sending(handoff.id, handoff.request_id, handoff.sequence_hash, stopped.set)
        with sending as (theirs, delivered):
            if skip + len(blocks) != len(theirs):
                raise HandoffMismatch(f"{skip}+{len(blocks)} blocks requested from a hand-off of {len(theirs)}")
            await asyncio.sleep(0)
            if stopped.is_set():
                raise HandoffBroken("the owner cancelled the hand-off")
            async with (
                aclosing(self._store.incoming(blocks)) as pieces,
                aclosing(owner._store.outgoing(theirs[skip:])) as sources,
            ):
                async for piece in pieces:
                    piece[:] = await anext(sources)
            delivered()
