"""The set-up and checks before `import tensorrt_llm`: variables that are read at import or in static initialisers of C++,
and libraries whose absence causes a crash instead of an error.
"""

from __future__ import annotations

import ctypes.util
import glob
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, MutableMapping
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from dynserve.errors import ConfigError

log = logging.getLogger(__name__)

LDCONFIG = "/sbin/ldconfig"
LIBCUDA = "libcuda.so.1"
_CUDA_FOLDERS = (
    "/usr/local/nvidia/lib64", "/usr/local/nvidia/lib", "/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu",
    "/usr/lib64", "/usr/lib/wsl/lib", "/usr/local/cuda/compat/lib.real", "/usr/local/cuda/compat",
)  # fmt: skip
_NIXL_PLUGINS = (
    "/opt/nvidia/nvda_nixl/lib*/**/plugins", "/usr/local/nixl/lib*/**/plugins", "/usr/lib/*-linux-gnu/plugins",
)  # fmt: skip
# NIXL's source reads the first, TensorRT-LLM's documents say the second
_PLUGIN_VARIABLES = ("NIXL_PLUGIN_DIR", "NIXL_PLUGINS_DIR")
_SHOWN = ("TRITON_LIBCUDA_PATH", "LC_ALL", *_PLUGIN_VARIABLES, "LD_LIBRARY_PATH", "UCX_TLS", "UCX_NET_DEVICES")
_CUDA_TRANSPORTS = ("cuda", "all", "^")


class Ldconfig(NamedTuple):
    """The output of `ldconfig -p`. `broken` is its first line that is not UTF-8, escaped as ASCII."""

    folders: list[str]  # with libcuda.so.1
    broken: str


def prepare(environ: MutableMapping[str, str], model_path: str) -> None:
    """Sets missing variables, and keeps those that are set. Logs the variables that matter for GPUs and KV transfers."""
    if not environ.get("TRITON_LIBCUDA_PATH") and (folder := libcuda_folder(environ)):
        environ["TRITON_LIBCUDA_PATH"] = folder  # Triton does not run ldconfig then
    if not is_utf8(environ):
        environ["LC_ALL"] = "C.UTF-8"
        environ.setdefault("PYTHONUTF8", "1")  # for the processes that the engine starts
    if Path(model_path).is_dir():
        environ.setdefault("HF_HUB_OFFLINE", "1")  # no search for a local model on the hub
    for warning in warnings(environ):
        log.warning("%s", warning)
    found = [f"{name}={environ[name]}" for name in sorted({*_SHOWN, *_transfer_names(environ)}) if environ.get(name)]
    log.info("environment: %s", " ".join(found) or "no relevant variable is set")


def warnings(environ: MutableMapping[str, str]) -> list[str]:
    """Returns a warning for each setting that is known to break KV transfers."""
    found = []
    transports = environ.get("UCX_TLS", "")
    if transports and not any(word in transports for word in _CUDA_TRANSPORTS):
        found.append(
            f"UCX_TLS={transports} excludes CUDA memory; KV transfers will fail with 'UCX CUDA support was not found': "
            "unset it, or add cuda_copy,cuda_ipc"
        )
    if environ.get("NIXL_BACKEND") and environ.get("TRTLLM_NIXL_KVCACHE_BACKEND"):
        found.append("NIXL_BACKEND and TRTLLM_NIXL_KVCACHE_BACKEND are both set; keep only the second")
    return found


def is_utf8(environ: MutableMapping[str, str]) -> bool:
    locale = environ.get("LC_ALL") or environ.get("LC_CTYPE") or environ.get("LANG") or ""
    return "utf" in locale.lower() or environ.get("PYTHONUTF8") == "1"


def libcuda_folder(environ: MutableMapping[str, str], folders: Iterable[str] = _CUDA_FOLDERS) -> str | None:
    """Returns the folder of the driver's library, or None. Output of ldconfig that is not UTF-8 is skipped."""
    listed = environ.get("LD_LIBRARY_PATH", "").split(":")
    for folder in [*filter(None, listed), *run_ldconfig().folders, *folders]:
        if Path(folder, LIBCUDA).exists():
            return folder
    return None


def run_ldconfig(command: str = LDCONFIG) -> Ldconfig:
    try:
        done = subprocess.run([command, "-p"], capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return Ldconfig([], "")
    folders, broken = [], ""
    for line in done.stdout.splitlines():
        if not _decodes(line):
            broken = broken or line.decode("ascii", "backslashreplace").strip()
        elif LIBCUDA.encode() in line and b"=> " in line:
            folders.append(str(Path(line.split(b"=> ")[1].decode()).parent))
    return Ldconfig(folders, broken)


def undecodable(error: UnicodeDecodeError) -> ConfigError:
    """Returns the error for an import that failed although `prepare` has run, because no libcuda was found."""
    broken = run_ldconfig(LDCONFIG).broken
    return ConfigError(
        f"Triton cannot read what ldconfig prints ({error.reason}{f' in: {broken}' if broken else ''}), and no {LIBCUDA} "
        "was found to make it unnecessary; set TRITON_LIBCUDA_PATH to the folder that holds it"
    )


def check_nixl(environ: MutableMapping[str, str]) -> None:
    """Checks that NIXL has its plugins: without them it ends the process with a segmentation fault, which no code can
    catch.

    Raises:
        ConfigError: the folders that NIXL searches have no plugins.
    """
    variable, named = nixl_plugin_setting(environ)
    if named and not _plugins(named):
        raise ConfigError(
            f"{variable}={named} holds no libplugin_*.so: NIXL would crash there. Unset it to use the packaged ones, "
            "or name the folder that has libplugin_UCX.so"
        )
    if named:  # whichever of the two names this build of NIXL reads
        environ.update(dict.fromkeys(_PLUGIN_VARIABLES, named))
    folders = [named] if named else nixl_plugin_folders()
    if len(folders) > 1:
        log.warning(
            "several NIXL installations (%s): mixing them crashes the process; choose one with NIXL_PLUGINS_DIR",
            ", ".join(folders),
        )
    if folders:
        return
    raise ConfigError(
        "no NIXL plugins are installed (libplugin_UCX.so was not found beside tensorrt_llm, in nixl's wheels or under "
        "/opt/nvidia/nvda_nixl): this looks like a slim image, and NIXL would crash in it. Use TensorRT-LLM's complete "
        "release image, or set NIXL_PLUGINS_DIR, or backend: UCX in cache_transceiver_config"
    )


def nixl_plugin_setting(environ: Mapping[str, str]) -> tuple[str, str]:
    """Returns the variable that names the folder of NIXL's plugins, and the folder; empty if none does.

    Raises:
        ConfigError: both variables are set, to different folders.
    """
    found = [(name, environ[name]) for name in _PLUGIN_VARIABLES if environ.get(name)]
    if len({folder for _, folder in found}) > 1:
        both = " and ".join(f"{name}={folder}" for name, folder in found)
        raise ConfigError(f"{both} differ: set one of them, or both to the same folder")
    return found[0] if found else ("", "")


def nixl_plugin_folders() -> list[str]:
    """Returns all folders with NIXL plugins; more than one means that installations are mixed."""
    patterns = list(_NIXL_PLUGINS)
    for package in ("tensorrt_llm", "nixl", "nixl_cu12", "nixl_cu13"):
        spec = find_spec(package)
        for root in (spec.submodule_search_locations or []) if spec is not None else []:
            patterns += [f"{root}/libs/**/plugins", f"{root}/plugins", f"{root}/*.libs/plugins"]
    for root in sys.path:
        if root.endswith(("site-packages", "dist-packages")):
            patterns += [f"{root}/.nixl*.libs/plugins", f"{root}/nixl*.libs/plugins"]
    if (library := ctypes.util.find_library("nixl")) and os.path.isabs(library):
        patterns.append(str(Path(library).parent / "plugins"))
    found = {folder for pattern in patterns for folder in glob.glob(pattern, recursive=True) if _plugins(folder)}
    return sorted(map(os.path.realpath, found))


def _plugins(folder: str) -> list[str]:
    return glob.glob(f"{glob.escape(folder)}/libplugin_*.so")


def _transfer_names(environ: MutableMapping[str, str]) -> list[str]:
    return [name for name in environ if re.match(r"(UCX|NIXL|TRTLLM|TLLM)_", name) and "KEY" not in name]


def _decodes(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True
