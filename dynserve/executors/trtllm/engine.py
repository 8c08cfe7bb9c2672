"""One TensorRT-LLM engine: its start, its events and statistics, its failure and shutdown. Requests are in `executor`."""

from __future__ import annotations

import asyncio
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
from dynserve.executors.trtllm.kv_events import KvStreams
from dynserve.executors.trtllm.pump import Pump
from dynserve.executors.trtllm.stats import Stats
from dynserve.executors.trtllm.watch import Watch
from dynserve.model_files import model_config
from dynserve.tasks import OwnedTasks, detached
from dynserve.wire.events import KvEvent

log = logging.getLogger(__name__)

START_TIMEOUT = 120.0  # seconds for the first token of an engine that was built
CAPACITY_TIMEOUT = 30.0  # seconds
SHUTDOWN_TIMEOUT = 30.0  # seconds; the engine's own waits have no bound
CANARY = [1, 2, 3]  # token ids that every vocabulary has
CANARY_SALT = "dynserve-canary"
MIN_GLOBAL_ID = 1 << 40  # smaller ids are the engine's own


class RankExecutor(Executor, Protocol):
    """The executor of one rank, as the engine sees it."""

    stats: Stats

    def kv_changed(self, events: list[KvEvent]) -> None: ...

    def engine_died(self) -> None: ...

    def close(self) -> None: ...


class TrtllmEngine:
    """The engine that the executors of all ranks share. Call `start` before the first request, `close` after the last."""

    def __init__(
        self, llm: Any, api: Api, config: WorkerConfig, instance_id: str, pairing: Mapping[str, str],
        capacity: Mapping[str, int], tasks: OwnedTasks,
    ) -> None:  # fmt: skip
        self.llm, self.api, self.pairing, self.tasks = llm, api, pairing, tasks
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.ids = global_ids(instance_id)
        args = llm.args
        transceiver = args.cache_transceiver_config
        self.disaggregates = transceiver is not None and transceiver.backend is not None
        self.block_size: int = capacity.get("tokensPerBlock") or args.kv_cache_config.tokens_per_block
        # 0 until a row of statistics contains it, on versions without `get_kv_cache_capacity`
        self.total_blocks: int = capacity.get("maxNumBlocks") or 0
        self.ranks: int = args.tensor_parallel_size if args.enable_attention_dp else 1
        self.has_kv_events: bool = config.kv_events and args.kv_cache_config.event_buffer_max_size > 0
        self._streams = KvStreams(self.block_size, self.ranks) if self.has_kv_events else None
        self._watch = Watch(llm, config.engine_stall_s, self.canary, self.die, tasks)
        self._pump = Pump(llm, self._streams, self._on_stats)
        self.note_sign_of_life, self.alive = self._watch.note_sign_of_life, self._watch.alive
        self._watching: list[asyncio.Task[None]] = []
        self.closing = False
        self._canaries = count(1)
        self.targets: Sequence[RankExecutor] = ()

    @property
    def guessed_blocks(self) -> int:
        """An estimate of the cache's size, for versions that report it in statistics only, when those are off."""
        args = self.llm.args
        tokens = args.kv_cache_config.max_tokens or args.max_num_tokens * args.max_batch_size
        return max(1, int(tokens) // self.block_size)

    async def start(self) -> None:
        """Generates a first token, which also enables the getters that the pump reads.

        Raises:
            InternalError: the engine does not answer.
        """
        try:
            async with asyncio.timeout(START_TIMEOUT):
                await self.canary()
                self._pump.start()
                while not self.total_blocks and self.llm.args.enable_iter_perf_stats:
                    await self.canary()
                    await asyncio.sleep(0.1)
        except TimeoutError:
            raise InternalError(f"the engine generated no token within {START_TIMEOUT:.0f} s of its start") from None
        except DynserveError:
            raise
        except Exception as error:
            raise InternalError(f"the engine's first token failed: {type(error).__name__}: {error}") from error
        self._watch.note_sign_of_life()
        self._watch.start()
        watching = (self._watch.beat(), self._watch.poll(), self._watch.poll_health())
        self._watching = [self.tasks.create_task(one) for one in watching]

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
            target.engine_died()

    async def canary(self) -> None:
        """Generates one token of a fixed prompt. The salt separates it from the padding requests of attention DP."""
        api = self.api
        params = api.sampling(max_tokens=1, temperature=0.0, end_id=-1, pad_id=0, detokenize=False)
        keywords: dict[str, Any] = {"streaming": True, "cache_salt": f"{CANARY_SALT}-{next(self._canaries)}"}
        if self.disaggregates:
            keywords["disaggregated_params"] = api.disaggregated(
                request_type=state.BOTH, disagg_request_id=next(self.ids)
            )
        result = self.llm.generate_async(CANARY, params, **keywords)
        try:
            async for _ in result:
                self._watch.note_sign_of_life()
        except api.request_error as error:  # an engine that refuses a request is alive
            log.warning("the canary was refused: %s", error)
        except asyncio.CancelledError:
            self.abort(result)
            raise

    def abort(self, result: Any) -> None:
        """Aborts a request, unless the engine is dead or shut down."""
        if self.closing or self.failed.done():
            return
        try:
            result.abort()
        except Exception as error:
            log.warning("an abort failed: %s: %s", type(error).__name__, error)

    def losses(self, rank: int) -> tuple[int, int]:
        """Returns the number of gaps in a rank's KV events, and of blocks stored without a known parent."""
        if self._streams is None:
            return 0, 0
        stream = self._streams.ranks[rank]
        return stream.gaps, stream.orphans

    def _on_stats(self, events: dict[int, list[KvEvent]], rows: list[Mapping[str, Any]]) -> None:
        self._watch.note_sign_of_life()
        for rank, found in events.items():
            self.targets[rank].kv_changed(found)
        now = asyncio.get_running_loop().time()
        for row in rows:
            rank = row.get("attentionDpRank") or 0
            if rank < len(self.targets):
                self.targets[rank].stats.update(row, now)
                self.total_blocks = self.targets[rank].stats.total_blocks


async def capacity_of(llm: Any) -> Mapping[str, int]:
    """Returns the KV cache's capacity; empty for versions that do not report it."""
    if not hasattr(llm, "get_kv_cache_capacity"):
        return {}
    try:
        async with asyncio.timeout(CAPACITY_TIMEOUT):
            found: Mapping[str, int] = await detached(llm.get_kv_cache_capacity)
            return found
    except Exception as error:
        log.warning("the engine does not report its cache's size (%s: %s)", type(error).__name__, error)
        return {}


def global_ids(instance_id: str) -> Iterator[int]:
    """Yields hand-off ids, unique over all workers at any time, in the range that TensorRT-LLM reserves for such ids."""
    owner = (MIN_GLOBAL_ID >> 32) + xxh3_64_intdigest(instance_id.encode()) % ((1 << 31) - 512)
    return count(owner << 32 | 1)


def pairing_of(api: Api, llm: Any, model_path: str, backend: str) -> dict[str, str]:
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
        "tokens_per_block": str(args.kv_cache_config.tokens_per_block),
        "KV cache dtype": kv_dtype if kv_dtype != "auto" else dtype,
    }
