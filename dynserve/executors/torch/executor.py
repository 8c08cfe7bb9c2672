"""The torch executor: `Engine` with a model, stepped in a thread of its own."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from dynserve.config import WorkerConfig
from dynserve.errors import ConfigError
from dynserve.executors.base import Executor
from dynserve.executors.carriers import Carrier
from dynserve.executors.engine import Engine, EngineModel, EngineSteps, StepResult, make_scheduler, open_engine
from dynserve.executors.engine_args import EngineArgs, engine_args
from dynserve.executors.torch.attention import KvCache
from dynserve.executors.torch.grammars import CompiledGrammars, warm_up
from dynserve.executors.torch.loading import ComputeTarget, load
from dynserve.executors.torch.model_config import ModelConfig
from dynserve.executors.torch.nixl import NixlCarrier, nixl_api
from dynserve.executors.torch.stepping import DeviceStep, Runner
from dynserve.executors.transceiver import TcpTransceivers, Transceivers
from dynserve.model_files import eos_token_ids
from dynserve.plane_tls import plane_tls

log = logging.getLogger(__name__)

STOP_TIMEOUT = 10.0  # seconds that closing waits for a step to end
SWITCH_INTERVAL = 0.0002  # seconds
STEPS_AHEAD = 2  # steps whose results may wait for the event loop


class Prepared(NamedTuple):
    target: ComputeTarget
    args: EngineArgs


def prepare(config: WorkerConfig) -> Prepared:
    """Chooses the device and reads the engine options. Raises ConfigError if one is not usable, or the model is unknown."""
    target = ComputeTarget.choose(config.device, config.dtype)
    ModelConfig.read(Path(config.model_path))
    return Prepared(target, engine_args(config, target.defaults))


@asynccontextmanager
async def open_executor(
    config: WorkerConfig, instance_id: str, transceivers: Transceivers | None = None, prepared: Prepared | None = None
) -> AsyncIterator[Executor]:
    """Loads the model in a thread, then runs it until the context exits.

    Raises:
        ConfigError: the folder, the model or an engine option is not usable.
    """
    target, args = prepared or prepare(config)
    folder = Path(config.model_path)
    model, cache, runner = await asyncio.to_thread(load, folder, args, target)
    eos = eos_token_ids(folder)
    grammars = None
    if eos and grammars_installed():
        grammars = CompiledGrammars(folder, model.config.vocab_size, eos)
    carriers = await asyncio.to_thread(carriers_for, args.cache_transceiver_config.backend, cache, runner, instance_id)
    limit = model.config.max_position
    scheduler = make_scheduler(args, cache.num_blocks, min(args.max_seq_len or limit, limit))
    stepper = StepThread(runner)
    steps = EngineSteps(scheduler, stepper.wake.set)
    pairing = {"KV cache": cache.layout.partition(":")[2]}
    opening = open_engine(
        args, scheduler, steps, EngineModel(model.config.vocab_size, frozenset(eos), model.config.hidden_size, pairing),
        cache, transceivers or TcpTransceivers(carriers, config.advertise_host, plane_tls(config)),
        instance_id=instance_id, host=config.link_host,
        grammars=grammars,
    )  # fmt: skip
    async with opening as (engine, tasks):
        if runner.overlaps:  # neither thread may wait 5 ms for the interpreter lock
            sys.setswitchinterval(SWITCH_INTERVAL)
        stepper.start(steps, engine)
        if grammars is not None and runner.overlaps:
            await grammars.prepare(after=0)  # later, the import would delay steps of half a millisecond
            await asyncio.to_thread(warm_up, model.config.vocab_size, model.device)
        elif grammars is not None:
            tasks.create_task(grammars.prepare())
        try:
            yield engine
        finally:
            await stepper.stop()


def carriers_for(backend: str, cache: KvCache, runner: Runner, worker: str) -> list[Carrier]:
    """Returns the carriers that can move blocks besides TCP, best first.

    Raises:
        ConfigError: NIXL was requested and cannot be used.
    """
    if backend in ("NIXL", "UCX"):
        return [NixlCarrier(cache, worker)]
    if backend != "DEFAULT" or cache.stream is None:
        return []
    makers: list[Callable[[], Carrier]] = []
    if (launcher := runner.launcher) is not None:
        from dynserve.executors.torch.cuda.peer import PeerCarrier

        makers.append(partial(PeerCarrier, cache, launcher))
    if nixl_api() is not None:
        makers.append(partial(NixlCarrier, cache, worker))
    carriers: list[Carrier] = []
    for make in makers:
        try:
            carriers.append(make())
        except (ConfigError, RuntimeError) as error:  # no option requires this carrier: TCP is the fallback
            log.warning("a fast transport of KV blocks is not available; using another one or TCP: %s", error)
    return carriers


def grammars_installed() -> bool:
    return find_spec("xgrammar") is not None


class StepThread:
    """The thread that runs the engine's steps: plan, compute, sample, book, and one call into the event loop. If the
    device computes asynchronously, the next step begins before the last one's tokens are read, unless the scheduler
    must decide something first."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._begun: DeviceStep | None = None
        self.wake = threading.Event()
        self._stopping = False
        self._ahead = threading.Semaphore(STEPS_AHEAD)
        self._loop = asyncio.get_running_loop()
        self._thread: threading.Thread | None = None

    def start(self, steps: EngineSteps, engine: Engine) -> None:
        """Starts the thread. `steps` is called in the thread, `engine` on the event loop only."""
        self._thread = threading.Thread(target=self._run, args=(steps, engine), name="torch-step", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        self._stopping = True
        self.wake.set()
        self._ahead.release()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, STOP_TIMEOUT)

    def _run(self, steps: EngineSteps, engine: Engine) -> None:
        try:
            self._runner.enter()
            while not self._stopping:
                self._step(steps, engine)
        except BaseException as error:
            self._call_in_loop(engine.fail, error)

    def _step(self, steps: EngineSteps, engine: Engine) -> None:
        step = self._begun or self._plan(steps, engine)
        self._begun = None
        if step is None:
            self._hand_over(engine, steps.book([], []))
            if not steps.has_commands:
                self.wake.wait()
            return
        if self._runner.overlaps and (more := steps.ahead(step.work)):
            self._begun = self._runner.begin(more, step)
        self._hand_over(engine, steps.book(step.work, step.result()))

    def _plan(self, steps: EngineSteps, engine: Engine) -> DeviceStep | None:
        self.wake.clear()
        work = steps.plan()
        if fetches := steps.fetches():
            self._call_in_loop(engine.start, fetches)
        return self._runner.begin(work, None) if work else None

    def _hand_over(self, engine: Engine, result: StepResult) -> None:
        if result.outputs or result.events:
            # the event loop may lag by `STEPS_AHEAD` results at most, so that they do not pile up
            self._ahead.acquire()
            self._call_in_loop(self._deliver, engine, result)

    def _deliver(self, engine: Engine, result: StepResult) -> None:
        self._ahead.release()
        engine.deliver(result)

    def _call_in_loop(self, call: Callable[..., None], *args: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(call, *args)
        except RuntimeError:  # the event loop is closed: the process is ending
            self._stopping = True
