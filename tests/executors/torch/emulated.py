"""`kernels.cu` on the CPU: compiled with the system's C++ compiler and `emulator.h`, behind the interface of the GPU's."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from dynserve.executors.torch.cuda.kernels import SOURCE, Argument, Shape, arguments

HERE = Path(__file__).parent

_MAIN = """
#include "{emulator}"
#include "{source}"
template <typename... A, size_t... I>
void call(void (*kernel)(A...), void** args, std::index_sequence<I...>) {{ kernel(*(A*)args[I]...); }}
template <typename... A>
void run(void (*kernel)(A...), unsigned x, unsigned y, unsigned z, unsigned threads, void** args) {{
    launch(x, y, z, threads, [=] {{ call(kernel, args, std::index_sequence_for<A...>()); }});
}}
"""
_ENTRY = """
extern "C" __attribute__((visibility("default"))) void kernel_{number}(unsigned x, unsigned y, unsigned z, unsigned threads, void** args) {{
    run({name}, x, y, z, threads, args);
}}
"""


class Emulated:
    """A `Launcher`. Libraries that were compiled into `folder` before are reused."""

    def __init__(self, shape: Shape, names: Sequence[str], folder: Path) -> None:
        compiler = shutil.which("g++")
        if compiler is None:
            pytest.skip("g++ is not installed")
        names = sorted(set(names))
        folder = folder / f"{abs(hash((shape, *names)))}"
        text = _MAIN.format(emulator=HERE / "emulator.h", source=SOURCE)
        text += "".join(_ENTRY.format(number=number, name=name) for number, name in enumerate(names))
        source, library = folder / "kernels.cc", folder / "kernels.so"
        if not folder.exists():
            folder.mkdir()
            source.write_text(text)
            # hidden and not unique: libraries for other shapes have variables of the same names
            flags = [
                "-std=c++20",
                "-O2",
                "-w",
                "-shared",
                "-fPIC",
                "-U_FORTIFY_SOURCE",
                "-fno-gnu-unique",
                "-fvisibility=hidden",
            ]
            flags += shape.macros()
            subprocess.run([compiler, *flags, "-o", str(library), str(source)], check=True)
        loaded = ctypes.CDLL(str(library))
        self._entries = {name: getattr(loaded, f"kernel_{number}") for number, name in enumerate(names)}
        self.launched: list[str] = []

    def launch(
        self, kernel: str, grid: tuple[int, int, int], threads: int, *args: Argument, early: bool = False
    ) -> None:
        self.launched.append(kernel)
        boxes = arguments(args)
        pointers = (ctypes.c_void_p * len(boxes))(*(ctypes.addressof(box) for box in boxes))
        self._entries[kernel](*grid, threads, pointers)
