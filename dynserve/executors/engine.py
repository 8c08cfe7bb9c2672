"""The engine of the torch and simulated executors: a scheduler, a way to compute a step, and a transceiver.

It has two sides, which only meet in a deque and a callback:

    EngineSteps    plans steps and records their results where steps are computed: in the torch executor's thread, or on
                   the event loop for the simulated one
    Engine         the `Executor`, on the event loop: requests in, outputs out, transfers

`Engine` posts commands to `EngineSteps`; each step's results come back in one call of `Engine.deliver`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Mapping
from collections.abc import Sequence as Seq
from contextlib import asynccontextmanager
from functools import partial
from itertools import count
from typing import Any, NamedTuple, Protocol

import uvloop

from dynserve.errors import (
    DynserveError,
    EngineDied,
    EngineLost,
    HandoffBroken,
    HandoffError,
    HandoffMismatch,
    InternalError,
    TimedOut,
    Unavailable,
)
from dynserve.executors.base import Executor, ExecutorLimits, KvListener, Output, OutputSink, check_request
from dynserve.executors.engine_args import EngineArgs
from dynserve.executors.handoff import HandoffTable, belongs
from dynserve.executors.kv_blocks import BlockManager
from dynserve.executors.scheduler import BlockFetch, Sampled, Scheduler, Sequence, SequenceState, Slice
from dynserve.executors.transceiver import BlockStore, Transceiver, Transceivers
from dynserve.tasks import OwnedTasks, task_group
from dynserve.wire.events import KvEvent, Load
from dynserve.wire.requests import GenerateRequest, Grammar, Handoff

log = logging.getLogger(__name__)

GRAMMAR_TIMEOUT = 90.0  # seconds to compile a grammar; the compiler has bounds of its own within them


class Grammars(Protocol):
    """Compiles grammars for one model's vocabulary."""

    async def matcher(self, grammar: Grammar) -> Any:
        """Returns a matcher that constrains one answer to the grammar. Raises BadRequest for an invalid grammar."""
        ...


class StepResult(NamedTuple):
    outputs: list[tuple[Sequence, Output]]
    events: list[KvEvent]


class EngineSteps:
    """The side of an engine that computes steps. `post` may be called from any thread, and `load` read from any; all other
    calls come from the one thread that computes."""

    def __init__(self, scheduler: Scheduler, wake: Callable[[], None]) -> None:
        self._scheduler, self._wake = scheduler, wake
        loop = asyncio.get_running_loop()
        # uvloop's clock has a resolution of milliseconds, and steps are shorter
        self.clock = time.monotonic if isinstance(loop, uvloop.Loop) else loop.time
        self._commands: deque[Callable[[], None]] = deque()
        blocks = scheduler.blocks
        self.load = Load(0, 0, blocks.num_blocks, blocks.num_blocks, 0)

    def post(self, command: Callable[[], None]) -> None:
        """Queues a command, which is executed before the next step is planned."""
        self._commands.append(command)
        self._wake()

    @property
    def has_commands(self) -> bool:
        return bool(self._commands)

    def plan(self) -> list[Slice]:
        """Executes the queued commands and plans the next step."""
        while self._commands:
            self._commands.popleft()()
        work = self._scheduler.schedule(self.clock())
        self._note_load()
        return work

    def ahead(self, work: Seq[Slice]) -> list[Slice]:
        """Returns the step after `work` before `work` is recorded; empty where that step depends on a decision."""
        return [] if self._commands else self._scheduler.ahead(work)

    def fetches(self) -> list[BlockFetch]:
        """Returns the transfers of the plan. `Engine.start` begins them before the step: they run while it computes."""
        return self._scheduler.drain_fetches()

    def max_steps(self, work: list[Slice], limit: int) -> int:
        return self._scheduler.max_steps(work, limit)

    def book(self, work: Seq[Slice], sampled: Seq[Seq[Sampled]]) -> StepResult:
        outputs = self._scheduler.commit(work, sampled, self.clock())
        self._note_load()
        return StepResult(outputs, self._scheduler.blocks.drain_events())

    def _note_load(self) -> None:
        scheduler, blocks = self._scheduler, self._scheduler.blocks
        running = len(scheduler.running) + len(scheduler.fetching)
        waiting = len(scheduler.waiting)
        self.load = Load(running, waiting, blocks.free, blocks.num_blocks, 0, scheduler.begun_tokens)


class EngineModel(NamedTuple):
    """The properties of a model that its engine needs."""

    vocab_size: int
    eos: frozenset[int]
    embedding_size: int = 0  # 0: no embeddings
    pairing: Mapping[str, str] = {}  # see `ExecutorLimits`


class Engine:
    """The side of an engine on the event loop, an `Executor`. All calls come from the loop."""

    def __init__(
        self, scheduler: Scheduler, steps: EngineSteps, model: EngineModel, handoffs: HandoffTable,
        transceiver: Transceiver, block_bytes: int, tasks: OwnedTasks, grammars: Grammars | None, *, chunked: bool,
    ) -> None:  # fmt: skip
        self._scheduler, self._steps, self._eos = scheduler, steps, model.eos
        self._transceiver, self._block_bytes, self._tasks, self._grammars = transceiver, block_bytes, tasks, grammars
        self.handoffs = handoffs
        blocks = scheduler.blocks
        self.limits = ExecutorLimits(
            blocks.block_size, blocks.num_blocks, scheduler.max_seq_len, scheduler.max_batch_size, model.vocab_size,
            grammars is not None, model.embedding_size, pairing=model.pairing, draws_by_position=True,
            max_num_tokens=scheduler.max_num_tokens,
        )  # fmt: skip
        self._max_prompt = None if chunked else scheduler.max_num_tokens
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tickets = count(1)
        self._live: dict[int, tuple[Sequence, OutputSink]] = {}
        self._fetches: dict[int, asyncio.Task[HandoffError | None]] = {}
        self._compiling: dict[int, asyncio.Task[None]] = {}
        self._kv_listener: KvListener | None = None
        self._transfers: Counter[str] = Counter()

    # requests in

    def submit(self, request: GenerateRequest, sink: OutputSink) -> int:
        if self.failed.done():
            raise Unavailable("the engine is dead")
        check_request(request, self.limits, self._max_prompt)
        ticket = next(self._tickets)
        sequence = Sequence(ticket, request, self.limits.block_size, self._eos, self._steps.clock())
        self._live[ticket] = (sequence, sink)
        if request.grammar is None:
            self._steps.post(partial(self._scheduler.add, sequence))
        else:
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
            compiling.cancel()  # its grammar is not needed any more
        self._steps.post(partial(self._abort_sequence, live[0]))
        if (task := self._fetches.get(ticket)) is not None:
            task.cancel()

    def handoff_done(self, ticket: int) -> None:
        self.handoffs.cancel(ticket)  # a delivered one has ended already; an open one was not needed

    def _abort_sequence(self, sequence: Sequence) -> None:
        if sequence.state is not SequenceState.DONE:
            self._scheduler.abort(sequence)

    async def _add_with_grammar(self, sequence: Sequence, grammar: Grammar) -> None:
        """Compiles the grammar, then adds the sequence. An error becomes the request's last output; it is not raised, since
        that would end the task group."""
        assert self._grammars is not None  # or the request would have been refused
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
                self._steps.post(partial(self._scheduler.add, sequence))
        elif (live := self._live.pop(sequence.ticket, None)) is not None:
            live[1](Output([], error=failure))

    # its state

    @property
    def targets(self) -> Seq[Executor]:
        return (self,)

    def describe(self) -> Mapping[str, str]:
        return {"kv_transfer": ", ".join(self._transceiver.carriers)}

    def load(self) -> Load:
        load = self._steps.load
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

    # steps out

    def start(self, fetches: list[BlockFetch]) -> None:
        """Begins the transfers that a plan decided on."""
        for fetch in fetches:
            self._start_fetch(fetch)

    def deliver(self, result: StepResult) -> None:
        """Passes on all results of a step, in one turn of the loop."""
        if result.events and self._kv_listener is not None:
            self._kv_listener(result.events)
        for sequence, output in result.outputs:
            live = self._live.get(sequence.ticket)
            if live is None:
                continue  # aborted; the posted command frees its blocks
            if output.reason is not None or output.error is not None:
                del self._live[sequence.ticket]
                if output.reason == "handoff":
                    output.handoff = self._open_handoff(sequence)
            try:
                live[1](output)
            except Exception:  # an error of one request must not lose the tokens of the others
                log.exception("request %s: its output could not be delivered", sequence.request.id)
                self.abort(sequence.ticket)

    def fail(self, error: BaseException) -> None:
        """Marks the engine as dead. Open requests fail with EngineLost, so that other workers continue them; new ones are
        refused."""
        if self.failed.done():
            return
        log.error("the engine died", exc_info=error)
        self.failed.set_exception(EngineDied(f"the engine died: {error!r}"))
        self.failed.exception()  # marks it as retrieved: nothing has to await `failed`
        live, self._live = self._live, {}
        for _, sink in live.values():
            sink(Output([], error=EngineLost("the worker's engine died")))

    # hand-offs

    def _open_handoff(self, sequence: Sequence) -> Handoff:
        blocks = sequence.blocks
        return self.handoffs.open(
            sequence.ticket,
            sequence.request,
            blocks[: -(-sequence.given // self.limits.block_size)],
            len(blocks) * self._block_bytes,
            self._transceiver.state(),
        )

    def _start_fetch(self, fetch: BlockFetch) -> None:
        ticket = fetch.sequence.ticket
        if ticket not in self._live:  # aborted before it began
            self._steps.post(partial(self._scheduler.fetched, fetch.sequence, 0.0, ok=False))
            return
        task = self._tasks.create_task(self._fetch(fetch))
        self._fetches[ticket] = task
        # a task that is cancelled before its first step never runs its own clean-up
        task.add_done_callback(partial(self._fetch_ended, fetch, self._steps.clock()))

    async def _fetch(self, fetch: BlockFetch) -> HandoffError | None:
        """Fetches the blocks. An error is returned, not raised, since that would end the task group."""
        request, handoff = fetch.sequence.request, fetch.sequence.request.handoff
        assert handoff is not None
        if not belongs(handoff, request):
            return HandoffMismatch(f"hand-off {handoff.id} belongs to another request or prompt")
        try:
            async with asyncio.timeout(handoff.ttl_s):
                await self._transceiver.fetch(handoff, fetch.blocks, fetch.skip)
        except HandoffError as error:
            return error
        except TimeoutError:
            return HandoffBroken(f"the KV transfer was not done within {handoff.ttl_s} s")
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
        self._steps.post(partial(self._scheduler.fetched, fetch.sequence, self._steps.clock() - began, ok=ok))


def make_scheduler(args: EngineArgs, num_blocks: int, max_seq_len: int) -> Scheduler:
    """Returns a scheduler for the engine options; a sequence is never longer than the cache."""
    size = args.kv_cache_config.tokens_per_block
    return Scheduler(
        BlockManager(num_blocks, size, reuse=args.kv_cache_config.enable_block_reuse),
        max_batch_size=args.max_batch_size,
        max_num_tokens=args.max_num_tokens,
        max_seq_len=min(max_seq_len, num_blocks * size),
        chunked=args.enable_chunked_prefill,
    )


@asynccontextmanager
async def open_engine(
    args: EngineArgs, scheduler: Scheduler, steps: EngineSteps, model: EngineModel, store: BlockStore,
    transceivers: Transceivers, *, instance_id: str, host: str, grammars: Grammars | None = None,
) -> AsyncIterator[tuple[Engine, OwnedTasks]]:  # fmt: skip
    """Assembles an engine. At the end of the block its tasks end, and open hand-offs are cancelled."""

    def release(ticket: int, how: object) -> None:
        steps.post(partial(scheduler.release_held, ticket))

    handoffs = HandoffTable(instance_id, args.cache_transceiver_config.kv_transfer_timeout_ms / 1000, release)
    async with transceivers.open(handoffs, store, host) as transceiver, task_group() as tasks:
        try:
            yield (
                Engine(
                    scheduler, steps, model, handoffs, transceiver, store.block_bytes, tasks, grammars,
                    chunked=args.enable_chunked_prefill,
                ),
                tasks,
            )  # fmt: skip
        finally:
            handoffs.cancel_all()
