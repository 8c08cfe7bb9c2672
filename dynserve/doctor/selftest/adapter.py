"""A LoRA adapter with random weights for the attention of the model under test."""

from __future__ import annotations

import json
from pathlib import Path

from dynserve.executors.trtllm.lora import ADAPTER_FILE
from dynserve.model_files import model_config

NAME, RANK = "selftest", 8
MODULES = ("q_proj", "k_proj", "v_proj")


class NoAdapter(Exception):
    """The model has no modules for which an adapter can be made."""


def make_adapter(model: Path, folder: Path) -> str:
    """Writes the adapter into a folder. Returns `name=folder`, as `--lora-adapters` takes it.

    Raises:
        NoAdapter: the attention of this model has other modules.
    """
    import torch  # both come with TensorRT-LLM
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(1)
    weights = {}
    for name, (width, hidden) in _shapes(model).items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        weights[f"{module}.lora_A.weight"] = torch.randn(RANK, hidden, generator=generator) * 0.1
        weights[f"{module}.lora_B.weight"] = torch.randn(width, RANK, generator=generator) * 0.1
    save_file(weights, str(folder / "adapter_model.safetensors"))
    described = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": list(MODULES)}
    (folder / ADAPTER_FILE).write_text(json.dumps(described))
    return f"{NAME}={folder}"


def _shapes(model: Path) -> dict[str, tuple[int, int]]:
    """Returns the shapes of the weights that the adapter changes, by name."""
    from safetensors import safe_open

    found: dict[str, tuple[int, int]] = {}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(str(file), "pt") as tensors:
            for name in list(tensors.keys()):
                if name.endswith(tuple(f"self_attn.{module}.weight" for module in MODULES)):
                    found[name] = tuple(tensors.get_slice(name).get_shape())
    layers = model_config(model).get("num_hidden_layers", 0)
    if not found or len(found) != len(MODULES) * layers or any(len(shape) != 2 for shape in found.values()):
        raise NoAdapter(f"the attention of this model has no {', '.join(MODULES)}")
    return found
