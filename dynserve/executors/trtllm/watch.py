"""Detects an engine that is dead or silent. Newer versions report that they are dead; older ones only stop answering.

A response, a KV event and a row of statistics are signs of life. After `stall_s` without one, a canary is generated: one
token, under a cache salt of its own. When that is not answered within `stall_s` either, or refused, the engine counts as
dead: an engine whose event loop has crashed refuses everything, and nothing in a canary can be refused.

A call of a dead engine of an older version may block for ever, and the event loop with it. So a thread watches the loop
and ends the process when the loop is blocked: no code on the loop could.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

from dynserve.errors import EngineDied
from dynserve.tasks import OwnedTasks, detached

log = logging.getLogger(__name__)

POLL_EVERY = 0.25  # seconds
HEALTH_EVERY = 5.0  # seconds between calls of the engine's own health check, which may block
HEALTH_TIMEOUT = 5.0
MIN_STANDSTILL = 3.0  # seconds without a turn of the loop after which it counts as blocked
SUSPECTED = 10.0  # seconds for one token of an engine that has raised an error


class Watch:
    """`dead(reason)` is called once. `canary` generates one token in the engine and returns when it has arrived."""

    def __init__(
        self, llm: Any, stall_s: float, canary: Callable[[], Awaitable[None]], dead: Callable[[str], None],
        tasks: OwnedTasks,
    ) -> None:  # fmt: skip
        self._llm, self._stall_s, self._canary, self._dead, self._tasks = llm, stall_s, canary, dead, tasks
        self._clock = asyncio.get_running_loop().time
        self._last_sign_of_life = self._clock()
        self._checking: asyncio.Task[bool] | None = None
        self._beat = time.monotonic()
        self._stopped = threading.Event()

    def note_sign_of_life(self) -> None:
        """Records that the engine has sent something."""
        self._last_sign_of_life = self._clock()

    @property
    def silence(self) -> float:
        """The seconds since the engine has sent something."""
        return self._clock() - self._last_sign_of_life

    def start(self) -> None:
        """Starts the thread that watches the loop. `stop` ends it."""
        self._beat = time.monotonic()
        threading.Thread(target=self._watch_loop, name="trtllm-watch", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    async def poll(self) -> None:
        """Checks the engine until it is dead."""
        while True:
            await asyncio.sleep(POLL_EVERY)
            if (why := self._fatal()) is not None:
                self._dead(why)
                return
            if self.silence > self._stall_s and not await self._answers(self._stall_s):
                self._dead(f"it has not answered for {self.silence:.0f} s, not even one token")
                return

    async def beat(self) -> None:
        """Records for the thread that the loop is running."""
        while True:
            self._beat = time.monotonic()
            await asyncio.sleep(POLL_EVERY)

    async def alive(self) -> bool:
        """Whether the engine still works, checked after an error. Concurrent callers share one check."""
        if self._fatal() is not None:
            return False
        if self._checking is None or self._checking.done():
            self._checking = self._tasks.create_task(self._answers(min(SUSPECTED, self._stall_s)))
        return await asyncio.shield(self._checking)

    async def poll_health(self) -> None:
        """Calls the engine's own health check, which detects dead processes that no request waits for."""
        check: asyncio.Future[bool] | None = None
        while True:
            await asyncio.sleep(HEALTH_EVERY)
            check = check or detached(self._llm._check_health)
            done, _ = await asyncio.wait([check], timeout=HEALTH_TIMEOUT)
            if not done:
                continue  # it waits for a dead or a busy process: `poll` tells them apart
            if (error := check.exception()) is not None:
                log.warning("the engine's own health check cannot be used: %s: %s", type(error).__name__, error)
                return
            if not check.result():
                self._dead("its own health check failed")
                return
            check = None

    def _fatal(self) -> str | None:
        error = getattr(getattr(self._llm, "_executor", None), "_fatal_error", None)
        return None if error is None else f"{type(error).__name__}: {error}"

    def _watch_loop(self) -> None:
        limit = max(self._stall_s, MIN_STANDSTILL)
        while not self._stopped.wait(POLL_EVERY):
            if time.monotonic() - self._beat > limit:
                # no handler and no clean-up can run any more, so exit at once
                print(
                    f"dynserve: the engine is dead: it has blocked the event loop for {limit:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(EngineDied.exit_code)

    async def _answers(self, seconds: float) -> bool:
        began = self._clock()
        try:
            async with asyncio.timeout(seconds):
                await self._canary()
        except TimeoutError:
            pass
        except Exception as error:
            log.warning("the canary failed: %s: %s", type(error).__name__, error)
        else:
            return True
        return self._last_sign_of_life > began  # by another request's response, say
