from __future__ import annotations

import asyncio
import time

import pytest

from dynserve import Cluster, clock
from tests.conftest import MODEL


def test_an_hour_of_sleeping_takes_no_time_and_keeps_its_order() -> None:
    order: list[str] = []

    async def sleeper(name: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        order.append(name)

    async def main() -> float:
        await asyncio.gather(sleeper("late", 3600), sleeper("early", 60), sleeper("middle", 1800.5))
        return asyncio.get_running_loop().time()

    began = time.monotonic()
    assert clock.run(main()) == 3600
    assert order == ["early", "middle", "late"]
    assert time.monotonic() - began < 60  # not an hour


def test_timeouts_pass_in_virtual_time() -> None:
    async def main() -> None:
        async with asyncio.timeout(1000):
            await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        clock.run(main())


def test_the_virtual_clock_stands_still_while_a_thread_works() -> None:
    async def main() -> float:
        async with asyncio.timeout(0.001):
            await asyncio.to_thread(time.sleep, 0.1)
        return asyncio.get_running_loop().time()

    assert clock.run(main()) == 0


def test_waiting_for_an_event_that_cannot_come_raises_deadlock() -> None:
    async def main() -> None:
        await asyncio.Event().wait()

    with pytest.raises(clock.Deadlock):
        clock.run(main())


async def _answers(engine: dict[str, object], max_tokens: int) -> tuple[list[str], float]:
    """Returns the answers to several simultaneous requests, and the time of the last one."""
    async with Cluster(prefill=1, decode=1, executor="simulated", engine=engine, seed=1) as c, c.client() as client:
        ask = {"model": MODEL, "max_tokens": max_tokens, "ignore_eos": True}
        asking = [client.post("/v1/completions", json=ask | {"prompt": [300 + i] * 50 * i}) for i in range(1, 9)]
        found = await asyncio.gather(*asking)
        return [f.json()["choices"][0]["text"] for f in found], asyncio.get_running_loop().time()


def test_leaping_in_virtual_time_changes_neither_tokens_nor_times() -> None:
    plain, plain_time = clock.run(_answers({}, 200))
    leaping, leaping_time = clock.run(_answers({"leap": 64}, 200))
    assert leaping == plain
    assert leaping_time == pytest.approx(plain_time, rel=0.01)
    assert plain_time > 1.0  # 200 steps of 5 ms
