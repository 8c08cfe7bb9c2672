"""The hand-off table, and both transceivers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import msgspec
import pytest

from dynserve.errors import HandoffBroken, HandoffError, HandoffGone, HandoffMismatch
from dynserve.executors.handoff import HandoffEnd, HandoffTable
from dynserve.executors.transceiver import HostBlocks, MemoryTransceivers, TcpTransceivers, Transceiver
from dynserve.wire.requests import GenerateRequest, Handoff
from tests.certificates import Authority
from tests.conftest import make_request, until

REQUEST = make_request([1, 2, 3])


class Store(HostBlocks):
    def __init__(self, fill: int, layout: str = "same") -> None:
        self.layout, self.block_bytes = layout, 70_000
        self.memory = bytearray([fill]) * (8 * self.block_bytes)

    def view(self, block: int) -> memoryview:
        return memoryview(self.memory)[block * self.block_bytes : (block + 1) * self.block_bytes]


class Side:
    """One worker's table, memory and transceiver."""

    def __init__(self, name: str, fill: int, layout: str = "same", ttl: float = 30) -> None:
        self.released: list[int] = []
        self.table = HandoffTable(name, ttl, lambda ticket, how: self.released.append(ticket))
        self.store = Store(fill, layout)
        self.transceiver: Transceiver

    def offer(self, blocks: list[int], request: GenerateRequest = REQUEST, ticket: int = 1) -> Handoff:
        return self.table.open(ticket, request, blocks, 0, self.transceiver.state())


@pytest.fixture(params=["tcp", "tls", "memory"])
async def sides(request: pytest.FixtureRequest, authority: Authority) -> AsyncIterator[Any]:
    factory: Any = MemoryTransceivers()
    if request.param != "memory":
        factory = TcpTransceivers(tls=authority.tls if request.param == "tls" else None)
    async with AsyncExitStack() as stack:

        async def make(name: str, fill: int, **how: Any) -> Side:
            side = Side(name, fill, **how)
            side.transceiver = await stack.enter_async_context(factory.open(side.table, side.store, "127.0.0.1"))
            return side

        yield make


async def test_the_blocks_arrive_and_the_owner_frees_its_own(sides: Any) -> None:
    prefill, decode = await sides("p", 1), await sides("d", 0)
    prefill.store.view(5)[:3] = b"abc"
    handoff = prefill.offer([4, 5])
    await decode.transceiver.fetch(handoff, [0, 7], 0)
    assert bytes(decode.store.view(0)) == bytes(prefill.store.view(4))
    assert bytes(decode.store.view(7)) == bytes(prefill.store.view(5))
    await until(lambda: prefill.released == [1])
    assert prefill.table.ended == {HandoffEnd.DELIVERED: 1} and len(prefill.table) == 0


async def test_blocks_that_the_decode_worker_already_has_are_not_sent(sides: Any) -> None:
    prefill, decode = await sides("p", 1), await sides("d", 0)
    await decode.transceiver.fetch(prefill.offer([4, 5, 6]), [2], 2)
    assert bytes(decode.store.view(2)) == bytes(prefill.store.view(6))
    assert not any(decode.store.view(1))


async def test_a_transfer_of_no_blocks_still_ends_the_hand_off(sides: Any) -> None:
    prefill, decode = await sides("p", 1), await sides("d", 0)
    await decode.transceiver.fetch(prefill.offer([4]), [], 1)
    await until(lambda: prefill.released == [1])


async def test_many_transfers_reuse_connections(sides: Any) -> None:
    prefill, decode = await sides("p", 1), await sides("d", 0)
    handoffs = [prefill.offer([i % 8], ticket=i) for i in range(1, 31)]
    await asyncio.gather(*(decode.transceiver.fetch(handoff, [0], 0) for handoff in handoffs))
    await until(lambda: sorted(prefill.released) == list(range(1, 31)))


@pytest.mark.parametrize("change", [{"request_id": "other"}, {"sequence_hash": 5}])
async def test_a_hand_off_of_another_request_is_refused_and_stays_open(sides: Any, change: dict[str, Any]) -> None:
    prefill, decode = await sides("p", 1), await sides("d", 0)
    handoff = prefill.offer([4])
    with pytest.raises(HandoffMismatch):
        await decode.transceiver.fetch(msgspec.structs.replace(handoff, **change), [0], 0)
    assert len(prefill.table) == 1
    await decode.transceiver.fetch(handoff, [0], 0)


async def test_a_wrong_number_of_blocks_is_refused(sides: Any) -> None:
    prefill, decode = await sides("p", 1), await sides("d", 0)
    with pytest.raises(HandoffMismatch):
        await decode.transceiver.fetch(prefill.offer([4, 5]), [0], 0)


async def test_different_memory_layouts_are_refused_with_both_named(sides: Any) -> None:
    prefill, decode = await sides("p", 1, layout="float32"), await sides("d", 0, layout="bfloat16")
    with pytest.raises(HandoffMismatch, match=r"float32.*bfloat16"):
        await decode.transceiver.fetch(prefill.offer([4]), [0], 0)


async def test_a_hand_off_is_delivered_once(sides: Any) -> None:
    prefill, decode = await sides("p", 1), await sides("d", 0)
    handoff = prefill.offer([4])
    await decode.transceiver.fetch(handoff, [0], 0)
    await until(lambda: prefill.released == [1])
    with pytest.raises(HandoffGone):
        await decode.transceiver.fetch(handoff, [0], 0)
    assert prefill.released == [1]


async def test_a_cancelled_hand_off_cannot_be_fetched(sides: Any) -> None:
    prefill, decode = await sides("p", 1), await sides("d", 0)
    handoff = prefill.offer([4])
    assert prefill.table.cancel(1)
    assert not prefill.table.cancel(1)
    with pytest.raises(HandoffGone):
        await decode.transceiver.fetch(handoff, [0], 0)
    assert prefill.released == [1] and prefill.table.ended == {HandoffEnd.CANCELLED: 1}


async def test_a_hand_off_that_is_never_fetched_expires(sides: Any) -> None:
    prefill = await sides("p", 1, ttl=0.05)
    prefill.offer([4])
    await until(lambda: prefill.released == [1])
    assert prefill.table.ended == {HandoffEnd.EXPIRED: 1}


async def test_a_hand_off_whose_owner_departed_is_broken() -> None:
    prefill, decode = Side("p", 1), Side("d", 0)
    async with TcpTransceivers().open(decode.table, decode.store, "127.0.0.1") as decode.transceiver:
        async with TcpTransceivers().open(prefill.table, prefill.store, "127.0.0.1") as prefill.transceiver:
            handoff = prefill.offer([4])
        with pytest.raises(HandoffBroken):
            await decode.transceiver.fetch(handoff, [0], 0)


async def test_a_cancelled_hand_off_is_released_when_its_sending_has_stopped() -> None:
    prefill = Side("p", 1)
    async with TcpTransceivers().open(prefill.table, prefill.store, "127.0.0.1") as prefill.transceiver:
        handoff = prefill.offer([4])
        stopped: list[int] = []
        with prefill.table.sending(handoff.id, handoff.request_id, handoff.sequence_hash, lambda: stopped.append(1)):
            assert prefill.table.cancel(1)
            assert stopped == [1] and prefill.released == []
        assert prefill.released == [1] and prefill.table.ended == {HandoffEnd.CANCELLED: 1}


async def test_a_peer_that_sends_invalid_bytes_loses_only_its_connection() -> None:
    prefill, decode = Side("p", 1), Side("d", 0)
    async with (
        TcpTransceivers().open(prefill.table, prefill.store, "127.0.0.1") as prefill.transceiver,
        TcpTransceivers().open(decode.table, decode.store, "127.0.0.1") as decode.transceiver,
    ):
        handoff = prefill.offer([4])
        address = msgspec.msgpack.decode(handoff.state)[0]
        host, port = address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"\xff" * 100)
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        writer.close()
        await decode.transceiver.fetch(handoff, [0], 0)


async def test_hand_off_ids_of_two_owners_are_distinct() -> None:
    one, two = Side("p1", 0), Side("p2", 0)
    ids = {side.table.open(i, REQUEST, [], 0, b"").id for side in (one, two) for i in range(100)}
    assert len(ids) == 200
    one.table.cancel_all()
    two.table.cancel_all()


def test_all_hand_off_errors_are_subclasses_of_handoff_error() -> None:
    assert all(issubclass(e, HandoffError) for e in (HandoffGone, HandoffMismatch, HandoffBroken))
