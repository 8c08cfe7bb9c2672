"""The carrier between GPUs of one machine: the decode worker reads the prefill worker's KV cache over NVLink or PCIe.

The prefill worker exports its cache (CUDA IPC); one kernel of the decode worker copies the blocks from there straight into
its own. Nothing is gathered, staged or scattered, and the prefill worker's GPU keeps computing.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import msgspec
import torch

from dynserve.executors.carriers import CarrierChannel, CarrierFailed, finished
from dynserve.executors.torch.attention import KvCache
from dynserve.executors.torch.cuda.kernels import Launcher, checked
from dynserve.wire import MALFORMED

log = logging.getLogger(__name__)

BLOCKS = 128  # of the kernel that copies: enough to fill a link
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class _Offer(msgspec.Struct, frozen=True, array_like=True):
    handle: bytes  # of the allocation that the cache is in
    offset: int  # of the cache in that allocation, bytes
    num_blocks: int
    blocks: list[int]


class PeerCarrier:
    """The CUDA IPC carrier of one KV cache on a GPU."""

    name = "cuda-ipc"
    kernel_names: ClassVar[list[str]] = ["move_blocks"]

    def __init__(self, cache: KvCache, launcher: Launcher) -> None:
        from cuda.bindings import driver

        self._driver, self._cache, self._launch = driver, cache, launcher.launch
        torch.cuda.set_device(cache.memory.device)
        self._machine = BOOT_ID.read_bytes().strip() if BOOT_ID.exists() else b""
        base = checked(driver.cuMemGetAddressRange(cache.memory.data_ptr()))
        handle = checked(driver.cuIpcGetMemHandle(base))
        self._handle = bytes(handle.reserved)
        self._offset = cache.memory.data_ptr() - int(base)
        self._opened: dict[str, _Opened] = {}  # by the worker's address
        self._stream = torch.cuda.Stream(cache.memory.device)  # type: ignore[no-untyped-call]

    def hello(self) -> bytes:
        return self._machine

    def reaches(self, hello: bytes) -> bool:
        return bool(hello) and hello == self._machine

    async def send(self, blocks: Sequence[int], channel: CarrierChannel) -> None:
        offer = _Offer(self._handle, self._offset, self._cache.num_blocks, list(blocks))
        await channel.send(msgspec.msgpack.encode(offer))

    async def receive(self, blocks: Sequence[int], channel: CarrierChannel) -> None:
        try:
            offer = msgspec.msgpack.decode(await channel.receive(), type=_Offer)
        except MALFORMED as error:
            raise CarrierFailed from error
        if len(offer.blocks) != len(blocks) or not all(0 <= block < offer.num_blocks for block in offer.blocks):
            raise CarrierFailed from ValueError("the prefill worker's offer does not match the requested blocks")
        torch.cuda.set_device(self._cache.memory.device)
        try:
            opened = self._open(channel.peer, offer.handle)
        except RuntimeError as error:
            raise CarrierFailed from error
        opened.users += 1
        try:
            done = self._copy(opened.pointer + offer.offset, offer.blocks, blocks)
            try:
                await finished(done.query)
            except asyncio.CancelledError:
                done.synchronize()  # the copy writes to blocks that are freed now
                raise
        finally:
            opened.users -= 1
            if opened.lost:
                self.lost(channel.peer)

    def _copy(self, source: int, theirs: Sequence[int], ours: Sequence[int]) -> torch.cuda.Event:
        cache = self._cache
        assert cache.stream is not None
        size = cache.block_bytes // 16
        # earlier steps may still write to these blocks; later steps run in parallel with the copy
        self._stream.wait_event(cache.stream.record_event())
        with torch.cuda.stream(self._stream):
            from_, to = cache.index(theirs), cache.index(ours)
            self._launch(
                "move_blocks", (BLOCKS, 1, 1), 256, ctypes.c_void_p(source), from_, cache.memory, to, len(ours), size
            )
            done: torch.cuda.Event = self._stream.record_event()
            return done

    def lost(self, peer: str) -> None:
        """Closes the peer's memory, which is not freed as long as it is open here, even if its owner has died."""
        opened = self._opened.get(peer)
        if opened is None:
            return
        if opened.users:
            opened.lost = True
            return
        del self._opened[peer]
        torch.cuda.set_device(self._cache.memory.device)
        (error,) = self._driver.cuIpcCloseMemHandle(opened.pointer)
        if error.value:
            log.warning("CUDA: closing a peer's memory failed: %s", error.name)

    def _open(self, peer: str, handle: bytes) -> _Opened:
        found = self._opened.get(peer)
        if found is not None and (found.lost or found.handle != handle):  # the worker has restarted at the same address
            if found.users:
                raise RuntimeError("the memory of the previous worker at this address is still being read")
            self.lost(peer)
            found = None
        if found is None:
            wrapped = self._driver.CUipcMemHandle()
            wrapped.reserved = handle
            flags = self._driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
            pointer = int(checked(self._driver.cuIpcOpenMemHandle(wrapped, flags.value)))
            found = self._opened[peer] = _Opened(handle, pointer)
        return found


class _Opened:
    """Another worker's memory, opened in this process."""

    def __init__(self, handle: bytes, pointer: int) -> None:
        self.handle, self.pointer = handle, pointer
        self.users = 0
        self.lost = False
