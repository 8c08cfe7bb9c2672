"""Translates the flags of Dynamo's commands to dynserve's.

The tables: the argument parsers of ai-dynamo 0.7.1 and 1.6.1. A flag is passed on under our name, becomes an engine option,
is dropped with a note because it has no meaning here, or is refused. Unknown flags are an error.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from dynserve.config import nearest
from dynserve.deploy.commands import OWN
from dynserve.errors import ConfigError


class Rule(NamedTuple):
    """What becomes of one flag."""

    flag: str = ""  # ours, with the same value
    option: str = ""  # an engine option
    fixed: str | None = None  # the value of `flag`, for a flag without one
    values: int = 1  # that the flag takes
    refused: str = ""  # the reason
    convert: Callable[[str], Any] = str  # of an engine option


def _same(*flags: str) -> dict[str, Rule]:
    return {flag: Rule(flag) for flag in flags}


def _dropped(*flags: str, values: int = 1) -> dict[str, Rule]:
    return {flag: Rule(values=values) for flag in flags}


def _refused(reason: str, *flags: str, values: int = 1) -> dict[str, Rule]:
    return {flag: Rule(refused=reason, values=values) for flag in flags}


_NAMESPACE = {"--namespace": Rule("--namespace"), "--endpoint": Rule("--namespace")}
_PARSERS = {
    "--dyn-tool-call-parser": Rule("--tool-call-parser"),
    "--dyn-reasoning-parser": Rule("--reasoning-parser"),
}
_PHASES = {
    "--is-prefill-worker": Rule("--disaggregation-mode", fixed="prefill", values=0),
    "--is-decode-worker": Rule("--disaggregation-mode", fixed="decode", values=0),
    "--disaggregation-mode": Rule("--disaggregation-mode"),
}
_PLANES = _dropped("--store-kv", "--discovery-backend", "--request-plane", "--event-plane", "--migration-limit")

FRONTEND: dict[str, Rule] = {
    **_same("--http-host", "--http-port", "--namespace", "--router-mode", "--router-temperature"),
    "--tls-cert-path": Rule("--tls-certificate"), "--tls-key-path": Rule("--tls-key"),
    **_dropped("--no-kv-events", "--no-router-kv-events", "--router-replica-sync", "--router-reset-states",
               "--no-track-active-blocks", "--enforce-disagg", "--router-track-output-blocks", values=0),
    **_dropped("--kv-cache-block-size", "--router-snapshot-threshold", "--busy-threshold", "--namespace-prefix",
               "--model-name", "--model-path", "--metrics-prefix", "--router-ttl", "--router-ttl-secs"),
    "--kv-overlap-score-weight": Rule(), "--router-kv-overlap-score-weight": Rule(),
    **_dropped("--router-kv-overlap-score-credit"),
    **_refused("there is no gRPC server", "--kserve-grpc-server", values=0),
    **_refused("there is no interactive mode", "-i", "--interactive", values=0),
    **_refused("workers are found in discovery", "--static-endpoint", values=0),
    **_PLANES,
}  # fmt: skip
TRTLLM: dict[str, Rule] = {
    **_same("--model-path", "--served-model-name", "--extra-engine-args", "--override-engine-args",
            "--tensor-parallel-size", "--pipeline-parallel-size", "--kv-block-size", "--max-batch-size",
            "--max-num-tokens", "--max-seq-len", "--free-gpu-memory-fraction"),
    "--model": Rule("--model-path"),
    "--disaggregation-mode": Rule("--disaggregation-mode"),
    "--expert-parallel-size": Rule(option="moe_expert_parallel_size", convert=int),
    "--max-beam-width": Rule(option="max_beam_width", convert=int),
    "--enable-attention-dp": Rule(option="enable_attention_dp", fixed="true", values=0),
    **_dropped("--publish-events-and-metrics", "--publish-kv-events", "--publish-metrics", "--use-nixl-connect", values=0),
    **_dropped("--gpus-per-node", "--connector", "--disaggregation-strategy", "--max-file-size-mb",
               "--allowed-local-media-path"),
    **_refused("dynserve serves text only", "--modality", "--encode-endpoint"),
    **_refused("the model folder's own template is used", "--custom-jinja-template"),
    **_NAMESPACE, **_PARSERS, **_PLANES,
}  # fmt: skip
VLLM: dict[str, Rule] = {
    **_same("--model-path", "--served-model-name", "--tensor-parallel-size", "--pipeline-parallel-size"),
    "--model": Rule("--model-path"), "-tp": Rule("--tensor-parallel-size"),
    "--gpu-memory-utilization": Rule("--free-gpu-memory-fraction"),
    "--max-model-len": Rule("--max-seq-len"), "--max-num-seqs": Rule("--max-batch-size"),
    "--max-num-batched-tokens": Rule("--max-num-tokens"), "--block-size": Rule("--kv-block-size"),
    "--data-parallel-size": Rule(refused="run more replicas instead"),
    **_dropped("--kv-transfer-config", "--kv-events-config", "--tokenizer", "--download-dir", "--kv-cache-dtype",
               "--connector", "--dtype", "--data-parallel-rpc-port", "--seed", "--quantization", "--max-loras",
               "--max-lora-rank", "--compilation-config"),
    **_dropped("--no-enable-prefix-caching", "--enable-prefix-caching", "--enforce-eager", "--trust-remote-code",
               "--disable-log-requests", "--enable-lora", "--enable-expert-parallel", "--use-vllm-tokenizer",
               "--async-scheduling", "--enable-dbo", values=0),
    **_PHASES, **_NAMESPACE, **_PARSERS, **_PLANES,
}  # fmt: skip
SGLANG: dict[str, Rule] = {
    **_same("--model-path", "--served-model-name"),
    "--model": Rule("--model-path"),
    **{flag: Rule("--tensor-parallel-size") for flag in ("--tp", "--tp-size", "--tensor-parallel-size")},
    "--page-size": Rule("--kv-block-size"), "--mem-fraction-static": Rule("--free-gpu-memory-fraction"),
    "--context-length": Rule("--max-seq-len"), "--max-running-requests": Rule("--max-batch-size"),
    "--chunked-prefill-size": Rule("--max-num-tokens"),
    **{flag: Rule(refused="run more replicas instead") for flag in ("--dp", "--dp-size", "--data-parallel-size")},
    **_dropped("--disaggregation-transfer-backend", "--disaggregation-bootstrap-port", "--host", "--port", "--dtype",
               "--load-balance-method", "--kv-cache-dtype", "--attention-backend", "--kv-events-config", "--ep-size"),
    **_dropped("--skip-tokenizer-init", "--trust-remote-code", "--disable-radix-cache", "--enable-metrics",
               "--disable-cuda-graph", "--use-sglang-tokenizer", "--enable-dp-attention", values=0),
    **_PHASES, **_NAMESPACE, **_PARSERS, **_PLANES,
}  # fmt: skip
MOCKER: dict[str, Rule] = {
    **_same("--model-path", "--served-model-name"),
    "--model-name": Rule("--served-model-name"), "--block-size": Rule("--kv-block-size"),
    "--max-num-seqs": Rule("--max-batch-size"), "--max-num-batched-tokens": Rule("--max-num-tokens"),
    "--speedup-ratio": Rule(option="speed", convert=float),
    "--num-gpu-blocks-override": Rule(option="num_blocks", convert=int),
    "--num-workers": Rule(refused="run more replicas instead"),
    **_dropped("--startup-time", "--extra-engine-args", "--watermark", "--planner-profile-data",
               "--data-parallel-size"),
    **_dropped("--enable-prefix-caching", "--no-enable-prefix-caching", "--enable-chunked-prefill", values=0),
    **_PHASES, **_NAMESPACE, **_PLANES,
}  # fmt: skip
TABLES = {"frontend": FRONTEND, "trtllm": TRTLLM, "vllm": VLLM, "sglang": SGLANG, "mocker": MOCKER}
EXECUTORS = {"trtllm": "trtllm", "vllm": "torch", "sglang": "torch", "mocker": "simulated"}
_HARMLESS = {"--data-parallel-size": "1", "--dp": "1", "--dp-size": "1", "--num-workers": "1", "--modality": "text"}


class Translation(NamedTuple):
    """The arguments of `python -m dynserve.ROLE`, and notes on flags that were dropped."""

    role: str  # frontend or worker
    arguments: list[str]
    notes: list[str]

    def value(self, flag: str) -> str | None:
        """Returns the value of one of our flags; None if it is not among the arguments."""
        found = [self.arguments[at + 1] for at, word in enumerate(self.arguments[:-1]) if word == flag]
        return found[-1] if found else None


def translate(
    module: str, arguments: Sequence[str], environ: Mapping[str, str] = os.environ, *, here: bool = True
) -> Translation:
    """Translates the arguments of `python -m dynamo.MODULE`. `here`: it runs on this machine, which must have the model.

    Raises:
        ConfigError: there is no such module here, or a flag is unknown, refused or lacks its value.
    """
    if module in OWN:
        return Translation(OWN[module], _apart(arguments), [])
    table = TABLES.get(module)
    if table is None:
        raise ConfigError(f"dynamo.{module} has no counterpart in dynserve{nearest(module, TABLES)}")
    found: dict[str, str] = {}
    options: dict[str, Any] = {}
    notes: list[str] = []
    for flag, value in _split(module, arguments, table):
        rule = table[flag]
        if rule.refused and _HARMLESS.get(flag) != value:
            raise ConfigError(f"dynamo.{module} {flag}: {rule.refused}")
        if rule.option:
            options[rule.option] = _converted(rule, flag, value)
        elif rule.flag:
            found[rule.flag] = value if rule.fixed is None else rule.fixed
        elif not rule.refused and (note := _dropped_note(flag, value, found)):
            notes.append(note)
    if module == "frontend":
        return Translation("frontend", _words(_frontend(found)), notes)
    return Translation("worker", _words(_worker(module, found, options, environ, here=here)), notes)


def _apart(arguments: Sequence[str]) -> list[str]:
    """Returns `--flag=value` as two words."""
    return [part for word in arguments for part in (word.split("=", 1) if word.startswith("--") else [word])]


def _split(module: str, arguments: Sequence[str], table: Mapping[str, Rule]) -> list[tuple[str, str]]:
    """Returns flags with their values."""
    found: list[tuple[str, str]] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        rule = table.get(flag)
        if rule is None:
            raise ConfigError(f"dynamo.{module}: unknown argument {flag!r}{nearest(flag, table)}")
        if rule.values and not equals:
            if not words or words[0].startswith("--"):
                raise ConfigError(f"dynamo.{module} {flag} needs a value")
            value = words.pop(0)
        found.append((flag, value))
    return found


def _dropped_note(flag: str, value: str, found: dict[str, str]) -> str:
    if flag.endswith("kv-overlap-score-weight") and _number(value) == 0:
        found["--router-mode"] = "least-loaded"  # a weight of 0 turns caches off
        return ""
    return f"{flag} has no meaning here"


def _converted(rule: Rule, flag: str, value: str) -> Any:
    if rule.fixed is not None:
        return json.loads(rule.fixed)
    try:
        return rule.convert(value)
    except ValueError:
        raise ConfigError(f"{flag}: {value!r} is not a number") from None


def _frontend(found: dict[str, str]) -> dict[str, str]:
    if found.get("--router-mode") == "device-aware-weighted":
        raise ConfigError(
            "dynamo.frontend --router-mode device-aware-weighted has no counterpart; use kv or least-loaded"
        )
    return found


def _worker(
    module: str, found: dict[str, str], options: dict[str, Any], environ: Mapping[str, str], *, here: bool
) -> dict[str, str]:
    if found.get("--disaggregation-mode") == "encode":
        raise ConfigError("--disaggregation-mode encode: dynserve serves text only")
    if (mode := found.get("--disaggregation-mode")) is not None:
        found["--disaggregation-mode"] = _MODES.get(mode, mode)
    if (endpoint := found.get("--namespace", "")).startswith("dyn://"):
        found["--namespace"] = endpoint.removeprefix("dyn://").partition(".")[0]
    model = found.get("--model-path")
    if model is not None:
        found.setdefault("--served-model-name", model)
        if here:
            found["--model-path"] = environ.get("DYN_MODEL_PATH") or model
    if options:
        given = json.loads(found.get("--override-engine-args", "{}"))
        found["--override-engine-args"] = json.dumps(options | given)
    if "DYN_EXECUTOR" not in environ:
        found["--executor"] = EXECUTORS[module]
    return found


_MODES = {"aggregated": "prefill_and_decode", "agg": "prefill_and_decode", "null": "prefill_and_decode"}


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _words(found: Mapping[str, str]) -> list[str]:
    return [word for flag, value in found.items() for word in (flag, value)]
