"""One frozen configuration per role, built in this order: defaults, `--config` file, environment, flags.

A field is declared once, with its default, its help and the environment variable that sets it; the flag is the field's
name with dashes. Only this module reads flags and the variables of dynserve itself; variables that other programs define
(TensorRT-LLM, UCX, NIXL, CUDA, XDG) are read where those programs are started or checked.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from dynserve.addresses import WILDCARDS, redacted
from dynserve.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Role = Literal["aggregated", "prefill", "decode"]
DisaggregationMode = Literal["prefill_and_decode", "prefill", "decode"]  # a role, as flags and health reports name it
ExecutorName = Literal["torch", "simulated", "trtllm"]
DtypeName = Literal["auto", "float32", "bfloat16"]
RouterMode = Literal["kv", "round-robin", "random", "least-loaded", "power-of-two", "direct"]
LogLevel = Literal["debug", "info", "warning", "error"]
Pooling = Literal["auto", "mean", "last", "none"]
DrainMode = Literal["finish", "migrate"]

# The names of the parsers in dialects/; a test compares the two.
TOOL_PARSERS = ("hermes", "llama3_json", "mistral", "mistral_v11", "deepseek_v3", "deepseek_v31", "pythonic")
REASONING_PARSERS = ("qwen3", "deepseek_r1")

# Flags of other servers, and the flags of dynserve with the same meaning.
FOREIGN = {
    "--model": "--model-path",
    "--model-name": "--served-model-name",
    "--is-prefill-worker": "--disaggregation-mode prefill",
    "--is-decode-worker": "--disaggregation-mode decode",
    "--gpu-memory-utilization": "--free-gpu-memory-fraction",
    "--mem-fraction-static": "--free-gpu-memory-fraction",
    "--max-model-len": "--max-seq-len",
    "--context-length": "--max-seq-len",
    "--max-num-seqs": "--max-batch-size",
    "--max-num-batched-tokens": "--max-num-tokens",
    "--block-size": "--kv-block-size",
    "--tp": "--tensor-parallel-size",
    "--tp-size": "--tensor-parallel-size",
    "--pp": "--pipeline-parallel-size",
    "--extra-llm-api-options": "--extra-engine-args",
    "--enable-lora": "--lora-adapters",
    "--lora-modules": "--lora-adapters",
    "--host": "--http-host",
    "--port": "--http-port",
}


TINY_MODEL = Path(__file__).parent / "local" / "tiny_model"


Positive = Annotated[int, Meta(gt=0)]
PositiveFloat = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[int, Meta(ge=0)]
NotNegativeFloat = Annotated[float, Meta(ge=0)]
Port = Annotated[int, Meta(ge=0, le=65535)]
# a part of NATS subjects and of etcd keys, in which space, dot, slash and wildcards have meanings of their own
Namespace = Annotated[str, Meta(pattern="[A-Za-z0-9_-]{1,64}")]


def option(default: Any, help: str, env: str | None = None) -> Any:
    return field(default=default, metadata={"help": help, "env": env})


def option_of(cls: type[DataclassInstance], name: str) -> Any:
    """Declares the same option, with default, help and environment variable, as another role has it."""
    other = cls.__dataclass_fields__[name]
    return field(default=other.default, metadata=other.metadata)


@dataclass(frozen=True, kw_only=True)
class PlanesConfig:
    """The addresses of the shared planes. Every role has these options."""

    nats_url: str = option("nats://127.0.0.1:4222", "NATS server, or several with commas", "NATS_URL")
    etcd_url: str = option("http://127.0.0.1:2379", "etcd server, or several of one cluster with commas", "ETCD_URL")
    namespace: Namespace = option("default", "clusters with different names do not see each other", "DYN_NAMESPACE")
    link_host: str = option(
        "127.0.0.1", "address that links (frontend) and KV transfers (worker) listen on", "DYN_LINK_HOST"
    )
    advertise_host: str | None = option(
        None,
        "name or address that other processes connect to; default: the one that a listener is bound to, or for 0.0.0.0 "
        "and :: this machine's own",
        "DYN_ADVERTISE_HOST",
    )
    plane_tls_certificate: str | None = option(
        None, "PEM file: mutual TLS on links, KV transfers and model files", "DYN_PLANE_TLS_CERTIFICATE"
    )
    plane_tls_key: str | None = option(None, "PEM file with the key of --plane-tls-certificate", "DYN_PLANE_TLS_KEY")
    plane_tls_ca: str | None = option(
        None,
        "PEM file with the CA of the cluster's certificates; NATS and etcd are verified by it, too, if their addresses "
        "begin with tls:// and https://",
        "DYN_PLANE_TLS_CA",
    )
    log_level: LogLevel = option("info", "debug, info, warning or error", "DYN_LOG_LEVEL")


@dataclass(frozen=True, kw_only=True)
class FrontendConfig(PlanesConfig):
    http_host: str = option("127.0.0.1", "address of the OpenAI server", "DYN_HTTP_HOST")
    http_port: Port = option(8000, "port of the OpenAI server; 0 picks a free one", "DYN_HTTP_PORT")
    workers: Positive = option(
        1, "processes on the HTTP port; link and system ports count up from the given ones", "DYN_FRONTEND_WORKERS"
    )
    reuse_port: bool = option(
        False, "let other frontends of this user listen on the same port, as those of --workers do", "DYN_REUSE_PORT"
    )
    http_fd: NotNegative | None = option(None, "listen on this inherited socket; for supervisors, as that of --workers")
    ready_fd: NotNegative | None = option(None, "write a line to this descriptor when requests are accepted")
    link_port: Port = option(0, "port that workers connect to; 0 picks a free one", "DYN_LINK_PORT")
    system_host: str = option("127.0.0.1", "address of --system-port", "DYN_SYSTEM_HOST")
    system_port: Port = option(
        0, "port of /health, /metrics and /v1/requests/*/why of this process alone; 0: none", "DYN_SYSTEM_PORT"
    )
    router_mode: RouterMode = option("kv", ", ".join(get_args(RouterMode)), "DYN_ROUTER_MODE")
    router_policy: str | None = option(None, "your own routing policy, as package.module:Class", "DYN_ROUTER_POLICY")
    router_prefill_weight: NotNegativeFloat = option(
        1.0, "kv: cost of one prompt block to prefill, in decode blocks", "DYN_ROUTER_PREFILL_WEIGHT"
    )
    router_overlap_weight: NotNegativeFloat = option(
        8.0, "kv: cost of one uncached block, in blocks that already wait for prefill", "DYN_ROUTER_OVERLAP_WEIGHT"
    )
    router_transfer_weight: NotNegativeFloat = option(
        0.1, "kv: cost of one block to transfer to a decode worker, in decode blocks", "DYN_ROUTER_TRANSFER_WEIGHT"
    )
    router_herd_factor: Annotated[float, Meta(ge=1)] = option(
        4.0,
        "kv: a cached prefix counts until the worker's wait is this many times the shortest",
        "DYN_ROUTER_HERD_FACTOR",
    )
    router_temperature: NotNegativeFloat = option(
        0.0, "kv: 0 chooses the cheapest worker; above 0, cheaper ones are drawn more often", "DYN_ROUTER_TEMPERATURE"
    )
    router_slow_start_s: NotNegativeFloat = option(
        10.0, "time in which the share of a new worker grows to its full size", "DYN_ROUTER_SLOW_START_S"
    )
    router_session_ttl_s: PositiveFloat = option(
        300.0, "how long an unused x-dynserve-session stays bound to its workers", "DYN_ROUTER_SESSION_TTL_S"
    )
    router_assume_ttl_s: PositiveFloat = option(
        120.0, "how long a prompt is assumed cached by a worker without KV events", "DYN_ROUTER_ASSUME_TTL_S"
    )
    router_index_bytes: Positive = option(1 << 30, "upper bound of the prefix index's memory", "DYN_ROUTER_INDEX_BYTES")
    local_prefill_tokens: NotNegative = option(
        1024, "up to this many uncached tokens are prefilled on the decode worker; 0: never", "DYN_LOCAL_PREFILL_TOKENS"
    )
    local_prefill_toll: NotNegative = option(
        1024, "a prefill worker slower by up to this many tokens still gets the prompt", "DYN_LOCAL_PREFILL_TOLL"
    )
    busy_prefill_tokens: NotNegative = option(
        0, "a worker with more tokens waiting for prefill is over its threshold; 0: 16 full steps of its engine",
        "DYN_BUSY_PREFILL_TOKENS",
    )  # fmt: skip
    busy_kv_fraction: PositiveFloat = option(
        1.0, "so is a worker whose answers use more than this fraction of its KV blocks", "DYN_BUSY_KV_FRACTION"
    )
    max_queued: NotNegative = option(
        1024, "requests per model that wait while all workers are over their thresholds", "DYN_MAX_QUEUED"
    )
    max_queued_s: PositiveFloat = option(
        30.0,
        "longest time of a request in that queue; one that would wait longer is refused at once",
        "DYN_MAX_QUEUED_S",
    )
    ttft_slo_ms: NotNegativeFloat = option(
        0.0, "objective for the time to the first token: requests that would miss it in the queue are refused, and "
        "/metrics has the share of those that miss it; 0: none", "DYN_TTFT_SLO_MS",
    )  # fmt: skip
    max_migrations: NotNegative = option(
        3, "how often an answer is continued on another worker after its own was lost; 0: never", "DYN_MAX_MIGRATIONS"
    )
    resume_s: PositiveFloat = option(
        30.0, "how long the rest of a stream with x-dynserve-resumable is kept for a client that comes back",
        "DYN_RESUME_S",
    )  # fmt: skip
    role_grace_s: NotNegativeFloat = option(
        2.0, "after so long without a prefill (or decode) worker, workers of the other role answer alone",
        "DYN_ROLE_GRACE_S",
    )  # fmt: skip
    suspect_s: Annotated[float, Meta(ge=0.05)] = option(
        0.5, "a worker that is silent for so long gets no new requests", "DYN_SUSPECT_S"
    )
    silence_s: PositiveFloat = option(
        2.0, "a worker that is silent for so long is lost, and its answers are continued on others", "DYN_SILENCE_S"
    )
    request_timeout_s: PositiveFloat = option(
        600.0, "longest time of a request before it fails", "DYN_REQUEST_TIMEOUT_S"
    )
    drain_timeout_s: PositiveFloat = option(
        30.0, "how long open requests may take to end after SIGTERM", "DYN_DRAIN_TIMEOUT_S"
    )
    keep_alive_s: PositiveFloat = option(
        75.0,
        "idle connections are closed after this time; a load balancer's time should be shorter",
        "DYN_KEEP_ALIVE_S",
    )
    strict_fields: bool = option(
        False, "refuse requests with unknown fields instead of ignoring them", "DYN_STRICT_FIELDS"
    )
    api_keys_file: str | None = option(
        None, "clients need an API key from this file, which `dynserve key` writes", "DYN_API_KEYS_FILE"
    )
    tls_certificate: str | None = option(None, "PEM file: serve HTTPS", "DYN_TLS_CERTIFICATE")
    tls_key: str | None = option(None, "PEM file with the certificate's key", "DYN_TLS_KEY")
    allowed_hosts: str | None = option(
        None, "names that clients may use in Host, as a.example,b.example or *; IP addresses are always accepted; default: "
        "names of this machine if --http-host is loopback, else any", "DYN_ALLOWED_HOSTS",
    )  # fmt: skip
    cors_origins: str | None = option(
        None, "web pages that may call this server, as https://a.example,https://b.example or *", "DYN_CORS_ORIGINS"
    )
    max_body_bytes: Positive = option(8 << 20, "largest body of a request", "DYN_MAX_BODY_BYTES")
    max_bodies_bytes: int = option(
        256 << 20, "largest sum of the bodies that arrive or are prepared; the slowest request is dropped",
        "DYN_MAX_BODIES_BYTES",
    )  # fmt: skip
    max_body_values: Positive = option(
        32_000, "numbers, texts, objects and lists in one body, not counting token ids", "DYN_MAX_BODY_VALUES"
    )
    max_prompt_ids: Positive = option(300_000, "token ids in one body", "DYN_MAX_PROMPT_IDS")
    max_header_bytes: Positive = option(64 << 10, "largest headers of a request", "DYN_MAX_HEADER_BYTES")
    max_requests: Positive = option(8192, "requests answered at the same time; more get 429", "DYN_MAX_REQUESTS")
    receive_timeout_s: PositiveFloat = option(
        60.0, "a request whose headers or body take longer to arrive is dropped", "DYN_RECEIVE_TIMEOUT_S"
    )
    tokenizer_threads: Positive = option(2, "threads that render and tokenise long prompts", "DYN_TOKENIZER_THREADS")
    max_stream_bytes: Positive = option(
        4 << 20, "bytes that may wait for a slow client before its request is aborted", "DYN_MAX_STREAM_BYTES"
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.silence_s < self.suspect_s:
            raise ConfigError(f"--silence-s {self.silence_s:g} cannot be less than --suspect-s {self.suspect_s:g}")
        if self.max_bodies_bytes < self.max_body_bytes:
            raise ConfigError(
                f"--max-bodies-bytes {self.max_bodies_bytes} cannot be less than --max-body-bytes {self.max_body_bytes}"
            )
        _tls(self)
        check_plane_tls(self)
        for name in ("link_port", "system_port"):
            if (first := getattr(self, name)) and first + self.workers > 65536:
                raise ConfigError(f"{_flag(name)} {first}: {self.workers} ports from it on pass 65535; use a lower one")
        _apart(self, {"http_port": 1, "link_port": self.workers, "system_port": self.workers})


@dataclass(frozen=True, kw_only=True)
class WorkerConfig(PlanesConfig):
    model_path: str = option(
        str(TINY_MODEL), "folder with config.json, weights and tokenizer, or Hugging Face id", "DYN_MODEL_PATH"
    )
    served_model_name: str | None = option(
        None, "name that clients use; default: the folder's name, or the id", "DYN_MODEL_NAME"
    )
    disaggregation_mode: DisaggregationMode = option(
        "prefill_and_decode", "prefill_and_decode, prefill or decode", "DYN_ROLE"
    )
    executor: ExecutorName = option("torch", "torch, simulated or trtllm", "DYN_EXECUTOR")
    system_host: str = option(
        "127.0.0.1", "address of /health, /live, /metrics and, without mutual TLS, model files", "DYN_SYSTEM_HOST"
    )
    system_port: Port = option(0, "port of --system-host; 0 picks a free one", "DYN_SYSTEM_PORT")
    max_seq_len: Positive | None = option(None, "longest prompt + answer, in tokens; default: the model's")
    max_batch_size: Positive | None = option(None, "sequences in one step")
    max_num_tokens: Positive | None = option(None, "tokens in one step; longer prompts are prefilled in chunks")
    kv_block_size: Positive | None = option(None, "tokens per KV block; default 32")
    free_gpu_memory_fraction: float | None = option(None, "fraction of the free GPU memory for the KV cache")
    device: str = option("auto", "torch: auto, cpu, cuda or cuda:N; auto uses a GPU if there is one", "DYN_DEVICE")
    dtype: DtypeName = option("auto", "torch: auto, float32 or bfloat16; auto is float32 on a CPU", "DYN_DTYPE")
    tensor_parallel_size: Positive = option(1, "GPUs per layer (trtllm)")
    pipeline_parallel_size: Positive = option(1, "stages of layers (trtllm)")
    max_queue: Positive | None = option(
        None, "requests that may wait in a worker beside the running ones; more are refused as busy; default: as many as "
        "run at once", "DYN_MAX_QUEUE",
    )  # fmt: skip
    extra_engine_args: str | None = option(None, "YAML file with engine options")
    override_engine_args: str | None = option(None, "JSON object with engine options; wins over the file")
    kv_events: bool = option(
        True, "send frontends the KV cache's changes; false: they estimate its content", "DYN_KV_EVENTS"
    )
    tool_call_parser: str = option(
        "auto", "how the model writes tool calls: auto, none, " + ", ".join(TOOL_PARSERS), "DYN_TOOL_CALL_PARSER"
    )
    reasoning_parser: str = option(
        "auto", "how the model marks its reasoning: auto, none, " + ", ".join(REASONING_PARSERS), "DYN_REASONING_PARSER"
    )
    engine_stall_s: PositiveFloat = option(
        60.0, "trtllm: silence after which the engine gets a test request; as much silence again means it is dead",
        "DYN_ENGINE_STALL_S",
    )  # fmt: skip
    lora_adapters: str | None = option(
        None, "trtllm: LoRA adapters, as name=folder,name=folder; clients use the names as models", "DYN_LORA_ADAPTERS"
    )
    pooling: Pooling = option("auto", "embeddings: auto, mean, last or none", "DYN_POOLING")
    resume_bytes: NotNegative = option(
        64 << 20, "bytes of resumable answers that are kept for clients that come back", "DYN_RESUME_BYTES"
    )
    stand_in: bool = option(
        True, "answer requests alone while the other role (prefill or decode) has no workers", "DYN_STAND_IN"
    )
    drain_mode: DrainMode = option(
        "finish", "after SIGTERM: finish answers up to --drain-timeout-s, or migrate all of them to other workers at once",
        "DYN_DRAIN_MODE",
    )  # fmt: skip
    drain_timeout_s: PositiveFloat = option(
        30.0, "how long a worker waits after SIGTERM for its answers to finish; then they migrate to other workers",
        "DYN_DRAIN_TIMEOUT_S",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.adapters and self.executor != "trtllm":
            raise ConfigError(f"--lora-adapters needs --executor trtllm; {self.executor} does not support adapters")
        _device(self)
        check_plane_tls(self)
        _one_of(self, "tool_call_parser", TOOL_PARSERS)
        _one_of(self, "reasoning_parser", REASONING_PARSERS)

    @property
    def role(self) -> Role:
        return "aggregated" if self.disaggregation_mode == "prefill_and_decode" else self.disaggregation_mode

    @property
    def model_name(self) -> str:
        return self.served_model_name or Path(self.model_path).resolve().name

    @property
    def adapters(self) -> dict[str, str]:
        """The LoRA adapters: name to folder."""
        found: dict[str, str] = {}
        for entry in filter(None, (self.lora_adapters or "").split(",")):
            name, _, folder = entry.strip().partition("=")
            if not name or not folder:
                raise ConfigError(f"--lora-adapters: {entry!r} is not name=folder")
            if name in found or name == self.model_name:
                raise ConfigError(f"--lora-adapters: two models have the name {name!r}; names must differ")
            if not Path(folder).is_dir():
                raise ConfigError(f"--lora-adapters: {folder} is not a folder")
            found[name] = folder
        return found


@dataclass(frozen=True, kw_only=True)
class UpConfig:
    """`dynserve up`: a whole cluster on this machine. Options of the frontend and the workers are passed on to them."""

    model_path: str = option_of(WorkerConfig, "model_path")
    served_model_name: str | None = option_of(WorkerConfig, "served_model_name")
    prefill: int = option(2, "prefill workers")
    decode: int = option(2, "decode workers")
    aggregated: int = option(0, "workers that prefill and decode")
    http_host: str = option_of(FrontendConfig, "http_host")
    http_port: Port = option_of(FrontendConfig, "http_port")
    router_mode: RouterMode = option_of(FrontendConfig, "router_mode")
    api_keys_file: str | None = option_of(FrontendConfig, "api_keys_file")
    tls_certificate: str | None = option_of(FrontendConfig, "tls_certificate")
    tls_key: str | None = option_of(FrontendConfig, "tls_key")
    allowed_hosts: str | None = option_of(FrontendConfig, "allowed_hosts")
    executor: ExecutorName = option_of(WorkerConfig, "executor")
    extra_engine_args: str | None = option_of(WorkerConfig, "extra_engine_args")
    override_engine_args: str | None = option_of(WorkerConfig, "override_engine_args")
    device: str = option("auto", "auto, cpu or cuda; auto gives each worker a GPU if there are any", "DYN_DEVICE")
    nats_url: str | None = option(None, "use this NATS server instead of starting one", "NATS_URL")
    etcd_url: str | None = option(None, "use this etcd server instead of starting one", "ETCD_URL")
    namespace: Namespace = option_of(PlanesConfig, "namespace")
    start_timeout_s: PositiveFloat | None = option(
        None, "longest time until the cluster is ready; then `up` fails; default: 300, with TensorRT-LLM 1800"
    )
    log_level: LogLevel = option_of(PlanesConfig, "log_level")

    def __post_init__(self) -> None:
        check_bounds(self)
        _tls(self)
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"--device {self.device!r} is not one of auto, cpu, cuda")
        if min(self.prefill, self.decode, self.aggregated) < 0:
            raise ConfigError("--prefill, --decode and --aggregated cannot be negative")
        if (self.prefill > 0) != (self.decode > 0):
            raise ConfigError(
                "--prefill and --decode come in pairs: a prefill worker needs a decode worker and vice versa"
            )
        if self.prefill + self.aggregated == 0:
            raise ConfigError("no workers: give --prefill and --decode, or --aggregated")

    @property
    def start_limit_s(self) -> float:
        return self.start_timeout_s or (1800.0 if self.executor == "trtllm" else 300.0)

    @property
    def roles(self) -> list[tuple[str, DisaggregationMode]]:
        """The name and role of each worker."""
        counts: list[tuple[str, DisaggregationMode, int]] = [
            ("prefill", "prefill", self.prefill),
            ("decode", "decode", self.decode),
            ("aggregated", "prefill_and_decode", self.aggregated),
        ]
        return [(f"{name}-{i + 1}", role) for name, role, count in counts for i in range(count)]


def mode_of(role: Role) -> DisaggregationMode:
    return "prefill_and_decode" if role == "aggregated" else role


Config = TypeVar("Config", FrontendConfig, WorkerConfig, UpConfig)
Loaded = TypeVar("Loaded", bound="DataclassInstance")


def load(cls: type[Loaded], prog: str, argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> Loaded:
    """Loads the configuration of one role.

    Raises:
        ConfigError: a flag, key or value is wrong; the text names it, its source and the nearest valid one.
        SystemExit: for `--help`.
    """
    options = fields(cls)
    types = get_type_hints(cls)
    flags = vars(_parser(prog, cls, options, types).parse_args(list(argv)))
    values: dict[str, Any] = {}
    if path := flags.pop("config"):
        values |= _from_file(path, options, types)
    for opt in options:
        env = opt.metadata["env"]
        if env and environ.get(env, "") != "":
            values[opt.name] = _convert(environ[env], types[opt.name], env)
        if flags[opt.name] is not None:
            values[opt.name] = _convert(flags[opt.name], types[opt.name], _flag(opt.name))
    return cls(**values)


def nearest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """Returns ` (did you mean X?)` for the nearest known name, or an empty string. `cutoff`: the least likeness, 0 to 1."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f" (did you mean {close[0]}?)" if close else ""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = redacted(unknown[0]).split("=")[0]
            if (ours := FOREIGN.get(flag)) is not None and ours.split()[0] in self._option_string_actions:
                raise ConfigError(f"unknown option {flag}: use {ours} instead; see {self.prog} --help")
            raise ConfigError(
                f"unknown option {flag}{nearest(flag, self._option_string_actions)}; see {self.prog} --help"
            )
        return parsed


def _parser(prog: str, cls: type, options: Sequence[Field[Any]], types: Mapping[str, Any]) -> argparse.ArgumentParser:
    parser = _Parser(prog=prog, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of the options below as keys")
    for opt in options:
        parts = [opt.metadata["help"]]
        if opt.default is not None:
            parts.append(f"default {opt.default}")
        if opt.metadata["env"]:
            parts.append(f"env {opt.metadata['env']}")
        alone: dict[str, Any] = {"nargs": "?", "const": "true"} if types[opt.name] is bool else {}
        meta = _meta(types[opt.name])
        parser.add_argument(_flag(opt.name), metavar=meta, help="; ".join(parts).replace("%", "%%"), **alone)
    return parser


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _meta(kind: Any) -> str:
    if kind is bool:
        return "true|false"
    for scalar, meta in ((int, "N"), (float, "X")):
        if kind is scalar or scalar in get_args(kind):
            return meta
    return "S"


def _from_file(path: str, options: Sequence[Field[Any]], types: Mapping[str, Any]) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text()) or {}
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path} is not YAML: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"--config {path}: expected keys and values, found {type(found).__name__}")
    names = [opt.name for opt in options]
    for key in found:
        if key not in names:
            raise ConfigError(f"--config {path}: unknown key {key!r}{nearest(str(key), names)}")
    return {key: _convert(value, types[key], f"{key} in {path}") for key, value in found.items()}


def _convert(value: Any, kind: Any, where: str) -> Any:
    try:
        return msgspec.convert(value, kind, strict=False)
    except msgspec.ValidationError as error:
        choices = [c for c in get_args(kind) if isinstance(c, str)]
        value = redacted(value) if isinstance(value, str) else value
        if choices:
            raise ConfigError(f"{where}: {value!r} is not one of {', '.join(choices)}") from error
        raise ConfigError(f"{where}: {value!r} does not fit: {str(error).lower()}") from error


def check_bounds(config: DataclassInstance) -> None:
    """Raises ConfigError for a value beyond the bounds of its option."""
    for name, bounds in _bounds_of(type(config)).items():
        value = getattr(config, name)
        if value is not None and (wrong := _beyond(value, bounds)):
            raise ConfigError(f"{_flag(name)} {wrong}")


@cache
def _bounds_of(cls: type) -> dict[str, Meta]:
    found = {}
    for name, kind in get_type_hints(cls, include_extras=True).items():
        for part in (kind, *get_args(kind)):  # the second for `X | None`
            if get_origin(part) is Annotated:
                found[name] = part.__metadata__[0]
    return found


def _beyond(value: Any, bounds: Meta) -> str:
    """Returns an error text, or an empty string for a value within its bounds. All comparisons with NaN are false."""
    if bounds.pattern is not None:
        allowed = re.fullmatch(bounds.pattern, value) is not None
        return "" if allowed else f"{value!r} has other characters than letters, digits, - and _, or more than 64"
    if bounds.gt is not None and not value > bounds.gt:
        return f"must be greater than {bounds.gt}, not {value}"
    if bounds.le is not None and not (bounds.ge or 0) <= value <= bounds.le:
        return f"must be between {bounds.ge} and {bounds.le}, not {value}"
    if bounds.ge is not None and not value >= bounds.ge:
        return f"cannot be negative: {value}" if bounds.ge == 0 else f"must be {bounds.ge} or more, not {value}"
    return ""


def _tls(config: Any) -> None:
    if (config.tls_certificate is None) != (config.tls_key is None):
        raise ConfigError("--tls-certificate and --tls-key need each other: set both or neither")


def check_plane_tls(config: PlanesConfig) -> None:
    """Raises ConfigError if one of the files for mutual TLS is set without the others that it needs."""
    if (config.plane_tls_certificate is None) != (config.plane_tls_key is None):
        raise ConfigError("--plane-tls-certificate and --plane-tls-key need each other: set both or neither")
    if config.plane_tls_certificate is not None and config.plane_tls_ca is None:
        raise ConfigError("--plane-tls-certificate needs --plane-tls-ca: the CA whose certificates are accepted")


def _one_of(config: Any, name: str, known: Sequence[str]) -> None:
    value = getattr(config, name)
    if value not in ("auto", "none", *known):
        names = ", ".join(("auto", "none", *known))
        raise ConfigError(f"{_flag(name)}: {value!r} is not one of {names}{nearest(value, known)}")


def _apart(config: FrontendConfig, counts: dict[str, int]) -> None:
    """Raises ConfigError when two listeners on one address share a port."""
    hosts = {"http_port": config.http_host, "link_port": config.link_host, "system_port": config.system_host}
    for one, other in combinations(counts, 2):
        first, second = getattr(config, one), getattr(config, other)
        if not first or not second or not (hosts[one] == hosts[other] or WILDCARDS & {hosts[one], hosts[other]}):
            continue
        if first < second + counts[other] and second < first + counts[one]:
            raise ConfigError(
                f"{_flag(other)} {second} overlaps the ports from {_flag(one)} {first} on; use ports further apart"
            )


def _device(config: WorkerConfig) -> None:
    if not _DEVICE.fullmatch(config.device):
        raise ConfigError(f"--device {config.device!r} is not one of auto, cpu, cuda, cuda:0, cuda:1, …")


_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?")


def exit_with(error: ConfigError) -> NoReturn:
    """Prints a configuration error as one sentence and exits with code 2."""
    print(f"dynserve: {error}", file=sys.stderr)
    raise SystemExit(2)
