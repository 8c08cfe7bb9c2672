"""`Channel`: bursts, bounds and ends."""

from __future__ import annotations

import asyncio

import pytest

from dynserve.errors import Unavailable
from dynserve.streams import Channel


async def test_a_channel_returns_a_burst_in_one_receive() -> None:
    channel: Channel[int] = Channel(10)
    for i in range(3):
        assert channel.put(i)
    assert await channel.receive() == [0, 1, 2]


async def test_a_full_channel_refuses_new_items_and_keeps_the_others() -> None:
    channel: Channel[str] = Channel(10)
    assert channel.put("a", 8)
    assert not channel.put("b", 3)
    assert channel.statistics() == (1, 8, 10)
    assert await channel.receive() == ["a"]
    assert channel.put("b", 3)


async def test_a_closed_channel_returns_its_items_and_then_raises_its_error() -> None:
    channel: Channel[int] = Channel(10)
    channel.put(1)
    channel.close(Unavailable("cut"))
    channel.close()
    assert not channel.put(2)
    assert await channel.receive() == [1]
    with pytest.raises(Unavailable):
        await channel.receive()


async def test_a_waiting_consumer_wakes_when_the_channel_ends() -> None:
    channel: Channel[int] = Channel(10)
    waiting = asyncio.ensure_future(channel.receive())
    await asyncio.sleep(0)
    channel.close()
    assert await waiting == []
