"""The simulated executor: the real block manager, scheduler and hand-offs, with made-up tokens and a simple model of time.

    step = (step_ms + prefill tokens · prefill_us_per_token + decoding sequences · decode_us_per_sequence
            + their tokens in thousands · decode_us_per_ktoken) / speed
    KV transfer = tokens · bytes_per_token / transfer_gb_per_s / speed

Tokens are a function of the prompt and the position, so that prefill and decode workers agree without moving a byte.
All waiting goes through the event loop, so a loop with a virtual clock simulates hours in seconds; `leap` lets it
compute many decode-only steps at once, which changes no time and no token, only the number of tokens per output.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from collections.abc import Sequence as Seq
from contextlib import asynccontextmanager
from pathlib import Path

from dynserve.config import WorkerConfig
from dynserve.executors.base import Executor
from dynserve.executors.engine import Engine, EngineModel, EngineSteps, make_scheduler, open_engine
from dynserve.executors.engine_args import EngineArgs, engine_args
from dynserve.executors.handoff import HandoffTable
from dynserve.executors.scheduler import Sampled, Sequence, Slice
from dynserve.executors.transceiver import BlockStore, HostBlocks, TcpTransceivers, Transceiver, Transceivers
from dynserve.model_files import eos_token_ids, model_limits
from dynserve.plane_tls import plane_tls
from dynserve.wire.hashing import sequence_hash
from dynserve.wire.requests import Handoff, TokenLogprob

NUM_BLOCKS = 4096
FIRST_TOKEN = 300  # made-up tokens avoid the special tokens and single bytes at the start of a vocabulary


def prepare(config: WorkerConfig) -> EngineArgs:
    """Reads the engine options. Raises ConfigError if one is not usable, or the model's limits are not known."""
    model_limits(Path(config.model_path))
    return engine_args(config)


@asynccontextmanager
async def open_executor(
    config: WorkerConfig, instance_id: str, transceivers: Transceivers | None = None, prepared: EngineArgs | None = None
) -> AsyncIterator[Executor]:
    """Opens the simulated executor. It needs the model folder's tokenizer and config only; weights are not read.

    Raises:
        ConfigError: the folder or an engine option is not usable.
    """
    args = prepared or prepare(config)
    folder = Path(config.model_path)
    vocab_size, context = model_limits(folder)
    size = args.kv_cache_config.tokens_per_block
    max_tokens = args.kv_cache_config.max_tokens
    num_blocks = args.num_blocks or (-(-max_tokens // size) if max_tokens else NUM_BLOCKS)
    eos = frozenset(eos_token_ids(folder))
    stepper = SimulatedStepper(args, vocab_size, eos)
    scheduler = make_scheduler(args, num_blocks, args.max_seq_len or context)
    steps = EngineSteps(scheduler, stepper.wake.set)
    opening = open_engine(
        args, scheduler, steps, EngineModel(vocab_size, eos), EmptyBlocks(f"simulated:{size}", args.bytes_per_token * size),
        TimedTransceivers(transceivers or TcpTransceivers((), config.advertise_host, plane_tls(config)), args),
        instance_id=instance_id, host=config.link_host,
    )  # fmt: skip
    async with opening as (engine, tasks):
        tasks.create_task(stepper.run(steps, engine))
        yield engine


class EmptyBlocks(HostBlocks):
    """A block store without bytes. `block_bytes` is the size that a block would have, for records and times."""

    def __init__(self, layout: str, block_bytes: int) -> None:
        self.layout, self.block_bytes = layout, block_bytes

    def view(self, block: int) -> memoryview:
        return memoryview(bytearray())


class TimedTransceivers:
    """Opens the transceivers of `inner`, with the time that transfers would take."""

    def __init__(self, inner: Transceivers, args: EngineArgs) -> None:
        self._inner, self._args = inner, args

    @asynccontextmanager
    async def open(self, table: HandoffTable, store: BlockStore, host: str) -> AsyncIterator[Transceiver]:
        async with self._inner.open(table, store, host) as transceiver:
            yield TimedTransceiver(transceiver, self._args)


class TimedTransceiver:
    """A transceiver whose `fetch` lasts as long as the bytes would."""

    def __init__(self, inner: Transceiver, args: EngineArgs) -> None:
        self._inner = inner
        size = args.kv_cache_config.tokens_per_block
        self._s_per_block = (
            size * args.bytes_per_token / (args.transfer_gb_per_s * 1e9) / args.speed if args.speed else 0
        )

    @property
    def carriers(self) -> Seq[str]:
        return self._inner.carriers

    def state(self) -> bytes:
        return self._inner.state()

    async def fetch(self, handoff: Handoff, blocks: list[int], skip: int) -> None:
        if self._s_per_block:
            await asyncio.sleep(len(blocks) * self._s_per_block)
        await self._inner.fetch(handoff, blocks, skip)


class SimulatedStepper:
    """The loop that computes steps, on the event loop."""

    def __init__(self, args: EngineArgs, vocab_size: int, eos: frozenset[int]) -> None:
        self._args, self._vocab_size = args, vocab_size
        self._end = min(eos, default=0)
        self.wake = asyncio.Event()

    async def run(self, steps: EngineSteps, engine: Engine) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            self.wake.clear()
            work = steps.plan()
            engine.start(steps.fetches())
            if not work:
                engine.deliver(steps.book(work, []))
                if steps.has_commands:
                    await asyncio.sleep(0)
                else:
                    await self.wake.wait()
                    due = loop.time()
                continue
            # the time that this process needs to record a step does not delay the next one
            began, seconds = max(due, loop.time() - self._args.step_ms / 1000), self.seconds(work)
            count = self._max_steps(steps, work) if seconds else 1
            if count > 1:
                count = await self._until_woken(began, seconds, count)
            due = began + count * seconds
            await asyncio.sleep(max(0.0, due - loop.time()))
            tokens = [self._tokens(s.sequence, count) if s.samples else [] for s in work]
            engine.deliver(steps.book(work, tokens))

    def seconds(self, work: list[Slice]) -> float:
        args = self._args
        if not args.speed:
            return 0.0
        decoding = [slice_.start for slice_ in work if slice_.size == 1]
        prefilling = sum(slice_.size for slice_ in work if slice_.size > 1)
        micros = args.step_ms * 1000 + prefilling * args.prefill_us_per_token
        micros += len(decoding) * args.decode_us_per_sequence + sum(decoding) / 1000 * args.decode_us_per_ktoken
        return micros / 1e6 / args.speed

    def _max_steps(self, steps: EngineSteps, work: list[Slice]) -> int:
        """Returns how many steps can be computed at once: while all only decode, none ends, and there are blocks."""
        limit = self._args.leap
        for slice_ in work:
            request = slice_.sequence.request
            if slice_.size > 1 or request.phase == "prefill" or request.stop.strings or request.stop.token_ids:
                return 1
            if request.sampling.logprobs is not None:
                return 1
            limit = min(limit, self._until_end(slice_.sequence))
        return steps.max_steps(work, limit)

    async def _until_woken(self, began: float, seconds: float, steps: int) -> int:
        """Returns how many steps are done or begun when the next command arrives; at most `steps`."""
        try:
            async with asyncio.timeout_at(began + steps * seconds):
                await self.wake.wait()
        except TimeoutError:
            return steps
        passed = asyncio.get_running_loop().time() - began
        return min(steps, max(1, math.ceil(passed / seconds - 1e-9)))

    def _until_end(self, sequence: Sequence) -> int:
        """Returns the number of steps up to and including the one that ends the sequence, context length aside."""
        stop, position = sequence.request.stop, sequence.generated
        remaining = stop.max_tokens - position
        return remaining if stop.ignore_eos else min(remaining, self._answer_length(sequence) - position + 1)

    def _answer_length(self, sequence: Sequence) -> int:
        """Returns 16 to 127, by the prompt's hash: the number of tokens before the end of the turn."""
        return max(16 + self._name(sequence) % 112, sequence.request.stop.min_tokens)

    def _tokens(self, sequence: Sequence, count: int) -> list[Sampled]:
        """Returns the next `count` tokens, which are a function of prompt and position."""
        position = sequence.generated
        if sequence.whole and not position:
            sequence.prompt_logprobs = [TokenLogprob(id_, -1.0) for id_ in sequence.tokens]
        if not sequence.request.stop.ignore_eos and position >= self._answer_length(sequence):
            return [Sampled(self._end)]
        name, span = self._name(sequence), self._vocab_size - FIRST_TOKEN
        ids = [FIRST_TOKEN + (name + at * 2_654_435_761 >> 4) % span for at in range(position, position + count)]
        if sequence.request.sampling.logprobs is None:
            return [Sampled(id_) for id_ in ids]
        return [Sampled(id_, TokenLogprob(id_, -1.0)) for id_ in ids]

    @staticmethod
    def _name(sequence: Sequence) -> int:
        if sequence.memo is None:
            sequence.memo = sequence_hash(sequence.request.prompt, sequence.request.cache_salt)
        return sequence.memo
