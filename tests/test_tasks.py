"""Owned tasks, limits in time, and clean-up with a bound."""

from __future__ import annotations

import asyncio

import pytest

from dynserve.errors import ClusterError, Unavailable
from dynserve.tasks import Limit, persist, running, task_group, within


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


async def test_leaving_a_task_group_ends_its_loops() -> None:
    ended = asyncio.Event()

    async def loop() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with task_group() as group:
        group.create_task(loop())
        await asyncio.sleep(0)
    assert ended.is_set()


async def test_a_loop_that_fails_ends_its_owner_with_its_own_error() -> None:
    async def fail() -> None:
        raise Unavailable("gone")

    with pytest.raises(Unavailable, match="gone"):
        async with running(fail()):
            await asyncio.Event().wait()


async def test_persist_tries_until_it_works() -> None:
    tries = []

    async def attempt() -> str:
        tries.append(1)
        if len(tries) < 3:
            raise Unavailable("not yet")
        return "there"

    assert await persist(attempt, retry_on=ClusterError, waiting_for="it") == "there"


async def test_clean_up_that_hangs_is_given_up_and_clean_up_that_fails_is_swallowed() -> None:
    async def fail() -> None:
        raise OSError("no")

    assert await within(0.01, asyncio.Event().wait(), "hanging") is None
    assert await within(1.0, fail(), "failing") is None
