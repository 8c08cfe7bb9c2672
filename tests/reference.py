"""A plain forward pass without paging, batching, cache or transfer. The engine must agree with it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor


class Reference:
    """Qwen2, Qwen3 and Llama, written from their papers' equations with the checkpoint's own weight names."""

    def __init__(self, folder: Path) -> None:
        self.c = json.loads((folder / "config.json").read_text())
        self.w = {name: tensor.float() for name, tensor in load_file(str(folder / "model.safetensors")).items()}
        self.dim = self.c.get("head_dim") or self.c["hidden_size"] // self.c["num_attention_heads"]

    def logits(self, ids: list[int]) -> Tensor:
        head = self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"])
        return F.linear(self.states(ids), head)

    def states(self, ids: list[int]) -> Tensor:
        """Returns the hidden states after the last norm, `[T, hidden]`."""
        x = self.w["model.embed_tokens.weight"][torch.tensor(ids)]
        for i in range(self.c["num_hidden_layers"]):
            p = f"model.layers.{i}."
            x = x + self.attention(p + "self_attn.", self.norm(x, p + "input_layernorm.weight"))
            h = self.norm(x, p + "post_attention_layernorm.weight")
            gate = F.silu(self.linear(h, p + "mlp.gate_proj")) * self.linear(h, p + "mlp.up_proj")
            x = x + self.linear(gate, p + "mlp.down_proj")
        return self.norm(x, "model.norm.weight")

    def greedy(self, ids: list[int], count: int) -> list[int]:
        generated: list[int] = []
        for _ in range(count):
            generated.append(int(self.logits(ids + generated)[-1].argmax()))
        return generated

    def attention(self, p: str, x: Tensor) -> Tensor:
        t = len(x)
        q, k, v = (self.linear(x, p + f"{n}_proj").view(t, -1, self.dim) for n in "qkv")
        if p + "q_norm.weight" in self.w:
            q, k = self.norm(q, p + "q_norm.weight"), self.norm(k, p + "k_norm.weight")
        q, k = self.rope(q), self.rope(k)
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / self.dim**0.5
        scores = scores.masked_fill(torch.ones(t, t).triu(1).bool(), float("-inf"))
        out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(t, -1)
        return self.linear(out, p + "o_proj")

    def rope(self, x: Tensor) -> Tensor:
        inverse = self.c["rope_theta"] ** (-torch.arange(0, self.dim, 2) / self.dim)
        angle = torch.arange(len(x))[:, None, None] * inverse
        a, b = x[..., : self.dim // 2], x[..., self.dim // 2 :]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.c["rms_norm_eps"]) * self.w[name]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.w[name + ".weight"], self.w.get(name + ".bias"))
