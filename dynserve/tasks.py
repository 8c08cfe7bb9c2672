"""Tasks with owners, retries that log what they wait for, and clean-up under a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator
from contextlib import asynccontextmanager
from typing import Any, TypeVar, cast

log = logging.getLogger(__name__)
T = TypeVar("T")


class OwnedTasks(asyncio.TaskGroup):
    """A `TaskGroup` with a set of its running tasks, so that its owner can cancel them."""

    def __init__(self) -> None:
        super().__init__()
        self.running: set[asyncio.Task[Any]] = set()

    def create_task(
        self, coro: Generator[Any, None, T] | Coroutine[Any, Any, T], *, name: str | None = None, context: Any = None
    ) -> asyncio.Task[T]:
        task = super().create_task(coro, name=name, context=context)
        self.running.add(task)
        task.add_done_callback(self.running.discard)
        return task


@asynccontextmanager
async def task_group() -> AsyncIterator[OwnedTasks]:
    """Yields a group for background loops. The end of the block cancels them; a single error is raised unwrapped."""
    try:
        async with OwnedTasks() as group:
            try:
                yield group
            finally:
                for task in list(group.running):
                    task.cancel()
    except BaseExceptionGroup as group_error:
        raise unwrapped(group_error) from group_error.__cause__


@asynccontextmanager
async def running(*loops: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Runs background loops for as long as the block. A loop that fails ends the block with its error."""
    async with task_group() as group:
        for loop in loops:
            group.create_task(loop)
        yield


def unwrapped(error: BaseException) -> BaseException:
    """Returns the error inside nested groups that hold only that one; the same error twice counts as one."""
    while isinstance(error, BaseExceptionGroup) and len(set(map(id, error.exceptions))) == 1:
        error = error.exceptions[0]
    return error


@asynccontextmanager
async def unless_failed(check: asyncio.Future[Any]) -> AsyncIterator[None]:
    """Runs the block, which may wait for long, unless `check` fails meanwhile: then the block is cancelled, and the error
    of `check` is raised."""
    task = asyncio.current_task()
    if task is None:
        raise RuntimeError("unless_failed must be used in a task")
    before, failed, left = task.cancelling(), False, False

    def settled(check: asyncio.Future[Any]) -> None:
        nonlocal failed
        # reading the exception marks it as retrieved, whoever raises it in the end
        if not check.cancelled() and check.exception() is not None and not left:
            failed = True
            task.cancel()

    check.add_done_callback(settled)
    try:
        yield
    except asyncio.CancelledError:
        # a cancellation by other code is passed on
        if failed and task.uncancel() <= before:
            await check
        raise
    finally:
        left = True


class Limit:
    """A replacement of `asyncio.timeout` for a block on every request's path. It costs a third, and needs no timer if its
    owner already has one. Once `expire` is called the block ends with TimeoutError.

        with Limit() as limit:
            ...
    """

    __slots__ = ("_before", "_expired", "_task", "_timer")

    def __init__(self, deadline: float | None = None) -> None:
        """`deadline` is a time of the loop's clock; with None the owner calls `expire`."""
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("Limit must be used in a task")
        self._task: asyncio.Task[Any] | None = task
        self._before = task.cancelling()
        self._expired = False
        self._timer = None if deadline is None else asyncio.get_running_loop().call_at(deadline, self.expire)

    def __enter__(self) -> Limit:
        return self

    def expire(self) -> None:
        """Ends the block now, unless it has ended."""
        if self._task is not None and not self._expired:
            self._expired = True
            self._task.cancel()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        task, self._task = self._task, None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        # a cancellation by other code is passed on
        ours = self._expired and task is not None and task.uncancel() <= self._before
        if ours and kind is not None and issubclass(kind, asyncio.CancelledError):
            raise TimeoutError from error


class Signal:
    """Wakes all tasks that wait for it."""

    __slots__ = ("_waiters",)

    def __init__(self) -> None:
        self._waiters: dict[asyncio.Future[bool], None] = {}  # first come, first woken

    def notify(self) -> None:
        for waiter in self._waiters:
            _wake(waiter, True)

    async def wait(self, deadline: float) -> bool:
        """Returns True at the next `notify`, or False at `deadline`, a time of the loop's clock."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[bool] = loop.create_future()
        timer = loop.call_at(deadline, _wake, waiter, False)
        self._waiters[waiter] = None
        try:
            return await waiter
        finally:
            timer.cancel()
            del self._waiters[waiter]


def _wake(waiter: asyncio.Future[bool], notified: bool) -> None:
    if not waiter.done():
        waiter.set_result(notified)


class Backoff:
    """Waits that double from `first` to `longest` seconds, with jitter so that processes do not retry at the same time."""

    def __init__(self, first: float = 0.1, longest: float = 2.0) -> None:
        self._first, self._longest, self._next = first, longest, first

    def reset(self) -> None:
        self._next = self._first

    def next(self) -> float:
        wait, self._next = self._next, min(self._longest, self._next * 2)
        return wait * random.uniform(0.75, 1.25)


def detached(call: Callable[..., T], *args: Any) -> asyncio.Future[T]:
    """Runs a blocking call in its own thread. Neither a caller's deadline nor the end of the process waits for it. Meant
    for calls of foreign code that may never return."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if done.done():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(cast(T, result))

    def work() -> None:
        result, failure = None, None
        try:
            result = call(*args)
        except BaseException as error:
            failure = error if isinstance(error, Exception) else RuntimeError(f"a thread ended with {error!r}")
        with contextlib.suppress(RuntimeError):  # the loop is closed: the result is not needed any more
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=work, name=getattr(call, "__name__", "detached"), daemon=True).start()
    return done


class Outage:
    """The time during which attempts fail. `wait` sleeps between attempts, and logs the reason: at once the first time,
    then every `report_every` seconds."""

    def __init__(self, what: str, purpose: str = "", *, max_wait_s: float = 2.0, report_every: float = 5.0) -> None:
        self._what, self._purpose, self._report_every = what, purpose and f" {purpose}", report_every
        self._backoff = Backoff(0.1, max_wait_s)
        self._began: float | None = None
        self._reported = float("-inf")

    async def wait(self, error: Exception) -> None:
        """Sleeps until the next attempt. To be called after each attempt that failed with `error`."""
        now = asyncio.get_running_loop().time()
        if self._began is None:
            self._began, self._reported = now, float("-inf")
        if now - self._reported >= self._report_every:
            self._reported, seconds = now, now - self._began
            reason = str(error).split("; last error")[0][:200]  # gRPC repeats the error after that
            log.warning("waiting for %s%s (%.0f s so far): %s", self._what, self._purpose, seconds, reason)
        await asyncio.sleep(self._backoff.next())

    def over(self) -> None:
        """Ends the outage. To be called after each attempt that succeeded."""
        if self._began is not None:
            log.warning("%s is available", self._what)
        self._began = None
        self._backoff.reset()


async def persist(attempt: Callable[[], Awaitable[T]], *, retry_on: type[Exception], waiting_for: str) -> T:
    """Repeats `attempt` until it succeeds, and logs what it waits for."""
    outage = Outage(waiting_for)
    while True:
        try:
            result = await attempt()
        except retry_on as error:
            await outage.wait(error)
        else:
            outage.over()
            return result


async def within(seconds: float, coro: Awaitable[T], what: str) -> T | None:
    """Awaits `coro`, a clean-up, for at most `seconds`. Logs instead of raising when it fails or takes longer."""
    try:
        async with asyncio.timeout(seconds):
            return await coro
    except TimeoutError:
        log.warning("%s took longer than %.1f s; gave up", what, seconds)
    except Exception as error:
        log.warning("%s failed: %s", what, error)
    return None
