"""The in-memory planes with faults, for `chaos.py`: processes that die or freeze, links that are late, cut or silent, a bus that
loses messages, and leases that outlive their owners.

Every process of the cluster gets planes of its own (`FaultyPlanes.open`), which know whether it lives.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from functools import partial
from typing import TypeVar, cast

from dynserve.errors import HandoffBroken, Unavailable
from dynserve.executors.engine_args import EngineArgs
from dynserve.executors.handoff import HandoffTable
from dynserve.executors.transceiver import BlockStore, HostBlocks, MemoryTransceivers, Transceiver
from dynserve.transport.base import (
    Callback,
    Change,
    Handler,
    Link,
    LinkHandler,
    Mailbox,
    OnReply,
    Planes,
    Registration,
)
from dynserve.transport.memory import MemoryBus, MemoryLink, MemoryLinks, MemoryPlanes, MemoryRegistry
from dynserve.wire.requests import Handoff

T = TypeVar("T")

MAX_LATE = 2.5  # seconds that a message of the bus may be late


class Process:
    """One process. While it is frozen nothing reaches it and nothing leaves it; all of that happens when it thaws."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.dead = False
        self.silent = False  # its machine is gone, too: nobody is told that its connections ended
        self.frozen = False
        self.fetch_fails_until = 0.0
        self.links: list[FaultyLink] = []  # its own sides
        self._loop = asyncio.get_running_loop()
        self._frozen_until = 0.0
        self._held: list[Callable[[], object]] = []
        self._thawed = asyncio.Event()

    @property
    def frozen_s(self) -> float:
        """The seconds until the process thaws."""
        return max(0.0, self._frozen_until - self._loop.time())

    @property
    def fetch_fails(self) -> bool:
        return self._loop.time() < self.fetch_fails_until

    def run(self, call: Callable[..., object], *args: object) -> None:
        """Runs a callback in the process: now, when it thaws, or never if it is dead."""
        if self.frozen:
            self._held.append(partial(call, *args))
        elif not self.dead:
            call(*args)

    def freeze(self, seconds: float) -> None:
        self._frozen_until = max(self._frozen_until, self._loop.time() + seconds)
        self.frozen = True
        self._thawed.clear()
        self._loop.call_at(self._frozen_until, self.thaw)

    def thaw(self) -> None:
        if self._frozen_until > self._loop.time():
            return  # frozen again meanwhile
        self._frozen_until, self.frozen = 0.0, False
        self._thawed.set()
        held, self._held = self._held, []
        for call in held:
            self._loop.call_soon(self.run, call)

    def end_freeze(self) -> None:
        self._frozen_until = min(self._frozen_until, self._loop.time())
        self.thaw()

    async def awake(self) -> None:
        while self.frozen:
            await self._thawed.wait()

    def die(self, *, silent: bool) -> None:
        """Ends all connections of the process. The caller cancels its tasks."""
        self._frozen_until, self.frozen, self._held = 0.0, False, []
        self._thawed.set()
        self.silent = silent
        for link in self.links:
            if silent:
                link.silence()
            link.abort("the process has died")
        self.dead = True


class FreezableArgs:
    """Engine options for one process. A step that begins while the process is frozen lasts until it thaws."""

    def __init__(self, args: EngineArgs, process: Process) -> None:
        self._args, self._process = args, process

    def __getattr__(self, name: str) -> object:
        return getattr(self._args, name)

    @property
    def step_ms(self) -> float:
        return self._args.step_ms + 1000 * self._process.frozen_s


class FaultyPlanes(MemoryPlanes):
    """Planes whose faults are switched by their attributes. `rng` decides which messages are lost or late."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.bus: FaultyBus = FaultyBus(self.bus.max_payload, rng)
        self.registry: FaultyRegistry = FaultyRegistry()
        self.links: FaultyLinks = FaultyLinks(rng)
        self.transceivers = MemoryTransceivers()
        self.processes: dict[str, Process] = {}

    def open_for(self, process: Process) -> Planes:
        """Returns the planes for one process."""
        self.processes[process.name] = process
        return Planes(
            _BusOf(self.bus, process),
            _RegistryOf(self.registry, process),
            _LinksOf(self.links, process),
            self._fetch,
        )

    def transceivers_of(self, process: Process) -> FaultyTransceivers:
        return FaultyTransceivers(self.transceivers, process, self.processes)


@contextmanager
def _while_open(callback: Callable[[T], None]) -> Iterator[Callable[[T], None]]:
    """Yields the callback without effect after the block, when a process that thaws may still receive something."""
    is_open = True

    def receive(message: T) -> None:
        if is_open:
            callback(message)

    try:
        yield receive
    finally:
        is_open = False


# the bus


class FaultyBus(MemoryBus):
    """A bus that may accept messages and deliver none (`silent`), or lose or delay a share of them."""

    def __init__(self, max_payload: int, rng: random.Random) -> None:
        super().__init__(max_payload)
        self._rng = rng
        self.silent = False
        self.lost = self.late = 0.0  # shares of the messages

    def carry(self, deliver: Callable[..., object], *args: object) -> None:
        if self.silent or (self.lost and self._rng.random() < self.lost):
            return
        if self.late and self._rng.random() < self.late:
            asyncio.get_running_loop().call_later(self._rng.uniform(0.0, MAX_LATE), deliver, *args)
        else:
            super().carry(deliver, *args)


class _BusOf:
    """`Bus` of one process."""

    def __init__(self, bus: FaultyBus, process: Process) -> None:
        self._bus, self._process = bus, process

    @property
    def connected(self) -> bool:
        return self._bus.connected

    @property
    def max_payload(self) -> int:
        return self._bus.max_payload

    def mailbox(self, on_reply: OnReply) -> AbstractAsyncContextManager[Mailbox]:
        return self._bus.mailbox(lambda number, reply: self._process.run(on_reply, number, reply))

    @asynccontextmanager
    async def serve(self, subject: str, handler: Handler) -> AsyncIterator[None]:
        process = self._process

        def handle(payload: bytes) -> bytes | None:
            if process.dead or process.frozen:
                process.run(handler, payload)  # an acknowledgement for the bus is lost; the link carries most of them
                return None
            return handler(payload)

        async with self._bus.serve(subject, handle):
            yield
        if process.silent:  # NATS keeps the subscription of a machine that it still waits for
            self._bus.handlers[subject] = handle

    async def publish(self, subject: str, payload: bytes) -> None:
        await self._process.awake()
        if not self._process.dead:
            await self._bus.publish(subject, payload)

    @asynccontextmanager
    async def subscribe(self, subject: str, callback: Callback) -> AsyncIterator[None]:
        with _while_open(callback) as receive:
            async with self._bus.subscribe(subject, partial(self._process.run, receive)):
                yield


# the registry


class FaultyRegistry(MemoryRegistry):
    """A registry in which the entries of dead processes remain until their leases expire."""

    def __init__(self) -> None:
        super().__init__()
        self.owners: dict[str, Process] = {}  # by key
        self.lease_s = 0.0  # how long an entry outlives its owner
        self.taken: dict[str, bytes] = {}  # entries of live owners that were lost, for a while

    def remove(self, key: str) -> None:
        owner = self.owners.pop(key, None)
        if self.taken.pop(key, None) is None and owner is not None and owner.dead:
            asyncio.get_running_loop().call_later(self.lease_s, super().remove, key)
        else:
            super().remove(key)

    def take(self, key: str, seconds: float) -> None:
        """Loses the entry of a live owner for some seconds."""
        self.taken[key] = self.lose(key)
        asyncio.get_running_loop().call_later(seconds, self.put_back, key)

    def put_back(self, key: str) -> None:
        if (value := self.taken.pop(key, None)) is not None:
            self.put(key, value)


class _RegistryOf:
    """`Registry` of one process."""

    def __init__(self, registry: FaultyRegistry, process: Process) -> None:
        self._registry, self._process = registry, process

    def register(self, key: str, value: bytes) -> AbstractAsyncContextManager[Registration]:
        self._registry.owners[key] = self._process
        return self._registry.register(key, value)

    @asynccontextmanager
    async def watch(self, prefix: str, on_change: Callable[[Change], None]) -> AsyncIterator[None]:
        with _while_open(on_change) as receive:
            async with self._registry.watch(prefix, partial(self._process.run, receive)):
                yield


# links


class FaultyLink(MemoryLink):
    """One side of a link between two processes. Its bytes arrive in order, `delay` seconds after they were sent, unless one
    of the processes is frozen then."""

    def __init__(self, process: Process, other: Process, delay: float, *, worker_side: bool) -> None:
        super().__init__(worker_side=worker_side)
        self.process, self.other, self._delay = process, other, delay
        self._under_way: deque[Callable[[], object]] = deque()

    def write(self, frame: bytes | bytearray) -> None:
        if self.peer is not None and not self.mute:
            self._carry(partial(self.peer._arrive, bytes(frame[4:])))

    def hang_up(self, *, at_once: bool) -> None:
        peer, self.peer = self.peer, None
        self._loop.call_soon(self.ended, "closed")
        if at_once:  # a reset: bytes that are under way are lost
            self._under_way.clear()
        if peer is not None and not self.mute:
            self._carry(peer._peer_ended)

    def _carry(self, call: Callable[[], object]) -> None:
        self._under_way.append(call)
        if self._delay:
            self._loop.call_later(self._delay, self._deliver)
        else:
            self._loop.call_soon(self._deliver)

    def _deliver(self) -> None:
        if not self._under_way:
            return
        call = self._under_way.popleft()
        if self.process.frozen:
            self.process.run(self.other.run, call)
        else:
            self.other.run(call)


class FaultyLinks(MemoryLinks):
    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self._rng = rng
        self.listening: dict[str, Process] = {}  # by address

    async def dial_from(self, process: Process, address: str, handler: LinkHandler) -> Link:
        accept, other = self._listeners.get(address), self.listening.get(address)
        if accept is None or other is None or other.dead or process.dead or process.frozen:
            raise Unavailable(f"cannot reach the frontend at {address}")
        delay = self._rng.choice((0.0, 0.0, 0.0002, 0.003))
        worker = FaultyLink(process, other, delay, worker_side=True)
        frontend = FaultyLink(other, process, delay, worker_side=False)
        worker.peer, frontend.peer = frontend, worker
        for link in (worker, frontend):
            link.process.links = [known for known in link.process.links if not known.closed] + [link]
        worker.start(handler)
        frontend.start(accept(cast(Link, frontend)))
        return cast(Link, worker)


class _LinksOf:
    """`Links` of one process."""

    def __init__(self, links: FaultyLinks, process: Process) -> None:
        self._links, self._process = links, process

    @asynccontextmanager
    async def listen(self, host: str, port: int, accept: Callable[[Link], LinkHandler]) -> AsyncIterator[str]:
        async with self._links.listen(host, port, accept) as address:
            self._links.listening[address] = self._process
            yield address

    async def dial(self, address: str, handler: LinkHandler) -> Link:
        return await self._links.dial_from(self._process, address, handler)


# hand-offs


class FaultyTransceivers:
    """Opens the transceiver of one process, whose transfers take time, wait for frozen processes, and may fail."""

    def __init__(self, inner: MemoryTransceivers, process: Process, processes: dict[str, Process]) -> None:
        self._inner, self._process, self._processes = inner, process, processes

    @asynccontextmanager
    async def open(self, table: HandoffTable, store: BlockStore, host: str) -> AsyncIterator[Transceiver]:
        async with self._inner.open(table, _SlowBlocks(store), host) as transceiver:
            yield FaultyTransceiver(transceiver, self._process, self._processes)


class FaultyTransceiver:
    def __init__(self, inner: Transceiver, process: Process, processes: dict[str, Process]) -> None:
        self._inner, self._process, self._processes = inner, process, processes
        self.carriers = inner.carriers

    def state(self) -> bytes:
        return self._inner.state()

    async def fetch(self, handoff: Handoff, blocks: list[int], skip: int) -> None:
        owner = self._processes[handoff.owner]
        await self._process.awake()
        await owner.awake()
        if owner.silent:
            await asyncio.get_running_loop().create_future()  # the fetch's own time limit ends it
        if self._process.fetch_fails:
            raise HandoffBroken("the transfer was made to fail")
        await self._inner.fetch(handoff, blocks, skip)
        await owner.awake()


class _SlowBlocks(HostBlocks):
    """A store in which the time of a transfer passes while it is under way, and not before it begins."""

    S_PER_BLOCK = 0.002

    def __init__(self, inner: BlockStore) -> None:
        self.layout, self.block_bytes = inner.layout, inner.block_bytes

    async def incoming(self, blocks: Sequence[int]) -> AsyncGenerator[memoryview]:
        await asyncio.sleep(len(blocks) * self.S_PER_BLOCK)
        for _ in blocks:
            yield memoryview(bytearray())

    def view(self, block: int) -> memoryview:
        return memoryview(bytearray())
