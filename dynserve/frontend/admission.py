"""Admission: requests wait here, in order of priority, until a worker can run them at once.

Workers run as many requests as their cards say (slots, tokens of a step, KV blocks), and their own queues stay short: a
request that waits here can still be placed on any worker, be overtaken by a more urgent one, or be refused in time. One
that would wait too long is refused at once, with a `retry-after`. The prediction is the longest time that so many
admissions in a row have taken lately: answers that began together end together, and then many are admitted at once. Before
there were any, it is the pace that the mean duration of answers suggests.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from collections import Counter, deque
from itertools import accumulate, count
from typing import NamedTuple, Protocol

from dynserve.errors import ClusterError, DynserveError, NoWorker, Overloaded, TimedOut

MAX_GAPS = 256  # between admissions, which are remembered: those of several batches
GAPS_AGE = 60.0  # seconds
MIN_GAPS = 8  # below that, predictions come from the duration of answers
MEMORY = 0.9  # weight of the past in mean durations
MARGIN = 1.15  # by which a wait may exceed its prediction: a late refusal is worse than an early one
MAX_RETRY_AFTER = 60  # seconds


class Capacity(Protocol):
    """The workers behind the queues."""

    def has_room(self, model: str, unplaced: int, undecoded: int) -> bool:
        """Whether a request could run at once, beside `unplaced` ones that were admitted and not placed yet, and
        `undecoded` ones that have no place on a decode worker yet."""
        ...

    def serves(self, model: str) -> bool:
        """Whether there are workers at all."""
        ...

    def slots(self, model: str) -> int:
        """The number of answers that can be generated at once."""
        ...


class QueueLimits(NamedTuple):
    """The limits of each model's queue. `ttft_slo_s`: requests that would miss this time to the first token are refused;
    0: none."""

    max_queued: int
    max_wait_s: float
    ttft_slo_s: float = 0.0


class QueuedRequest:
    """One request in the queue. Higher priorities come first, equal ones in order of arrival."""

    __slots__ = ("future", "key")

    def __init__(self, priority: int, number: int) -> None:
        self.key = (-priority, number)
        self.future: asyncio.Future[Admitted] = asyncio.get_running_loop().create_future()

    def __lt__(self, other: QueuedRequest) -> bool:
        return self.key < other.key

    @property
    def priority(self) -> int:
        return -self.key[0]

    def fail(self, error: DynserveError) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class Admitted:
    """An admitted request, which counts as load until the workers' accounts show it. All calls may be repeated."""

    __slots__ = ("_began", "_queue", "_undecoded", "_unplaced")

    def __init__(self, queue: Queue) -> None:
        self._queue, self._began = queue, queue.clock()
        self._unplaced = self._undecoded = True
        queue.unplaced += 1
        queue.undecoded += 1

    def placed(self, *, decoding: bool) -> None:
        """Notes that load was reserved for the request; with `decoding`, on the worker that generates its answer."""
        if self._unplaced:
            self._unplaced = False
            self._queue.unplaced -= 1
        if decoding and self._undecoded:
            self._undecoded = False
            self._queue.undecoded -= 1

    def answering(self) -> None:
        """Notes the time to the first token."""
        self._queue.first_token.note(self._queue.clock() - self._began)

    def close(self, *, finished: bool) -> None:
        """Ends the request. The duration of a finished one counts for predictions."""
        if self._undecoded or self._unplaced:
            self.placed(decoding=True)
            self._queue.recheck()
        if finished:
            self._queue.service.note(self._queue.clock() - self._began)


class Mean:
    """A running mean of durations in seconds; None without any."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float | None = None

    def note(self, seconds: float) -> None:
        """Adds a duration."""
        self.value = seconds if self.value is None else MEMORY * self.value + (1 - MEMORY) * seconds


class Queue:
    """The queue of one model."""

    def __init__(self, model: str, limits: QueueLimits, capacity: Capacity) -> None:
        self._model, self._limits, self._capacity = model, limits, capacity
        self.clock = asyncio.get_running_loop().time
        self._heap: list[QueuedRequest] = []
        self._by_priority: Counter[int] = Counter()  # of the waiting requests
        self._numbers = count()
        self._gaps: deque[tuple[float, float]] = deque(maxlen=MAX_GAPS)  # admissions: when, and seconds since the last
        self._last = 0.0
        self._nobody = False  # there were no workers at the last look
        self._recheck_due = False
        self.unplaced = self.undecoded = 0  # see `Capacity`
        self.service, self.first_token = Mean(), Mean()  # after the admission

    def __len__(self) -> int:
        return self._by_priority.total()

    def enter(self, priority: int) -> Admitted | QueuedRequest:
        """Admits the request if it could run at once; else returns its entry of the queue, for `wait`.

        Raises:
            Overloaded: the queue is full of requests of at least this priority, or the request would wait too long.
            NoWorker: the queue is full of requests that wait for a first worker.
        """
        if not self._by_priority and self._has_room():
            return Admitted(self)
        self._refuse_hopeless(priority)
        if len(self) >= self._limits.max_queued:
            self._make_place(priority)
        waiting = QueuedRequest(priority, next(self._numbers))
        heapq.heappush(self._heap, waiting)
        if not self._by_priority:
            self._last = self.clock()  # the time of an empty queue is not part of the pace
        self._by_priority[priority] += 1
        self._nobody = self._nobody or not self._capacity.serves(self._model)
        return waiting

    async def wait(self, waiting: QueuedRequest, deadline: float) -> Admitted:
        """Returns when it is this request's turn.

        Raises:
            TimedOut: the deadline has come.
            Overloaded: the request waited too long, or one of higher priority replaced it.
            NoWorker: no worker came in time.
        """
        admitted: Admitted | None = None
        until = self.clock() + self._limits.max_wait_s
        try:
            async with asyncio.timeout_at(min(deadline, until)):
                admitted = await waiting.future
                return admitted
        except TimeoutError:
            if deadline < until:
                raise TimedOut("the request's time limit was over before a worker could take it") from None
            raise self._refusal(f"stayed busy for {self._limits.max_wait_s:.0f} s") from None
        finally:
            future = waiting.future
            if admitted is None and future.done() and not future.cancelled() and future.exception() is None:
                future.result().close(finished=False)  # it was admitted in the turn in which it gave up
            future.cancel()
            self._by_priority[waiting.priority] -= 1
            if not self._by_priority[waiting.priority]:
                del self._by_priority[waiting.priority]
            self._tidy()
            del waiting, future  # its error refers to this frame: a reference cycle

    def recheck(self) -> None:
        """Admits requests in the next turn of the loop, after load was released or a worker was added."""
        if self._heap and not self._recheck_due:
            self._recheck_due = True
            asyncio.get_running_loop().call_soon(self._admit)

    def _admit(self) -> None:
        self._recheck_due = False
        self._tidy()
        now, nobody = self.clock(), not self._capacity.serves(self._model)
        if self._nobody and not nobody:
            self._last = now  # the time without workers is not part of the pace
        self._nobody = nobody
        while self._heap and self._has_room():
            heapq.heappop(self._heap).future.set_result(Admitted(self))
            self._gaps.append((now, now - self._last))
            self._last = now
            self._tidy()

    def _has_room(self) -> bool:
        return self._capacity.has_room(self._model, self.unplaced, self.undecoded)

    def _refuse_hopeless(self, priority: int) -> None:
        """Raises Overloaded for a request that would wait too long. Without workers nothing can be predicted. With nobody
        ahead it waits in any case, so that predictions are corrected by what happens."""
        ahead = sum(number for other, number in self._by_priority.items() if other >= priority)
        pace, limits = self._pace(), self._limits
        if pace is None or not ahead or not self._capacity.serves(self._model):
            return
        wait = self._longest(ahead + 1) or (ahead + 1) * pace
        if wait * MARGIN > limits.max_wait_s:
            raise self._refusal(
                f"are busy: it would wait for {wait:.1f} s, and --max-queued-s is {limits.max_wait_s:g}"
            )
        ttft = wait + (self.first_token.value or 0.0)
        if 0 < limits.ttft_slo_s < ttft * MARGIN:
            raise self._refusal(
                f"are busy: its first token would come after {ttft:.1f} s, and --ttft-slo-ms is "
                f"{limits.ttft_slo_s * 1000:g}"
            )

    def _make_place(self, priority: int) -> None:
        last = max((w for w in self._heap if not w.future.done()), default=None)
        if last is None or last.priority >= priority:
            raise self._refusal(f"are busy and {len(self)} requests wait")
        last.fail(self._refusal("are busy, and a request of higher priority came"))

    def _tidy(self) -> None:
        while self._heap and self._heap[0].future.done():
            heapq.heappop(self._heap)
        if len(self._heap) > 2 * self._limits.max_queued + 16:
            self._heap = [w for w in self._heap if not w.future.done()]
            heapq.heapify(self._heap)

    def _longest(self, admissions: int) -> float:
        """Returns the longest time that so many admissions in a row have taken lately; 0 if there were too few."""
        gaps, count = [gap for _, gap in self._gaps], len(self._gaps)
        if count < max(MIN_GAPS, admissions):
            return 0.0
        sums = list(accumulate(gaps, initial=0.0))
        return max(sums[i + admissions] - sums[i] for i in range(count - admissions + 1))

    def _pace(self) -> float | None:
        """Returns the predicted seconds between two admissions; None if nothing is known."""
        gaps, oldest = self._gaps, self.clock() - GAPS_AGE
        while gaps and gaps[0][0] < oldest:
            gaps.popleft()
        mean = sum(gap for _, gap in gaps) / len(gaps) if gaps else None
        slots = self._capacity.slots(self._model)
        if len(gaps) < MIN_GAPS and self.service.value is not None and slots:
            return self.service.value / slots
        return mean

    def _refusal(self, state: str) -> ClusterError:
        """Makes the error of a refused request. `state`: what the workers are or did, after "all workers of M"."""
        if not self._capacity.serves(self._model):
            return NoWorker(f"no worker serves {self._model} at the moment")
        error = Overloaded(f"all workers of {self._model} {state}")
        pace = self._pace()
        ahead = (len(self) + 1) * (pace if pace is not None else 1.0)
        error.retry_after = max(1, min(MAX_RETRY_AFTER, math.ceil(ahead)))
        return error


class Admission:
    """The queues of all models."""

    def __init__(self, limits: QueueLimits, capacity: Capacity) -> None:
        self._limits, self._capacity = limits, capacity
        self.queues: dict[str, Queue] = {}

    def queue(self, model: str) -> Queue:
        found = self.queues.get(model)
        if found is None:
            found = self.queues[model] = Queue(model, self._limits, self._capacity)
        return found

    def recheck(self) -> None:
        for queue in self.queues.values():
            queue.recheck()
