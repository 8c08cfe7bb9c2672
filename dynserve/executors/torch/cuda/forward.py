"""A model's forward pass over the rows of a step, in kernels and matrix products that a CUDA graph can hold.

A row is one token of one sequence. All buffers keep their addresses, so that captured graphs stay valid.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dynserve.executors.torch.attention import KvCache
from dynserve.executors.torch.cuda.kernels import (
    BIAS,
    BLOCKS,
    FLOAT,
    NORM,
    PICK,
    RESIDUAL,
    SILU,
    Launcher,
    Product,
    Shape,
    attend_name,
)
from dynserve.executors.torch.cuda.packet import Packet
from dynserve.executors.torch.model import Layer, Transformer
from dynserve.executors.torch.rope import rotary_table

FEW = 8  # rows up to which own kernels multiply matrices; with more, cuBLAS does
SHORT = 512  # keys of a row up to which one block processes all of them
MAX_BESIDE = 128  # rows of a step with whole prompts that are not part of a prompt
LONG = 2048  # tokens of a prompt from which cuDNN's attention is faster than FlashAttention 2 (H100: 60 us against 72)
MAX_KEYS = 65_536  # copied out of the cache at once, for continued prompts; those of a longer prompt are copied alone
MAX_SPLITS = 32  # parts that the keys of a longer row are split into


class ContinuedPrompts(NamedTuple):
    """Rows of prompts whose first keys are in the cache already. Offsets are cumulative, on the device, int32."""

    rows: int
    query_offsets: Tensor
    query_longest: int
    blocks: Tensor  # [n] of all prompts, one after the other
    key_offsets: Tensor  # in tokens, up to the end of each prompt's last block
    key_lengths: Tensor  # in tokens, without the unused end of the last block
    key_longest: int


class Prompts(NamedTuple):
    """The prompt rows of a long step, which come first in it: fresh prompts, whose keys are all among the rows, then
    continued ones, in groups whose keys together fit the memory that is reserved for them."""

    fresh_sizes: list[int]
    fresh_offsets: Tensor
    continued: list[ContinuedPrompts]

    @property
    def rows(self) -> int:
        return sum(self.fresh_sizes) + sum(group.rows for group in self.continued)


class Forward:
    """A model's layers and head. `rows` is the packet of `slots`, `positions`, `sources`, `tokens` and `changes`."""

    def __init__(
        self, model: Transformer, cache: KvCache, shape: Shape, launcher: Launcher, *, max_rows: int, slots: int,
        table_width: int, max_samples: int, max_alone: int,
    ) -> None:  # fmt: skip
        self._model, self._cache, self._shape, self._launch = model, cache, shape, launcher.launch
        self._products = products(shape, model.config.qkv_bias)
        device = model.device
        for layer in model.layers:
            interleave(layer)

        def buffer(rows: int, width: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.zeros(rows, width, dtype=dtype, device=device)

        self._rope = torch.cat(rotary_table(model.config.rope), dim=-1).to(device)
        self.tables = torch.zeros(slots, table_width, dtype=torch.int32, device=device)
        self.x, self._normed = buffer(max_rows, shape.hidden), buffer(max_rows, shape.hidden)
        self._qkv = buffer(max_rows, shape.qkv)
        self._attended = buffer(max_rows, shape.heads * shape.head_dim)
        self._gate_up, self._mid = buffer(max_rows, 2 * shape.intermediate), buffer(max_rows, shape.intermediate)
        self._picked = buffer(max_samples, shape.hidden)
        self.logits = buffer(max_samples, shape.vocabulary, torch.float32)
        self.drawn = torch.zeros(max_samples, dtype=torch.int32, device=device)
        max_parts = max(rows * splits_for(rows, shape, short=False) for rows in range(1, max_alone + 1))
        self._parts = torch.zeros(max_parts * shape.heads * (shape.head_dim + 2), dtype=torch.float32, device=device)
        self._arrived = torch.zeros(max_alone * shape.heads, dtype=torch.int32, device=device)

    @staticmethod
    def kernel_names(shape: Shape, qkv_bias: bool) -> list[str]:
        """Returns the names of all kernels that a `Forward` launches."""
        names = [attend_name(1, True), attend_name(1, False), attend_name(shape.heads_together, False)]
        names += [p.kernel(columns)[0] for columns in (1, FEW) for p in products(shape, qkv_bias).values()]
        return [*names, "begin", "rope_write", "rms_norm", "silu_mul"]

    def begin(self, rows: Packet, count: int) -> None:
        self._launch(
            "begin", (count, 1, 1), 128, rows["changes"], self.tables, self.tables.shape[1], rows["sources"],
            rows["tokens"], self.drawn, self._model.embedding, self.x,
        )  # fmt: skip

    def layers(self, rows: Packet, count: int, *, alone: bool, short: bool) -> None:
        """Maps embeddings to hidden states, both in `x[:count]`, and writes keys and values into the cache. `alone`: every
        row is a sequence of its own. `short`: no row has more than `SHORT` keys."""
        for index, layer in enumerate(self._model.layers):
            if count <= FEW:
                self._layer_of_few(layer, index, rows, count, alone, short)
            else:
                self._layer(layer, index, rows, count, short, None)

    def layers_with_prompts(self, rows: Packet, count: int) -> None:
        """Does the same for a step that begins with whole prompts: `offsets` holds where each begins and ends. `beside`
        lists the other rows, whose attention is computed row by row, and is padded with -1."""
        for index, layer in enumerate(self._model.layers):
            self._layer(layer, index, rows, count, False, None, prompts=True)

    def long_layers(self, rows: Packet, count: int, prompts: Prompts) -> None:
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True):
            for index, layer in enumerate(self._model.layers):
                self._layer(layer, index, rows, count, False, prompts)

    def head(self, picks: Tensor, count: int) -> None:
        """Computes `logits[:count]`, float32, of the rows in `picks`."""
        model = self._model
        if count <= FEW:
            self._product("head", model.head, self.x, self.logits, count, norm=model.norm, pick=picks)
            return
        self._launch("rms_norm", (count, 1, 1), 256, self.x, model.norm, self._picked, picks)
        matrix_product_f32(self._picked[:count], model.head, self.logits[:count])

    def _product(
        self, name: str, weight: Tensor, x: Tensor, out: Tensor, columns: int, *, bias: Tensor | None = None,
        norm: Tensor | None = None, pick: Tensor | None = None, early: bool = True,
    ) -> None:  # fmt: skip
        product = self._products[name]
        kernel, blocks = product.kernel(columns)
        own = () if columns == 1 else (columns,)
        self._launch(kernel, (blocks, 1, 1), 256, weight, x, out, product.n, *own, bias, norm, pick, early=early)

    def _layer_of_few(self, layer: Layer, index: int, rows: Packet, count: int, alone: bool, short: bool) -> None:
        x, qkv, attended, mid = self.x, self._qkv, self._attended, self._mid
        # the first kernel starts after all of the step's data is written, so the others may read it before they wait
        self._product("qkv", layer.qkv, x, qkv, count, bias=layer.qkv_bias, norm=layer.attn_norm, early=index > 0)
        if not alone:
            self._rope_write(layer, index, rows, count)
        self._attend(layer, index, rows, 0, count, fused=alone, short=short)
        self._product("o", layer.o, attended, x, count)
        self._product("gate_up", layer.gate_up, x, mid, count, norm=layer.mlp_norm)
        self._product("down", layer.down, mid, x, count)

    def _layer(
        self,
        layer: Layer,
        index: int,
        rows: Packet,
        count: int,
        short: bool,
        long: Prompts | None,
        prompts: bool = False,
    ) -> None:
        shape, launch = self._shape, self._launch
        x, normed, qkv, attended = self.x[:count], self._normed[:count], self._qkv[:count], self._attended[:count]
        launch("rms_norm", (count, 1, 1), 256, x, layer.attn_norm, normed, None, early=index > 0)
        if layer.qkv_bias is None:
            torch.mm(normed, layer.qkv.t(), out=qkv)
        else:
            torch.addmm(layer.qkv_bias, normed, layer.qkv.t(), out=qkv)
        self._rope_write(layer, index, rows, count)
        first = 0
        if long is not None:
            self._attend_prompts(index, long)
            first = long.rows
        if prompts:
            attended.copy_(self._whole_prompts(qkv, rows["offsets"], count))
            self._attend(layer, index, rows, 0, MAX_BESIDE, fused=False, short=True, listed=rows["beside"])
        elif first < count:
            self._attend(layer, index, rows, first, count - first, fused=False, short=short)
        x.addmm_(attended, layer.o.t())
        launch("rms_norm", (count, 1, 1), 256, x, layer.mlp_norm, normed, None, early=True)
        torch.mm(normed, layer.gate_up.t(), out=self._gate_up[:count])
        blocks = -(-shape.intermediate // 1024)
        launch("silu_mul", (count, blocks, 1), 256, self._gate_up, self._mid, early=True)
        x.addmm_(self._mid[:count], layer.down.t())

    def _rope_write(self, layer: Layer, index: int, rows: Packet, count: int) -> None:
        self._launch(
            "rope_write", (count, 1, 1), 256, self._qkv, self._cache.memory, self.tables, self.tables.shape[1],
            rows["slots"], rows["positions"], self._rope, layer.q_norm, layer.k_norm, index, early=True,
        )  # fmt: skip

    def _attend(
        self,
        layer: Layer,
        index: int,
        rows: Packet,
        first: int,
        count: int,
        *,
        fused: bool,
        short: bool,
        listed: Tensor | None = None,
    ) -> None:
        """Computes attention of the rows from `first` on, each over its own sequence up to itself."""
        shape = self._shape
        together = _together(count, shape)
        self._launch(
            attend_name(together, fused), (shape.heads // together, count, splits_for(count, shape, short=short)), 256,
            self._qkv[first:], self._cache.memory, self.tables, self.tables.shape[1], rows["slots"][first:],
            rows["positions"][first:], self._rope, layer.q_norm, layer.k_norm, self._attended[first:], self._parts,
            self._arrived, index, listed, early=True,
        )  # fmt: skip

    def _whole_prompts(self, qkv: Tensor, offsets: Tensor, count: int) -> Tensor:
        """Returns the attention of whole prompts, `[count, heads * head_dim]`; the values of other rows are meaningless."""
        q, k, v = self._heads(qkv)
        return causal_attention(q, k, v, offsets, offsets, count, count, None).view(count, -1)

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shape = self._shape
        rows = qkv.view(len(qkv), -1, shape.head_dim)
        ends = shape.heads, shape.heads + shape.kv_heads
        return rows[:, : ends[0]], rows[:, ends[0] : ends[1]], rows[:, ends[1] :]

    def _attend_prompts(self, index: int, prompts: Prompts) -> None:
        shape = self._shape
        out = self._attended[: prompts.rows].view(prompts.rows, shape.heads, shape.head_dim)
        q, k, v = self._heads(self._qkv[: prompts.rows])
        sizes, offsets, fresh = prompts.fresh_sizes, prompts.fresh_offsets, sum(prompts.fresh_sizes)
        if sizes and min(sizes) >= LONG:
            for begin, size in zip(itertools.accumulate(sizes, initial=0), sizes, strict=False):
                _attend_whole(*(part[begin : begin + size] for part in (q, k, v, out)))
        elif sizes:
            longest = max(sizes)
            out[:fresh] = causal_attention(q[:fresh], k[:fresh], v[:fresh], offsets, offsets, longest, longest, None)
        first = fresh
        for group in prompts.continued:
            last = first + group.rows
            stored = self._cache.memory[group.blocks, index].transpose(0, 1)
            keys, values = (half.reshape(-1, shape.kv_heads, shape.head_dim) for half in stored)
            out[first:last] = causal_attention(
                q[first:last], keys, values, group.query_offsets, group.key_offsets, group.query_longest,
                group.key_longest, group.key_lengths,
            )  # fmt: skip
            first = last


def products(shape: Shape, qkv_bias: bool) -> dict[str, Product]:
    """Returns the matrix products of a model, by name."""
    width = shape.heads * shape.head_dim
    return {
        "qkv": Product(shape.qkv, shape.hidden, NORM | BIAS if qkv_bias else NORM),
        "o": Product(shape.hidden, width, RESIDUAL),
        "gate_up": Product(2 * shape.intermediate, shape.hidden, NORM | SILU),
        "down": Product(shape.hidden, shape.intermediate, RESIDUAL),
        "head": Product(shape.vocabulary, shape.hidden, NORM | FLOAT | PICK),
    }


def _together(rows: int, shape: Shape) -> int:
    """Returns the number of query heads per block: one, if there are few rows."""
    return 1 if rows <= FEW else shape.heads_together


def splits_for(rows: int, shape: Shape, *, short: bool) -> int:
    """Returns the parts of a row's keys that blocks process in parallel: more if few rows would leave the GPU idle."""
    if short:
        return 1
    return max(4, min(MAX_SPLITS, 2 * BLOCKS // (rows * shape.heads // _together(rows, shape))))


def interleave(layer: Layer) -> None:
    """Puts each row of the gate beside its row of up, so that one warp computes both. Called once per layer."""
    gate, up = layer.gate_up.chunk(2)
    layer.gate_up = torch.stack([gate, up], dim=1).reshape(layer.gate_up.shape)


def matrix_product_f32(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """Computes `x @ weight.T` of bfloat16 matrices in float32, without rounding the result to bfloat16."""
    if x.is_cuda:
        torch.mm(x, weight.t(), out_dtype=torch.float32, out=out)
    else:
        torch.mm(x.float(), weight.float().t(), out=out)


def _attend_whole(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """Computes causal attention of a whole sequence, `[rows, heads, head_dim]`, with the fastest library for long ones."""
    queries, keys, values = (part.transpose(0, 1)[None] for part in (q, k, v))
    attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
    out.copy_(attended[0].transpose(0, 1))


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, k_offsets: Tensor, q_longest: int, k_longest: int,
    k_lengths: Tensor | None,
) -> Tensor:  # fmt: skip
    """Returns causal attention of several sequences, `[rows, heads, head_dim]`. Each last query is at the last key."""
    if q.is_cuda:
        found: Tensor = torch.ops.aten._flash_attention_forward(
            q, k, v, q_offsets, k_offsets, q_longest, k_longest, 0.0, True, False, seqused_k=k_lengths
        )[0]
        return found
    out = torch.empty_like(q)
    for (begin, end), (start, stop), at in zip(
        _pairs(q_offsets), _pairs(k_offsets), range(len(q_offsets)), strict=False
    ):
        if begin == end:
            continue
        length = stop - start if k_lengths is None else int(k_lengths[at])
        visible = torch.arange(length) <= torch.arange(length - (end - begin), length)[:, None]
        keys, values = (half[start : start + length].transpose(0, 1)[None] for half in (k, v))
        out[begin:end] = F.scaled_dot_product_attention(
            q[begin:end].transpose(0, 1)[None], keys, values, attn_mask=visible, enable_gqa=True
        )[0].transpose(0, 1)
    return out


def _pairs(offsets: Tensor) -> Sequence[tuple[int, int]]:
    numbers = offsets.tolist()
    return list(itertools.pairwise(numbers))
