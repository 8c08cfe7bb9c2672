"""Threads for work on long prompts, off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor as Pool
from typing import TypeVar

from dynserve.errors import Overloaded, TimedOut

INLINE_CHARACTERS = 4_000  # a longer prompt is tokenised in a thread: it would hold up every stream
MAX_TOKENISING = 64  # long prompts that are being tokenised or wait for it
TOKENISE_TIMEOUT = 60.0  # seconds

T = TypeVar("T")


class TokenizerThreads:
    """Runs work on long prompts off the event loop, with bounds on threads, waiting work, and time."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._waiting = 0

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """Returns `work()`, which runs inline if the prompt has few characters.

        Raises:
            Overloaded: too many long prompts run or wait already.
            TimedOut: the work took too long.
        """
        if size <= INLINE_CHARACTERS:
            return work()
        if self._waiting >= MAX_TOKENISING:
            raise Overloaded(f"{self._waiting} long prompts are being tokenised; try again soon")
        self._waiting += 1
        try:
            async with asyncio.timeout(TOKENISE_TIMEOUT):
                return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        except TimeoutError:
            raise TimedOut(f"the prompt was not tokenised within {TOKENISE_TIMEOUT:.0f} s") from None
        finally:
            self._waiting -= 1
