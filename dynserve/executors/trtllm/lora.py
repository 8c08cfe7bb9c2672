"""The `lora_config` of an engine, from the folders of its adapters.

In the PyTorch backend only `lora_config` turns LoRA on. An engine without one drops a request's adapter and answers as the
base model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dynserve.errors import ConfigError

ADAPTER_FILE = "adapter_config.json"
DEFAULT_RANK = 8  # PEFT's
# Hugging Face's name of a module -> TensorRT-LLM's (its default `trtllm_modules_to_hf_modules`, reversed)
MODULES = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "qkv_proj": "attn_qkv", "o_proj": "attn_dense",
    "gate_proj": "mlp_h_to_4h", "up_proj": "mlp_gate", "down_proj": "mlp_4h_to_h", "gate_up_proj": "mlp_gate_up",
    "w1": "moe_h_to_4h", "w3": "moe_gate", "w2": "moe_4h_to_h", "gate": "moe_router",
    "shared_expert.gate_proj": "shared_expert_h_to_4h", "shared_expert.up_proj": "shared_expert_gate",
    "shared_expert.down_proj": "shared_expert_4h_to_h", "in_proj": "mamba_in_proj", "out_proj": "mamba_out_proj",
    "fc1_latent_proj": "moe_latent_fc1", "fc2_latent_proj": "moe_latent_fc2",
}  # fmt: skip
_QKV = {"attn_q", "attn_k", "attn_v"}  # all three or none


class AdapterFile(NamedTuple):
    """The parts of an adapter's `adapter_config.json` that an engine must know before it loads the adapter."""

    rank: int
    modules: list[str] | str  # a string is a pattern
    own_layers: list[str]  # embeddings or heads with weights of their own


def lora_config(adapters: Mapping[str, str], given: Mapping[str, Any] | None, place: str) -> dict[str, Any]:
    """Returns `lora_config` for these adapters (name: folder). What the user has given wins.

    Raises:
        ConfigError: an adapter's description is missing or cannot be served, or `given` has too small a rank for it.
    """
    given = {name: value for name, value in (given or {}).items() if value is not None}
    if given.get("lora_ckpt_source") == "nemo":  # archives, which only the engine reads
        return {"max_loras": len(adapters), "max_cpu_loras": len(adapters), **given}
    files = {name: read_adapter(name, folder) for name, folder in adapters.items()}
    made: dict[str, Any] = {
        "lora_ckpt_source": "hf",
        "max_lora_rank": max(file.rank for file in files.values()),
        "max_loras": len(files),
        "max_cpu_loras": len(files),
    }
    if not given.get("lora_dir") and not given.get("lora_target_modules"):
        if len(adapters) == 1:
            made["lora_dir"] = list(
                adapters.values()
            )  # the engine's loader reads the modules there, and its embeddings
        else:
            made["lora_target_modules"] = target_modules(files)
    made |= given
    for name, file in files.items():
        if file.rank > made["max_lora_rank"]:
            rank = made["max_lora_rank"]
            raise ConfigError(f"{place}: max_lora_rank: {rank} is below the rank of adapter {name!r}, {file.rank}")
    return made


def target_modules(files: Mapping[str, AdapterFile]) -> list[str]:
    """Returns TensorRT-LLM's names of all modules that the adapters change. Raises ConfigError for an unknown module."""
    found: set[str] = set()
    for name, file in files.items():
        if isinstance(file.modules, str):
            raise ConfigError(
                f"adapter {name!r}: its target_modules is a pattern, {file.modules!r}: name the modules in the engine "
                "options, lora_config: {lora_target_modules: [...]}, or serve it as the only adapter"
            )
        if file.own_layers:
            raise ConfigError(
                f"adapter {name!r} has its own {', '.join(file.own_layers)}, which TensorRT-LLM applies only if it is the "
                "only adapter"
            )
        for module in file.modules:
            found.add(_target(name, module))
    if found & _QKV:
        found |= _QKV
    return sorted(found)


def read_adapter(name: str, folder: str) -> AdapterFile:
    """Reads the `adapter_config.json` of an adapter. Raises ConfigError if it is missing or not that of a LoRA."""
    path = Path(folder) / ADAPTER_FILE
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
        if found.get("peft_type", "LORA") != "LORA":
            raise ValueError(f"an adapter of type {found['peft_type']}, not LORA")
        ranks = [found.get("r", DEFAULT_RANK), *(found.get("rank_pattern") or {}).values()]
        if not all(isinstance(rank, int) and rank > 0 for rank in ranks):
            raise ValueError(f"ranks {ranks}")
        modules = found.get("target_modules") or []
        if not isinstance(modules, str | list):
            raise ValueError(f"target_modules {modules!r}")
    except OSError as error:
        raise ConfigError(f"--lora-adapters: adapter {name!r}: {path}: {error.strerror}") from error
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"--lora-adapters: adapter {name!r}: {path} does not describe a LoRA: {error}") from error
    return AdapterFile(max(ranks), modules, list(found.get("modules_to_save") or []))


def _target(adapter: str, module: str) -> str:
    parts = str(module).split(".")
    for known in (".".join(parts[-2:]), parts[-1]):
        if known in MODULES:
            return MODULES[known]
    raise ConfigError(
        f"adapter {adapter!r} changes the module {module!r}, for which TensorRT-LLM has no name; it has "
        f"{', '.join(MODULES)}; name its modules in the engine options, lora_config: {{lora_target_modules: [...]}}"
    )
