from __future__ import annotations

import asyncio

import pytest

from dynserve import clock
from dynserve.errors import Cancelled, NoWorker, Overloaded, TimedOut
from dynserve.frontend.admission import Admitted, Queue, QueuedRequest, QueueLimits
from tests.conftest import reference_cycles


class Pool:
    """Workers with `slots` free slots behind a queue; an admitted request occupies one while it runs."""

    def __init__(self, slots: int, most: int = 10, most_s: float = 30.0, slo_s: float = 0.0) -> None:
        self.free = self.total = slots
        self.present = True  # there are workers
        self.queue = Queue("m", QueueLimits(most, most_s, slo_s), self)
        self.order: list[str] = []

    def has_room(self, model: str, unplaced: int, undecoded: int) -> bool:
        return self.present and self.free > unplaced

    def serves(self, model: str) -> bool:
        return self.present

    def slots(self, model: str) -> int:
        return self.total

    async def request(self, name: str, priority: int = 0, seconds: float = 1.0) -> None:
        entry = self.queue.enter(priority)
        admitted = entry if isinstance(entry, Admitted) else await self.queue.wait(entry, 1e9)
        await asyncio.sleep(0)  # preparing a request takes some turns of the loop
        self.free -= 1
        admitted.placed(decoding=True)
        self.order.append(name)
        assert self.free >= 0, "more were let in than there was room for"
        admitted.answering()
        await asyncio.sleep(seconds)
        self.free += 1
        self.queue.recheck()
        admitted.close(finished=True)


def test_requests_are_admitted_at_once_while_slots_are_free() -> None:
    async def main() -> None:
        pool = Pool(1)
        assert isinstance(pool.queue.enter(0), Admitted)
        assert isinstance(pool.queue.enter(0), QueuedRequest)  # the first one will occupy the slot

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
    queue = Pool(0).queue

    async def request() -> None:
        waiting = queue.enter(0)
        assert isinstance(waiting, QueuedRequest)
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


def test_a_request_that_would_wait_too_long_is_refused_at_once() -> None:
    async def main() -> None:
        pool = Pool(2, most=100, most_s=7.0)
        await pool.request("warm", seconds=4.0)  # the mean duration: two slots admit one in two seconds
        asking = [asyncio.create_task(pool.request("first", seconds=4.0))]
        await asyncio.sleep(2)
        asking += [asyncio.create_task(pool.request(str(i), seconds=4.0)) for i in range(4)]
        await asyncio.sleep(0)
        began = asyncio.get_running_loop().time()
        with pytest.raises(Overloaded, match="it would wait for 8.0 s, and --max-queued-s is 7") as refused:
            await pool.request("hopeless")
        assert asyncio.get_running_loop().time() == began and refused.value.retry_after == 8
        asking.append(asyncio.create_task(pool.request("urgent", priority=1, seconds=4.0)))  # nobody is ahead of it
        await asyncio.gather(*asking, return_exceptions=True)
        assert pool.order[:4] == ["warm", "first", "0", "urgent"]

    clock.run(main())


def test_a_request_that_would_miss_the_objective_of_its_first_token_is_refused() -> None:
    async def main() -> None:
        pool = Pool(1, most=100, most_s=100.0, slo_s=3.0)
        await pool.request("warm", seconds=2.0)
        pool.queue.first_token.value = 0.5
        asking = []
        for name in ("running", "waiting"):  # the latter for 2 s
            asking.append(asyncio.create_task(pool.request(name, seconds=2.0)))
            await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="its first token would come after 4.5 s, and --ttft-slo-ms is 3000"):
            await pool.request("too late")
        await asyncio.gather(*asking)

    clock.run(main())


def test_requests_wait_for_a_first_worker_and_fail_without_one() -> None:
    async def main() -> None:
        pool = Pool(2, most=2, most_s=5.0)
        pool.present = False
        early = asyncio.create_task(pool.request("early"))
        late = asyncio.create_task(pool.request("late"))
        await asyncio.sleep(0)
        with pytest.raises(NoWorker, match="no worker serves m at the moment"):
            await pool.request("no place in the queue")
        await asyncio.sleep(4)
        pool.present = True
        pool.queue.recheck()
        await asyncio.gather(early, late)
        pool.present = False
        began = asyncio.get_running_loop().time()
        with pytest.raises(NoWorker):
            await pool.request("for nothing")
        assert asyncio.get_running_loop().time() == began + 5.0

    clock.run(main())


def test_a_request_cancelled_in_the_turn_of_its_admission_gives_its_place_back() -> None:
    async def main() -> None:
        pool = Pool(1)
        running = asyncio.create_task(pool.request("running"))
        await asyncio.sleep(0.5)
        waiting = asyncio.create_task(pool.request("cancelled"))
        await asyncio.sleep(0)
        pool.free = 2
        pool.queue._recheck_due = True
        pool.queue._admit()
        waiting.cancel()
        await asyncio.wait([waiting])
        pool.free = 0
        await running
        assert (pool.queue.unplaced, pool.queue.undecoded, len(pool.queue)) == (0, 0, 0)

    clock.run(main())


def test_an_outage_does_not_spoil_the_predictions_for_ever() -> None:
    async def main() -> None:
        pool = Pool(1, most=100, most_s=10.0)
        for _ in range(10):
            await asyncio.gather(pool.request("a"), pool.request("b"))
        pool.present = False
        early = asyncio.create_task(pool.request("early"))
        await asyncio.sleep(9)
        pool.present = True
        pool.queue.recheck()
        await early
        asking = [asyncio.create_task(pool.request(str(i))) for i in range(6)]
        await asyncio.gather(*asking)  # five of them wait, the last for 5 s
        pool.queue._gaps.extend((asyncio.get_running_loop().time(), 100.0) for _ in range(20))  # whatever spoilt them
        running = asyncio.create_task(pool.request("running"))
        await asyncio.sleep(0)
        await pool.request("with nobody ahead it waits in any case")
        await running
        await asyncio.sleep(61)
        asking = [asyncio.create_task(pool.request(str(i))) for i in range(6)]
        await asyncio.gather(*asking)  # what is a minute old is forgotten

    clock.run(main())


def test_a_request_whose_time_is_up_in_the_queue_has_timed_out() -> None:
    async def main() -> None:
        pool = Pool(0, most_s=5.0)
        entry = pool.queue.enter(0)
        assert isinstance(entry, QueuedRequest)
        with pytest.raises(TimedOut):
            await pool.queue.wait(entry, 2.0)

    clock.run(main())
