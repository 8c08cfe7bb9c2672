from __future__ import annotations

import asyncio

import pytest

from dynserve.tasks import Limit


async def test_a_block_ends_when_its_limit_is_told_to() -> None:
    loop = asyncio.get_running_loop()

    async def work() -> None:
        with Limit() as limit:
            loop.call_soon(limit.expire)
            loop.call_soon(limit.expire)  # once is enough
            await asyncio.sleep(60)

    with pytest.raises(TimeoutError):
        await work()
    await asyncio.sleep(0)  # nothing of it is left


async def test_a_block_ends_at_its_deadline() -> None:
    with pytest.raises(TimeoutError):
        with Limit(asyncio.get_running_loop().time() + 0.01):
            await asyncio.sleep(60)


async def test_a_limit_that_is_told_too_late_changes_nothing() -> None:
    with Limit(asyncio.get_running_loop().time() + 0.01) as limit:
        pass
    limit.expire()
    await asyncio.sleep(0.02)


async def test_an_error_of_the_block_is_its_own() -> None:
    async def work() -> None:
        with Limit(asyncio.get_running_loop().time() + 60):
            await asyncio.sleep(0)
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        await work()


@pytest.mark.parametrize("both", [True, False])
async def test_a_task_that_is_cancelled_stays_so(both: bool) -> None:
    limits: list[Limit] = []

    async def work() -> None:
        with Limit() as limit:
            limits.append(limit)
            await asyncio.sleep(60)

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    if both:
        limits[0].expire()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_one_within_another_ends_only_its_own_block() -> None:
    loop = asyncio.get_running_loop()
    with Limit():
        with pytest.raises(TimeoutError):
            with Limit(loop.time() + 0.01):
                await asyncio.sleep(60)
        await asyncio.sleep(0)
