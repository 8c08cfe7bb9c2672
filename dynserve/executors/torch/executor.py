"""The torch executor: `Engine` with a model, stepped in a thread of its own."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from dynserve.config import WorkerConfig
from dynserve.executors.base import Executor
from dynserve.executors.engine import Engine, StepResult
from dynserve.executors.engine_args import EngineArgs, engine_args
from dynserve.executors.kv_blocks import BlockManager
from dynserve.executors.scheduler import Sampled, Scheduler, Slice
from dynserve.executors.torch.attention import KvCache
from dynserve.executors.torch.guides import Guides
from dynserve.executors.torch.model import ModelConfig, Transformer
from dynserve.executors.torch.sampler import sample
from dynserve.executors.torch.whole import look_at
from dynserve.executors.transceiver import TcpTransceivers, Transceivers
from dynserve.openai.model_files import eos_token_ids
from dynserve.tasks import task_group

log = logging.getLogger(__name__)

CACHE_BYTES = 1 << 30  # of KV cache when nothing says how much
SMALL_MODEL = 50_000_000  # parameters up to which a second thread costs more than it brings
STOP_TIMEOUT = 10.0  # seconds that closing waits for a step to end
STEPS_AHEAD = 2  # steps whose results may wait for the event loop


@asynccontextmanager
async def open_executor(
    config: WorkerConfig, instance_id: str, transceivers: Transceivers | None = None
) -> AsyncIterator[Executor]:
    """Loads the model (off the loop), then runs it until the block is left.

    Raises:
        ConfigError: the folder, the model or an engine option is not usable.
    """
    args = engine_args(config)
    folder = Path(config.model_path)
    model, cache = await asyncio.to_thread(load, folder, args)
    limit = model.config.max_position
    scheduler = Scheduler(
        BlockManager(
            cache.num_blocks, args.kv_cache_config.tokens_per_block, reuse=args.kv_cache_config.enable_block_reuse
        ),
        max_batch_size=args.max_batch_size,
        max_num_tokens=args.max_num_tokens,
        max_seq_len=min(args.max_seq_len or limit, limit, cache.num_blocks * args.kv_cache_config.tokens_per_block),
        chunked=args.enable_chunked_prefill,
    )
    stepper = Stepper(model, cache)
    eos = eos_token_ids(folder)
    guides = Guides(folder, model.config.vocab_size, eos)
    guided = bool(eos) and guides_installed()
    engine = Engine(
        scheduler,
        cache,
        instance_id=instance_id,
        vocab_size=model.config.vocab_size,
        eos=frozenset(eos),
        handoff_ttl_s=args.cache_transceiver_config.kv_transfer_timeout_ms / 1000,
        wake=stepper.wake.set,
        chunked=args.enable_chunked_prefill,
        guides=guides if guided else None,
        embedding_size=model.config.hidden_size,
    )
    async with (
        (transceivers or TcpTransceivers()).open(engine.handoffs, cache, config.link_host) as transceiver,
        task_group() as tasks,
    ):
        engine.connect(transceiver, tasks)
        stepper.start(engine)
        if guided:
            tasks.create_task(guides.prepare())
        try:
            yield engine
        finally:
            engine.handoffs.cancel_all()
            await stepper.stop()


def guides_installed() -> bool:
    return find_spec("xgrammar") is not None


def load(folder: Path, args: EngineArgs) -> tuple[Transformer, KvCache]:
    config = ModelConfig.read(folder)
    # CPUs compute bfloat16 slowly and with less precision; float32 also makes every batch size agree on greedy tokens
    device, dtype = torch.device("cpu"), torch.float32
    model = Transformer(config, folder, device, dtype)
    small = model.num_parameters < SMALL_MODEL
    torch.set_num_threads(args.num_threads or (1 if small else os.cpu_count() or 1))
    size = args.kv_cache_config.tokens_per_block
    block_bytes = 2 * config.num_layers * size * config.num_kv_heads * config.head_dim * dtype.itemsize
    num_blocks = args.num_blocks or (
        -(-args.kv_cache_config.max_tokens // size)
        if args.kv_cache_config.max_tokens
        else max(1, min(CACHE_BYTES // block_bytes, args.max_batch_size * -(-config.max_position // size)))
    )
    cache = KvCache(
        num_blocks=num_blocks, block_size=size, num_layers=config.num_layers, kv_heads=config.num_kv_heads,
        head_dim=config.head_dim, dtype=dtype, device=device, model=folder.resolve().name,
    )  # fmt: skip
    log.info(
        "%s: %.1f M parameters, %d KV blocks of %d tokens (%.0f MB), %d thread(s)",
        config.family, model.num_parameters / 1e6, num_blocks, size, num_blocks * block_bytes / 1e6,
        torch.get_num_threads(),
    )  # fmt: skip
    return model, cache


class Stepper:
    """The thread that computes. One step: plan, forward, sample, book, and one call into the event loop."""

    def __init__(self, model: Transformer, cache: KvCache) -> None:
        self._model, self._cache = model, cache
        self.wake = threading.Event()
        self._stopping = False
        self._ahead = threading.Semaphore(STEPS_AHEAD)
        self._loop = asyncio.get_running_loop()
        self._thread: threading.Thread | None = None

    def start(self, engine: Engine) -> None:
        self._thread = threading.Thread(target=self._run, args=(engine,), name="torch-step", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        self._stopping = True
        self.wake.set()
        self._ahead.release()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, STOP_TIMEOUT)

    def _run(self, engine: Engine) -> None:
        try:
            while not self._stopping:
                self._step(engine)
        except BaseException as error:
            self._tell(engine.fail, error)

    def _step(self, engine: Engine) -> None:
        self.wake.clear()
        work = engine.plan()
        if fetches := engine.fetches():
            self._tell(engine.start, fetches)
        result = engine.book(work, self.compute(work) if work else [])
        if result.outputs or result.events:
            # the loop may be behind, but not by more than this: results must not pile up
            self._ahead.acquire()
            self._tell(self._deliver, engine, result)
        if not work and not engine.has_commands:
            self.wake.wait()

    def compute(self, work: list[Slice]) -> list[list[Sampled]]:
        layout, owners = self._cache.lay_out(work)
        hidden = self._model.forward(self._cache, layout)
        for i, first in layout.whole:
            look_at(self._model, hidden[first : first + work[i].size], work[i])
        sampled: list[list[Sampled]] = [[] for _ in work]
        logits = self._model.logits(hidden[layout.sampling])
        for owner, new in zip(owners, sample(logits, [work[i].sequence for i in owners]), strict=True):
            sampled[owner] = [new]
        return sampled

    def _deliver(self, engine: Engine, result: StepResult) -> None:
        self._ahead.release()
        engine.deliver(result)

    def _tell(self, call: Callable[..., None], *args: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(call, *args)
        except RuntimeError:  # the loop was closed under us: the process is ending
            self._stopping = True
