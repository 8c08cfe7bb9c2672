"""`LLM`: its constructor, `generate_async`, and what can be asked of a running engine."""

from __future__ import annotations

import asyncio
import atexit
import inspect
import json
import os
import signal
import time
from itertools import count
from pathlib import Path
from typing import Any

from dynserve.model_files import model_limits
from dynserve.wire.requests import (
    GenerateRequest,
    Grammar,
    Handoff,
    PriorOutput,
    RenderOptions,
    StopConditions,
    TokenLogprob,
    pack_tokens,
)  # fmt: skip
from dynserve.wire.requests import (
    SamplingParams as OurSampling,
)

from .. import _messages as m
from .._contract import CONTRACT, OLD, here
from .._proxy import Proxy
from ..executor.result import IterationResult, RequestOutput
from ..executor.utils import RequestError
from ..sampling_params import SamplingParams
from .disagg_utils import MIN_GLOBAL_ID
from .llm_args import TorchLlmArgs

BLOCKS = 2000
MADE: list[LLM] = []  # for tests that end within the process


class LLM:
    def __init__(
        self, model: str | Path, tokenizer: Any = None, tokenizer_mode: str = "auto", skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False, tensor_parallel_size: int = 1, dtype: str = "auto", revision: str | None = None,
        tokenizer_revision: str | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        given = {
            "model": str(model), "tokenizer": tokenizer, "tokenizer_mode": tokenizer_mode,
            "skip_tokenizer_init": skip_tokenizer_init, "trust_remote_code": trust_remote_code,
            "tensor_parallel_size": tensor_parallel_size, "dtype": dtype, "revision": revision,
            "tokenizer_revision": tokenizer_revision,
        }  # fmt: skip
        for name in kwargs:
            if name not in TorchLlmArgs.model_fields:
                raise ValueError(f"TorchLlmArgs got invalid argument: {name}")
        self.args = args = TorchLlmArgs(**given, **kwargs)
        gpus = int(os.environ.get("TRTLLM_DOUBLE_GPUS", "8"))
        if args.tensor_parallel_size * args.pipeline_parallel_size > gpus:
            raise RuntimeError(f"world size of {args.tensor_parallel_size} is more than the {gpus} GPUs of this node")
        if not Path(args.model).joinpath("config.json").is_file():
            raise RuntimeError(f"{args.model} is not a model folder")  # the real one would try to download it
        self._load_nixl()
        self._check_worker()
        self.tokenizer = None if args.skip_tokenizer_init else object()
        self.llm_id = f"double-{os.getpid()}-{int(time.time() * 1000)}"
        self._ids = count(1)
        self._armed = self._closed = False
        setup = self._setup()
        cache = args.kv_cache_config
        pushed = getattr(cache, "kv_events_config", None)
        pushes = pushed is not None and pushed.enable_kv_cache_events and pushed.publisher != "null"
        events = 0 if pushes else cache.event_buffer_max_size
        self._executor = Proxy(setup, events, max(1, args.max_stats_len))
        if not OLD:
            self.disaggregated_params: dict[str, Any] = {}
            self.startup_metrics: dict[str, float] = {}
        atexit.register(self.shutdown)
        MADE.append(self)

    def generate_async(self, inputs: Any, sampling_params: Any = None, **keywords: Any) -> RequestOutput:
        known = here("generate_async", CONTRACT["generate_async"])
        for name in keywords:
            if name not in known:
                raise TypeError(f"generate_async() got an unexpected keyword argument {name!r}")
        if self._closed:
            raise RuntimeError("LLM is shutting down")
        if self._executor.dead:
            from ..executor.utils import EngineDeadError

            raise EngineDeadError(self._executor._fatal_error)
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            raise AssertionError("asyncio event loop was not present during initialization") from None
        return self._start(_Call(inputs, sampling_params or SamplingParams(), **keywords))

    # callers ask the signature what this version can do
    generate_async.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD),
            *(
                inspect.Parameter(
                    name,
                    inspect.Parameter.POSITIONAL_OR_KEYWORD,
                    default=inspect.Parameter.empty if default == "..." else default,
                )
                for name, default in here("generate_async", CONTRACT["generate_async"]).items()
            ),
        ]
    )

    def get_stats_async(self, timeout: float | None = 2) -> IterationResult:
        armed = self._armed or not OLD
        return IterationResult(self._executor.stats if armed else type(self._executor.stats)(), timeout)

    def get_kv_cache_events_async(self, timeout: float | None = 2) -> IterationResult:
        assert self._armed or not OLD, "KV Event IterationResult is not properly instantiated"
        return IterationResult(self._executor.events, timeout)

    if not OLD:

        def get_kv_cache_capacity(self) -> dict[str, int]:
            ready = self._executor.ready
            return {
                "maxNumBlocks": ready.num_blocks,
                "tokensPerBlock": ready.block_size,
                "maxNumTokens": ready.num_blocks * ready.block_size,
            }

    def _check_health(self) -> bool:
        return not self._executor.dead

    def shutdown(self) -> None:
        if self._executor.dead:
            print("TRT-LLM: shutdown of a dead engine", flush=True)
            time.sleep(5)
            return
        self._closed = True
        self._executor.shutdown()

    def _start(self, call: _Call) -> RequestOutput:
        args, params, disagg = self.args, call.params, call.disagg
        kind = disagg.request_type if disagg is not None else None
        if args.lora_config is None:
            call.lora = None  # as the real one: without a word
        if args.skip_tokenizer_init:
            if params.end_id is None:
                raise ValueError("end_id is required when there is no tokenizer")
            if params.stop or params.bad:
                raise ValueError("stop and bad need a tokenizer")
            if params.detokenize:
                raise ValueError("detokenize needs a tokenizer")
        if params.guided_decoding is not None:
            if args.guided_decoding_backend is None:
                raise ValueError("guided decoding needs guided_decoding_backend")
            if params.guided_decoding.structural_tag is not None and args.guided_decoding_backend != "xgrammar":
                raise ValueError("structural tags need xgrammar")
        if kind in ("context_only", "generation_only"):
            self._check_disaggregated(call, kind)
        left = max(1, self._executor.ready.max_seq_len - len(call.prompt))  # the engine refuses what does not fit
        if kind != "generation_only" and not args.enable_chunked_prefill and len(call.prompt) > args.max_num_tokens:
            raise RequestError(f"The sum of prompt length ({len(call.prompt)}) should not exceed {args.max_num_tokens}")
        if kind == "context_only":
            params.max_tokens = 1  # into the caller's own object, as the real one
        number = next(self._ids)
        result = RequestOutput(self._executor, number, call.prompt, disagg, call.streaming)
        result.postprocessed = args.num_postprocess_workers > 0
        message = call.message(number, args, left)
        self._armed = True
        self._executor.submit(result, message)
        return result

    def _check_worker(self) -> None:
        """What the real one finds out in its worker process, after minutes."""
        args, refusal = self.args, ""
        backend, tokenizer = args.guided_decoding_backend, Path(args.model, "tokenizer.json")
        if backend and args.skip_tokenizer_init and (OLD or not tokenizer.is_file()):
            refusal = "AssertionError: a tokenizer is needed for guided decoding"
        mode = (args.speculative_config or {}).get("decoding_type")
        if backend and mode == "SaveState":
            refusal = f"Guided decoding is not supported for speculative decoding mode: {mode}"
        transceiver = args.cache_transceiver_config
        python = transceiver is not None and getattr(transceiver, "transceiver_runtime", None) == "PYTHON"
        if python and transceiver.kv_transfer_timeout_ms is None:
            refusal = "KvCacheTransceiverV2 requires a finite kv_transfer_timeout_ms"
        if (lora := args.lora_config) is not None:
            if len(lora.lora_dir) > 1:
                refusal = "AssertionError: Expecting only a single lora dir"
            elif OLD and not lora.lora_dir and not lora.lora_target_modules:
                refusal = "AssertionError: Expecting at least one lora target module"
        if refusal:
            raise RuntimeError(f"Executor worker returned error: {refusal}")

    @property
    def _tokens_per_block(self) -> int:
        """What the engine makes of the option."""
        args = self.args
        if args.attn_backend == "VANILLA":
            return int(args.max_num_tokens)
        return int(args.kv_cache_config.tokens_per_block)

    def _check_disaggregated(self, call: _Call, kind: str) -> None:
        transceiver, disagg = self.args.cache_transceiver_config, call.disagg
        if transceiver is None or transceiver.backend is None:
            raise AssertionError(
                "kv_cache_transceiver is disabled, please set 'cache_transceiver_config: backend:<...>'"
            )
        if kind == "context_only" and call.streaming:
            raise ValueError("a context-only request is not streamed")
        for name in ("disagg_request_id", *(("ctx_request_id",) if kind == "generation_only" else ())):
            value = getattr(disagg, name)
            if value is None or value < MIN_GLOBAL_ID or value >= (1 << 63) - 1:
                raise ValueError(f"{name} is not a global id: {value}")
        if kind == "generation_only" and not disagg.first_gen_tokens:
            raise ValueError("a generation-only request without first_gen_tokens")

    def _setup(self) -> m.Setup:
        args = self.args
        cache, transceiver = args.kv_cache_config, args.cache_transceiver_config
        timeout = transceiver.kv_transfer_timeout_ms if transceiver is not None else None
        tokens = cache.max_tokens or BLOCKS * self._tokens_per_block
        options: dict[str, Any] = {
            "max_batch_size": args.max_batch_size,
            "max_num_tokens": args.max_num_tokens,
            "enable_chunked_prefill": True,
            "kv_cache_config": {
                "tokens_per_block": self._tokens_per_block,
                "enable_block_reuse": cache.enable_block_reuse and args.attn_backend != "FLASHINFER",
                "max_tokens": tokens,
            },
            # no time limit: blocks that nobody takes are lost until the end
            "cache_transceiver_config": {"kv_transfer_timeout_ms": timeout or 1 << 30},
        }
        # clipped to what the pool holds
        options["max_seq_len"] = min(args.max_seq_len or model_limits(Path(args.model))[1], tokens)
        dummy = args.load_format.upper() == "DUMMY"
        if dummy:
            step = float(os.environ.get("TRTLLM_DOUBLE_STEP_MS", "0"))
            options |= {"speed": 1, "step_ms": step} if step else {"speed": 0}
            options |= {"prefill_us_per_token": 0, "decode_us_per_sequence": 0, "decode_us_per_ktoken": 0}
        limit = args.max_seq_len or 1 << 20
        windows = sorted(set(cache.max_attention_window or [limit]))
        return m.Setup(
            model=args.model,
            executor="simulated" if dummy else "torch",
            options=options,
            ranks=args.tensor_parallel_size if args.enable_attention_dp else 1,
            windows=windows,
            attention_dp=args.enable_attention_dp,
            stats=args.enable_iter_perf_stats,
            partial=cache.enable_block_reuse and cache.enable_partial_reuse and not dummy,
            v2=getattr(cache, "use_kv_cache_manager_v2", None) is True and not OLD,
            stream_interval=args.stream_interval,
            token_hashes=not OLD,
            appends_eos=OLD,
        )

    def _load_nixl(self) -> None:
        """The real library dies of a missing plugin folder; so does this one."""
        transceiver = self.args.cache_transceiver_config
        if transceiver is None or transceiver.backend not in ("NIXL", "DEFAULT"):
            return
        if OLD and transceiver.backend == "DEFAULT":
            return
        packaged = Path(__file__).parent.parent / "libs" / "nixl" / "plugins"
        folder = Path(os.environ.get("NIXL_PLUGINS_DIR") or packaged)
        if not list(folder.glob("libplugin_*.so")):
            os.kill(os.getpid(), signal.SIGSEGV)


class _Call:
    """The arguments of one `generate_async`."""

    def __init__(
        self, inputs: Any, params: Any, *, lora_request: Any = None, prompt_adapter_request: Any = None,
        streaming: bool = False, kv_cache_retention_config: Any = None, disaggregated_params: Any = None,
        trace_headers: Any = None, _postproc_params: Any = None, scheduling_params: Any = None,
        conversation_params: Any = None, cache_salt: str | None = None, priority: float = 0.5,
    ) -> None:  # fmt: skip
        if isinstance(inputs, dict):
            inputs = inputs["prompt_token_ids"]
        if not (isinstance(inputs, list) and inputs and all(type(token) is int for token in inputs)):
            raise TypeError("without a tokenizer, inputs are a list of token ids")
        if not isinstance(params, SamplingParams):
            raise TypeError("sampling_params must be SamplingParams")
        if not 0 <= priority <= 1:
            raise ValueError(f"priority must be between 0 and 1, got {priority}")
        if cache_salt is not None and not cache_salt:
            raise ValueError("cache_salt cannot be empty")
        if trace_headers is not None and not all(isinstance(value, str) for value in trace_headers.values()):
            raise TypeError("trace_headers must be a mapping of strings")
        if conversation_params is not None and not isinstance(conversation_params.conversation_id, str):
            raise TypeError("conversation_params must be ConversationParams")
        self.prompt, self.params, self.streaming = inputs, params, streaming
        self.lora, self.disagg, self.scheduling = lora_request, disaggregated_params, scheduling_params
        self.salt = cache_salt or ""

    def message(self, number: int, args: Any, left: int) -> m.Submit:
        params, disagg = self.params, self.disagg
        kind = disagg.request_type if disagg is not None else None
        phase = {"context_only": "prefill", "generation_only": "decode"}.get(kind, "aggregated")
        handoff, prior = None, None
        if phase == "decode":
            handoff = _handoff(disagg, self.prompt)
            entries = [
                _token_logprob(t, e)
                for t, e in zip(
                    disagg.first_gen_tokens, getattr(disagg, "first_gen_log_probs", None) or [], strict=False
                )
            ]
            prior = PriorOutput(list(disagg.first_gen_tokens), entries)
        lora = self.lora.lora_name if self.lora is not None else ""
        salt = json.dumps([lora, self.salt]) if lora else self.salt
        name = str(disagg.disagg_request_id) if phase != "aggregated" else f"local-{number}"
        # of a context request the engine would stop at one token; it hands over instead, as the real one does
        most = params.max_tokens if params.max_tokens is not None else left
        most = min(most, left) if phase != "prefill" else left
        end = -1 if params.ignore_eos or params.end_id is None else params.end_id
        stops = () if params.ignore_eos else tuple(params.stop_token_ids or ())
        rank = (self.scheduling.attention_dp_rank or 0) if self.scheduling is not None else 0
        request = GenerateRequest(
            id=name, stream=number, reply_to="", model="", phase=phase, prompt=pack_tokens(self.prompt),
            sampling=self._sampling(lora), timeout_s=1e9, cache_salt=salt, prior=prior, handoff=handoff,
            stop=StopConditions(
                max_tokens=most, min_tokens=params.min_tokens or 0, ignore_eos=True,
                token_ids=(*stops, *((end,) if end >= 0 else ())),
            ),
            render=RenderOptions(kind="completion", response_id="", model="", created=0), grammar=self._grammar(),
        )  # fmt: skip
        return m.Submit(number, request, rank, self.salt, lora, self.streaming, end, params.return_perf_metrics,
            _adapter_error(self.lora, args.lora_config) if self.lora is not None else "")  # fmt: skip

    def _sampling(self, lora: str) -> OurSampling:
        params = self.params
        bias = params.embedding_bias
        biases = {} if bias is None else {int(at): float(bias[at]) for at in bias.nonzero()[:, 0]}
        if self.lora is not None:
            biases |= _adapter(self.lora).get("bias", {})
        prompt = bool(params.prompt_logprobs)  # 0 gives none
        logprobs = params.logprobs or None if OLD else params.logprobs
        return OurSampling(
            temperature=0.0 if params._greedy else 1.0 if params.temperature is None else params.temperature,
            top_p=1.0 if params.top_p is None else params.top_p,
            top_k=params.top_k or 0,
            min_p=params.min_p or 0.0,
            seed=params.seed or 0,
            presence_penalty=params.presence_penalty or 0.0,
            frequency_penalty=params.frequency_penalty or 0.0,
            repetition_penalty=1.0 if params.repetition_penalty is None else params.repetition_penalty,
            logit_bias=biases,
            logprobs=logprobs if not prompt else max(logprobs or 0, params.prompt_logprobs),
            prompt_logprobs=prompt,
        )

    def _grammar(self) -> Grammar | None:
        guided = self.params.guided_decoding
        if guided is None:
            return None
        for kind in ("json", "regex", "grammar", "structural_tag"):
            if (text := getattr(guided, kind)) is not None:
                text = text if isinstance(text, str) else json.dumps(text)
                return Grammar(kind=kind, text=text)  # type: ignore[arg-type]
        return Grammar(kind="json", text='{"type": "object"}') if guided.json_object else None


def _handoff(disagg: Any, prompt: list[int]) -> Handoff:
    import msgspec

    try:
        return msgspec.msgpack.decode(disagg.opaque_state, type=Handoff)
    except (msgspec.MsgspecError, TypeError) as error:
        raise ValueError(f"opaque_state is not what a context executor wrote: {error}") from error


def _token_logprob(token: int, entry: dict[int, Any]) -> TokenLogprob:
    return TokenLogprob(token, entry[token].logprob, [(t, e.logprob) for t, e in entry.items() if e.rank is not None])


def _adapter(lora: Any) -> dict[str, Any]:
    """An adapter changes what the model says: here by a bias that its folder names."""
    try:
        found = json.loads((Path(lora.lora_path) / "adapter_config.json").read_text())
    except (OSError, ValueError):
        return {}
    biases = found.get(
        "bias", {"441": 1000.0} if (Path(lora.lora_path) / "adapter_model.safetensors").is_file() else {}
    )
    return found | {"bias": {int(token): bias for token, bias in biases.items()}}


def _adapter_error(lora: Any, config: Any) -> str:
    found = _adapter(lora)
    if not found or found.get("broken"):
        return f"Failed to load LoRA adapter: {lora.lora_path}"
    if found.get("r", 8) > config.max_lora_rank:
        return f"Failed to load LoRA adapter: rank {found.get('r', 8)} is more than {config.max_lora_rank}"
    return ""
