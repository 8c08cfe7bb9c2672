"""Admission: requests wait here, in order of priority, while every worker is over its threshold.

The queue is bounded in length and each wait in time. A request that finds the queue full or waits too long fails with a
`retry-after`: the time that the requests ahead of it need at the pace of the last admissions.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from collections.abc import Callable
from functools import partial
from itertools import count

from dynserve.errors import DynserveError, Overloaded

PACE_MEMORY = 0.9  # weight of the past in the mean time between admissions
MAX_RETRY_AFTER = 60  # seconds


class QueuedRequest:
    """One request in the queue. Higher priorities come first, equal ones in order of arrival."""

    __slots__ = ("future", "key")

    def __init__(self, priority: int, number: int) -> None:
        self.key = (-priority, number)
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def __lt__(self, other: QueuedRequest) -> bool:
        return self.key < other.key

    def fail(self, error: DynserveError) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class Queue:
    """The queue of one model. `has_room()` returns whether one more request could be placed now."""

    def __init__(self, model: str, max_queued: int, max_wait_s: float, has_room: Callable[[], bool]) -> None:
        self._model, self._max_queued, self._max_wait_s, self._has_room = model, max_queued, max_wait_s, has_room
        self._heap: list[QueuedRequest] = []
        self._numbers = count()
        self._pace: float | None = None  # seconds between admissions from the queue
        self._last = 0.0
        self._recheck_due = False
        self._waiting = 0

    def __len__(self) -> int:
        return self._waiting

    def enter(self, priority: int) -> QueuedRequest | None:
        """Returns None if the request can be placed now, else an entry of the queue, for `wait`.

        Raises:
            Overloaded: the queue is full of requests of at least this priority.
        """
        if not self._waiting and self._has_room():
            return None
        if self._waiting >= self._max_queued:
            self._make_place(priority)
        waiting = QueuedRequest(priority, next(self._numbers))
        heapq.heappush(self._heap, waiting)
        if not self._waiting:
            self._last = asyncio.get_running_loop().time()  # the time of an empty queue is not part of the pace
        self._waiting += 1
        return waiting

    async def wait(self, waiting: QueuedRequest, deadline: float) -> None:
        """Returns when it is this request's turn. The caller must place it before it awaits anything else.

        Raises:
            Overloaded: the request waited too long, or one of higher priority replaced it.
        """
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout_at(min(deadline, loop.time() + self._max_wait_s)):
                await waiting.future
        except TimeoutError:
            raise self._overloaded(f"all workers of {self._model} stayed busy for {self._max_wait_s:.0f} s") from None
        finally:
            waiting.future.cancel()
            self._waiting -= 1
            self._tidy()
            del waiting  # its error refers to this frame: a reference cycle

    def recheck(self) -> None:
        """Admits requests from the next turn of the loop on, after load was released or a worker was added."""
        if self._heap and not self._recheck_due:
            self._recheck_due = True
            asyncio.get_running_loop().call_soon(self._admit_next)

    def _admit_next(self) -> None:
        """Admits one request. It is charged to its worker before the next one is checked."""
        self._recheck_due = False
        self._tidy()
        if self._heap and self._has_room():
            heapq.heappop(self._heap).future.set_result(None)
            self._note_pace()
            if self._heap:
                # two turns later the admitted request has been placed
                asyncio.get_running_loop().call_soon(self.recheck)

    def _make_place(self, priority: int) -> None:
        last = max((w for w in self._heap if not w.future.done()), default=None)
        if last is None or -last.key[0] >= priority:
            raise self._overloaded(f"all workers of {self._model} are busy and {self._waiting} requests wait")
        last.fail(self._overloaded(f"all workers of {self._model} are busy, and a request of higher priority came"))

    def _tidy(self) -> None:
        while self._heap and self._heap[0].future.done():
            heapq.heappop(self._heap)
        if len(self._heap) > 2 * self._max_queued + 16:
            self._heap = [w for w in self._heap if not w.future.done()]
            heapq.heapify(self._heap)

    def _note_pace(self) -> None:
        now = asyncio.get_running_loop().time()
        gap, self._last = now - self._last, now
        self._pace = gap if self._pace is None else PACE_MEMORY * self._pace + (1 - PACE_MEMORY) * gap

    def _overloaded(self, message: str) -> Overloaded:
        error = Overloaded(message)
        ahead = (self._waiting + 1) * (self._pace if self._pace is not None else 1.0)
        error.retry_after = max(1, min(MAX_RETRY_AFTER, math.ceil(ahead)))
        return error


class Admission:
    """The queues of all models. Each may hold `max_queued` requests, and each of those for `max_wait_s` seconds."""

    def __init__(self, max_queued: int, max_wait_s: float) -> None:
        self._max_queued, self._max_wait_s = max_queued, max_wait_s
        self.queues: dict[str, Queue] = {}

    def queue(self, model: str, has_room: Callable[[str], bool]) -> Queue:
        """The queue of a model. `has_room(model)` returns whether one more request could be placed now."""
        found = self.queues.get(model)
        if found is None:
            found = self.queues[model] = Queue(model, self._max_queued, self._max_wait_s, partial(has_room, model))
        return found

    def recheck(self) -> None:
        for queue in self.queues.values():
            queue.recheck()
