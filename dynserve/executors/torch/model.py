"""Decoder-only transformers of the Qwen2, Qwen3 and Llama families, from Hugging Face checkpoints.

One flat batch per step: the tokens of all sequences one after the other, shape `[T]`; nothing is padded but attention's
gathered keys. The families differ in four switches of `ModelConfig`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from dynserve.errors import ConfigError
from dynserve.executors.torch.attention import KvCache, StepLayout

FAMILIES = ("qwen2", "qwen3", "llama")


@dataclass(frozen=True)
class ModelConfig:
    """The fields of `config.json`, under names of our own. Sizes are in elements."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    tied_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool

    @staticmethod
    def read(folder: Path) -> ModelConfig:
        """Raises ConfigError for a folder without a config, or a model that is not of the three families."""
        raw = read_json(folder / "config.json")
        family = raw.get("model_type", "")
        if family not in FAMILIES:
            raise ConfigError(f"{folder}: model_type {family!r} is not supported; one of {', '.join(FAMILIES)} is")
        if raw.get("use_sliding_window"):
            raise ConfigError(f"{folder}: sliding-window attention is not supported")
        if raw.get("quantization_config"):
            raise ConfigError(f"{folder}: quantised checkpoints are not supported by the torch executor")
        try:
            heads = raw["num_attention_heads"]
            # newer checkpoints keep everything about rotary embeddings in one object
            rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
            return ModelConfig(
                family=family,
                vocab_size=raw["vocab_size"],
                hidden_size=raw["hidden_size"],
                intermediate_size=raw["intermediate_size"],
                num_layers=raw["num_hidden_layers"],
                num_heads=heads,
                num_kv_heads=raw.get("num_key_value_heads") or heads,
                head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
                max_position=raw["max_position_embeddings"],
                norm_eps=raw["rms_norm_eps"],
                rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10_000.0),
                rope_scaling=rope or None,
                tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
                qkv_bias=family == "qwen2" or bool(raw.get("attention_bias", False)),
                o_bias=family != "qwen2" and bool(raw.get("attention_bias", False)),
                qk_norm=family == "qwen3",
            )
        except KeyError as error:
            raise ConfigError(f"{folder}/config.json lacks {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; --model-path must be a folder with a model in it") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds no JSON object")
    return found


class Layer:
    """One layer's weights. Projections that read the same input are one matrix."""

    def __init__(self, config: ModelConfig, weights: Weights, index: int) -> None:
        def get(name: str) -> Tensor:
            return weights.load(f"model.layers.{index}.{name}")

        def joined(kind: str, *names: str) -> Tensor:
            return torch.cat([get(f"{name}.{kind}") for name in names])

        qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self.attn_norm = get("input_layernorm.weight")
        self.qkv = joined("weight", *qkv)
        self.qkv_bias = joined("bias", *qkv) if config.qkv_bias else None
        self.q_norm = get("self_attn.q_norm.weight") if config.qk_norm else None
        self.k_norm = get("self_attn.k_norm.weight") if config.qk_norm else None
        self.o = get("self_attn.o_proj.weight")
        self.o_bias = get("self_attn.o_proj.bias") if config.o_bias else None
        self.mlp_norm = get("post_attention_layernorm.weight")
        self.gate_up = joined("weight", "mlp.gate_proj", "mlp.up_proj")
        self.down = get("mlp.down_proj.weight")


class Transformer:
    """A model. `forward` maps a step's tokens to hidden states and writes the KV cache, `logits` maps those to logits."""

    def __init__(self, config: ModelConfig, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        with Weights(folder, device, dtype) as weights:
            self.embedding = weights.load("model.embed_tokens.weight")
            self.layers = [Layer(config, weights, index) for index in range(config.num_layers)]
            self.norm = weights.load("model.norm.weight")
            self.head = self.embedding if config.tied_embeddings else weights.load("lm_head.weight")
        self.cos, self.sin = rotary_table(config, device, dtype)

    @property
    def num_parameters(self) -> int:
        per_layer: int = sum(w.numel() for w in vars(self.layers[0]).values() if w is not None)
        head = 0 if self.config.tied_embeddings else self.head.numel()
        return self.embedding.numel() + head + per_layer * len(self.layers)

    @torch.inference_mode()
    def forward(self, cache: KvCache, layout: StepLayout) -> Tensor:
        """Returns the hidden states `[T, hidden]` after the last layer, before the final norm."""
        x = F.embedding(layout.tokens, self.embedding)
        cos, sin = self.cos[layout.positions], self.sin[layout.positions]
        for index, layer in enumerate(self.layers):
            x = x + self._attention(layer, index, self._norm(x, layer.attn_norm), cos, sin, cache, layout)
            gate, up = F.linear(self._norm(x, layer.mlp_norm), layer.gate_up).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, layer.down)
        return x

    @torch.inference_mode()
    def normed(self, hidden: Tensor) -> Tensor:
        return self._norm(hidden, self.norm)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Maps rows of `forward`'s result to logits, `[rows, vocab]`, float32."""
        return F.linear(self.normed(hidden), self.head).float()

    def _attention(
        self, layer: Layer, index: int, x: Tensor, cos: Tensor, sin: Tensor, cache: KvCache, layout: StepLayout
    ) -> Tensor:
        c = self.config
        heads = F.linear(x, layer.qkv, layer.qkv_bias).view(len(x), -1, c.head_dim)
        q, k, v = torch.split(heads, [c.num_heads, c.num_kv_heads, c.num_kv_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = F.rms_norm(q, (c.head_dim,), layer.q_norm, c.norm_eps)
            k = F.rms_norm(k, (c.head_dim,), layer.k_norm, c.norm_eps)
        cache.write(index, layout, rotate(k, cos, sin), v)
        attended = cache.attend(index, layout, rotate(q, cos, sin))
        return F.linear(attended.reshape(len(x), -1), layer.o, layer.o_bias)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (self.config.hidden_size,), weight, self.config.norm_eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies rotary embedding to `[T, heads, head_dim]` with tables `[T, 1, head_dim]`, halves paired as in GPT-NeoX."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def rotary_table(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns cos and sin, `[max_position, 1, head_dim]` each."""
    angles = rotary_angles(config)
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def rotary_angles(config: ModelConfig) -> Tensor:
    """Returns the angle of each pair of elements at each position, `[max_position, head_dim / 2]`, float32.

    Source of the scaled frequencies: Llama 3.1's model card and its reference code (`rope_type: llama3`), and the
    position interpolation paper for `linear` (arXiv 2306.15595).
    """
    inverse = 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
    scaling = config.rope_scaling or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "linear":
        inverse = inverse / scaling["factor"]
    elif kind == "llama3":
        inverse = _llama3_frequencies(inverse, scaling)
    elif kind != "default":
        raise ConfigError(f"rope_type {kind!r} is not supported; default, linear and llama3 are")
    return torch.outer(torch.arange(config.max_position, dtype=torch.float32), inverse)


def _llama3_frequencies(inverse: Tensor, scaling: dict[str, Any]) -> Tensor:
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelength = 2 * math.pi / inverse
    smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    scaled: Tensor = (1 - smooth) * inverse / factor + smooth * inverse
    return scaled


class Weights:
    """The safetensors files of a checkpoint, one or many. A file is opened when a tensor in it is first read."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        self._folder, self._device, self._dtype = folder, device, dtype
        index = folder / "model.safetensors.index.json"
        if index.exists():
            self._file_of: dict[str, str] | None = read_json(index)["weight_map"]
        elif (folder / "model.safetensors").exists():
            self._file_of = None
        else:
            raise ConfigError(f"{folder}: there is no model.safetensors in it; other formats are not supported")
        self._open: dict[str, Any] = {}

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *exc: object) -> None:
        for file in self._open.values():
            file.__exit__(None, None, None)

    def load(self, name: str) -> Tensor:
        file = "model.safetensors" if self._file_of is None else self._file_of.get(name, "")
        try:
            if file not in self._open:
                opened: Any = safe_open(str(self._folder / file), framework="pt", device="cpu")
                self._open[file] = opened.__enter__()
            tensor: Tensor = self._open[file].get_tensor(name)
        except Exception as error:  # safetensors raises error types of its own for invalid files
            raise ConfigError(f"{self._folder}: cannot read {name}: {error}") from error
        return tensor.to(self._device, self._dtype)
