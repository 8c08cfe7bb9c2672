"""The engines under test, opened as workers open them, and requests to them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer

from dynserve.config import DisaggregationMode, WorkerConfig
from dynserve.doctor.finding import DoctorConfig
from dynserve.errors import DynserveError, InternalError, TimedOut
from dynserve.executors.base import Output
from dynserve.executors.trtllm.executor import TrtllmExecutor
from dynserve.executors.trtllm.options import merged, read_options
from dynserve.wire.requests import (
    GenerateRequest,
    PriorOutput,
    RenderOptions,
    SamplingParams,
    StopConditions,
    TokenLogprob,
    pack_tokens,
)

TRANSFER_MS = 5000  # that the engine keeps blocks which nobody fetches
REQUEST_TIMEOUT = 60.0  # seconds
STALL_S = 60.0
TIE = 0.2  # between the log-probabilities of tokens that count as equally likely
# two engines share a GPU, and the second measures what the first has left
PAIR_OPTIONS: Mapping[str, Any] = {
    "max_seq_len": 1024, "max_num_tokens": 2048, "max_batch_size": 8, "enable_iter_perf_stats": True,
    "kv_cache_config": {"free_gpu_memory_fraction": 0.3},
    "cache_transceiver_config": {"backend": "DEFAULT", "kv_transfer_timeout_ms": TRANSFER_MS},
}  # fmt: skip
GREEDY = SamplingParams(temperature=0.0, logprobs=2)
EIGHT_TOKENS = StopConditions(max_tokens=8, ignore_eos=True)
TEXT = (
    "The river rises in the hills behind the town and runs for forty miles to the sea. In spring it carries the snow of "
    "the mountains, in summer children swim in it, and in autumn the mills along its banks begin to turn. "
)


class Answer:
    """All outputs of one request."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.last = Output([])
        self.ended = asyncio.Event()

    def __call__(self, output: Output) -> None:
        self.tokens += output.token_ids
        self.logprobs += output.logprobs or []
        self.last = output
        if output.reason is not None or output.error is not None:
            self.ended.set()

    @property
    def reason(self) -> str:
        return self.last.reason or str(self.last.error)

    def agrees(self, tokens: Sequence[int]) -> bool:
        """Whether other tokens are the same, or differ first where two were about equally likely."""
        for at, (mine, other) in enumerate(zip(self.tokens, tokens, strict=False)):
            if mine != other:
                likely = dict(self.logprobs[at].top) if at < len(self.logprobs) else {}
                return other in likely and abs(likely[other] - self.logprobs[at].logprob) < TIE
        return len(self.tokens) == len(tokens)


class Engines:
    """`main` is the engine that requests go to: an aggregated one, or the decode engine beside `prefill`. `adapter` is the
    name of its adapter, or else `no_adapter` says why it has none. `processes` are its own, by pid."""

    def __init__(
        self, model: Path, main: TrtllmExecutor, prefill: TrtllmExecutor | None = None, adapter: str = "",
        no_adapter: str = "", processes: frozenset[int] = frozenset(),
    ) -> None:  # fmt: skip
        self.model, self.main, self._prefill = model, main, prefill
        self.adapter, self.no_adapter, self.processes = adapter, no_adapter, processes
        self.tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self._text = self.tokenizer.encode(TEXT, add_special_tokens=False).ids
        self._numbers = count(1)

    @property
    def prefill(self) -> TrtllmExecutor:
        if self._prefill is None:
            raise InternalError("this part of the self-test has no prefill engine")
        return self._prefill

    @property
    def died(self) -> str:
        """The reason of the death of one of the engines; empty while both live."""
        for executor in (self.main, self._prefill):
            if executor is not None and executor.failed.done():
                return str(executor.failed.exception())
        return ""

    def text(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=False))

    def prompt(self, number: int = 0, length: int = 70) -> list[int]:
        """Returns the tokens of a text. Prompts with different numbers share no block."""
        numbered = self.tokenizer.encode(f"Chapter {number}. ", add_special_tokens=False).ids
        return (numbered + self._text * (length // len(self._text) + 1))[:length]

    @property
    def blocks(self) -> int:
        """The length of a prompt of several blocks, in tokens."""
        return 3 * self.main.limits.block_size + 5

    def request(self, prompt: list[int] | None = None, **changes: Any) -> GenerateRequest:
        number = next(self._numbers)
        fields: dict[str, Any] = {
            "id": f"selftest-{number}", "stream": number, "reply_to": "selftest", "model": self.model.name,
            "phase": "aggregated", "timeout_s": REQUEST_TIMEOUT, "sampling": GREEDY, "stop": EIGHT_TOKENS,
            "render": RenderOptions(kind="completion", response_id="", model="", created=0),
        }  # fmt: skip
        return GenerateRequest(prompt=pack_tokens(prompt or self.prompt()), **(fields | changes))

    async def ask(self, prompt: list[int] | None = None, **changes: Any) -> Answer:
        """Returns the answer of the main engine. Raises the error of a request that fails."""
        return (await self.run(self.main, self.request(prompt, **changes)))[0]

    async def run(self, executor: TrtllmExecutor, request: GenerateRequest) -> tuple[Answer, int]:
        """Runs a request to its end. Returns its answer and its ticket."""
        answer = Answer()
        ticket = executor.submit(request, answer)
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT):
                await answer.ended.wait()
        except TimeoutError:
            executor.abort(ticket)
            raise TimedOut(f"no answer within {REQUEST_TIMEOUT:.0f} s") from None
        if answer.last.error is not None:
            raise answer.last.error
        return answer, ticket

    async def hand_over(self, request: GenerateRequest) -> tuple[list[int], list[TokenLogprob]]:
        """Prefills a request in one engine and decodes it in the other. Returns its tokens and log-probabilities."""
        first, ticket = await self.run(self.prefill, msgspec.structs.replace(request, phase="prefill"))
        handoff = first.last.handoff
        if handoff is None:
            raise InternalError(f"the prefill ended with {first.reason}, without a hand-off")
        prior = PriorOutput(first.tokens, first.logprobs)
        decoding = msgspec.structs.replace(request, phase="decode", prior=prior, handoff=handoff)
        rest, _ = await self.run(self.main, decoding)
        self.prefill.handoff_done(ticket)
        return first.tokens + rest.tokens, first.logprobs + rest.logprobs

    def raw(
        self, executor: TrtllmExecutor, prompt: list[int], *, streaming: bool = True, keywords: Mapping[str, Any] = {},
        **params: Any,
    ) -> Any:  # fmt: skip
        """Calls `generate_async` itself: greedily, without an end of turn, with these keywords and sampling parameters."""
        engine = executor.engine
        fixed = {"temperature": 0.0, "end_id": -1, "pad_id": 0, "detokenize": False}
        sampling = engine.api.sampling(**(fixed | params))
        return engine.llm.generate_async(prompt, sampling, streaming=streaming, **keywords)


def config_of(
    config: DoctorConfig, role: DisaggregationMode, defaults: Mapping[str, Any], adapter: str = ""
) -> WorkerConfig:
    """Returns the options of one engine. The user's win over these defaults."""
    made = WorkerConfig(
        executor="trtllm", model_path=config.model_path, disaggregation_mode="prefill_and_decode",
        extra_engine_args=config.extra_engine_args, override_engine_args=config.override_engine_args,
        lora_adapters=adapter, engine_stall_s=STALL_S,
    )  # fmt: skip
    options = merged(dict(defaults), read_options(made).values)
    return replace(made, disaggregation_mode=role, override_engine_args=json.dumps(options, default=str))


def why(error: BaseException) -> str:
    """Returns an error in one line."""
    if isinstance(error, TimeoutError) and not isinstance(error, DynserveError):
        return "it took too long"
    kind = "" if isinstance(error, DynserveError) else f"{type(error).__name__}: "
    return " ".join(f"{kind}{error}".split())[:300]


async def read(result: Any) -> Any:
    """Reads a raw result to its end, and returns it."""
    async with asyncio.timeout(REQUEST_TIMEOUT):
        async for _ in result:
            pass
    return result
