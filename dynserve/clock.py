"""A virtual clock: an event loop whose time jumps to the next timer as soon as nothing is left to do.

An hour of sleeping passes in the time that the work in it takes. Everything in dynserve waits through the running loop
(`asyncio.sleep`, `loop.time`, timeouts), so a `Cluster` on the in-memory planes runs under it unchanged:

    dynserve.clock.run(main())

What it cannot do is wait for the outside: a socket that nobody writes to ends the run with `Deadlock`. Threads are waited
for in real time, with the clock stopped.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, TypeVar, TypeVarTuple

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

THREAD_POLL = 0.05  # real seconds between looks whether a thread is done


class Deadlock(RuntimeError):
    """Nothing is ready, no timer is set, no thread runs: nothing will ever happen."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """`time()` starts at 0 and moves only when all tasks wait."""

    def __init__(self) -> None:
        self.now = 0.0
        self.threads = 0
        super().__init__(_Jumping(self))

    def time(self) -> float:
        return self.now

    def run_in_executor(self, executor: Executor | None, func: Callable[[*Ts], T], *args: *Ts) -> asyncio.Future[T]:
        future: asyncio.Future[T] = super().run_in_executor(executor, func, *args)
        self.threads += 1
        future.add_done_callback(self._thread_done)
        return future

    async def shutdown_default_executor(self, *timeout: Any) -> None:
        self.threads += 1  # the joining of the pool's threads is one
        try:
            await super().shutdown_default_executor(*timeout)
        finally:
            self.threads -= 1

    def _thread_done(self, future: asyncio.Future[Any]) -> None:
        self.threads -= 1


class _Jumping(selectors.DefaultSelector):
    """Instead of waiting for the next timer, makes it be now."""

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
            raise Deadlock("nothing is ready, no timer is set, no thread runs")
        self._loop.now += timeout
        return ready


def run(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` on a virtual clock."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
