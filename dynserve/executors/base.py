"""The executor interface: the operations that a worker needs of TensorRT-LLM, the PyTorch engine and the simulated one."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import msgspec

from dynserve.config import WorkerConfig
from dynserve.errors import BadRequest, ConfigError, ContextTooLong, DynserveError
from dynserve.streams import Channel
from dynserve.wire.events import KvEvent, Load
from dynserve.wire.requests import GenerateRequest, Handoff, TokenLogprob

if TYPE_CHECKING:
    from dynserve.executors.transceiver import Transceivers


class Output(msgspec.Struct, gc=False):
    """The output of one engine step for one request. An output with a `reason` or an `error` is the last. Cached tokens
    and times are set in the first and in the last.

    `reason` is `stop` (end of turn or a stop token), `length`, or `handoff` (prefill done; `handoff` describes it).
    A stop token is not in `token_ids`: it is consumed, and named in `stop_token`. With `prompt_logprobs` requested, the
    first output's `logprobs` begin with one entry per prompt token (the first token's entry has no meaning).
    """

    token_ids: list[int]
    reason: str | None = None
    logprobs: list[TokenLogprob] | None = None
    stop_token: int | None = None
    cached_tokens: int = 0
    queue_s: float = 0.0
    transfer_s: float = 0.0
    prefill_s: float = 0.0  # from admission to the first token
    handoff: Handoff | None = None
    error: DynserveError | None = None
    # in the first output of a decode request: TensorRT-LLM computes the prompt itself, and the hand-off must be cancelled
    handoff_declined: bool = False
    embedding: bytes = b""  # float32, little-endian, of unit norm: the answer to a request with `pooling`


OutputSink = Callable[[Output], None]
KvListener = Callable[[list[KvEvent]], None]


class ExecutorLimits(NamedTuple):
    """The limits and features of an open executor, which the worker's card contains."""

    block_size: int  # tokens per KV block
    num_blocks: int
    max_seq_len: int  # prompt + answer, tokens
    max_batch_size: int
    vocab_size: int
    grammars: bool = False  # answers can follow a grammar
    embedding_size: int = 0  # 0: no embeddings
    kv_events: bool = True  # `listen_kv` reports changes of the prefix cache
    adapters: tuple[str, ...] = ()  # LoRA adapters by name
    pairing: Mapping[str, str] = {}  # properties that the other side of a hand-off must share
    single_use_handoffs: bool = False  # once a worker may have begun to fetch a hand-off, no second worker can use it
    draws_by_position: bool = False  # sampled tokens depend on seed and position only
    max_num_tokens: int = 0  # tokens of one step; 0: not known
    no_grammars: str = ""  # why answers cannot follow a grammar, where an option can change that


def check_request(request: GenerateRequest, limits: ExecutorLimits, max_num_tokens: int | None) -> None:
    """Raises CallerError for a request that can never run on an executor with these limits. `max_num_tokens` is the
    bound of one step where prompts are not computed in chunks, else None."""
    prior = request.prior_tokens
    length = request.num_tokens + len(prior)
    if length == 0:
        raise ContextTooLong("the prompt is empty")
    if length >= limits.max_seq_len:
        raise ContextTooLong(f"{length} tokens leave no room for an answer in a context of {limits.max_seq_len}")
    if max_num_tokens is not None and length > max_num_tokens:
        raise ContextTooLong(
            f"{length} tokens are over max_num_tokens={max_num_tokens}; "
            "set enable_chunked_prefill to accept longer prompts"
        )
    if _any_beyond(request.prompt, limits.vocab_size) or max(prior, default=0) >= limits.vocab_size:
        highest = max([*array("I", request.prompt), *prior])
        raise BadRequest(
            f"token id {highest} is not one of this model's 0 to {limits.vocab_size - 1}; its tokenizer has more tokens "
            "than the model"
        )
    if request.grammar is not None and not limits.grammars:
        because = f": {limits.no_grammars}" if limits.no_grammars else ""
        raise BadRequest(f"this model's workers do not support grammars{because}", param="response_format")
    if request.pooling is not None and not limits.embedding_size:
        raise BadRequest("this model's workers make no embeddings", param="model")


def _any_beyond(prompt: bytes, vocab_size: int) -> bool:
    """Whether one of the token ids (u32 little-endian) is `vocab_size` or more. It runs for every request, so all ids are
    checked together, as one large number: adding 2**31 - vocab_size sets the highest bit of those ids only."""
    count = len(prompt) // 4
    ids = int.from_bytes(prompt, "little")
    missing = int.from_bytes(((1 << 31) - vocab_size).to_bytes(4, "little") * count, "little")
    return (ids | ids + missing) & int.from_bytes(_HIGHEST_BIT * count, "little") != 0


_HIGHEST_BIT = (1 << 31).to_bytes(4, "little")


class Executor(Protocol):
    """Runs requests. All calls and callbacks happen on the event loop; none of them blocks.

    Results are pushed, not pulled: an engine step ends with one call into the loop, in which each request's sink is
    called once, so that a step of 128 sequences wakes no task. `abort` is the only cancellation: the sink is not called
    again, blocks are freed as soon as the engine releases them, and an open hand-off of the request is cancelled.
    """

    @property
    def limits(self) -> ExecutorLimits: ...

    @property
    def failed(self) -> asyncio.Future[None]:
        """Pending while the engine works; then holds the exception that ended it."""
        ...

    def submit(self, request: GenerateRequest, sink: OutputSink) -> int:
        """Starts a request and returns a ticket for `abort`. Raises CallerError for a request that can never run here."""
        ...

    def abort(self, ticket: int) -> None:
        """Cancels a request. Unknown and finished tickets are ignored."""
        ...

    def handoff_done(self, ticket: int) -> None:
        """Ends the hand-off of this prefill: the decode worker has answered."""
        ...

    @property
    def targets(self) -> Sequence[Executor]:
        """The executors that routers choose among: this one, or one per KV cache of an engine that has several."""
        ...

    def load(self) -> Load: ...

    def counters(self) -> Mapping[str, float]:
        """Returns values for `/metrics`: counters by names that end in `_total`, gauges by other names."""
        ...

    def describe(self) -> Mapping[str, str]:
        """Returns the executor's description for `/health`."""
        ...

    def listen_kv(self, listener: KvListener) -> None:
        """Passes every later change of the prefix cache to `listener`, in order."""
        ...


async def generate(executor: Executor, request: GenerateRequest) -> AsyncIterator[Output]:
    """A request's outputs as an iterator, for scripts and tests; leaving it early aborts the request."""
    outputs: Channel[Output] = Channel(bound=1 << 20)
    done = False

    def sink(output: Output) -> None:
        nonlocal done
        outputs.put(output)
        if output.reason is not None or output.error is not None:
            done = True  # an open hand-off now belongs to its decode worker
            outputs.close()

    ticket = executor.submit(request, sink)
    try:
        while batch := await outputs.receive():
            for output in batch:
                if output.error is not None:
                    raise output.error
                yield output
    finally:
        if not done:
            executor.abort(ticket)


def check_engine_options(config: WorkerConfig) -> None:
    """Checks what needs neither the executor's packages nor the model: files and flags with engine options.

    Raises:
        ConfigError: one of them is not readable or not usable.
    """
    if config.executor == "trtllm":
        from dynserve.executors.trtllm.options import read_options

        read_options(config)
    else:
        from dynserve.executors.engine_args import engine_args

        engine_args(config)


_HOMES = {
    "torch": "dynserve.executors.torch.executor",
    "simulated": "dynserve.executors.simulated",
    "trtllm": "dynserve.executors.trtllm.start",
}


def open_executor(
    config: WorkerConfig, instance_id: str = "local", transceivers: Transceivers | None = None, prepared: Any = None
) -> AbstractAsyncContextManager[Executor]:
    """Opens the executor that `config.executor` names. `transceivers` other than TCP are for clusters in one process;
    `prepared` is what `prepare_executor` has returned, if it was called.

    Raises:
        ConfigError: it is not installed, or not usable as it is configured.
    """
    opened: AbstractAsyncContextManager[Executor] = executor_module(config.executor).open_executor(
        config, instance_id, transceivers, prepared
    )
    return opened


def prepare_executor(config: WorkerConfig) -> Any:
    """Imports an executor's packages, which takes seconds, and checks what can be known before weights are loaded. The
    result is for `open_executor`.

    Raises:
        ConfigError: a package is missing, or an engine option, the device or the model cannot be used.
    """
    return executor_module(config.executor).prepare(config)


def executor_module(name: str) -> Any:
    """Imports an executor's module, and with it the packages that it needs. Raises ConfigError if one is missing."""
    try:
        return import_module(_HOMES[name])
    except ImportError as error:
        raise ConfigError(f"--executor {name} needs a package that is not installed: {error}") from error
