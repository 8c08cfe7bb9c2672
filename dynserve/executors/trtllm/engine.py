"""One TensorRT-LLM engine: its start, its events and statistics, its failure and shutdown. Requests are in `executor`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from xxhash import xxh3_64_intdigest

from dynserve.config import WorkerConfig
from dynserve.errors import DynserveError, EngineDied, InternalError
from dynserve.executors.base import Executor
from dynserve.executors.trtllm import state
from dynserve.executors.trtllm.api import Api
from dynserve.executors.trtllm.arguments import WITHOUT_EVENTS
from dynserve.executors.trtllm.kv_events import PROBE_SALT, KvStreams
from dynserve.executors.trtllm.pump import Pump
from dynserve.executors.trtllm.stats import Stats
from dynserve.executors.trtllm.watch import Watch
from dynserve.model_files import model_config
from dynserve.tasks import OwnedTasks, detached
from dynserve.wire.events import KvEvent
from dynserve.wire.requests import pack_tokens

log = logging.getLogger(__name__)

START_TIMEOUT = 120.0  # seconds for the first token of an engine that was built
CAPACITY_TIMEOUT = 30.0  # seconds
EVENTS_GRACE = 10.0  # seconds, at least, after a request's end in which its KV events may still come
ROWS_TIMEOUT = 20.0  # seconds for the first row of statistics
SHUTDOWN_TIMEOUT = 30.0  # seconds; the engine's own waits have no bound
CANARY = [1, 2, 3]  # token ids that every vocabulary has
MIN_GLOBAL_ID = 1 << 40  # smaller ids are the engine's own
LOOP_CRASHED = "Event loop terminated with error"  # in a `RequestError`: the process lives, but computes nothing more


class RankExecutor(Executor, Protocol):
    """The executor of one rank, as the engine sees it."""

    stats: Stats

    def kv_changed(self, events: list[KvEvent]) -> None: ...

    def engine_died(self, *, crashed: bool) -> None: ...

    def close(self) -> None: ...


class TrtllmEngine:
    """The engine that the executors of all ranks share. Call `start` before the first request, `close` after the last.

    The worker process of the engine changes some of its options; `llm.args` keeps what was passed. So `block_size` and
    the capacity are asked of the engine, or read from its statistics, before they are published.
    """

    def __init__(
        self, llm: Any, api: Api, config: WorkerConfig, instance_id: str, backend: str, capacity: Mapping[str, int],
        tasks: OwnedTasks,
    ) -> None:  # fmt: skip
        self.llm, self.api, self.tasks = llm, api, tasks
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.ids = global_ids(instance_id)
        self._config, self._backend = config, backend
        args = llm.args
        transceiver = args.cache_transceiver_config
        self.disaggregates = transceiver is not None and transceiver.backend is not None
        self.block_size: int = capacity.get("tokensPerBlock") or args.kv_cache_config.tokens_per_block
        self.knows_block_size = "tokensPerBlock" in capacity  # else it is what the options say
        # 0 until a row of statistics contains it, on versions without `get_kv_cache_capacity`
        self.total_blocks: int = capacity.get("maxNumBlocks") or 0
        self._total_tokens: int = capacity.get("maxNumTokens") or 0
        self.pairing: Mapping[str, str] = self._pairing()  # empty without a transceiver
        # with context parallelism each rank holds a part of a sequence; the numbers of blocks are those of one
        self.parts: int = getattr(args, "context_parallel_size", 1) or 1
        self.ranks: int = args.tensor_parallel_size if args.enable_attention_dp else 1
        events = config.kv_events and _emits_kv_events(args)
        self.streams = KvStreams(self.block_size, self.ranks) if events else None
        self._watch = Watch(llm, config.engine_stall_s, self.canary, self.die, tasks)
        self._pump = Pump(llm, self.streams, self._on_stats)
        self.note_sign_of_life, self.alive = self._watch.note_sign_of_life, self._watch.alive
        self._watching: list[asyncio.Task[None]] = []
        self.closing = False
        self._probes = count(1)
        self._ended_apart: list[tuple[int, bool]] = []
        self.targets: Sequence[RankExecutor] = ()

    @property
    def has_kv_events(self) -> bool:
        """Whether the engine reports the changes of its prefix cache."""
        return self.streams is not None

    @property
    def silence(self) -> float:
        """The seconds since the engine has sent something."""
        return self._watch.silence

    @property
    def capacity(self) -> int | None:
        """The tokens that the KV cache holds: the engine refuses longer sequences. None if it does not tell."""
        return (self._total_tokens or self.total_blocks * self.block_size) * self.parts or None

    @property
    def guessed_blocks(self) -> int:
        """An estimate of the cache's size, for versions that report it in statistics only, when those are off."""
        args = self.llm.args
        tokens = args.kv_cache_config.max_tokens or args.max_num_tokens * args.max_batch_size
        return max(1, int(tokens) // self.block_size)

    async def start(self) -> None:
        """Generates a first token, which also enables the getters that the pump reads.

        Raises:
            InternalError: the engine does not answer, or refuses a prompt that nothing is wrong with.
        """
        try:
            async with asyncio.timeout(START_TIMEOUT):
                await self.canary()
                self._pump.start()
            await self._read_size()
        except TimeoutError:
            raise InternalError(f"the engine generated no token within {START_TIMEOUT:.0f} s of its start") from None
        except DynserveError:
            raise
        except Exception as error:
            raise InternalError(f"the engine's first token failed: {type(error).__name__}: {error}") from error
        self._watch.note_sign_of_life()
        self._watch.start()
        watching = (self._watch.beat(), self._watch.poll(), self._watch.poll_health(), self._forget_ended())
        self._watching = [self.tasks.create_task(one) for one in watching]

    async def _read_size(self) -> None:
        """Waits for a row of statistics that contains the size of the KV cache, if nothing else has told it."""
        try:
            async with asyncio.timeout(ROWS_TIMEOUT):
                while not self.total_blocks and self.llm.args.enable_iter_perf_stats:
                    await self.canary()
                    await asyncio.sleep(0.1)
        except TimeoutError:
            pass
        if not self.total_blocks:
            guessed = self.guessed_blocks
            log.warning("the engine does not tell the size of its KV cache; taking it for %d blocks", guessed)

    async def close(self) -> None:
        """Shuts the engine down, unless it is dead: the clean-up of a dead engine may wait for ever."""
        self._pump.stop()
        self._watch.stop()
        for task in self._watching:
            task.cancel()
        for target in self.targets:
            target.close()
        self.closing = True  # from here on the engine is not called
        if self.failed.done():
            return
        try:
            async with asyncio.timeout(SHUTDOWN_TIMEOUT):
                await detached(self.llm.shutdown)
        except TimeoutError:
            log.warning("the engine did not shut down within %.0f s; not waiting any longer", SHUTDOWN_TIMEOUT)
        except Exception as error:
            log.warning("the engine's shutdown failed: %s", error)

    def die(self, reason: str) -> None:
        """Marks the engine as dead, for good: open requests fail, and new ones are refused."""
        if self.failed.done():
            return
        log.error("the engine is dead: %s", reason)
        self.failed.set_exception(EngineDied(f"the engine is dead: {reason}"))
        self.failed.exception()  # marks it as retrieved: nothing has to await `failed`
        self._pump.stop()
        for target in self.targets:
            target.engine_died(crashed=LOOP_CRASHED in reason)

    async def canary(self) -> None:
        """Generates one token of a fixed prompt. Raises what the engine raises; nothing in the prompt can be refused."""
        await self.probe(CANARY)

    async def probe(
        self, prompt: list[int], *, max_tokens: int = 1, logprobs: int | None = None, lora: Any = None
    ) -> Any:
        """Generates an answer that no client has asked for, greedily and on the first rank, and returns its result.

        The salt separates it from the padding requests of attention DP, which have an unsalted prompt.
        """
        api = self.api
        params = api.sampling(
            max_tokens=max_tokens, temperature=0.0, end_id=-1, pad_id=0, detokenize=False, logprobs=logprobs
        )
        keywords: dict[str, Any] = {"streaming": True, "cache_salt": f"{PROBE_SALT}-{next(self._probes)}"}
        if lora is not None:
            keywords["lora_request"] = lora
        if self.disaggregates:
            keywords["disaggregated_params"] = api.disaggregated(
                request_type=state.BOTH, disagg_request_id=next(self.ids)
            )
        if self.ranks > 1:
            keywords["scheduling_params"] = api.scheduling(attention_dp_rank=0, attention_dp_relax=False)
        noted, result = self.note_apart(pack_tokens(prompt), adapter=lora is not None), None
        try:
            result = self.llm.generate_async(prompt, params, **keywords)
            async for _ in result:
                self._watch.note_sign_of_life()
        except asyncio.CancelledError:
            self.abort(result)
            raise
        finally:
            self.forget_apart(noted)
        return result

    def note_apart(self, prompt: bytes, *, adapter: bool) -> tuple[int, bool] | None:
        """Notes that a prompt with a salt or an adapter is computed from now on; see `KvStreams.note_apart`."""
        return None if self.streams is None else self.streams.note_apart(prompt, adapter=adapter)

    def forget_apart(self, noted: tuple[int, bool] | None) -> None:
        """Ends what `note_apart` has begun, once the last events of the request have come."""
        if noted is not None:
            self._ended_apart.append(noted)

    async def _forget_ended(self) -> None:
        while True:
            await asyncio.sleep(EVENTS_GRACE)
            ended, self._ended_apart = self._ended_apart, []
            if not ended or self.streams is None:
                continue
            if not self.streams.names_salts:  # version 1.2, which passes events on after submissions only
                with contextlib.suppress(Exception):  # `Watch` decides whether the engine is dead
                    await self.canary()
            await asyncio.sleep(EVENTS_GRACE)
            for noted in ended:
                self.streams.forget_apart(noted)

    def abort(self, result: Any) -> None:
        """Aborts a request, unless the engine is dead or shut down, or there is none."""
        if result is None or self.closing or self.failed.done():
            return
        try:
            result.abort()
        except Exception as error:
            log.warning("an abort failed: %s: %s", type(error).__name__, error)

    def losses(self, rank: int) -> tuple[int, int]:
        """Returns the number of gaps in a rank's KV events, and of blocks stored without a known parent."""
        if self.streams is None:
            return 0, 0
        stream = self.streams.ranks[rank]
        return stream.gaps, stream.orphans

    def set_block_size(self, tokens: int) -> None:
        """Corrects the block size, before the first request: the engine has chosen another one than its options say."""
        log.warning(
            "the engine uses KV blocks of %d tokens, not of %d: that is what this worker publishes",
            tokens,
            self.block_size,
        )
        self.block_size = tokens
        self.pairing = self._pairing()
        if self.streams is not None:
            self.streams.set_block_size(tokens)
        for target in self.targets:
            target.stats.block_size = tokens

    def give_up_kv_events(self, reason: str) -> None:
        """Makes the worker publish that it reports no KV events, before the first request."""
        log.warning(
            "the engine reports no KV events: %s. Requests are not routed by what its cache really holds; block reuse may "
            "be off for this model or its attention backend", reason,
        )  # fmt: skip
        self.streams = self._pump.streams = None

    def _pairing(self) -> Mapping[str, str]:
        if not self.disaggregates:
            return {}
        return pairing_of(self.api, self.llm, self._config.model_path, self._backend, self.block_size)

    def _on_stats(self, events: dict[int, list[KvEvent]], rows: list[Mapping[str, Any]]) -> None:
        self._watch.note_sign_of_life()
        for rank, found in events.items():
            self.targets[rank].kv_changed(found)
        now = asyncio.get_running_loop().time()
        for row in rows:
            rank = row.get("attentionDpRank") or 0
            if rank >= len(self.targets):
                continue
            self.total_blocks = self.total_blocks or (row.get("kvCacheStats") or {}).get("maxNumBlocks") or 0
            if not self._watching:  # the first rows, before any request
                size = (row.get("kvCacheStats") or {}).get("tokensPerBlock") or 0
                self.knows_block_size = self.knows_block_size or size > 0
                if size and size != self.block_size:
                    self.set_block_size(size)
            self.targets[rank].stats.update(row, now)


def _emits_kv_events(args: Any) -> bool:
    """Whether these arguments have the engine record the changes of its prefix cache, for a worker that reads them."""
    cache = args.kv_cache_config
    pushed = getattr(cache, "kv_events_config", None)
    pushes = pushed is not None and pushed.enable_kv_cache_events and pushed.publisher != "null"
    reused = cache.enable_block_reuse and args.attn_backend not in WITHOUT_EVENTS
    return bool(reused and cache.event_buffer_max_size > 0 and not pushes)


async def capacity_of(llm: Any) -> Mapping[str, int]:
    """Returns the KV cache's capacity; empty for versions that do not report it."""
    if not hasattr(llm, "get_kv_cache_capacity"):
        return {}
    try:
        async with asyncio.timeout(CAPACITY_TIMEOUT):
            found: Mapping[str, int] = await detached(llm.get_kv_cache_capacity)
            return {name: value for name, value in found.items() if value > 0}
    except Exception as error:
        log.warning("the engine does not report its cache's size (%s: %s)", type(error).__name__, error)
        return {}


def global_ids(instance_id: str) -> Iterator[int]:
    """Yields hand-off ids, unique over all workers at any time, in the range that TensorRT-LLM reserves for such ids."""
    owner = (MIN_GLOBAL_ID >> 32) + xxh3_64_intdigest(instance_id.encode()) % ((1 << 31) - 512)
    return count(owner << 32 | 1)


def pairing_of(api: Api, llm: Any, model_path: str, backend: str, block_size: int) -> dict[str, str]:
    """Returns the properties that both sides of a hand-off must share: TensorRT-LLM's own messages do not carry them."""
    args = llm.args
    config = model_config(Path(model_path))
    dtype = args.dtype if args.dtype != "auto" else str(config.get("dtype") or config.get("torch_dtype") or "auto")
    kv_dtype = args.kv_cache_config.dtype
    transceiver = args.cache_transceiver_config
    return {
        "tensorrt_llm": api.version,
        "transceiver backend": backend,
        "transceiver runtime": str(getattr(transceiver, "transceiver_runtime", None) or "CPP"),
        "tokens_per_block": str(block_size),
        "KV cache dtype": kv_dtype if kv_dtype != "auto" else dtype,
    }
