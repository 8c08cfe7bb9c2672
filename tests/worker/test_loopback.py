"""The request that a worker sends to itself before it registers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from dynserve.errors import InternalError, TimedOut
from dynserve.transport.base import Mailbox, OnReply
from dynserve.transport.memory import MemoryBus
from dynserve.wire import requests
from dynserve.wire.link import Failed, Finished, SubmitReply, Usage
from dynserve.wire.requests import Accepted, Busy, Refused
from dynserve.worker import loopback
from dynserve.worker.loopback import Loopback
from tests.conftest import make_request

DONE = Finished(0, b"", [1], "length", Usage(1, 1, 0))


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loopback, "AGAIN", 0.02)
    monkeypatch.setattr(loopback, "TIMEOUT", 0.2)


async def submit(handler: Callable[[Loopback, int], bytes | None]) -> int:
    """Returns how many copies of the request arrived until it was answered. `handler` gets the link and the copy's number."""
    bus, link, copies = MemoryBus(1 << 20), Loopback(), 0

    def came(payload: bytes) -> bytes | None:
        nonlocal copies
        assert requests.decode_request(payload).id == "warm-up"
        copies += 1
        return handler(link, copies)

    async with bus.serve("s", came):
        await link.submit(bus, "s", make_request([1], id="warm-up", stream=0))
    return copies


async def test_an_answer_of_several_messages_is_awaited_to_its_end() -> None:
    def answers(link: Loopback, copy: int) -> None:
        link.send(SubmitReply(0, Accepted()))
        asyncio.get_running_loop().call_later(0.005, link.send, DONE)

    assert await submit(answers) == 1


async def test_a_request_that_the_bus_loses_is_sent_again() -> None:
    assert await submit(lambda link, copy: link.send(DONE) if copy == 3 else None) == 3


@pytest.mark.parametrize("by_bus", [True, False])
@pytest.mark.parametrize(("ack", "words"), [(Refused("internal", "no such model"), "no such model"), (Busy(3), "busy")])
async def test_a_refusal_is_an_error_with_its_reason(ack: Refused | Busy, words: str, by_bus: bool) -> None:
    def refuses(link: Loopback, copy: int) -> bytes | None:
        return requests.encode(ack) if by_bus else link.send(SubmitReply(0, ack))

    with pytest.raises(InternalError, match=words):
        await submit(refuses)


async def test_a_failure_is_an_error_with_its_reason() -> None:
    with pytest.raises(InternalError, match="out of memory"):
        await submit(lambda link, copy: link.send(Failed(0, "internal", "out of memory")))


async def test_a_timeout_is_an_error_with_the_time_waited() -> None:
    with pytest.raises(InternalError, match="warm-up took longer than 0 s$"):
        await submit(lambda link, copy: None)


async def test_a_timeout_is_an_error_with_the_last_cause() -> None:
    bus, link = MemoryBus(1 << 20), Loopback()
    with pytest.raises(InternalError, match="no process serves"):
        await link.submit(bus, "s", make_request([1], id="warm-up", stream=0))
    bus.connected = False
    with pytest.raises(InternalError, match="the bus is down"):
        await link.submit(bus, "s", make_request([1], id="warm-up", stream=0))


async def test_a_bus_that_times_out_once_is_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    bus, link = MemoryBus(1 << 20), Loopback()
    mailbox, tries = bus.mailbox, []

    @asynccontextmanager
    async def slow_at_first(on_reply: OnReply) -> AsyncIterator[Mailbox]:
        tries.append(1)
        if len(tries) == 1:
            raise TimedOut("NATS: timeout")
        async with mailbox(on_reply) as opened:
            yield opened

    monkeypatch.setattr(bus, "mailbox", slow_at_first)
    async with bus.serve("s", lambda payload: link.send(DONE)):
        await link.submit(bus, "s", make_request([1], id="warm-up", stream=0))
    assert len(tries) == 2


async def test_a_bus_that_reconnects_in_time_is_used() -> None:
    bus, link = MemoryBus(1 << 20), Loopback()
    bus.connected = False
    asyncio.get_running_loop().call_later(0.03, setattr, bus, "connected", True)
    async with bus.serve("s", lambda payload: link.send(DONE)):
        await link.submit(bus, "s", make_request([1], id="warm-up", stream=0))
