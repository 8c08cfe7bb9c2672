"""Notices an engine that is dead or silent. Newer versions say that they are dead; older ones only stop answering.

Silence is broken by a response, a KV event or a row of statistics. After `stall_s` of it a canary is generated: one token,
under a cache salt of its own. When that too is not answered within `stall_s`, the engine is given up.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from dynserve.tasks import detached

log = logging.getLogger(__name__)

LOOK_EVERY = 0.25  # seconds
HEALTH_EVERY = 5.0  # seconds between calls of the engine's own check, which may block
HEALTH_TIMEOUT = 5.0


class Watch:
    """`dead(reason)` is called once. `canary` asks the engine for one token and returns when it is there."""

    def __init__(
        self, llm: Any, stall_s: float, canary: Callable[[], Awaitable[None]], dead: Callable[[str], None]
    ) -> None:
        self._llm, self._stall_s, self._canary, self._dead = llm, stall_s, canary, dead
        self._clock = asyncio.get_running_loop().time
        self._heard = self._clock()

    def heard(self) -> None:
        """The engine has said something."""
        self._heard = self._clock()

    async def look(self) -> None:
        """Until it is dead."""
        while True:
            await asyncio.sleep(LOOK_EVERY)
            error = getattr(getattr(self._llm, "_executor", None), "_fatal_error", None)
            if error is not None:
                self._dead(f"{type(error).__name__}: {error}")
                return
            if self._clock() - self._heard > self._stall_s and not await self._answers():
                self._dead(f"it has not answered for {self._clock() - self._heard:.0f} s, not even one token")
                return

    async def ask_health(self) -> None:
        """The engine's own check, which notices dead processes that nobody waits for."""
        asked: asyncio.Future[bool] | None = None
        while True:
            await asyncio.sleep(HEALTH_EVERY)
            asked = asked or detached(self._llm._check_health)
            done, _ = await asyncio.wait([asked], timeout=HEALTH_TIMEOUT)
            if not done:
                continue  # it waits for a dead process, or a busy one: `look` finds out
            if (error := asked.exception()) is not None:
                log.warning("the engine's own health check cannot be used: %s: %s", type(error).__name__, error)
                return
            if not asked.result():
                self._dead("its own health check says so")
                return
            asked = None

    async def _answers(self) -> bool:
        asked = self._clock()
        try:
            async with asyncio.timeout(self._stall_s):
                await self._canary()
        except TimeoutError:
            pass
        except Exception as error:
            log.warning("the canary failed: %s: %s", type(error).__name__, error)
        else:
            self.heard()
        return self._heard > asked
