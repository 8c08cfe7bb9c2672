"""A virtual clock: an event loop whose time jumps to the next timer as soon as no callback is ready.

An hour of sleeping takes only as long as the work in that hour. Everything in dynserve waits through the running loop
(`asyncio.sleep`, `loop.time`, timeouts), so a `Cluster` on the in-memory planes runs under it unchanged:

    dynserve.clock.run(main())

It cannot wait for other processes: a read from a socket without data ends the run with `Deadlock`. Threads run in real
time, with the clock stopped.
"""

from __future__ import annotations

import asyncio
import math
import selectors
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, TypeVar, TypeVarTuple

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

THREAD_POLL = 0.05  # real seconds between checks of running threads


class Deadlock(RuntimeError):
    """No callback is ready, no timer is set and no thread runs, so the loop would wait for ever."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose `time()` starts at 0 and advances only when all tasks wait."""

    def __init__(self) -> None:
        self.now = 0.0
        self.threads = 0
        super().__init__(_Jumping(self))

    def time(self) -> float:
        return self.now

    def jump(self, seconds: float) -> None:
        """Advances the clock to the next timer, exactly. A callback that runs a rounding error before its time, and waits
        again for that time, would do so for ever: only a real clock goes on meanwhile."""
        later, due = self.now + seconds, self._scheduled[0].when()  # type: ignore[attr-defined]
        self.now = due if math.isclose(later, due) else later
        self._clock_resolution = math.ulp(self.now)  # how early asyncio calls timers back

    def run_in_executor(self, executor: Executor | None, func: Callable[[*Ts], T], *args: *Ts) -> asyncio.Future[T]:
        future: asyncio.Future[T] = super().run_in_executor(executor, func, *args)
        self.threads += 1
        future.add_done_callback(self._thread_done)
        return future

    async def shutdown_default_executor(self, *timeout: Any) -> None:
        self.threads += 1  # the pool is joined in a thread
        try:
            await super().shutdown_default_executor(*timeout)
        finally:
            self.threads -= 1

    def _thread_done(self, future: asyncio.Future[Any]) -> None:
        self.threads -= 1


class _Jumping(selectors.DefaultSelector):
    """A selector that advances the clock to the next timer instead of waiting for it."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if ready or (timeout is not None and timeout <= 0):
            return ready
        if self._loop.threads:
            return super().select(THREAD_POLL)
        if timeout is None:
            raise Deadlock("no callback is ready, no timer is set and no thread runs: the loop would wait for ever")
        self._loop.jump(timeout)
        return ready


def run(main: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine like `asyncio.run`, on a virtual clock."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
