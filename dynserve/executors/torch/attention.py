"""The paged KV cache as one tensor, and attention over it by torch's own operations; `cuda/` has kernels of its own.

Layout: `[blocks, layers, 2 (keys, values), block_size, kv_heads, head_dim]`. A block is contiguous over all layers, so
that a hand-off moves it as one run of bytes straight out of, and into, this tensor.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Collection, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dynserve.executors.scheduler import Slice
from dynserve.executors.transceiver import HostBlocks

PIECE_BYTES = 16 << 20  # upper bound of one piece of a transfer through the host's memory
COPY_POLL = 0.0002  # seconds between checks that a copy from the device has ended


class Prefill(NamedTuple):
    """Rows `first:last` of the batch are consecutive tokens of one sequence whose KV is in `blocks` (`[n]`)."""

    first: int
    last: int
    blocks: Tensor
    length: int  # tokens of the sequence up to and including the last row
    mask: Tensor | None  # [rows, length]; None when the rows are the whole sequence
    window_mask: Tensor | None  # the same for layers with sliding-window attention


class Decode(NamedTuple):
    """Rows `first:last` hold one token each, of as many different sequences."""

    first: int
    last: int
    blocks: Tensor  # [rows, most blocks]; short sequences are padded with block 0
    mask: Tensor  # [rows, 1, 1, most blocks * block_size]
    window_mask: Tensor  # the same for layers with sliding-window attention


class StepLayout(NamedTuple):
    """One step's batch of `T` tokens: the prefilling sequences come first, then the decoding ones."""

    tokens: Tensor  # [T]
    positions: Tensor  # [T]
    block_of: Tensor  # [T] block that each token's KV is written to
    offset_of: Tensor  # [T] offset within that block
    prefills: list[Prefill]
    decode: Decode | None
    sampling: Tensor  # rows that yield a next token
    whole: list[tuple[int, int]]  # slices whose request needs every row: index in the step's work, first row


class KvCache(HostBlocks):
    """The memory of `num_blocks` KV blocks; it is also the `BlockStore` of the transceiver."""

    def __init__(
        self, *, num_blocks: int, block_size: int, num_layers: int, kv_heads: int, head_dim: int,
        dtype: torch.dtype, device: torch.device, model: str, window: int = 0, windowed: Collection[int] = (),
    ) -> None:  # fmt: skip
        shape = (num_blocks, num_layers, 2, block_size, kv_heads, head_dim)
        self.num_blocks = num_blocks
        # zeros, not empty: padding is masked to a weight of 0, and 0 times a NaN found in old memory is a NaN
        self.memory = torch.zeros(shape, dtype=dtype, device=device)
        self._block_size, self._kv_heads, self._head_dim = block_size, kv_heads, head_dim
        self._device, self._window, self._windowed = device, window, windowed
        # on a GPU, steps read and write the cache in order on this stream; code on other streams waits for it
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.block_bytes = self.memory[0].numel() * self.memory.element_size()
        self.layout = f"{model}:{str(dtype).removeprefix('torch.')}:{num_layers}x2x{block_size}x{kv_heads}x{head_dim}"
        # bytes of the whole cache, sliced per block; only host memory can be viewed this way
        self._bytes = _bytes_of(self.memory) if device.type == "cpu" else None

    def view(self, block: int) -> memoryview:
        """Returns the block's bytes, writable and without a copy; the cache must be in the host's memory."""
        assert self._bytes is not None
        return self._bytes[block * self.block_bytes : (block + 1) * self.block_bytes]

    async def outgoing(self, blocks: Sequence[int]) -> AsyncGenerator[memoryview]:
        if self.stream is None:
            async for view in super().outgoing(blocks):
                yield view
            return
        for some in self._pieces(blocks):
            host = self._pinned(len(some))
            with torch.cuda.stream(self.stream):
                host.copy_(self.gather(self.index(some)), non_blocking=True)
                copied = self.stream.record_event()
            while not copied.query():
                await asyncio.sleep(COPY_POLL)
            yield _bytes_of(host)

    async def incoming(self, blocks: Sequence[int]) -> AsyncGenerator[memoryview]:
        if self.stream is None:
            async for view in super().incoming(blocks):
                yield view
            return
        for some in self._pieces(blocks):
            host = self._pinned(len(some))
            yield _bytes_of(host)
            with torch.cuda.stream(self.stream):  # readers use this stream, after the copy
                self.scatter(self.index(some), host.to(self._device, non_blocking=True))

    def index(self, blocks: Sequence[int]) -> Tensor:
        """Copies block numbers to the device; the host does not wait for the copy."""
        host = torch.tensor(blocks, dtype=torch.long, pin_memory=self.stream is not None)
        return host.to(self._device, non_blocking=True)

    def gather(self, blocks: Tensor, out: Tensor | None = None) -> Tensor:
        """Copies the blocks into one contiguous tensor, `[n, ...]`, on the current stream."""
        return torch.index_select(self.memory, 0, blocks, out=out)

    def scatter(self, blocks: Tensor, content: Tensor) -> None:
        """Copies `content`, `[n, ...]`, into the blocks; the reverse of `gather`."""
        self.memory.index_copy_(0, blocks, content)

    def _pieces(self, blocks: Sequence[int]) -> Iterator[Sequence[int]]:
        size = max(1, PIECE_BYTES // self.block_bytes)
        for at in range(0, len(blocks), size):
            yield blocks[at : at + size]

    def _pinned(self, blocks: int) -> Tensor:
        return torch.empty((blocks, *self.memory.shape[1:]), dtype=self.memory.dtype, pin_memory=True)

    def write(self, layer: int, layout: StepLayout, keys: Tensor, values: Tensor) -> None:
        """Stores `[T, kv_heads, head_dim]` keys and values of this step."""
        self.memory[layout.block_of, layer, 0, layout.offset_of] = keys
        self.memory[layout.block_of, layer, 1, layout.offset_of] = values

    def attend(self, layer: int, layout: StepLayout, q: Tensor) -> Tensor:
        """Returns causal attention of `[T, heads, head_dim]` queries, each over its own sequence, in the same shape."""
        out = torch.empty_like(q)
        windowed = layer in self._windowed
        for prefill in layout.prefills:
            rows = slice(prefill.first, prefill.last)
            k = self._gather(layer, 0, prefill.blocks)[: prefill.length]
            v = self._gather(layer, 1, prefill.blocks)[: prefill.length]
            mask = prefill.window_mask if windowed else prefill.mask
            out[rows] = F.scaled_dot_product_attention(
                q[rows].transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None],
                attn_mask=mask, is_causal=mask is None, enable_gqa=True,
            )[0].transpose(0, 1)  # fmt: skip
        if layout.decode is not None:
            rows = slice(layout.decode.first, layout.decode.last)
            k = self._gather(layer, 0, layout.decode.blocks)
            v = self._gather(layer, 1, layout.decode.blocks)
            out[rows] = F.scaled_dot_product_attention(
                q[rows][:, :, None], k.transpose(1, 2), v.transpose(1, 2), enable_gqa=True,
                attn_mask=layout.decode.window_mask if windowed else layout.decode.mask,
            )[:, :, 0]  # fmt: skip
        return out

    def lay_out(self, work: Sequence[Slice]) -> tuple[StepLayout, list[int]]:
        """Returns the tensors of a step and, for each sampling row, the index of its slice in `work`."""
        order = sorted(range(len(work)), key=lambda i: work[i].size == 1)
        tokens: list[int] = []
        positions: list[int] = []
        block_of: list[int] = []
        prefills: list[Prefill] = []
        sampling: list[int] = []
        owners: list[int] = []
        decoding: list[Slice] = []
        whole: list[tuple[int, int]] = []
        size = self._block_size
        for i in order:
            sequence, start, count, samples = work[i]
            first = len(tokens)
            end = start + count
            tokens += sequence.tokens[start:end]
            positions += range(start, end)
            block_of += [sequence.blocks[position // size] for position in range(start, end)]
            if sequence.whole and not sequence.generated:
                whole.append((i, first))
            if samples:
                sampling.append(len(tokens) - 1)
                owners.append(i)
            if count == 1:
                decoding.append(work[i])
            else:
                blocks = torch.tensor(sequence.blocks[: -(-end // size)], device=self._device)
                mask = self._chunk_mask(start, count, 0)
                recent = self._chunk_mask(start, count, self._window) if self._window else mask
                prefills.append(Prefill(first, len(tokens), blocks, end, mask, recent))
        place = torch.tensor(positions, device=self._device)
        layout = StepLayout(
            torch.tensor(tokens, device=self._device),
            place,
            torch.tensor(block_of, device=self._device),
            place % size,
            prefills,
            self._decode(decoding, len(tokens)),
            torch.tensor(sampling, device=self._device, dtype=torch.long),
            whole,
        )
        return layout, owners

    def _decode(self, work: list[Slice], total: int) -> Decode | None:
        if not work:
            return None
        counts = [slice_.start // self._block_size + 1 for slice_ in work]
        width = max(counts)
        tables = [s.sequence.blocks[:n] + [0] * (width - n) for s, n in zip(work, counts, strict=True)]
        lengths = torch.tensor([slice_.start + 1 for slice_ in work], device=self._device)
        keys = torch.arange(width * self._block_size, device=self._device)
        mask = (keys < lengths[:, None])[:, None, None]
        recent = mask & (keys >= lengths[:, None] - self._window)[:, None, None] if self._window else mask
        return Decode(total - len(work), total, torch.tensor(tables, device=self._device), mask, recent)

    def _chunk_mask(self, start: int, count: int, window: int) -> Tensor | None:
        """`window` is 0 for layers that attend to all earlier tokens."""
        if start == 0 and (not window or count <= window):
            return None
        rows = torch.arange(start, start + count, device=self._device)[:, None]
        keys = torch.arange(start + count, device=self._device)
        mask = keys <= rows
        return mask & (keys > rows - window) if window else mask

    def _gather(self, layer: int, which: int, blocks: Tensor) -> Tensor:
        """Returns the contents of `[..., n]` blocks as `[..., n * block_size, kv_heads, head_dim]`."""
        found = self.memory[:, layer, which][blocks]
        return found.view(*blocks.shape[:-1], -1, self._kv_heads, self._head_dim)


def _bytes_of(tensor: Tensor) -> memoryview:
    """Returns the bytes of a tensor in the host's memory, writable and without a copy."""
    return tensor.view(-1).view(torch.uint8).numpy().data
