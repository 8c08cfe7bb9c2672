"""`Engine`: an `Executor` made of a scheduler, a way to compute a step, and a transceiver.

Two sides meet here. The *loop side* (submit, abort, deliver, transfers) runs on the event loop. The *step side* (plan,
book) runs wherever the driver runs it: in the torch executor's thread, or on the same loop for the simulated one. The
loop side hands commands over in a deque; the step side hands a whole step back in one call of `deliver`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from functools import partial
from itertools import count
from typing import Any, NamedTuple, Protocol

import uvloop

from dynserve.errors import (
    DynserveError,
    HandoffBroken,
    HandoffError,
    HandoffMismatch,
    InternalError,
    TimedOut,
    Unavailable,
)
from dynserve.executors.base import Executor, ExecutorLimits, KvListener, Output, OutputSink, check_request
from dynserve.executors.handoff import HandoffEnd, HandoffTable, belongs
from dynserve.executors.scheduler import BlockFetch, Sampled, Scheduler, Sequence, SequenceState, Slice
from dynserve.executors.transceiver import BlockStore, Transceiver
from dynserve.tasks import OwnedTasks
from dynserve.wire.events import KvEvent, Load
from dynserve.wire.requests import GenerateRequest, Grammar, Handoff

log = logging.getLogger(__name__)

GRAMMAR_TIMEOUT = 90.0  # seconds for a grammar to be compiled, in which its compiler has bounds of its own


class Grammars(Protocol):
    """Compiles grammars for one model's vocabulary."""

    async def matcher(self, grammar: Grammar) -> Any:
        """What the driver follows the grammar with. Raises BadRequest for a guide that is none."""
        ...


class StepResult(NamedTuple):
    outputs: list[tuple[Sequence, Output]]
    events: list[KvEvent]


class Engine:
    """The loop side is the `Executor`; `plan` and `book` are the driver's."""

    def __init__(
        self,
        scheduler: Scheduler,
        store: BlockStore,
        *,
        instance_id: str,
        vocab_size: int,
        eos: frozenset[int],
        handoff_ttl_s: float,
        wake: Callable[[], None],
        chunked: bool = True,
        grammars: Grammars | None = None,
        embedding_size: int = 0,
        pairing: Mapping[str, str] | None = None,
    ) -> None:
        self._grammars = grammars
        self._scheduler, self._store, self._eos, self._wake = scheduler, store, eos, wake
        self._loop = asyncio.get_running_loop()
        # uvloop's time has milliseconds only, and steps take less
        self._clock = time.monotonic if isinstance(self._loop, uvloop.Loop) else self._loop.time
        blocks = scheduler.blocks
        self.limits = ExecutorLimits(
            blocks.block_size, blocks.num_blocks, scheduler.max_seq_len, scheduler.max_batch_size, vocab_size,
            grammars is not None, embedding_size, pairing=pairing or {},
        )  # fmt: skip
        self.failed: asyncio.Future[None] = self._loop.create_future()
        self.handoffs = HandoffTable(instance_id, handoff_ttl_s, self._release)
        self._chunked = chunked
        self._tickets = count(1)
        self._commands: deque[Callable[[], None]] = deque()
        self._live: dict[int, tuple[Sequence, OutputSink]] = {}
        self._fetches: dict[int, asyncio.Task[HandoffError | None]] = {}
        self._compiling: dict[int, asyncio.Task[None]] = {}
        self._kv_listener: KvListener | None = None
        self._load = Load(0, 0, blocks.num_blocks, blocks.num_blocks, 0)
        self._transfers: Counter[str] = Counter()
        self._transceiver: Transceiver | None = None
        self._tasks: OwnedTasks | None = None

    def connect(self, transceiver: Transceiver, tasks: OwnedTasks) -> None:
        """Who moves blocks, and who owns the tasks that do."""
        self._transceiver, self._tasks = transceiver, tasks

    # the loop side

    def submit(self, request: GenerateRequest, sink: OutputSink) -> int:
        if self.failed.done():
            raise Unavailable("the engine is dead")
        check_request(request, self.limits, None if self._chunked else self._scheduler.max_num_tokens)
        ticket = next(self._tickets)
        sequence = Sequence(ticket, request, self.limits.block_size, self._eos, self._clock())
        self._live[ticket] = (sequence, sink)
        if request.grammar is None:
            self._post(partial(self._scheduler.add, sequence))
        else:
            assert self._tasks is not None
            task = self._tasks.create_task(self._add_with_grammar(sequence, request.grammar))
            self._compiling[ticket] = task
            task.add_done_callback(lambda _: self._compiling.pop(ticket, None))
        return ticket

    def abort(self, ticket: int) -> None:
        if self.handoffs.cancel(ticket):
            return
        if (live := self._live.pop(ticket, None)) is None:
            return
        if (compiling := self._compiling.get(ticket)) is not None:
            compiling.cancel()  # nobody waits for its grammar any more
        self._post(partial(self._abort_sequence, live[0]))
        if (task := self._fetches.get(ticket)) is not None:
            task.cancel()

    def handoff_done(self, ticket: int) -> None:
        self.handoffs.cancel(ticket)  # one that was delivered is closed already; this one was not needed

    @property
    def targets(self) -> Seq[Executor]:
        return (self,)

    def describe(self) -> Mapping[str, str]:
        carriers = [] if self._transceiver is None else self._transceiver.carriers
        return {"kv_transfer": ", ".join(carriers)} if carriers else {}

    def load(self) -> Load:
        load = self._load
        return Load(
            load.running, load.waiting, load.free_blocks, load.total_blocks, len(self.handoffs), load.begun_tokens
        )

    def counters(self) -> Mapping[str, float]:
        return {
            "preemptions_total": self._scheduler.preemptions,
            **{f"handoffs_{how}_total": number for how, number in self.handoffs.ended.items()},
            **{f"kv_transfers_{what}_total": number for what, number in self._transfers.items()},
        }

    def listen_kv(self, listener: KvListener) -> None:
        self._kv_listener = listener

    def start(self, fetches: list[BlockFetch]) -> None:
        """Begins the transfers that a plan decided on."""
        for fetch in fetches:
            self._start_fetch(fetch)

    def deliver(self, result: StepResult) -> None:
        """Everything that a step did, in one turn of the loop."""
        if result.events and self._kv_listener is not None:
            self._kv_listener(result.events)
        for sequence, output in result.outputs:
            live = self._live.get(sequence.ticket)
            if live is None:
                continue  # aborted; its command frees what it holds
            if output.reason is not None or output.error is not None:
                del self._live[sequence.ticket]
                if output.reason == "handoff":
                    output.handoff = self._open_handoff(sequence)
            try:
                live[1](output)
            except Exception:  # one request's fault must not cost the others of the step their tokens
                log.exception("request %s: its output could not be delivered", sequence.request.id)
                self.abort(sequence.ticket)

    def fail(self, error: BaseException) -> None:
        """The engine is dead: everyone who waits is told, and nothing new is taken."""
        if self.failed.done():
            return
        log.error("the engine died", exc_info=error)
        self.failed.set_exception(InternalError(f"the engine died: {error!r}"))
        self.failed.exception()  # whoever watches `failed` sees it; nobody needs to
        live, self._live = self._live, {}
        for _, sink in live.values():
            sink(Output([], error=InternalError("the engine died")))

    # the step side

    def plan(self) -> list[Slice]:
        """Carries out what the loop side asked for, and decides on the next step."""
        while self._commands:
            self._commands.popleft()()
        work = self._scheduler.schedule(self._clock())
        self._note_load()
        return work

    def ahead(self, work: Seq[Slice]) -> list[Slice]:
        """The step after one that is not booked yet, where nothing has to be decided for it; else none."""
        return [] if self._commands else self._scheduler.ahead(work)

    def fetches(self) -> list[BlockFetch]:
        """Transfers that the plan decided on. `start` them before the step: they go on while it computes."""
        return self._scheduler.drain_fetches()

    def max_steps(self, work: list[Slice], most: int) -> int:
        return self._scheduler.max_steps(work, most)

    def book(self, work: Seq[Slice], sampled: Seq[Seq[Sampled]]) -> StepResult:
        outputs = self._scheduler.commit(work, sampled, self._clock())
        self._note_load()
        return StepResult(outputs, self._scheduler.blocks.drain_events())

    @property
    def has_commands(self) -> bool:
        return bool(self._commands)

    def _note_load(self) -> None:
        scheduler, blocks = self._scheduler, self._scheduler.blocks
        running = len(scheduler.running) + len(scheduler.fetching)
        waiting = len(scheduler.waiting)
        self._load = Load(running, waiting, blocks.free, blocks.num_blocks, 0, scheduler.begun_tokens)

    def _abort_sequence(self, sequence: Sequence) -> None:
        if sequence.state is not SequenceState.DONE:
            self._scheduler.abort(sequence)

    # helpers of the loop side

    async def _add_with_grammar(self, sequence: Sequence, grammar: Grammar) -> None:
        """The grammar is compiled before the sequence takes part. What goes wrong is the request's last word: a task that
        raised would take its owner with it."""
        assert self._grammars is not None
        failure: DynserveError | None = None
        try:
            async with asyncio.timeout(GRAMMAR_TIMEOUT):
                sequence.matcher = await self._grammars.matcher(grammar)
        except DynserveError as error:
            failure = error
        except TimeoutError:
            failure = TimedOut(f"the grammar was not compiled within {GRAMMAR_TIMEOUT:.0f} s")
        except Exception as error:
            log.exception("request %s: its grammar could not be compiled", sequence.request.id)
            failure = InternalError(f"compiling the grammar failed: {type(error).__name__}")
        if failure is None:
            if sequence.ticket in self._live:
                self._post(partial(self._scheduler.add, sequence))
        elif (live := self._live.pop(sequence.ticket, None)) is not None:
            live[1](Output([], error=failure))

    def _post(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        self._wake()

    def _release(self, ticket: int, how: HandoffEnd) -> None:
        self._post(partial(self._scheduler.release_held, ticket))

    def _open_handoff(self, sequence: Sequence) -> Handoff:
        assert self._transceiver is not None
        blocks = sequence.blocks
        return self.handoffs.open(
            sequence.ticket,
            sequence.request,
            blocks[: -(-sequence.prompt_len // self.limits.block_size)],
            len(blocks) * self._store.block_bytes,
            self._transceiver.state(),
        )

    def _start_fetch(self, fetch: BlockFetch) -> None:
        assert self._tasks is not None
        ticket = fetch.sequence.ticket
        if ticket not in self._live:  # aborted before it began
            self._post(partial(self._scheduler.fetched, fetch.sequence, 0.0, ok=False))
            return
        task = self._tasks.create_task(self._fetch(fetch))
        self._fetches[ticket] = task
        # a task that is cancelled before its first step never runs its own clean-up
        task.add_done_callback(partial(self._fetch_ended, fetch, self._clock()))

    async def _fetch(self, fetch: BlockFetch) -> HandoffError | None:
        """What went wrong, as a value: a task that raised would take its owner with it."""
        request, handoff = fetch.sequence.request, fetch.sequence.request.handoff
        assert handoff is not None and self._transceiver is not None
        if not belongs(handoff, request):
            return HandoffMismatch(f"hand-off {handoff.id} belongs to another request or prompt")
        try:
            async with asyncio.timeout(handoff.ttl_s):
                await self._transceiver.fetch(handoff, fetch.blocks, fetch.skip)
        except HandoffError as error:
            return error
        except TimeoutError:
            return HandoffBroken(f"not done within {handoff.ttl_s} s")
        except Exception as error:
            log.exception("unexpected failure of a KV transfer")
            return HandoffBroken(repr(error))
        return None

    def _fetch_ended(self, fetch: BlockFetch, began: float, task: asyncio.Task[HandoffError | None]) -> None:
        del self._fetches[fetch.sequence.ticket]
        error = None if task.cancelled() else task.result()
        self._transfers["cancelled" if task.cancelled() else "failed" if error else "done"] += 1
        if error is not None:
            log.warning("request %s: %s; prefilling here instead", fetch.sequence.request.id, error)
        ok = not task.cancelled() and error is None
        self._post(partial(self._scheduler.fetched, fetch.sequence, self._clock() - began, ok=ok))
