from __future__ import annotations

import asyncio

import pytest

from dynserve import clock
from dynserve.errors import Cancelled, Overloaded
from dynserve.frontend.admission import Queue, QueuedRequest
from tests.conftest import reference_cycles


class Pool:
    """Workers with `slots` free slots behind a queue; an admitted request occupies one while it runs."""

    def __init__(self, slots: int, most: int = 10, most_s: float = 30.0) -> None:
        self.slots = slots
        self.queue = Queue("m", most, most_s, lambda: self.slots > 0)
        self.order: list[str] = []

    async def request(self, name: str, priority: int = 0, seconds: float = 1.0) -> None:
        waiting = self.queue.enter(priority)
        if waiting is not None:
            await self.queue.wait(waiting, 1e9)
        self.slots -= 1
        self.order.append(name)
        assert self.slots >= 0, "more were let in than there was room for"
        await asyncio.sleep(seconds)
        self.slots += 1
        self.queue.recheck()


def test_requests_are_admitted_at_once_while_slots_are_free() -> None:
    async def main() -> None:
        assert Pool(1).queue.enter(0) is None

    clock.run(main())


def test_waiting_requests_are_admitted_by_priority_and_then_by_arrival() -> None:
    async def main() -> None:
        pool = Pool(2)
        await asyncio.gather(
            *(pool.request(f"first{i}") for i in range(2)),
            *(pool.request(f"normal{i}") for i in range(3)),
            *(pool.request(f"high{i}", priority=5) for i in range(2)),
            pool.request("low", priority=-1),
        )
        assert pool.order == ["first0", "first1", "high0", "high1", "normal0", "normal1", "normal2", "low"]
        assert len(pool.queue) == 0

    clock.run(main())


def test_a_full_queue_refuses_with_the_estimated_wait_as_retry_after() -> None:
    async def main() -> None:
        pool = Pool(1, most=4)
        asking = [asyncio.create_task(pool.request(str(i), seconds=3.0)) for i in range(5)]
        await asyncio.sleep(9.5)  # three are done or under way: the pace is one in three seconds
        asking += [asyncio.create_task(pool.request(str(i), seconds=3.0)) for i in range(5, 8)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded) as refused:
            await pool.request("too many")
        assert 13 <= refused.value.retry_after <= 16  # four ahead, and itself
        await asyncio.gather(*asking)

    clock.run(main())


def test_a_higher_priority_displaces_the_newest_request_of_the_lowest() -> None:
    async def main() -> None:
        pool = Pool(1, most=2)
        running = asyncio.create_task(pool.request("running"))
        await asyncio.sleep(0)
        older, newer = (asyncio.create_task(pool.request(name)) for name in ("older", "newer"))
        await asyncio.sleep(0)
        urgent = asyncio.create_task(pool.request("urgent", priority=1))
        with pytest.raises(Overloaded, match="higher priority"):
            await newer
        with pytest.raises(Overloaded):
            await pool.request("equal")
        await asyncio.gather(running, older, urgent)
        assert pool.order == ["running", "urgent", "older"]

    clock.run(main())


def test_no_request_waits_longer_than_the_limit() -> None:
    async def main() -> None:
        pool = Pool(0, most_s=5.0)
        with pytest.raises(Overloaded, match="stayed busy for 5 s"):
            await pool.request("patient")
        assert asyncio.get_running_loop().time() == 5.0
        assert len(pool.queue) == 0

    clock.run(main())


def test_a_cancelled_request_frees_its_place_in_the_queue() -> None:
    async def main() -> None:
        pool = Pool(1, most=2)
        running = asyncio.create_task(pool.request("running"))
        await asyncio.sleep(0)
        cancelled = asyncio.create_task(pool.request("cancelled"))
        stayer = asyncio.create_task(pool.request("stayer"))
        await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.sleep(0)
        late = asyncio.create_task(pool.request("late"))
        await asyncio.gather(running, stayer, late)
        assert pool.order == ["running", "stayer", "late"]

    clock.run(main())


def test_idle_times_do_not_raise_the_estimated_wait() -> None:
    async def main() -> None:
        pool = Pool(1, most=4)
        for _ in range(3):  # lone waits, far apart
            await asyncio.gather(pool.request("a", seconds=2.0), pool.request("b", seconds=2.0))
            await asyncio.sleep(500)
        asking = [asyncio.create_task(pool.request(str(i), seconds=2.0)) for i in range(5)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded) as refused:
            await pool.request("too many")
        assert 8 <= refused.value.retry_after <= 12
        await asyncio.gather(*asking)

    clock.run(main())


async def test_a_cancelled_request_in_the_queue_leaves_no_reference_cycle() -> None:
    queue = Queue("m", 10, 30.0, lambda: False)

    async def request() -> None:
        waiting = queue.enter(0)
        assert waiting is not None
        asyncio.get_running_loop().call_soon(waiting.fail, Cancelled("the client has left"))
        try:
            await queue.wait(waiting, 1e9)
        except Cancelled:
            del waiting

    with reference_cycles(QueuedRequest, Cancelled) as cyclic:
        for _ in range(3):
            await asyncio.create_task(request())
        await asyncio.sleep(0)
    assert cyclic == [] and len(queue) == 0
