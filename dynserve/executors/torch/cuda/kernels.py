"""Compiles `kernels.cu` for one model's shape and launches the kernels.

NVRTC, which torch's CUDA wheels contain, takes some seconds; the result is kept in the user's cache folder, under a hash
of all its inputs.
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

from dynserve.executors.torch.model_config import ModelConfig

SOURCE = Path(__file__).with_name("kernels.cu")
WARPS = 8  # of a block
BLOCKS = 264  # that keep a GPU of about 130 multiprocessors busy
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
        """Query heads per block of `attend` when there are many rows: up to 8, so that blocks divide a group evenly."""
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
    """Returns the reason why the kernels cannot compute this model, or None if they can."""
    if config.head_dim not in (32, 64, 128):
        return f"heads of {config.head_dim} elements; the kernels compute 32, 64 and 128"
    if config.num_heads % config.num_kv_heads:
        return f"{config.num_heads} query heads cannot share {config.num_kv_heads} key-value heads evenly"
    if config.hidden_size % 8 or config.intermediate_size % 8:
        return f"sizes of {config.hidden_size} and {config.intermediate_size}; the kernels compute multiples of 8"
    if config.o_bias or config.mlp_bias:
        return "biases after attention or in the MLP, which the kernels do not compute"
    if config.activation not in ("silu", "swish"):
        return f"the activation {config.activation}; the kernels compute silu"
    if config.windowed:
        return "sliding-window attention, which the kernels do not compute"
    return None


class Product(NamedTuple):
    """A product of an `[n, k]` matrix and a few columns; `flags` select the operations before and after it."""

    n: int
    k: int
    flags: int

    def kernel(self, columns: int) -> tuple[str, int]:
        """Returns the kernel's name and its number of blocks."""
        if columns == 1:
            warps, rows = self._shares
            return f"gemv<{self.k}, {warps}, {rows}, {self.flags}>", -(-self.n // (WARPS // warps * rows))
        # tiles of 16 rows in a block: as many as leave enough blocks to fill a GPU
        tiles = max(t for t in (1, 2, 4, 8) if t == 1 or self.n / 16 / t >= BLOCKS)
        return f"product<{self.k}, {tiles}, {-(-columns // 8)}, {self.flags}>", -(-self.n // (16 * tiles))

    @property
    def _shares(self) -> tuple[int, int]:
        """Returns, for a single column, how many warps share how many rows of the matrix. Each thread loads up to 16 pieces
        of 16 bytes, so that there are about `BLOCKS` blocks. Among these choices, one with few idle lanes and short
        sums is best."""
        chunks = self.k // 8
        wanted = min(16.0, max(1.0, self.n * chunks / (32 * WARPS) / BLOCKS))
        best, shares = math.inf, (WARPS, 2 if self.flags & SILU else 1)
        for warps, rows in itertools.product((1, 2, 4, 8), (1, 2, 4, 8)):
            pieces = -(-chunks // (32 * warps))
            if pieces * rows > 16 or (self.flags & SILU and rows < 2):
                continue
            waste = pieces * 32 * warps / chunks - 1
            cost = abs(math.log(wanted / (pieces * rows))) + 0.5 * waste + 0.05 * pieces
            if cost < best:
                best, shares = cost, (warps, rows)
        return shares


def attend_name(together: int, fused: bool) -> str:
    return f"attend<{together}, {int(fused)}, {8 if together == 1 else 4}>"


Argument = Tensor | int | ctypes.c_void_p | None  # of a kernel


class Launcher(Protocol):
    def launch(
        self, kernel: str, grid: tuple[int, int, int], threads: int, *args: Argument, early: bool = False
    ) -> None:
        """Launches a kernel by its C++ name. Tensors are passed as pointers, None as a null pointer. With `early` it may
        start before the previous kernel has ended, and must wait for that itself."""
        ...


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute, for attributes whose value is a number."""

    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16)]


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)), ("number", ctypes.c_uint),
    ]  # fmt: skip


PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID


class KernelsFailed(Exception):
    """The compiler is missing, or rejects the kernels."""


class Kernels:
    """The compiled kernels, on the current device. Raises KernelsFailed if there is no compiler.

    The driver is called through ctypes: a launch through the bindings takes several times as long, and a long prompt needs
    hundreds of launches.
    """

    def __init__(self, shape: Shape, names: Sequence[str]) -> None:
        from cuda.bindings import driver

        major, minor = torch.cuda.get_device_capability()
        compiled = _compiled(shape, sorted(set(names)), f"sm_{major}{minor}")
        torch.cuda.current_stream().synchronize()  # makes sure that there is a context
        self._module = checked(driver.cuModuleLoadData(compiled.binary))
        self._functions = {
            name: int(checked(driver.cuModuleGetFunction(self._module, symbol.encode())))
            for name, symbol in compiled.symbols.items()
        }
        # not CDLL, which would release the interpreter lock for each launch, and wait to get it back
        self._launch = ctypes.PyDLL("libcuda.so.1").cuLaunchKernelEx
        self._launch.argtypes = [ctypes.c_void_p] * 4
        attribute = _Attribute(PROGRAMMATIC_STREAM_SERIALIZATION)
        attribute.value[0] = 1
        self._early = ctypes.pointer(attribute) if major >= 9 else None

    def launch(
        self, kernel: str, grid: tuple[int, int, int], threads: int, *args: Argument, early: bool = False
    ) -> None:
        config = _Config((ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(threads, 1, 1))
        config.stream = torch.cuda.current_stream().cuda_stream
        if early and self._early is not None:
            config.attributes, config.number = self._early, 1
        boxes = arguments(args)
        pointers = (ctypes.c_void_p * len(boxes))(*map(ctypes.addressof, boxes))
        error = self._launch(ctypes.addressof(config), self._functions[kernel], ctypes.addressof(pointers), None)
        if error:
            raise RuntimeError(f"CUDA: launching {kernel} failed with error {error}")


def arguments(args: Sequence[Argument]) -> list[ctypes.c_int | ctypes.c_void_p]:
    """Converts the arguments to C integers and pointers."""
    boxes: list[ctypes.c_int | ctypes.c_void_p] = []
    for arg in args:
        if isinstance(arg, Tensor):
            boxes.append(ctypes.c_void_p(arg.data_ptr()))
        elif isinstance(arg, int):
            boxes.append(ctypes.c_int(arg))
        else:
            boxes.append(arg or ctypes.c_void_p(None))
    return boxes


class _Compiled(msgspec.Struct, frozen=True):
    symbols: dict[str, str]
    binary: bytes


def _compiled(shape: Shape, names: Sequence[str], architecture: str) -> _Compiled:
    source = SOURCE.read_text()
    flags = [f"--gpu-architecture={architecture}", "--std=c++17", *shape.macros()]
    path = _cache_folder() / f"{xxh3_128_hexdigest(repr((source, names, flags)).encode())}.kernels"
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        return msgspec.msgpack.decode(path.read_bytes(), type=_Compiled)
    try:
        compiled = _compile(source, names, flags)
    except RuntimeError as error:  # the library is missing, for example
        raise KernelsFailed(str(error).splitlines()[0]) from error
    with contextlib.suppress(OSError):  # a cache that cannot be written costs some seconds at the next start
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_bytes(msgspec.msgpack.encode(compiled))
        partial.rename(path)
    return compiled


def _compile(source: str, names: Sequence[str], flags: Sequence[str]) -> _Compiled:
    from cuda.bindings import nvrtc

    program = checked(nvrtc.nvrtcCreateProgram(source.encode(), b"kernels.cu", 0, [], []))
    for name in names:
        checked(nvrtc.nvrtcAddNameExpression(program, name.encode()))
    (result,) = nvrtc.nvrtcCompileProgram(program, len(flags), [flag.encode() for flag in flags])
    if result.value:
        log = b" " * checked(nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise KernelsFailed(log.decode(errors="replace").strip())
    symbols = {name: checked(nvrtc.nvrtcGetLoweredName(program, name.encode())).decode() for name in names}
    binary = b" " * checked(nvrtc.nvrtcGetCUBINSize(program))
    checked(nvrtc.nvrtcGetCUBIN(program, binary))
    return _Compiled(symbols, binary)


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dynserve"


def checked(answer: tuple[Any, ...]) -> Any:
    """Returns the first value of a CUDA call's result, after the error code. Raises RuntimeError if the call failed."""
    error, *values = answer
    if error.value:
        raise RuntimeError(f"CUDA: {error.name}")
    return values[0] if values else None
