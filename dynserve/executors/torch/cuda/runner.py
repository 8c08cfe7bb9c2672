"""Steps on a GPU: laid out on the host, computed in CUDA graphs, sampled on the device, and read one step later.

The size of a step decides how the model computes it:

    up to 8 tokens     own matrix products, five or six kernels a layer    a graph for each of some sizes
    up to 512 tokens   cuBLAS, attention row by row                        a graph for each of some sizes
    up to 2,048        cuBLAS, whole prompts by FlashAttention             a graph for each of some sizes
    more               cuBLAS, prompts by FlashAttention or cuDNN          no graph: the device is busy anyway
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynserve.executors.scheduler import Sampled, SequenceState, Slice
from dynserve.executors.scheduler import Sequence as _Sequence
from dynserve.executors.torch.attention import KvCache
from dynserve.executors.torch.cuda.drawing import Drawing, Drawn
from dynserve.executors.torch.cuda.forward import FEW, MAX_BESIDE, MAX_KEYS, SHORT, ContinuedPrompts, Forward, Prompts
from dynserve.executors.torch.cuda.kernels import Launcher, Shape
from dynserve.executors.torch.cuda.packet import Packet
from dynserve.executors.torch.model import Transformer
from dynserve.executors.torch.stepping import DeviceStep
from dynserve.executors.torch.whole import observe_prompt

log = logging.getLogger(__name__)

# step sizes, in rows, that graphs are captured for
SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 384, 512)
SIZES_WITH_PROMPTS = (768, 1024, 1280, 1536, 1792, 2048)  # of steps with whole prompts among the rows
MAX_PROMPTS = 32  # per such step
MAX_CHANGES = 1024  # of block tables, per step's packet


class Capture:
    """CUDA graphs by name. A device without graphs runs the functions themselves."""

    def __init__(self, device: torch.device) -> None:
        self._on = device.type == "cuda"
        self._graphs: dict[Any, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, name: Any, launch: Callable[[], None]) -> None:
        if (graph := self._graphs.get(name)) is not None:
            graph.replay()
        else:
            launch()

    def keep(self, name: Any, launch: Callable[[], None]) -> None:
        if not self._on:
            return
        launch()  # libraries initialise themselves in the first call, which must not be captured
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=torch.cuda.current_stream()):
            launch()
        self._pool = self._pool or graph.pool()
        self._graphs[name] = graph


class _Slot:
    """A sequence's row of the device's block tables, and its contents."""

    def __init__(self, number: int, sequence: _Sequence) -> None:
        self.number, self.sequence = number, sequence
        self.blocks: list[int] = []


class _Rows(NamedTuple):
    """The slices of a step that sample: the last row of each, and the source of its last token."""

    picks: list[int]
    sources: list[int]  # row of the last step's tokens, or -1


class CudaStep:
    """A step that the device computes, or has computed. Its work may be in another order than in `begin`."""

    def __init__(self, work: Sequence[Slice], drawn: Drawn | None, wait: Callable[[], None]) -> None:
        self.work, self._drawn, self._wait = work, drawn, wait
        self.row_of = {id(s.sequence): row for row, s in enumerate(s for s in work if s.samples)}

    def result(self) -> list[list[Sampled]]:
        self._wait()
        found = iter(self._drawn.read() if self._drawn is not None else ())
        return [[next(found)] if s.samples else [] for s in self.work]


class CudaRunner:
    """Steps of one model on one GPU. `max_rows` and `max_samples` are the most tokens and sequences of a step."""

    overlaps = True

    def __init__(
        self, model: Transformer, cache: KvCache, shape: Shape, launcher: Launcher, *, max_rows: int, max_samples: int,
        max_seq_len: int,
    ) -> None:  # fmt: skip
        self.launcher = launcher
        self._model, self._device, self._block, self._stream = model, model.device, shape.block, cache.stream
        slots = 2 * max_samples  # ended sequences keep theirs until none is free
        width = -(-max_seq_len // shape.block) + 1
        self._max_samples = _padded(max_samples)
        max_rows, max_samples = max(max_rows, SIZES_WITH_PROMPTS[-1]), self._max_samples
        self._forward = Forward(
            model,
            cache,
            shape,
            launcher,
            max_rows=max_rows,
            slots=slots,
            table_width=width,
            max_samples=max_samples,
            max_alone=max(SIZES_WITH_PROMPTS[-1], max_samples),
        )
        self._drawing = Drawing(self._forward, launcher, shape.vocabulary, max_samples, self._device)
        self._short, self._long = self._packet(SIZES[-1]), self._packet(max_rows)
        self._free = list(range(slots))
        self._slots: dict[int, _Slot] = {}
        self._capture = Capture(self._device)

    def capture(self, max_size: int) -> None:
        """Captures the graphs for steps of up to `max_size` tokens. Logs the progress."""
        began = logged = time.monotonic()
        plans: list[tuple[int, Callable[[int], None]]] = [
            *((size, self._capture_with_prompts) for size in reversed(SIZES_WITH_PROMPTS) if size <= max_size),
            *((size, self._capture_size) for size in reversed(SIZES) if size <= max_size),
        ]
        with torch.inference_mode(), self._on_stream():
            for done, (size, capture) in enumerate(plans):  # the largest first: the others then use its memory
                capture(size)
                if time.monotonic() - logged > 1.0:
                    logged = time.monotonic()
                    log.info("captured CUDA graphs for %d of %d step sizes", done + 1, len(plans))
        log.info("captured %d CUDA graphs in %.1f s", len(self._capture), time.monotonic() - began)

    def _capture_with_prompts(self, size: int) -> None:
        self._idle_rows(self._long, size)
        self._capture.keep(("prompts", size), partial(self._layers_with_prompts, size))

    def _capture_size(self, size: int) -> None:
        self._idle_rows(self._short, size)
        for short, alone in itertools.product((True, False), repeat=2):
            if alone or size <= FEW:
                self._capture.keep(("layers", size, alone, short), partial(self._layers, size, alone, short))
            if alone and size <= self._max_samples:
                self._capture.keep(("decode", size, short), partial(self._decode, size, short))
        if size <= self._max_samples:
            self._capture.keep(("head", size), partial(self._head, size))

    def enter(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

    @torch.inference_mode()
    def begin(self, work: Sequence[Slice], before: DeviceStep | None) -> CudaStep:
        rows_before = before.row_of if isinstance(before, CudaStep) else {}
        with self._on_stream():
            total = sum(s.size for s in work)
            if total > SIZES[-1]:
                work = sorted(work, key=_part)
                laid = self._run_prompts(work, rows_before, total)
                self._prepare(work, laid)
            else:
                size = _padded(total)
                laid = self._lay_out(self._short, work, rows_before, size)
                alone, short = len(work) == total, all(s.start + s.size <= SHORT for s in work)
                simple = self._prepare(work, laid)
                if simple and alone and len(laid.picks) == total and not any(map(_needs_all_rows, work)):
                    self._capture.run(("decode", size, short), partial(self._decode, size, short))
                    return CudaStep(work, self._drawing.drawn(total), self._mark())
                alone = alone or size > FEW
                self._capture.run(("layers", size, alone, short), partial(self._layers, size, alone, short))
            self._observe_prompts(work)
            return CudaStep(work, self._draw(work, laid) if laid.picks else None, self._mark())

    def _run_prompts(self, work: Sequence[Slice], before: dict[int, int], total: int) -> _Rows:
        """Runs the layers for a step of many tokens, whose work is sorted by `_part`."""
        fresh = sum(s.size for s in work if _part(s) == 0)
        number = sum(_part(s) == 0 for s in work)
        short = all(s.start + s.size <= 4 * SHORT for s in work[number:])
        if total <= SIZES_WITH_PROMPTS[-1] and 0 < number <= MAX_PROMPTS and total - fresh <= MAX_BESIDE and short:
            size = next(size for size in SIZES_WITH_PROMPTS if size >= total)
            laid = self._lay_out(self._long, work, before, size, fresh=[s.size for s in work[:number]])
            self._capture.run(("prompts", size), partial(self._layers_with_prompts, size))
            return laid
        laid = self._lay_out(self._long, work, before, total)
        self._forward.begin(self._long, total)
        self._forward.long_layers(self._long, total, self._prompts(work))
        return laid

    def _layers_with_prompts(self, size: int) -> None:
        self._forward.begin(self._long, size)
        self._forward.layers_with_prompts(self._long, size)

    def _decode(self, size: int, short: bool) -> None:
        """Runs a whole step in which each row is a sequence of its own and needs a plain draw only."""
        self._layers(size, True, short)
        self._head(size)
        self._drawing.choose(size)

    def _layers(self, size: int, alone: bool, short: bool) -> None:
        self._forward.begin(self._short, size)
        self._forward.layers(self._short, size, alone=alone, short=short)

    def _head(self, size: int) -> None:
        self._forward.head(self._drawing.packet["picks"], size)

    def _prepare(self, work: Sequence[Slice], laid: _Rows) -> bool:
        """Sends the step's sampling fields. Returns True if its tokens can be drawn from the unchanged logits."""
        if not laid.picks:
            return False
        sampling = [s for s in work if s.samples]
        padded = _padded(len(sampling))
        positions = [s.start + s.size for s in sampling]
        return self._drawing.prepare([s.sequence for s in sampling], positions, laid.picks, padded)

    def _draw(self, work: Sequence[Slice], laid: _Rows) -> Drawn:
        sequences = [s.sequence for s in work if s.samples]
        size = _padded(len(sequences))
        self._capture.run(("head", size), partial(self._head, size))
        return self._drawing.draw(sequences, laid.sources)

    def _observe_prompts(self, work: Sequence[Slice]) -> None:
        """Serves the requests that need every position of their prompt."""
        first = 0
        for slice_ in work:
            if _needs_all_rows(slice_):
                observe_prompt(self._model, self._forward.x[first : first + slice_.size], slice_)
            first += slice_.size

    def _on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _mark(self) -> Callable[[], None]:
        if self._device.type != "cuda":
            return lambda: None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event.synchronize

    # laying out

    def _packet(self, rows: int) -> Packet:
        i = torch.int32
        names = {"slots": (rows, i), "positions": (rows, i), "sources": (rows, i), "tokens": (rows, i)}
        names |= {"beside": (MAX_BESIDE, i), "offsets": (MAX_PROMPTS + 1, i)}
        return Packet(names | {"changes": (1 + 3 * MAX_CHANGES, i)}, self._device)

    def _idle_rows(self, packet: Packet, size: int) -> None:
        host = packet.fill()
        host["positions"][:size] = host["sources"][:size] = -1
        host["beside"][:] = -1
        host["offsets"][:] = 0
        host["tokens"][:size] = host["slots"][:size] = 0
        host["changes"][0] = 0
        packet.send()
        self._drawing.prepare([], [], [], min(size, self._max_samples))

    def _lay_out(
        self, packet: Packet, work: Sequence[Slice], before: dict[int, int], padded: int, fresh: Sequence[int] = ()
    ) -> _Rows:
        """Fills and sends the packet, in the order of `work`. `fresh`: the sizes of the whole prompts, which come first."""
        slots: list[int] = []
        positions: list[int] = []
        tokens: list[int] = []
        row_sources: list[int] = []
        changes: list[int] = []
        picks, sources = [], []
        for sequence, start, count, samples in work:
            slot = self._slot(sequence)
            if slot.blocks != sequence.blocks:
                self._note_blocks(slot, changes)
            end = start + count
            source = before[id(sequence)] if end > len(sequence.tokens) else -1
            positions += range(start, end)
            slots += [slot.number] * count
            tokens += sequence.tokens[start:end] if source < 0 else [0]
            row_sources += [source] if source >= 0 else [-1] * count
            if samples:
                picks.append(len(positions) - 1)
                sources.append(source)
        rows, missing = len(positions), padded - len(positions)
        host = packet.fill()
        host["slots"][:padded] = slots + [0] * missing
        host["positions"][:padded] = positions + [-1] * missing
        host["tokens"][:padded] = tokens + [0] * missing
        host["sources"][:padded] = row_sources + [-1] * missing
        if fresh:
            offsets = list(itertools.accumulate(fresh, initial=0))
            host["offsets"][:] = offsets + offsets[-1:] * (MAX_PROMPTS + 1 - len(offsets))
            beside = range(offsets[-1], rows)
            host["beside"][: len(beside)] = beside
            host["beside"][len(beside) :] = -1
        host["changes"][0] = len(changes) // 3
        host["changes"][1 : 1 + len(changes)] = changes
        packet.send()
        return _Rows(picks, sources)

    def _slot(self, sequence: _Sequence) -> _Slot:
        slot = self._slots.get(id(sequence))
        if slot is None:
            if not self._free:
                for key in [key for key, s in self._slots.items() if s.sequence.state is not SequenceState.RUNNING]:
                    self._free.append(self._slots.pop(key).number)
            slot = self._slots[id(sequence)] = _Slot(self._free.pop(), sequence)
        return slot

    def _note_blocks(self, slot: _Slot, changes: list[int]) -> None:
        """Updates the device's table: through the step's packet, or by a copy of the row if much has changed."""
        ours, theirs = slot.blocks, slot.sequence.blocks
        changed = [at for at in range(len(theirs)) if at >= len(ours) or ours[at] != theirs[at]]
        if len(changed) <= 8 and len(changes) // 3 + len(changed) <= MAX_CHANGES:
            for at in changed:
                changes += (slot.number, at, theirs[at])
        else:
            # new host memory each time: the device may not have read the last copy yet
            row = torch.tensor(theirs, dtype=torch.int32, pin_memory=self._device.type == "cuda")
            self._forward.tables[slot.number, : len(theirs)].copy_(row, non_blocking=True)
        slot.blocks = list(theirs)

    def _prompts(self, work: Sequence[Slice]) -> Prompts:
        """Returns the prompts of a long step, whose work is in the order that `Prompts` needs."""
        fresh = [s for s in work if s.size > 1 and s.start == 0]
        groups: list[list[Slice]] = []
        keys = 0
        for slice_ in work:
            if slice_.size > 1 and slice_.start > 0:
                end = slice_.start + slice_.size
                if not groups or keys + end > MAX_KEYS:
                    groups.append([])
                    keys = 0
                groups[-1].append(slice_)
                keys += end
        sizes = [s.size for s in fresh]
        return Prompts(sizes, self._offsets(sizes), [self._continued(group) for group in groups])

    def _continued(self, group: Sequence[Slice]) -> ContinuedPrompts:
        held = [-(-(s.start + s.size) // self._block) for s in group]
        blocks = [block for s, n in zip(group, held, strict=True) for block in s.sequence.blocks[:n]]
        return ContinuedPrompts(
            sum(s.size for s in group),
            self._offsets([s.size for s in group]),
            max(s.size for s in group),
            self._on_device(blocks, torch.long),
            self._offsets([n * self._block for n in held]),
            self._on_device([s.start + s.size for s in group], torch.int32),
            max(held) * self._block,
        )

    def _offsets(self, sizes: Sequence[int]) -> Tensor:
        return self._on_device(list(itertools.accumulate(sizes, initial=0)), torch.int32)

    def _on_device(self, numbers: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.tensor(numbers, dtype=dtype).to(self._device, non_blocking=True)


def _padded(count: int) -> int:
    """Returns the rows of the smallest graph that holds `count` rows, or `count` if no graph does."""
    return next((size for size in SIZES if size >= count), count)


def _needs_all_rows(slice_: Slice) -> bool:
    """Whether the slice's request needs every position of its prompt."""
    return slice_.sequence.whole and not slice_.sequence.generated


def _part(slice_: Slice) -> int:
    """Returns the slice's rank in a long step: 0 for a fresh prompt, 1 for a continued one, 2 for a single token."""
    return 2 if slice_.size == 1 else int(slice_.start > 0)
