"""Two TensorRT-LLM engines in one process, as a prefill and a decode worker open them, and requests to them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer

from dynserve.config import DisaggregationMode, WorkerConfig
from dynserve.doctor.finding import DoctorConfig
from dynserve.errors import DynserveError, InternalError
from dynserve.executors.base import Output
from dynserve.executors.trtllm.executor import TrtllmExecutor
from dynserve.executors.trtllm.lora import ADAPTER_FILE
from dynserve.model_files import model_config
from dynserve.wire.requests import (
    GenerateRequest,
    PriorOutput,
    RenderOptions,
    SamplingParams,
    StopConditions,
    TokenLogprob,
    pack_tokens,
)

CONTEXT = 1024  # tokens
TRANSFER_MS = 5000  # that the engine keeps blocks which nobody fetches
STALL_S = 5.0
REQUEST_TIMEOUT = 60.0  # seconds
ADAPTER, RANK = "selftest", 8
# two engines share a GPU, and the second measures what the first has left
OPTIONS: Mapping[str, Any] = {
    "max_seq_len": CONTEXT, "max_num_tokens": 2 * CONTEXT, "max_batch_size": 8, "enable_iter_perf_stats": True,
    "kv_cache_config": {"free_gpu_memory_fraction": 0.3},
    "cache_transceiver_config": {"backend": "DEFAULT", "kv_transfer_timeout_ms": TRANSFER_MS},
}  # fmt: skip
GREEDY = SamplingParams(temperature=0.0)
EIGHT = StopConditions(max_tokens=8, ignore_eos=True)


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


class Engines:
    """The two executors. `adapter` is the name of the decode engine's adapter; empty if it has none."""

    def __init__(self, prefill: TrtllmExecutor, decode: TrtllmExecutor, model: Path, adapter: str) -> None:
        self.prefill, self.decode, self.adapter = prefill, decode, adapter
        self.model = model
        self.processes: set[int] = set()  # of the decode engine, by pid
        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self._numbers = count(1)

    def text(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False))

    def request(self, prompt: list[int] | None = None, **changes: Any) -> GenerateRequest:
        number = next(self._numbers)
        fields: dict[str, Any] = {
            "id": f"selftest-{number}", "stream": number, "reply_to": "selftest", "model": self.model.name,
            "phase": "aggregated", "timeout_s": REQUEST_TIMEOUT, "sampling": GREEDY, "stop": EIGHT,
            "render": RenderOptions(kind="completion", response_id="", model="", created=0),
        }  # fmt: skip
        return GenerateRequest(prompt=pack_tokens(prompt or self.prompt()), **(fields | changes))

    def prompt(self, first: int = 100, length: int = 70) -> list[int]:
        """Returns token ids that every vocabulary has. Prompts with different `first` share no block."""
        return [100 + (first + 7 * at) % 400 for at in range(length)]

    async def ask(self, prompt: list[int] | None = None, **changes: Any) -> Answer:
        """Returns the answer of one engine. Raises the error of a request that fails."""
        answer, _ = await self.run(self.decode, self.request(prompt, **changes))
        return answer

    async def run(self, executor: TrtllmExecutor, request: GenerateRequest) -> tuple[Answer, int]:
        answer = Answer()
        ticket = executor.submit(request, answer)
        async with asyncio.timeout(REQUEST_TIMEOUT):
            await answer.ended.wait()
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
        rest, _ = await self.run(self.decode, decoding)
        self.prefill.handoff_done(ticket)
        return first.tokens + rest.tokens, first.logprobs + rest.logprobs

    def raw(
        self, executor: TrtllmExecutor, prompt: list[int], *, streaming: bool = True, disagg: Any = None, **params: Any
    ) -> Any:
        """Calls `generate_async` itself."""
        engine = executor.engine
        fixed = {"temperature": 0.0, "end_id": -1, "pad_id": 0, "detokenize": False}
        keywords = {} if disagg is None else {"disaggregated_params": disagg}
        return engine.llm.generate_async(
            prompt, engine.api.sampling(**fixed, **params), streaming=streaming, **keywords
        )


def config_of(config: DoctorConfig, role: DisaggregationMode, adapter: str) -> WorkerConfig:
    """Returns the options of one engine: the user's, with a small context and cache."""
    override = json.loads(config.override_engine_args) if config.override_engine_args else {}
    return WorkerConfig(
        executor="trtllm",
        model_path=config.model_path,
        disaggregation_mode=role,
        extra_engine_args=config.extra_engine_args,
        override_engine_args=json.dumps(merged(override, OPTIONS)),
        lora_adapters=adapter,
        engine_stall_s=STALL_S,
    )


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(below)
    for name, value in above.items():
        old = found.get(name)
        found[name] = merged(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return found


def make_adapter(model: Path, folder: Path) -> str:
    """Writes a LoRA adapter with random weights for the attention of this model. Returns its `name=folder`."""
    import torch  # both come with TensorRT-LLM
    from safetensors.torch import save_file

    config = model_config(model)
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    size = int(config.get("head_dim") or hidden // heads)
    sizes = {"q_proj": heads * size}
    sizes |= dict.fromkeys(("k_proj", "v_proj"), int(config.get("num_key_value_heads") or heads) * size)
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for layer in range(int(config["num_hidden_layers"])):
        for module, width in sizes.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            weights[f"{name}.lora_A.weight"] = torch.randn(RANK, hidden, generator=generator) * 0.1
            weights[f"{name}.lora_B.weight"] = torch.randn(width, RANK, generator=generator) * 0.1
    save_file(weights, str(folder / "adapter_model.safetensors"))
    described = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": list(sizes)}
    (folder / ADAPTER_FILE).write_text(json.dumps(described))
    return f"{ADAPTER}={folder}"


def why(error: BaseException) -> str:
    """Returns an error in one line."""
    kind = "" if isinstance(error, DynserveError) else f"{type(error).__name__}: "
    return " ".join(f"{kind}{error}".split())[:300]
