"""Decoder-only transformers of the Qwen2, Qwen3 and Llama families, from Hugging Face checkpoints.

One flat batch per step: the tokens of all sequences one after the other, shape `[T]`; nothing is padded but attention's
gathered keys. The families differ in a few switches of `ModelConfig`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dynserve.executors.torch.attention import KvCache, StepLayout
from dynserve.executors.torch.model_config import ModelConfig
from dynserve.executors.torch.rope import rotary_table, rotate
from dynserve.executors.torch.weights import Weights

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


class Layer:
    """One layer's weights. Projections that read the same input are one matrix."""

    def __init__(self, config: ModelConfig, weights: Weights, index: int) -> None:
        hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
        q, kv = config.num_heads * dim, config.num_kv_heads * dim

        def get(name: str, *shape: int) -> Tensor:
            return weights.load(f"{weights.prefix}layers.{index}.{name}", *shape)

        def joined(kind: str, rows: dict[str, int], *columns: int) -> Tensor:
            return torch.cat([get(f"{name}.{kind}", size, *columns) for name, size in rows.items()])

        qkv = {"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv}
        gate_up = {"mlp.gate_proj": inner, "mlp.up_proj": inner}
        self.attn_norm = get("input_layernorm.weight", hidden)
        self.qkv = joined("weight", qkv, hidden)
        self.qkv_bias = joined("bias", qkv) if config.qkv_bias else None
        self.q_norm = get("self_attn.q_norm.weight", dim) if config.qk_norm else None
        self.k_norm = get("self_attn.k_norm.weight", dim) if config.qk_norm else None
        self.o = get("self_attn.o_proj.weight", hidden, q)
        self.o_bias = get("self_attn.o_proj.bias", hidden) if config.o_bias else None
        self.mlp_norm = get("post_attention_layernorm.weight", hidden)
        self.gate_up = joined("weight", gate_up, hidden)
        self.gate_up_bias = joined("bias", gate_up) if config.mlp_bias else None
        self.down = get("mlp.down_proj.weight", hidden, inner)
        self.down_bias = get("mlp.down_proj.bias", hidden) if config.mlp_bias else None


class Transformer:
    """A model. `forward` maps a step's tokens to hidden states and writes the KV cache, `logits` maps those to logits."""

    def __init__(self, config: ModelConfig, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        with Weights(folder, device, dtype) as weights:
            self.embedding = weights.load(f"{weights.prefix}embed_tokens.weight", config.vocab_size, config.hidden_size)
            self.layers = [Layer(config, weights, index) for index in range(config.num_layers)]
            self.norm = weights.load(f"{weights.prefix}norm.weight", config.hidden_size)
            self.head = self._load_head(weights)
            weights.check_all_used()
        self._activation = _ACTIVATIONS[config.activation]
        cos, sin = rotary_table(config.rope)
        self.cos, self.sin = (torch.cat([t, t], dim=-1)[:, None].to(device, dtype) for t in (cos, sin))

    def _load_head(self, weights: Weights) -> Tensor:
        """Returns the matrix of the logits, `[vocab, hidden]`. As in transformers, a file that has one of its own has
        precedence over a config that ties it to the embedding."""
        if self.config.tied_embeddings and "lm_head.weight" not in weights:
            return self.embedding
        head = weights.load("lm_head.weight", self.config.vocab_size, self.config.hidden_size)
        return self.embedding if torch.equal(head, self.embedding) else head

    @property
    def num_parameters(self) -> int:
        per_layer: int = sum(w.numel() for w in vars(self.layers[0]).values() if w is not None)
        head = 0 if self.head is self.embedding else self.head.numel()
        return self.embedding.numel() + head + per_layer * len(self.layers)

    @torch.inference_mode()
    def forward(self, cache: KvCache, layout: StepLayout) -> Tensor:
        """Returns the hidden states `[T, hidden]` after the last layer, before the final norm."""
        x = F.embedding(layout.tokens, self.embedding)
        cos, sin = self.cos[layout.positions], self.sin[layout.positions]
        for index, layer in enumerate(self.layers):
            x = x + self._attention(layer, index, self._norm(x, layer.attn_norm), cos, sin, cache, layout)
            gate, up = F.linear(self._norm(x, layer.mlp_norm), layer.gate_up, layer.gate_up_bias).chunk(2, dim=-1)
            x = x + F.linear(self._activation(gate) * up, layer.down, layer.down_bias)
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
