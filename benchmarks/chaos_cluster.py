"""A whole cluster in one process, on a virtual clock, with the faults of a plan; for `chaos.py`.

All that could differ between two runs of one seed is fixed here: ids and jitter come from the seed, the work of threads runs
on the loop, and sets of tasks are iterated in the order in which the tasks were created.
"""

from __future__ import annotations

import asyncio
import functools
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Executor as Pool
from contextvars import ContextVar
from functools import partial
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, TypeVarTuple

from chaos_plan import Plan
from chaos_planes import FaultyPlanes, FreezableArgs, Process

from dynserve.clock import VirtualLoop
from dynserve.config import TINY_MODEL, FrontendConfig, Role, WorkerConfig, mode_of
from dynserve.errors import EngineDied
from dynserve.executors import simulated
from dynserve.executors.engine import Engine
from dynserve.executors.engine_args import EngineArgs, engine_args
from dynserve.frontend import frontend as frontend_module
from dynserve.frontend import models
from dynserve.frontend.frontend import Frontend
from dynserve.model_files import digest, eos_token_ids, model_limits
from dynserve.routing.router import PlacementQuery, Reservation
from dynserve.text.detokenize import Vocabulary
from dynserve.text.parity import parity
from dynserve.transport import memory
from dynserve.worker import worker as worker_module
from dynserve.worker.model_text import ModelText
from dynserve.worker.serving import serving_targets
from dynserve.worker.worker import Worker

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

MODEL = TINY_MODEL.name
REQUEST: ContextVar[str] = ContextVar("REQUEST")  # the name of the current task's request
READY_S = 20.0  # seconds in which a frontend must find all workers that no fault has touched

TEXT = ModelText.read(Path(TINY_MODEL))
VOCABULARY = Vocabulary(TEXT.preprocessor.tokenizer)
VOCAB_SIZE, _ = model_limits(Path(TINY_MODEL))
EOS = frozenset(eos_token_ids(Path(TINY_MODEL)))
FILES = {digest(content): content for content in TEXT.files.values()}


def replace(module: ModuleType, name: str, value: object) -> None:
    """Replaces what a module of dynserve has imported or defined."""
    setattr(module, name, value)


def share_model() -> None:
    """Makes all workers and frontends of this process share what they compute from the model's files: reading these takes
    ten times as long as a run."""

    known_parity = functools.cache(partial(parity, TEXT.preprocessor))
    for module in (models, worker_module):
        replace(module, "parity", lambda _, block_size: known_parity(block_size))
    for module in (worker_module, simulated):
        replace(module, "eos_token_ids", functools.cache(eos_token_ids))
    replace(simulated, "model_limits", functools.cache(model_limits))
    replace(models, "Preprocessor", lambda _: TEXT.preprocessor)
    replace(worker_module, "Vocabulary", lambda _: VOCABULARY)
    replace(memory, "matches", functools.cache(memory.matches))
    # a virtual clock has no lag, and load reports are most of what happens in an idle cluster
    replace(frontend_module, "LAG_EVERY", 60.0)
    replace(worker_module, "LOAD_EVERY", 0.25)


class NumberedTask(asyncio.Task[Any]):
    """A task whose hash is its number, so that sets of tasks have one order in all runs."""

    numbers = count()

    def __init__(self, coro: Coroutine[Any, Any, Any], *, loop: asyncio.AbstractEventLoop, **options: Any) -> None:
        self.number = next(self.numbers)
        super().__init__(coro, loop=loop, **options)

    def __hash__(self) -> int:
        return self.number


class ChaosLoop(VirtualLoop):
    """A virtual loop that runs the work of threads at once."""

    def __init__(self) -> None:
        super().__init__()
        NumberedTask.numbers = count()
        self.set_task_factory(lambda loop, coro, **options: NumberedTask(coro, loop=loop, **options))

    def run_in_executor(self, executor: Pool | None, func: Callable[[*Ts], T], *args: *Ts) -> asyncio.Future[T]:
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def live_timers(self) -> Counter[str]:
        """The timers that are set, by the names of their callbacks."""
        names: Counter[str] = Counter()
        for handle in self._scheduled:  # type: ignore[attr-defined]
            if not handle.cancelled():
                callback = handle._callback
                while isinstance(callback, functools.partial):
                    callback = callback.func
                names[getattr(callback, "__qualname__", repr(callback))] += 1
        return names


class Log:
    """What happened, with virtual times. Formatted only when it is read."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.entries: list[tuple[object, ...]] = []

    def add(self, *what: object) -> None:
        self.entries.append((self._loop.time(), *what))

    def lines(self) -> list[str]:
        return [f"{at:10.6f}  " + " ".join(map(str, what)) for at, *what in self.entries]


class ClusterProcess(Process):
    """A process with its task."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.task: asyncio.Task[None]
        self.leave = asyncio.Event()

    @property
    def started(self) -> bool:
        raise NotImplementedError

    @property
    def live(self) -> bool:
        """Whether it serves, and has not been asked to leave."""
        return self.started and not self.task.done() and not self.leave.is_set() and not self.dead


class WorkerProcess(ClusterProcess):
    def __init__(self, name: str, role: Role) -> None:
        super().__init__(name)
        self.role = role
        self.worker: Worker | None = None  # once it serves
        self.touched = False  # a fault has hit it, so that its requests may fail

    @property
    def started(self) -> bool:
        return self.worker is not None

    @property
    def engine(self) -> Engine:
        assert self.worker is not None
        engine = self.worker.executor
        assert isinstance(engine, Engine)
        return engine


class FrontendProcess(ClusterProcess):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.frontend: Frontend | None = None  # once it is open
        self.ready = False  # it has found the workers
        self.client_tasks: dict[asyncio.Task[None], None] = {}

    @property
    def started(self) -> bool:
        return self.frontend is not None


class ChaosCluster:
    """The processes of one plan. `violations` collects errors that no fault explains."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.planes = FaultyPlanes(random.Random(f"planes {plan.seed}"))
        self.planes.registry.lease_s = plan.lease_s
        self.planes.files |= FILES
        self.loop = asyncio.get_running_loop()
        self.log = Log()
        self.workers: list[WorkerProcess] = []
        self.frontends: list[FrontendProcess] = []
        self.violations: list[str] = []
        self.injected: Counter[str] = Counter()
        self._config = functools.cache(self._worker_config)
        self._frontend_config = FrontendConfig(**plan.frontend_options)
        self._numbers: Counter[str] = Counter()
        ids = count(1)
        replace(frontend_module, "token_hex", lambda _: f"{next(ids):02}")

    @functools.cached_property
    def args(self) -> EngineArgs:
        return engine_args(self._config("aggregated"))

    # membership

    async def start(self) -> None:
        for _ in range(self.plan.frontends):
            self.add_frontend()
        for role in self.plan.roles:
            self.add_worker(role)
        await self.until(self._started)

    def _started(self) -> bool:
        return all(w.live for w in self.workers) and all(f.ready for f in self.frontends)

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(READY_S):
            while not condition():
                await asyncio.sleep(0.02)

    def add_worker(self, role: Role) -> WorkerProcess:
        self._numbers[role] += 1
        process = WorkerProcess(f"{role}-{self._numbers[role]}", role)
        self.workers.append(process)
        process.task = self.loop.create_task(self._guarded(process, self._serve(process)), name=process.name)
        return process

    def add_frontend(self) -> FrontendProcess:
        self._numbers["frontend"] += 1
        process = FrontendProcess(f"frontend-{self._numbers['frontend']:02}")
        self.frontends.append(process)
        process.task = self.loop.create_task(self._guarded(process, self._open(process)), name=process.name)
        return process

    async def _guarded(self, process: Process, work: Awaitable[None]) -> None:
        try:
            await work
        except EngineDied:
            pass
        except Exception as error:
            self.violations.append(f"{process.name} has ended with {error!r}")
        self.log.add(process.name, "has ended")

    def _worker_config(self, role: Role) -> WorkerConfig:
        return WorkerConfig(
            executor="simulated", disaggregation_mode=mode_of(role), served_model_name=MODEL, **self.plan.worker_options,
            override_engine_args=json.dumps(self.plan.engine),
        )  # fmt: skip

    async def _serve(self, process: WorkerProcess) -> None:
        config, planes = self._config(process.role), self.planes.open_for(process)
        prepared: Any = FreezableArgs(self.args, process)
        opened = simulated.open_executor(config, process.name, self.planes.transceivers_of(process), prepared)
        async with (
            opened as executor,
            serving_targets(config, executor, planes, process.name, "memory:", text=TEXT) as (process.worker,),
        ):
            self.log.add(process.name, "serves")
            await process.leave.wait()

    async def _open(self, process: FrontendProcess) -> None:
        rng = random.Random(f"{process.name} {self.plan.seed}")
        async with Frontend.open(self._frontend_config, self.planes.open_for(process), rng=rng) as frontend:
            process.frontend = frontend
            self._log_placements(frontend)
            while not self._finds_workers(frontend):
                await asyncio.sleep(0.02)
            self.log.add(process.name, "is ready as", frontend.id)
            process.ready = True
            await process.leave.wait()

    def _finds_workers(self, frontend: Frontend) -> bool:
        """Whether all workers that serve undisturbed, and at least one, are usable there."""
        peers, expected = frontend.fleet.peers, [w for w in self.workers if not w.touched]
        return bool(expected) and all(w.live and w.name in peers and peers[w.name].usable for w in expected)

    def _log_placements(self, frontend: Frontend) -> None:
        place = frontend.router.place

        def logged(query: PlacementQuery, phase: Any, *args: Any, **options: Any) -> Reservation:
            reservation = place(query, phase, *args, **options)
            self.log.add(REQUEST.get(), phase, "is placed on", reservation.worker)
            return reservation

        frontend.router.place = logged  # type: ignore[method-assign]

    @property
    def processes(self) -> list[ClusterProcess]:
        return [*self.workers, *self.frontends]

    def live_workers(self) -> list[WorkerProcess]:
        return [w for w in self.workers if w.live]

    def live_frontends(self) -> list[FrontendProcess]:
        return [f for f in self.frontends if f.live]

    # the end of a run

    async def heal(self) -> None:
        """Ends all faults, and adds a worker for each role that has none."""
        bus, registry = self.planes.bus, self.planes.registry
        bus.silent, bus.lost, bus.late, bus.connected = False, 0.0, 0.0, True
        registry.up = True
        for key in list(registry.taken):
            registry.put_back(key)
        for process in self.processes:
            process.end_freeze()
            process.fetch_fails_until = 0.0
        for role in dict.fromkeys(self.plan.roles):
            if not any(w.role == role and not w.task.done() and not w.leave.is_set() for w in self.workers):
                self.add_worker(role)
        if not any(not f.task.done() for f in self.frontends):
            self.add_frontend()
        await asyncio.sleep(0)

    async def close(self) -> None:
        tasks = [process.task for process in self.processes if not process.task.done()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
