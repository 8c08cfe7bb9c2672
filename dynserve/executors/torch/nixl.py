"""The carrier between machines: NIXL (UCX) reads the blocks out of the prefill worker's memory, GPU or host.

Networks and links are fast with large pieces of memory only, and a block is small. So the owner gathers blocks into one
piece of memory that NIXL knows, the receiver reads that in one transfer and scatters it; of a long hand-off the next piece
is gathered while one is being read.

    decode                                    prefill
              ◀───────────────────────────── Piece{agent, where, bytes}      gather
    read      ◀════════ by NIXL ════════════
    scatter   one byte ────────────────────▶ that memory can be used again
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

PACKAGES = ("nixl_cu13", "nixl_cu12", "nixl")  # under which NIXL's wheels install it
PIECE_BYTES = {"cuda": 64 << 20, "cpu": 8 << 20}
PIECES = 4  # in each direction; a transfer uses two of its sender's
GOT = b"\x06"


def nixl_api() -> Any:
    """NIXL's Python interface, or None where it is not installed."""
    for package in PACKAGES:
        try:
            return import_module(f"{package}._api")
        except ImportError:
            continue
    return None


class _Piece(msgspec.Struct, frozen=True, array_like=True):
    agent: bytes  # what NIXL says of the sender's
    address: int
    size: int  # bytes
    device: int


class NixlCarrier:
    """Of one KV cache. Raises ConfigError where NIXL is missing or does not start."""

    name = "nixl"

    def __init__(self, cache: KvCache, worker: str) -> None:
        api = nixl_api()
        if api is None:
            raise ConfigError("cache_transceiver_config.backend NIXL needs the extra dynserve[nixl]")
        self._cache, self._device = cache, cache.memory.device
        self._enter()
        self._blocks = max(1, PIECE_BYTES[self._device.type] // cache.block_bytes)  # in a piece
        shape = (2 * PIECES, self._blocks, *cache.memory.shape[1:])
        self._pieces = torch.empty(shape, dtype=cache.memory.dtype, device=self._device)
        try:
            self._agent = api.nixl_agent(worker, api.nixl_agent_config(backends=["UCX"]))
            self._agent.register_memory(self._pieces)
            self._hello: bytes = self._agent.get_agent_metadata()
        except Exception as error:  # NIXL has error types of its own for all that can be wrong
            raise ConfigError(f"NIXL does not start here: {error}") from error
        self._outgoing, self._incoming = _Places(range(PIECES)), _Places(range(PIECES, 2 * PIECES))
        self._peers: dict[bytes, str] = {}
        self._agents: dict[str, bytes] = {}  # of the workers at these addresses
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
                # whoever waits for a place must not hold one that another waits for
                while lent and (len(lent) == 2 or not self._outgoing.free):
                    await self._taken(channel, lent)
                lent.append(await self._outgoing.take())
                piece = await self._gathered(lent[-1], blocks[at : at + self._blocks])
                device = self._device.index or 0
                await channel.send(msgspec.msgpack.encode(_Piece(self._hello, piece.data_ptr(), piece.nbytes, device)))
            while lent:
                await self._taken(channel, lent)
        finally:
            self._outgoing.give_back(*lent)

    async def receive(self, blocks: Sequence[int], channel: CarrierChannel) -> None:
        self._enter()
        try:
            await self._receive(blocks, channel)
        except BaseException:
            if self._stream is not None and self._cache.stream is not None:
                # blocks that are given back now may still be written to: whoever uses them next does so behind that
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
            place = await self._incoming.take()
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
        """Makes our device the thread's own, as UCX expects."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

    async def _taken(self, channel: CarrierChannel, lent: deque[int]) -> None:
        if await channel.receive() != GOT:
            raise EOFError("the receiver of KV blocks talks nonsense")
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
        """Leaves the place to the transfer, until that has ended, when it fails or is given up."""
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
        """Begins to; the result tells whether it is done."""
        if self._stream is None or self._cache.stream is None:
            self._cache.scatter(self._cache.index(blocks), content)
            return lambda: True
        # what was begun before may still write to blocks that are ours now; later steps go on beside this
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
                log.info("NIXL: %s", error)


class _Transfer:
    """Asks, when called, whether a transfer has ended, and lets go of it then."""

    def __init__(self, agent: Any, handle: Any, state: str) -> None:
        self._agent, self._handle, self.state = agent, handle, state

    def __call__(self) -> bool:
        if self._handle is None:
            return True
        if self.state not in ("DONE", "ERR"):
            try:
                self.state = self._agent.check_xfer_state(self._handle)
            except Exception:  # of the peer's death, say
                self.state = "ERR"
        if self.state in ("DONE", "ERR"):
            self._agent.release_xfer_handle(self._handle)
            self._handle = None
        return self._handle is None


class _Places:
    """Numbers that are given to one at a time."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self._free = list(numbers)
        self._later: list[tuple[Callable[[], bool], int]] = []
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def free(self) -> bool:
        return bool(self._free)

    async def take(self) -> int:
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
        self._wake()  # who waits for somebody to give one back can look for the end of this one

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
                self._wake()  # another one may have it
            raise
