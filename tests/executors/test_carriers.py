"""Carriers of KV blocks: their use by a transfer, their failures, and NIXL over host memory."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

import pytest
import torch

from dynserve.errors import HandoffBroken, HandoffGone
from dynserve.executors.carriers import Carrier, CarrierChannel, CarrierFailed
from dynserve.executors.handoff import HandoffEnd, HandoffTable
from dynserve.executors.torch.attention import KvCache
from dynserve.executors.torch.nixl import PIECE_BYTES, PIECES, NixlCarrier, nixl_api
from dynserve.executors.transceiver import TcpTransceiver, TcpTransceivers
from dynserve.wire.requests import GenerateRequest, Handoff
from tests.conftest import make_request, until

REQUEST = make_request([1, 2, 3])


class Side:
    """One worker's table, cache and transceiver."""

    def __init__(self, fill: float) -> None:
        self.released: list[int] = []
        self.table = HandoffTable(f"worker{fill}", 30, lambda ticket, how: self.released.append(ticket))
        self.cache = KvCache(
            num_blocks=64, block_size=32, num_layers=2, kv_heads=2, head_dim=64, dtype=torch.float32,
            device=torch.device("cpu"), model="m",
        )  # fmt: skip
        self.cache.memory[:] = fill * 100 + torch.arange(64.0)[:, None, None, None, None, None]
        self.transceiver: TcpTransceiver
        self.carrier: Any = None

    def offer(self, blocks: list[int], request: GenerateRequest = REQUEST, ticket: int = 1) -> Handoff:
        return self.table.open(ticket, request, blocks, 0, self.transceiver.state())

    def content(self, block: int) -> set[float]:
        return set(self.cache.memory[block].unique().tolist())


Make = Callable[..., Awaitable[Side]]


@pytest.fixture
async def sides() -> AsyncIterator[Make]:
    async with AsyncExitStack() as stack:

        async def make(fill: float, carrier: Callable[[Side], Carrier] | None = None) -> Side:
            side = Side(fill)
            side.carrier = carrier(side) if carrier is not None else None
            factory = TcpTransceivers([side.carrier] if side.carrier is not None else [])
            opened = await stack.enter_async_context(factory.open(side.table, side.cache, "127.0.0.1"))
            assert isinstance(opened, TcpTransceiver)
            side.transceiver = opened
            return side

        yield make


class ByHand:
    """A carrier that the test drives step by step."""

    name = "by-hand"

    def __init__(self, side: Side) -> None:
        self.side, self.reading, self.go = side, asyncio.Event(), asyncio.Event()
        self.fails: Exception | None = None
        self.gone: list[str] = []

    def lost(self, peer: str) -> None:
        self.gone.append(peer)

    def hello(self) -> bytes:
        return b"hand"

    def reaches(self, hello: bytes) -> bool:
        return hello == b"hand"

    async def send(self, blocks: Sequence[int], channel: CarrierChannel) -> None:
        await channel.send(bytes(blocks))

    async def receive(self, blocks: Sequence[int], channel: CarrierChannel) -> None:
        theirs = await channel.receive()
        self.reading.set()
        await self.go.wait()
        if self.fails is not None:
            raise CarrierFailed from self.fails
        for ours, other in zip(blocks, theirs, strict=True):
            self.side.cache.memory[ours] = 100.0 + other


async def test_a_carrier_common_to_both_workers_moves_the_blocks(sides: Make) -> None:
    prefill, decode = await sides(1, ByHand), await sides(0, ByHand)
    decode.carrier.go.set()
    await decode.transceiver.fetch(prefill.offer([7, 5, 9]), [2, 3], skip=1)
    assert decode.content(2) == {105.0} and decode.content(3) == {109.0}
    assert prefill.released == [1] and prefill.table.ended[HandoffEnd.DELIVERED] == 1
    assert decode.transceiver.carried == {"by-hand": 1}


@pytest.mark.parametrize("which", ["sender", "receiver"])
async def test_without_a_common_carrier_the_blocks_come_over_tcp(sides: Make, which: str) -> None:
    prefill = await sides(1, ByHand if which == "sender" else None)
    decode = await sides(0, ByHand if which == "receiver" else None)
    await decode.transceiver.fetch(prefill.offer([7]), [2], skip=0)
    assert decode.content(2) == {107.0} and decode.transceiver.carried == {"tcp": 1}


async def test_a_carrier_that_failed_is_not_used_again(sides: Make) -> None:
    prefill, decode = await sides(1, ByHand), await sides(0, ByHand)
    decode.carrier.go.set()
    decode.carrier.fails = RuntimeError("no way through")
    await decode.transceiver.fetch(prefill.offer([7]), [2], skip=0)
    await decode.transceiver.fetch(prefill.offer([8], ticket=2), [3], skip=0)
    assert decode.content(2) == {107.0} and decode.content(3) == {108.0}
    assert decode.transceiver.carried == {"by-hand": 1, "tcp": 2}
    await until(lambda: prefill.released == [1, 2])


async def test_a_carrier_is_notified_when_a_worker_departs(sides: Make) -> None:
    decode = await sides(0, ByHand)
    decode.carrier.go.set()
    prefill = Side(1)
    prefill.carrier = ByHand(prefill)
    async with TcpTransceivers([prefill.carrier]).open(prefill.table, prefill.cache, "127.0.0.1") as opened:
        prefill.transceiver = opened  # type: ignore[assignment]
        for ticket in range(3):
            await decode.transceiver.fetch(prefill.offer([7], ticket=ticket), [2], skip=0)
        assert decode.carrier.gone == []
    await until(lambda: len(decode.carrier.gone) == 1)
    assert not decode.transceiver._idle


async def test_a_carrier_is_notified_of_a_worker_that_departs_mid_transfer(sides: Make) -> None:
    decode, prefill = await sides(0, ByHand), Side(1)
    prefill.carrier = ByHand(prefill)
    async with TcpTransceivers([prefill.carrier]).open(prefill.table, prefill.cache, "127.0.0.1") as opened:
        prefill.transceiver = opened  # type: ignore[assignment]
        fetching = asyncio.create_task(decode.transceiver.fetch(prefill.offer([7]), [2], skip=0))
        await decode.carrier.reading.wait()
    decode.carrier.go.set()
    with pytest.raises(HandoffBroken):
        await fetching
    assert len(decode.carrier.gone) == 1


async def test_blocks_read_after_their_hand_off_was_cancelled_are_not_used(sides: Make) -> None:
    """The owner reuses the memory at once, so blocks read after that may belong to another request."""
    prefill, decode = await sides(1, ByHand), await sides(0, ByHand)
    handoff = prefill.offer([7])
    fetching = asyncio.create_task(decode.transceiver.fetch(handoff, [2], skip=0))
    await decode.carrier.reading.wait()
    prefill.table.cancel(1)
    await until(lambda: prefill.released == [1])
    decode.carrier.go.set()
    with pytest.raises(HandoffBroken):
        await fetching
    assert prefill.table.ended[HandoffEnd.CANCELLED] == 1 and prefill.table.ended[HandoffEnd.DELIVERED] == 0


async def test_a_cancelled_fetch_keeps_the_hand_off_open(sides: Make) -> None:
    prefill, decode = await sides(1, ByHand), await sides(0, ByHand)
    handoff = prefill.offer([7])
    fetching = asyncio.create_task(decode.transceiver.fetch(handoff, [2], skip=0))
    await decode.carrier.reading.wait()
    fetching.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await fetching
    decode.carrier.go.set()

    async def again() -> bool:
        with contextlib.suppress(HandoffGone):  # as long as the owner has not noticed
            await decode.transceiver.fetch(handoff, [2], skip=0)
            return True
        return False

    while not await again():
        await asyncio.sleep(0)
    assert decode.content(2) == {107.0} and prefill.table.ended[HandoffEnd.DELIVERED] == 1


# NIXL


@pytest.fixture
def nixl() -> Callable[[Side], Carrier]:
    if nixl_api() is None:
        pytest.skip("NIXL is not installed")
    count = iter(range(100))
    return lambda side: NixlCarrier(side.cache, f"worker{next(count)}-{id(side)}")


async def test_nixl_moves_blocks_in_pieces(sides: Make, nixl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PIECE_BYTES, "cpu", 5 << 16)
    prefill, decode = await sides(1, nixl), await sides(0, nixl)
    assert prefill.carrier._blocks == 5
    theirs, ours = list(range(40, 63)), list(range(23))[::-1]
    await decode.transceiver.fetch(prefill.offer(theirs), ours, skip=0)
    assert [decode.content(block) for block in ours] == [{100.0 + block} for block in theirs]
    assert decode.content(30) == {30.0}
    assert prefill.released == [1] and decode.transceiver.carried == {"nixl": 1}


async def test_many_nixl_transfers_share_the_staging_slots(sides: Make, nixl: Any) -> None:
    prefill, decode = await sides(1, nixl), await sides(0, nixl)
    requests = [make_request([i + 1]) for i in range(12)]
    handoffs = [prefill.offer([i], request, ticket=i) for i, request in enumerate(requests)]
    await asyncio.gather(*(decode.transceiver.fetch(h, [40 + i], skip=0) for i, h in enumerate(handoffs)))
    assert [decode.content(40 + i) for i in range(12)] == [{100.0 + i} for i in range(12)]
    assert len(decode.carrier._incoming._free) + len(decode.carrier._incoming._later) == PIECES
    assert len(prefill.carrier._outgoing._free) == PIECES


async def test_nixl_transfers_of_many_pieces_do_not_deadlock(
    sides: Make, nixl: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PIECE_BYTES, "cpu", 1)  # a block each
    prefill, decode = await sides(1, nixl), await sides(0, nixl)
    requests = [make_request([i + 1]) for i in range(8)]
    handoffs = [prefill.offer(list(range(5 * i, 5 * i + 5)), r, ticket=i) for i, r in enumerate(requests)]
    ours = [list(range(5 * i, 5 * i + 5)) for i in range(8)]
    async with asyncio.timeout(30):
        await asyncio.gather(*(decode.transceiver.fetch(h, ours[i], skip=0) for i, h in enumerate(handoffs)))
    assert [decode.content(block) for block in range(40)] == [{100.0 + block} for block in range(40)]


async def test_a_cancelled_nixl_transfer_returns_its_staging_slots(sides: Make, nixl: Any) -> None:
    prefill, decode = await sides(1, nixl), await sides(0, nixl)
    for ticket in range(1, 4):
        fetching = asyncio.create_task(decode.transceiver.fetch(prefill.offer([7], ticket=ticket), [2], skip=0))
        for _ in range(ticket * 3):
            await asyncio.sleep(0)
        fetching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await fetching
        prefill.table.cancel(ticket)
    await until(lambda: len(prefill.carrier._outgoing._free) == PIECES)
    await decode.transceiver.fetch(prefill.offer([9], ticket=9), [3], skip=0)
    assert decode.content(3) == {109.0}
    places = decode.carrier._incoming
    await until(lambda: places._some_free() and len(places._free) == PIECES)
