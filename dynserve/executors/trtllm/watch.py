"""Notices an engine that is dead or silent. Newer versions say that they are dead; older ones only stop answering.

Silence is broken by a response, a KV event or a row of statistics. After `stall_s` of it a canary is generated: one token,
under a cache salt of its own. When that too is not answered within `stall_s`, the engine is given up.

A dead engine of an older version does worse than be silent: whoever asks it for something waits for ever, and that is
the event loop. So a thread watches the loop, and ends the process when the loop stands still: nobody else could.
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
HEALTH_EVERY = 5.0  # seconds between calls of the engine's own check, which may block
HEALTH_TIMEOUT = 5.0
MIN_STANDSTILL = 3.0  # seconds of a loop that does not turn before it is taken for blocked
SUSPECTED = 10.0  # seconds that an engine has for one token when there is reason for doubt


class Watch:
    """`dead(reason)` is called once. `canary` asks the engine for one token and returns when it is there."""

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
        """The engine has said something."""
        self._last_sign_of_life = self._clock()

    def start(self) -> None:
        """The thread that watches the loop. `stop` ends it."""
        self._beat = time.monotonic()
        threading.Thread(target=self._watch_loop, name="trtllm-watch", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    async def poll(self) -> None:
        """Until it is dead."""
        while True:
            await asyncio.sleep(POLL_EVERY)
            if (why := self._fatal()) is not None:
                self._dead(why)
                return
            if self._clock() - self._last_sign_of_life > self._stall_s and not await self._answers(self._stall_s):
                self._dead(
                    f"it has not answered for {self._clock() - self._last_sign_of_life:.0f} s, not even one token"
                )
                return

    async def beat(self) -> None:
        """Tells the thread that the loop turns."""
        while True:
            self._beat = time.monotonic()
            await asyncio.sleep(POLL_EVERY)

    async def alive(self) -> bool:
        """Whether the engine still works, asked by somebody who has met an error. Those who ask at once share the
        answer."""
        if self._fatal() is not None:
            return False
        if self._checking is None or self._checking.done():
            self._checking = self._tasks.create_task(self._answers(min(SUSPECTED, self._stall_s)))
        return await asyncio.shield(self._checking)

    async def ask_health(self) -> None:
        """The engine's own check, which notices dead processes that nobody waits for."""
        asked: asyncio.Future[bool] | None = None
        while True:
            await asyncio.sleep(HEALTH_EVERY)
            asked = asked or detached(self._llm._check_health)
            done, _ = await asyncio.wait([asked], timeout=HEALTH_TIMEOUT)
            if not done:
                continue  # it waits for a dead process, or a busy one: `poll` finds out
            if (error := asked.exception()) is not None:
                log.warning("the engine's own health check cannot be used: %s: %s", type(error).__name__, error)
                return
            if not asked.result():
                self._dead("its own health check says so")
                return
            asked = None

    def _fatal(self) -> str | None:
        error = getattr(getattr(self._llm, "_executor", None), "_fatal_error", None)
        return None if error is None else f"{type(error).__name__}: {error}"

    def _watch_loop(self) -> None:
        limit = max(self._stall_s, MIN_STANDSTILL)
        while not self._stopped.wait(POLL_EVERY):
            if time.monotonic() - self._beat > limit:
                # no handler runs any more, and no clean-up: to leave is all that is left
                print(
                    f"dynserve: the engine is dead: it has blocked the event loop for {limit:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(EngineDied.exit_code)

    async def _answers(self, seconds: float) -> bool:
        asked = self._clock()
        try:
            async with asyncio.timeout(seconds):
                await self._canary()
        except TimeoutError:
            pass
        except Exception as error:
            log.warning("the canary failed: %s: %s", type(error).__name__, error)
        else:
            self.note_sign_of_life()
        return self._last_sign_of_life > asked
