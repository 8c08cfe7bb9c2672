"""Owned tasks, limits in time, and clean-up with a bound."""

from __future__ import annotations

import asyncio

import pytest

from dynserve.errors import ClusterError, Unavailable
from dynserve.tasks import Limit, persist, running, task_group, unless_failed, within


async def test_a_block_ends_when_its_limit_is_expired() -> None:
    loop = asyncio.get_running_loop()

    async def work() -> None:
        with Limit() as limit:
            loop.call_soon(limit.expire)
            loop.call_soon(limit.expire)  # once is enough
            await asyncio.sleep(60)

    with pytest.raises(TimeoutError):
        await work()
    await asyncio.sleep(0)  # no second cancellation follows


async def test_a_block_ends_at_its_deadline() -> None:
    with pytest.raises(TimeoutError):
        with Limit(asyncio.get_running_loop().time() + 0.01):
            await asyncio.sleep(60)


async def test_a_limit_that_is_expired_after_its_block_has_no_effect() -> None:
    with Limit(asyncio.get_running_loop().time() + 0.01) as limit:
        pass
    limit.expire()
    await asyncio.sleep(0.02)


async def test_an_error_of_the_block_is_raised_unchanged() -> None:
    async def work() -> None:
        with Limit(asyncio.get_running_loop().time() + 60):
            await asyncio.sleep(0)
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        await work()


@pytest.mark.parametrize("both", [True, False])
async def test_a_cancelled_task_raises_cancelled_even_if_its_limit_expired(both: bool) -> None:
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


async def test_a_limit_within_another_ends_only_its_own_block() -> None:
    loop = asyncio.get_running_loop()
    with Limit():
        with pytest.raises(TimeoutError):
            with Limit(loop.time() + 0.01):
                await asyncio.sleep(60)
        await asyncio.sleep(0)


async def test_a_task_group_cancels_its_tasks_at_exit() -> None:
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


async def test_a_background_task_that_fails_ends_its_owner_with_its_error() -> None:
    async def fail() -> None:
        raise Unavailable("gone")

    with pytest.raises(Unavailable, match="gone"):
        async with running(fail()):
            await asyncio.Event().wait()


async def test_persist_retries_until_it_succeeds() -> None:
    tries = []

    async def attempt() -> str:
        tries.append(1)
        if len(tries) < 3:
            raise Unavailable("not yet")
        return "there"

    assert await persist(attempt, retry_on=ClusterError, waiting_for="it") == "there"


async def test_clean_up_has_a_timeout_and_its_errors_are_suppressed() -> None:
    async def fail() -> None:
        raise OSError("no")

    assert await within(0.01, asyncio.Event().wait(), "hanging") is None
    assert await within(1.0, fail(), "failing") is None


async def test_a_failed_check_ends_a_block_that_waits() -> None:
    check: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(check.set_exception, ValueError("wrong"))
    with pytest.raises(ValueError, match="wrong"):
        async with unless_failed(check):
            await asyncio.Event().wait()
    await asyncio.sleep(0)  # nothing is left of the cancellation


async def test_a_check_that_succeeds_or_fails_later_does_not_end_a_block() -> None:
    check: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    async with unless_failed(check):
        check.set_result(None)
        await asyncio.sleep(0)
    late: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    async with unless_failed(late):
        pass
    late.set_exception(ValueError("later"))
    await asyncio.sleep(0)
    with pytest.raises(ValueError, match="later"):
        await late


async def test_a_check_that_fails_in_the_turn_in_which_the_block_ends_does_not_cancel_what_follows() -> None:
    check: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    async with unless_failed(check):
        check.set_exception(ValueError("wrong"))
    await asyncio.sleep(0.01)  # its callback has run
    with pytest.raises(ValueError, match="wrong"):
        await check
    with pytest.raises(KeyError):
        async with unless_failed(asyncio.get_running_loop().create_future()):
            raise KeyError("the block's own")


async def test_a_cancellation_by_other_code_passes_through_a_check() -> None:
    check: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def waits() -> None:
        async with unless_failed(check):
            await asyncio.Event().wait()

    task = asyncio.create_task(waits())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    check.cancel()
