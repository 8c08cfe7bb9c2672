"""Compiles `kernels.cu` for one model's shape and launches what comes out.

NVRTC, which torch's CUDA wheels bring along, takes some seconds; the result is kept in the user's cache folder, by a
hash of everything that it depends on.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec
import torch
from torch import Tensor
from xxhash import xxh3_128_hexdigest

from dynserve.errors import ConfigError
from dynserve.executors.torch.model import ModelConfig

SOURCE = Path(__file__).with_name("kernels.cu")
WARPS = 8  # of a block
BLOCKS = 300  # that a matrix-vector product should have on a card of about 130 multiprocessors
ROWS_OF_GEMV = 4  # most rows that are computed by matrix-vector products; more are cuBLAS's
NORM, BIAS, RESIDUAL, SILU, FLOAT, PICK = 1, 2, 4, 8, 16, 32  # as in kernels.cu


class Shape(NamedTuple):
    """The sizes that the kernels are compiled for."""

    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocabulary: int
    layers: int
    block: int
    epsilon: float
    qk_norm: bool

    @staticmethod
    def of(config: ModelConfig, block_size: int) -> Shape:
        return Shape(
            config.num_heads, config.num_kv_heads, config.head_dim, config.hidden_size, config.intermediate_size,
            config.vocab_size, config.num_layers, block_size, config.norm_eps, config.qk_norm,
        )  # fmt: skip

    @property
    def group(self) -> int:
        """Query heads that share keys and values."""
        return self.heads // self.kv_heads

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def heads_together(self) -> int:
        """Query heads that one block of `attend` looks after when there are many rows: as many of a group as fit."""
        return max(h for h in range(1, 9) if self.group % h == 0)

    def macros(self) -> list[str]:
        values = {
            "HEADS": self.heads, "KV_HEADS": self.kv_heads, "HEAD_DIM": self.head_dim, "HIDDEN": self.hidden,
            "INTERMEDIATE": self.intermediate, "VOCABULARY": self.vocabulary, "LAYERS": self.layers,
            "BLOCK": self.block, "EPSILON": f"{self.epsilon!r}f", "SCALE": f"{self.head_dim**-0.5!r}f",
            "QK_NORM": int(self.qk_norm),
        }  # fmt: skip
        return [f"-D{name}={value}" for name, value in values.items()]


def unfit(config: ModelConfig) -> str | None:
    """Why these kernels do not compute such a model, if they do not."""
    if config.head_dim not in (32, 64, 128):
        return f"heads of {config.head_dim} elements; the kernels compute 32, 64 and 128"
    if config.num_heads % config.num_kv_heads:
        return f"{config.num_heads} heads cannot share {config.num_kv_heads} of keys and values evenly"
    if config.hidden_size % 8 or config.intermediate_size % 8:
        return f"sizes of {config.hidden_size} and {config.intermediate_size}, which are not multiples of 8"
    if config.o_bias:
        return "biases behind attention"
    return None


class Gemv(NamedTuple):
    """How a matrix-vector product is cut up: `warps` share `rows` rows of the matrix."""

    warps: int
    rows: int

    @staticmethod
    def plan(n: int, k: int, flags: int) -> Gemv:
        """Each thread loads so many pieces of 16 bytes that the product has about `BLOCKS` blocks, at most 16. Of the ways
        to do so, one that wastes few lanes and has short sums."""
        chunks = k // 8
        wanted = min(16.0, max(1.0, n * chunks / (32 * WARPS) / BLOCKS))
        best, plan = math.inf, Gemv(WARPS, 2 if flags & SILU else 1)
        for warps, rows in itertools.product((1, 2, 4, 8), (1, 2, 4, 8)):
            pieces = -(-chunks // (32 * warps))
            if pieces * rows > 16 or (flags & SILU and rows < 2):
                continue
            waste = pieces * 32 * warps / chunks - 1
            cost = abs(math.log(wanted / (pieces * rows))) + 0.5 * waste + 0.05 * pieces
            if cost < best:
                best, plan = cost, Gemv(warps, rows)
        return plan

    def name(self, k: int, columns: int, flags: int) -> str:
        return f"gemv<{k}, {self.warps}, {self.rows}, {columns}, {flags}>"

    def blocks(self, n: int) -> int:
        return -(-n // (WARPS // self.warps * self.rows))


def attend_name(together: int, fused: bool) -> str:
    return f"attend<{together}, {int(fused)}, {8 if together == 1 else 4}>"


class Launcher(Protocol):
    def launch(
        self, kernel: str, grid: tuple[int, int, int], threads: int, *args: Tensor | int | None, early: bool = False
    ) -> None:
        """Launches a kernel by its C++ name. Tensors are passed as pointers, None as a null pointer. With `early` it may
        start before the kernel before it has ended, which it waits for by itself."""
        ...


class Kernels:
    """The compiled kernels, on the current device."""

    def __init__(self, shape: Shape, names: Sequence[str]) -> None:
        from cuda.bindings import driver

        self._driver = driver
        major, minor = torch.cuda.get_device_capability()
        self._early = major >= 9
        compiled = _compiled(shape, sorted(set(names)), f"sm_{major}{minor}")
        torch.cuda.current_stream().synchronize()  # makes sure that there is a context
        module = _checked(driver.cuModuleLoadData(compiled.binary))
        self._functions = {
            name: _checked(driver.cuModuleGetFunction(module, symbol.encode()))
            for name, symbol in compiled.symbols.items()
        }
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        self._attribute = attribute

    def launch(
        self, kernel: str, grid: tuple[int, int, int], threads: int, *args: Tensor | int | None, early: bool = False
    ) -> None:
        config = self._driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.hStream = torch.cuda.current_stream().cuda_stream
        if early and self._early:
            config.attrs = [self._attribute]
            config.numAttrs = 1
        values, types = arguments(args)
        _checked(self._driver.cuLaunchKernelEx(config, self._functions[kernel], (values, types), 0))


def arguments(args: Sequence[Tensor | int | None]) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    """Values and C types."""
    values = tuple(arg.data_ptr() if isinstance(arg, Tensor) else arg or 0 for arg in args)
    types = tuple(ctypes.c_int if isinstance(arg, int) else ctypes.c_void_p for arg in args)
    return values, types


class _Compiled(msgspec.Struct, frozen=True):
    symbols: dict[str, str]
    binary: bytes


def _compiled(shape: Shape, names: Sequence[str], architecture: str) -> _Compiled:
    from cuda.bindings import nvrtc

    source = SOURCE.read_text()
    version = _checked(nvrtc.nvrtcVersion())
    flags = [f"--gpu-architecture={architecture}", "--std=c++17", *shape.macros()]
    path = _cache_folder() / f"{xxh3_128_hexdigest(repr((source, names, flags, version)).encode())}.kernels"
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        return msgspec.msgpack.decode(path.read_bytes(), type=_Compiled)
    compiled = _compile(source, names, flags)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs some seconds at the next start
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_bytes(msgspec.msgpack.encode(compiled))
        partial.rename(path)
    return compiled


def _compile(source: str, names: Sequence[str], flags: Sequence[str]) -> _Compiled:
    from cuda.bindings import nvrtc

    program = _checked(nvrtc.nvrtcCreateProgram(source.encode(), b"kernels.cu", 0, [], []))
    for name in names:
        _checked(nvrtc.nvrtcAddNameExpression(program, name.encode()))
    (result,) = nvrtc.nvrtcCompileProgram(program, len(flags), [flag.encode() for flag in flags])
    if result.value:
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise ConfigError(f"the GPU kernels could not be compiled: {log.decode(errors='replace').strip()}")
    symbols = {name: _checked(nvrtc.nvrtcGetLoweredName(program, name.encode())).decode() for name in names}
    binary = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
    _checked(nvrtc.nvrtcGetCUBIN(program, binary))
    return _Compiled(symbols, binary)


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dynserve"


def _checked(answer: tuple[Any, ...]) -> Any:
    """The value of a call of CUDA, whose answers begin with an error code."""
    error, *values = answer
    if error.value:
        raise RuntimeError(f"CUDA: {error.name}")
    return values[0] if values else None
