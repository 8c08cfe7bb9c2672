"""The carrier between machines: NIXL (UCX) reads the blocks out of the prefill worker's memory, GPU or host.

Networks and links are fast with large pieces of memory only, and a block is small. So the owner gathers blocks into one
piece of memory that is registered with NIXL; the receiver reads it in one transfer and scatters it. In a long hand-off the
next piece is gathered while one is being read.

    decode                                    prefill
              ◀───────────────────────────── Piece{agent, where, bytes}      gather
    read      ◀════════ by NIXL ════════════
    scatter   one byte ────────────────────▶ the memory can be reused
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import msgspec
import torch
from torch import Tensor

from dynserve.errors import ConfigError
from dynserve.executors.carriers import CarrierChannel, CarrierFailed, finished
from dynserve.executors.torch.attention import KvCache
from dynserve.wire import MALFORMED

log = logging.getLogger(__name__)

PACKAGES = ("nixl_cu13", "nixl_cu12", "nixl")  # import names of NIXL's wheels
PIECE_BYTES = {"cuda": 64 << 20, "cpu": 8 << 20}
PIECES = 4  # in each direction; a transfer uses at most two of its sender's
GOT = b"\x06"


def nixl_api() -> Any:
    """Returns NIXL's Python interface, or None if it is not installed."""
    for package in PACKAGES:
        try:
            return import_module(f"{package}._api")
        except ImportError:
            continue
    return None


class _Piece(msgspec.Struct, frozen=True, array_like=True):
    agent: bytes  # metadata of the sender's NIXL agent
    address: int
    size: int  # bytes
    device: int


class NixlCarrier:
    """The NIXL carrier of one KV cache. Raises ConfigError if NIXL is missing or does not start."""

    name = "nixl"

    def __init__(self, cache: KvCache, worker: str) -> None:
        api = nixl_api()
        if api is None:
            raise ConfigError("cache_transceiver_config.backend NIXL needs the extra dynserve[nixl]")
        self._cache, self._device = cache, cache.memory.device
        self._enter()
        self._blocks = max(1, PIECE_BYTES[self._device.type] // cache.block_bytes)  # per piece
        shape = (2 * PIECES, self._blocks, *cache.memory.shape[1:])
        self._pieces = torch.empty(shape, dtype=cache.memory.dtype, device=self._device)
        try:
            self._agent = api.nixl_agent(worker, api.nixl_agent_config(backends=["UCX"]))
            self._agent.register_memory(self._pieces)
            self._hello: bytes = self._agent.get_agent_metadata()
        except Exception as error:  # NIXL raises error types of its own
            raise ConfigError(f"NIXL does not start here: {error}") from error
        self._outgoing, self._incoming = _Places(range(PIECES)), _Places(range(PIECES, 2 * PIECES))
        self._peers: dict[bytes, str] = {}
        self._agents: dict[str, bytes] = {}  # metadata of each worker's agent, by the worker's address
        self._stream = torch.cuda.Stream(self._device) if cache.stream is not None else None  # type: ignore[no-untyped-call]

    def hello(self) -> bytes:
        return self.name.encode()

    def reaches(self, hello: bytes) -> bool:
        return hello == self.name.encode()

    async def send(self, blocks: Sequence[int], channel: CarrierChannel) -> None:
        lent: deque[int] = deque()
        self._enter()
        try:
            for at in range(0, len(blocks), self._blocks):
                # a transfer that waits for a piece must not hold one that another transfer waits for
                while lent and (len(lent) == 2 or not self._outgoing.free):
                    await self._confirmed(channel, lent)
                lent.append(await self._outgoing.acquire())
                piece = await self._gathered(lent[-1], blocks[at : at + self._blocks])
                device = self._device.index or 0
                await channel.send(msgspec.msgpack.encode(_Piece(self._hello, piece.data_ptr(), piece.nbytes, device)))
            while lent:
                await self._confirmed(channel, lent)
        finally:
            self._outgoing.give_back(*lent)

    async def receive(self, blocks: Sequence[int], channel: CarrierChannel) -> None:
        self._enter()
        try:
            await self._receive(blocks, channel)
        except BaseException:
            if self._stream is not None and self._cache.stream is not None:
                # the freed blocks may still be written to: the next user of them must come after that
                self._cache.stream.wait_event(self._stream.record_event())
            raise

    async def _receive(self, blocks: Sequence[int], channel: CarrierChannel) -> None:
        scattered: list[Callable[[], bool]] = []
        for at in range(0, len(blocks), self._blocks):
            some = blocks[at : at + self._blocks]
            try:
                piece = msgspec.msgpack.decode(await channel.receive(), type=_Piece)
            except MALFORMED as error:
                raise CarrierFailed from error
            place = await self._incoming.acquire()
            mine = self._pieces[place, : len(some)]
            if piece.size != mine.nbytes:
                self._incoming.give_back(place)
                raise CarrierFailed from ValueError(f"a piece of {piece.size} bytes instead of {mine.nbytes}")
            self._agents[channel.peer] = piece.agent
            await self._read(piece, mine, place)
            done = self._scatter(some, mine)
            self._incoming.give_back_when(done, place)
            scattered.append(done)
            await channel.send(GOT)
        for done in scattered:
            await finished(done)

    def lost(self, peer: str) -> None:
        if (agent := self._agents.pop(peer, None)) is not None:
            self._forget(agent)

    def _enter(self) -> None:
        """Sets the cache's device as the current one of the thread, as UCX expects."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

    async def _confirmed(self, channel: CarrierChannel, lent: deque[int]) -> None:
        if await channel.receive() != GOT:
            raise EOFError("the receiver of KV blocks sent an invalid acknowledgement")
        self._outgoing.give_back(lent.popleft())

    async def _gathered(self, place: int, blocks: Sequence[int]) -> Tensor:
        piece = self._pieces[place, : len(blocks)]
        if self._stream is None:
            self._cache.gather(self._cache.index(blocks), out=piece)
            return piece
        with torch.cuda.stream(self._stream):
            self._cache.gather(self._cache.index(blocks), out=piece)
            done = self._stream.record_event()
        await finished(done.query)
        return piece

    async def _read(self, piece: _Piece, mine: Tensor, place: int) -> None:
        """Reads a remote piece into `mine`. Frees the place on failure or, after a cancellation, when the transfer ends."""
        kind, agent = self._device.type, self._agent
        try:
            peer = self._peers.get(piece.agent)
            known = peer is not None
            if peer is None:
                peer = self._peers[piece.agent] = agent.add_remote_agent(piece.agent)
            here = agent.get_xfer_descs([(mine.data_ptr(), mine.nbytes, self._device.index or 0)], mem_type=kind)
            there = agent.get_xfer_descs([(piece.address, piece.size, piece.device)], mem_type=kind)
            handle = agent.initialize_xfer("READ", here, there, peer)
            state = agent.transfer(handle)
        except Exception as error:
            self._incoming.give_back(place)
            self._forget(piece.agent)
            raise CarrierFailed from error
        ended = _Transfer(agent, handle, state)
        try:
            await finished(ended)
        except asyncio.CancelledError:
            self._incoming.give_back_when(ended, place)
            raise
        if ended.state != "DONE":
            self._incoming.give_back(place)
            self._forget(piece.agent)
            lost = ConnectionError("the transfer failed; the other worker may have died")
            if known:
                raise lost
            raise CarrierFailed from lost

    def _scatter(self, blocks: Sequence[int], content: Tensor) -> Callable[[], bool]:
        """Starts to copy the piece into the blocks. The returned function returns True once that has ended."""
        if self._stream is None or self._cache.stream is None:
            self._cache.scatter(self._cache.index(blocks), content)
            return lambda: True
        # earlier steps may still write to these blocks; later steps run in parallel with this copy
        self._stream.wait_event(self._cache.stream.record_event())
        with torch.cuda.stream(self._stream):
            self._cache.scatter(self._cache.index(blocks), content)
            done: Callable[[], bool] = self._stream.record_event().query
            return done

    def _forget(self, agent: bytes) -> None:
        peer = self._peers.pop(agent, None)
        if peer is not None:
            try:
                self._agent.remove_remote_agent(peer)
            except Exception as error:
                log.info("NIXL could not remove an agent: %s", error)


class _Transfer:
    """A running transfer. A call returns True once the transfer has ended, and releases its handle."""

    def __init__(self, agent: Any, handle: Any, state: str) -> None:
        self._agent, self._handle, self.state = agent, handle, state

    def __call__(self) -> bool:
        if self._handle is None:
            return True
        if self.state not in ("DONE", "ERR"):
            try:
                self.state = self._agent.check_xfer_state(self._handle)
            except Exception:  # because the peer has died, for example
                self.state = "ERR"
        if self.state in ("DONE", "ERR"):
            self._agent.release_xfer_handle(self._handle)
            self._handle = None
        return self._handle is None


class _Places:
    """The numbers of pieces, each of which is lent to one transfer at a time."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self._free = list(numbers)
        self._later: list[tuple[Callable[[], bool], int]] = []
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def free(self) -> bool:
        return bool(self._free)

    async def acquire(self) -> int:
        while not self._free:
            await finished(self._some_free) if self._later else await self._turn()
            self._some_free()
        return self._free.pop()

    def give_back(self, *numbers: int) -> None:
        self._free += numbers
        for _ in numbers:
            self._wake()

    def _wake(self) -> None:
        while self._waiting:
            if not (first := self._waiting.popleft()).done():
                first.set_result(None)
                return

    def give_back_when(self, done: Callable[[], bool], number: int) -> None:
        self._later.append((done, number))
        self._wake()  # a waiting transfer can poll for the end of this one instead

    def _some_free(self) -> bool:
        ready = [number for done, number in self._later if done()]
        self._later = [(done, number) for done, number in self._later if number not in ready]
        self.give_back(*ready)
        return bool(self._free)

    async def _turn(self) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self._wake()  # pass the free piece to the next waiting transfer
            raise
