"""A model's forward pass over the rows of a step, in kernels and matrix products that a CUDA graph can hold.

A row is one token of one sequence. All buffers stay where they are, so that a captured graph finds them again.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dynserve.executors.torch.attention import KvCache
from dynserve.executors.torch.cuda.kernels import (
    BIAS,
    FLOAT,
    NORM,
    PICK,
    RESIDUAL,
    ROWS_OF_GEMV,
    SILU,
    Gemv,
    Launcher,
    Shape,
    attend_name,
)
from dynserve.executors.torch.cuda.packet import Packet
from dynserve.executors.torch.model import Layer, Transformer, rotary_angles

FUSED = (1, 2, 4)  # rows of steps in which every row is a sequence of its own, and matrix-vector products are used
MOST_SPLITS = 16  # parts that the keys of one row are cut into
MIN_BLOCKS = 264  # of attention, two for each multiprocessor of an H100


class Prompts(NamedTuple):
    """The rows of a long step that are parts of prompts, and come first in it: `fresh` ones whose keys are all among the
    rows, then those that go on behind what the cache holds. Offsets are cumulative, on the device, int32."""

    fresh_rows: int
    fresh_offsets: Tensor
    fresh_longest: int
    rows: int  # fresh ones and others
    query_offsets: Tensor
    query_longest: int
    blocks: Tensor  # [n] of all that go on, one after the other
    key_offsets: Tensor  # in tokens, up to the end of each one's last block
    key_lengths: Tensor  # without what the last block does not hold yet
    key_longest: int


class Forward:
    """The layers and the head. `rows` is the packet of `slots`, `positions`, `sources`, `tokens` and `changes`."""

    def __init__(
        self, model: Transformer, cache: KvCache, shape: Shape, launcher: Launcher, *, max_rows: int, slots: int,
        table_width: int, max_samples: int,
    ) -> None:  # fmt: skip
        self._model, self._cache, self._shape, self._launch = model, cache, shape, launcher.launch
        device = model.device
        for layer in model.layers:
            interleave(layer)

        def buffer(rows: int, width: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.zeros(rows, width, dtype=dtype, device=device)

        angles = rotary_angles(model.config)
        self._rope = torch.cat([angles.cos(), angles.sin()], dim=-1).to(device)
        self.tables = torch.zeros(slots, table_width, dtype=torch.int32, device=device)
        self.x, self._normed = buffer(max_rows, shape.hidden), buffer(max_rows, shape.hidden)
        self._qkv = buffer(max_rows, shape.qkv)
        self._attended = buffer(max_rows, shape.heads * shape.head_dim)
        self._gate_up, self._mid = buffer(max_rows, 2 * shape.intermediate), buffer(max_rows, shape.intermediate)
        self._picked = buffer(max_samples, shape.hidden)
        self.logits = buffer(max_samples, shape.vocabulary, torch.float32)
        self.drawn = torch.zeros(max_samples, dtype=torch.int32, device=device)
        most = max(rows * splits_for(rows, shape, rows in FUSED) for rows in range(1, max_samples + 1))
        self._parts = torch.zeros(most * shape.heads * (shape.head_dim + 2), dtype=torch.float32, device=device)
        self._arrived = torch.zeros(max_samples * shape.heads, dtype=torch.int32, device=device)

    @staticmethod
    def kernel_names(shape: Shape, qkv_bias: bool) -> list[str]:
        """All that a `Forward` launches."""
        names = [attend_name(1, True), attend_name(1, False), attend_name(shape.heads_together, False)]
        for columns in FUSED:
            names += [
                Gemv.plan(n, k, flags).name(k, columns, flags) for n, k, flags in _products(shape, qkv_bias).values()
            ]
        return [*names, "begin", "rope_write", "rms_norm", "silu_mul"]

    def begin(self, rows: Packet, count: int) -> None:
        self._launch(
            "begin", (count, 1, 1), 128, rows["changes"], self.tables, self.tables.shape[1], rows["sources"],
            rows["tokens"], self.drawn, self._model.embedding, self.x,
        )  # fmt: skip

    def layers(self, rows: Packet, count: int, *, fused: bool) -> None:
        """From embeddings to hidden states, both in `x[:count]`; keys and values go into the cache."""
        for index, layer in enumerate(self._model.layers):
            if fused:
                self._small_layer(layer, index, rows, count)
            else:
                self._layer(layer, index, rows, count, None)

    def long_layers(self, rows: Packet, count: int, prompts: Prompts) -> None:
        for index, layer in enumerate(self._model.layers):
            self._layer(layer, index, rows, count, prompts)

    def head(self, picks: Tensor, count: int) -> None:
        """`logits[:count]`, float32, of the rows that `picks` names."""
        model, shape = self._model, self._shape
        if count in FUSED:
            n, k, flags = _products(shape, False)["head"]
            plan = Gemv.plan(n, k, flags)
            self._launch(
                plan.name(k, count, flags), (plan.blocks(n), 1, 1), 256, model.head, self.x, self.logits, n, None,
                model.norm, picks,
            )  # fmt: skip
            return
        self._launch("rms_norm", (count, 1, 1), 256, self.x, model.norm, self._picked, picks)
        matrix_product_f32(self._picked[:count], model.head, self.logits[:count])

    def _small_layer(self, layer: Layer, index: int, rows: Packet, count: int) -> None:
        products = _products(self._shape, layer.qkv_bias is not None)

        def gemv(name: str, weight: Tensor, x: Tensor, out: Tensor, *rest: Tensor | None, early: bool = True) -> None:
            n, k, flags = products[name]
            plan = Gemv.plan(n, k, flags)
            self._launch(
                plan.name(k, count, flags), (plan.blocks(n), 1, 1), 256, weight, x, out, n, *rest, None, early=early
            )

        # the first kernel waits for the step's own data in full: what the others read before they wait is there then
        gemv("qkv", layer.qkv, self.x, self._qkv, layer.qkv_bias, layer.attn_norm, early=index > 0)
        self._attend(layer, index, rows, 0, count, fused=True)
        gemv("o", layer.o, self._attended, self.x, None, None)
        gemv("gate_up", layer.gate_up, self.x, self._mid, None, layer.mlp_norm)
        gemv("down", layer.down, self._mid, self.x, None, None)

    def _layer(self, layer: Layer, index: int, rows: Packet, count: int, prompts: Prompts | None) -> None:
        shape, launch = self._shape, self._launch
        x, normed, qkv, attended = self.x[:count], self._normed[:count], self._qkv[:count], self._attended[:count]
        launch("rms_norm", (count, 1, 1), 256, x, layer.attn_norm, normed, None, early=index > 0)
        if layer.qkv_bias is None:
            torch.mm(normed, layer.qkv.t(), out=qkv)
        else:
            torch.addmm(layer.qkv_bias, normed, layer.qkv.t(), out=qkv)
        launch(
            "rope_write", (count, 1, 1), 256, qkv, self._cache.memory, self.tables, self.tables.shape[1], rows["slots"],
            rows["positions"], self._rope, layer.q_norm, layer.k_norm, index, early=True,
        )  # fmt: skip
        first = 0
        if prompts is not None:
            self._attend_prompts(index, prompts)
            first = prompts.rows
        if first < count:
            self._attend(layer, index, rows, first, count - first, fused=False)
        x.addmm_(attended, layer.o.t())
        launch("rms_norm", (count, 1, 1), 256, x, layer.mlp_norm, normed, None, early=True)
        torch.mm(normed, layer.gate_up.t(), out=self._gate_up[:count])
        blocks = -(-shape.intermediate // 1024)
        launch("silu_mul", (blocks, count, 1), 256, self._gate_up, self._mid, early=True)
        x.addmm_(self._mid[:count], layer.down.t())

    def _attend(self, layer: Layer, index: int, rows: Packet, first: int, count: int, *, fused: bool) -> None:
        """Attention of rows `first` on, each over its own sequence up to itself."""
        shape = self._shape
        together = _together(count, shape, fused)
        self._launch(
            attend_name(together, fused), (shape.heads // together, count, splits_for(count, shape, fused)), 256,
            self._qkv[first:], self._cache.memory, self.tables, self.tables.shape[1], rows["slots"][first:],
            rows["positions"][first:], self._rope, layer.q_norm, layer.k_norm, self._attended[first:], self._parts,
            self._arrived, index, early=True,
        )  # fmt: skip

    def _attend_prompts(self, index: int, prompts: Prompts) -> None:
        shape = self._shape
        rows = self._qkv[: prompts.rows].view(prompts.rows, -1, shape.head_dim)
        out = self._attended[: prompts.rows].view(prompts.rows, shape.heads, shape.head_dim)
        q, k, v = torch.split(rows, [shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
        fresh = prompts.fresh_rows
        if fresh:
            offsets, longest = prompts.fresh_offsets, prompts.fresh_longest
            out[:fresh] = causal_attention(q[:fresh], k[:fresh], v[:fresh], offsets, offsets, longest, longest, None)
        if fresh < prompts.rows:
            stored = self._cache.memory[prompts.blocks, index].transpose(0, 1)
            keys, values = (half.reshape(-1, shape.kv_heads, shape.head_dim) for half in stored)
            out[fresh:] = causal_attention(
                q[fresh:], keys, values, prompts.query_offsets, prompts.key_offsets, prompts.query_longest,
                prompts.key_longest, prompts.key_lengths,
            )  # fmt: skip


def _products(shape: Shape, qkv_bias: bool) -> dict[str, tuple[int, int, int]]:
    """The matrix-vector products of a model: rows and columns of the matrix, and what is done around it."""
    width = shape.heads * shape.head_dim
    return {
        "qkv": (shape.qkv, shape.hidden, NORM | BIAS if qkv_bias else NORM),
        "o": (shape.hidden, width, RESIDUAL),
        "gate_up": (2 * shape.intermediate, shape.hidden, NORM | SILU),
        "down": (shape.hidden, shape.intermediate, RESIDUAL),
        "head": (shape.vocabulary, shape.hidden, NORM | FLOAT | PICK),
    }


def _together(rows: int, shape: Shape, fused: bool) -> int:
    return 1 if fused or rows <= ROWS_OF_GEMV else shape.heads_together


def splits_for(rows: int, shape: Shape, fused: bool) -> int:
    """Parts of a row's keys that blocks look at side by side: many where there are few rows to keep the card busy."""
    return max(1, min(MOST_SPLITS, MIN_BLOCKS // (rows * shape.heads // _together(rows, shape, fused))))


def interleave(layer: Layer) -> None:
    """Puts each row of the gate beside its row of up, so that one warp computes both. Of a layer once."""
    gate, up = layer.gate_up.chunk(2)
    layer.gate_up = torch.stack([gate, up], dim=1).reshape(layer.gate_up.shape)


def matrix_product_f32(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """`x @ weight.T` of bfloat16 matrices, not rounded to bfloat16 again."""
    if x.is_cuda:
        torch.mm(x, weight.t(), out_dtype=torch.float32, out=out)
    else:
        torch.mm(x.float(), weight.float().t(), out=out)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, k_offsets: Tensor, q_longest: int, k_longest: int,
    k_lengths: Tensor | None,
) -> Tensor:  # fmt: skip
    """Attention of several sequences, `[rows, heads, head_dim]`, whose last queries and last keys belong together."""
    if q.is_cuda:
        found: Tensor = torch.ops.aten._flash_attention_forward(
            q, k, v, q_offsets, k_offsets, q_longest, k_longest, 0.0, True, False, seqused_k=k_lengths
        )[0]
        return found
    out = torch.empty_like(q)
    for (begin, end), (start, stop), at in zip(
        _pairs(q_offsets), _pairs(k_offsets), range(len(q_offsets)), strict=False
    ):
        length = stop - start if k_lengths is None else int(k_lengths[at])
        visible = torch.arange(length) <= torch.arange(length - (end - begin), length)[:, None]
        keys, values = (half[start : start + length].transpose(0, 1)[None] for half in (k, v))
        out[begin:end] = torch.nn.functional.scaled_dot_product_attention(
            q[begin:end].transpose(0, 1)[None], keys, values, attn_mask=visible, enable_gqa=True
        )[0].transpose(0, 1)
    return out


def _pairs(offsets: Tensor) -> Sequence[tuple[int, int]]:
    numbers = offsets.tolist()
    return list(itertools.pairwise(numbers))
