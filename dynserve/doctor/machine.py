"""The doctor's checks of the machine itself. No check imports TensorRT-LLM, Triton or NIXL: that may take a minute, or
end the process.
"""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from dynserve.doctor.cluster import backend_of
from dynserve.doctor.finding import DoctorConfig, Finding, FindingState
from dynserve.executors.trtllm import PIN
from dynserve.executors.trtllm import environment as env
from dynserve.executors.trtllm.arguments import resolved_backend

TESTED = (PIN, "1.2.1")
NVIDIA_SMI = "nvidia-smi"
SHARED_MEMORY = 1 << 30  # bytes
OPEN_FILES = 4096


def python(config: DoctorConfig) -> Iterator[Finding]:
    found = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    yield Finding("python", "ok", found)


def gpu(config: DoctorConfig) -> Iterator[Finding]:
    needed: FindingState = "fail" if config.trtllm else "skip"
    fields = "name,memory.total,memory.free,driver_version,compute_cap"
    listed = _run(NVIDIA_SMI, f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    if listed is None:
        cure = "start the container with --gpus all, or install NVIDIA's driver" if config.trtllm else ""
        yield Finding("GPU", needed, f"no GPU found: {NVIDIA_SMI} is missing or failed", cure)
        return
    rows = [[cell.strip() for cell in line.split(",")] for line in listed.splitlines() if line.count(",") == 4]
    for at, (name, total, free, _, capability) in enumerate(rows):
        share = float(free) / float(total) if float(total) else 0.0
        text = f"{at}: {name}, {float(free) / 1024:.0f} of {float(total) / 1024:.0f} GiB free"
        if float(capability) < 8.0:
            yield Finding("GPU", "warn", f"{text}, compute capability {capability}", "bfloat16 needs 8.0: use float16")
        elif share < 0.5:
            yield Finding(
                "GPU", "warn", text, "free_gpu_memory_fraction counts only free memory: stop other processes on the GPU"
            )
        else:
            yield Finding("GPU", "ok", text)
    if rows:
        cuda = re.search(r"CUDA Version:\s*([\d.]+)", _run(NVIDIA_SMI) or "")
        yield Finding("driver", "ok", f"{rows[0][3]}, CUDA up to {cuda[1] if cuda else 'unknown'}")


def packages(config: DoctorConfig) -> Iterator[Finding]:
    if config.role == "frontend":
        return
    found = _version("tensorrt_llm", "tensorrt-llm")
    if found is None:
        cure = f"use its release image, or pip install tensorrt-llm=={PIN}" if config.trtllm else ""
        yield Finding("TensorRT-LLM", "fail" if config.trtllm else "skip", "is not installed", cure)
    elif found in TESTED:
        yield Finding("TensorRT-LLM", "ok", found)
    else:
        cure = f"dynserve is tested with {PIN} and {TESTED[1]}; other versions may differ: install one of these"
        yield Finding("TensorRT-LLM", "warn", found, cure)
    if config.engine == "torch":
        torch = _version("torch")
        cure = "" if torch else "pip install 'dynserve[torch]'"
        yield Finding("torch", "ok" if torch else "fail", torch or "is not installed", cure)
        if not _version("xgrammar"):
            cure = "pip install 'dynserve[torch]' for response_format, guided_* and tool_choice"
            yield Finding("xgrammar", "warn", "is not installed", cure)


def triton(config: DoctorConfig) -> Iterator[Finding]:
    """Checks that Triton finds libcuda. Without `TRITON_LIBCUDA_PATH` it decodes the output of ldconfig as UTF-8."""
    if not config.trtllm:
        return
    found, broken = _version("triton"), env.run_ldconfig(env.LDCONFIG).broken
    folder = os.environ.get("TRITON_LIBCUDA_PATH") or env.libcuda_folder(os.environ)
    name = f"triton {found or 'is not installed'}"
    if folder:
        text = f"{name}, libcuda in {folder}"
        yield Finding("Triton", "ok", text + (f" (ldconfig lists {broken}, which is not UTF-8)" if broken else ""))
    elif broken:
        cure = f"set TRITON_LIBCUDA_PATH to the folder of {env.LIBCUDA}"
        yield Finding("Triton", "fail", f"{name}; ldconfig lists {broken}, which is not UTF-8: Triton would fail", cure)
    else:
        yield Finding("Triton", "warn", f"{name}; {env.LIBCUDA} was not found", "start the container with --gpus all")


def transfer(config: DoctorConfig) -> Iterator[Finding]:
    """Checks NIXL's plugins and UCX's transports."""
    if not config.trtllm:
        return
    backend = backend_of(config)
    if backend and resolved_backend(backend, PIN) != "NIXL":
        yield Finding("NIXL", "skip", f"KV caches move over {backend}")
        return
    folders = env.nixl_plugin_folders()
    try:
        _, named = env.nixl_plugin_setting(os.environ)
        env.check_nixl(dict(os.environ))
    except Exception as error:
        needed: FindingState = "fail" if config.role in ("prefill", "decode") else "warn"
        yield Finding("NIXL", needed, str(error))
    else:
        several = len(folders) > 1 and not named
        cure = "keep one, or choose it with NIXL_PLUGINS_DIR: plugins of different builds crash" if several else ""
        yield Finding("NIXL", "warn" if several else "ok", f"plugins in {named or ', '.join(folders)}", cure)
    for warning in env.warnings(os.environ):
        text, _, cure = warning.partition(": ")
        yield Finding("UCX", "warn", text, cure)


def mpi(config: DoctorConfig) -> Iterator[Finding]:
    if not config.trtllm:
        return
    printed = _run("mpirun", "--version")
    if printed is None:
        yield Finding(
            "MPI", "warn", "mpirun is not installed", "TensorRT-LLM's image has OpenMPI; its import needs libmpi"
        )
    elif "Open MPI" in printed:
        yield Finding("MPI", "ok", printed.splitlines()[0])
    else:
        yield Finding(
            "MPI", "fail", f"{printed.splitlines()[0]} is not OpenMPI", "use the image's OpenMPI: others hang at import"
        )


def locale(config: DoctorConfig) -> Iterator[Finding]:
    if env.is_utf8(os.environ):
        yield Finding("locale", "ok", "UTF-8")
    else:
        yield Finding("locale", "warn", "is not UTF-8", "export LC_ALL=C.UTF-8 (a trtllm worker sets it by itself)")


def limits(config: DoctorConfig) -> Iterator[Finding]:
    files, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = files >= OPEN_FILES or files == resource.RLIM_INFINITY
    cure = "" if enough else f"ulimit -n {min(65536, hard_limit) if hard_limit > 0 else 65536}"
    yield Finding("open files", "ok" if enough else "warn", _amount(files), cure)
    if not config.trtllm:
        return
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = locked == resource.RLIM_INFINITY
    cure = "" if unlimited else "docker run --ulimit memlock=-1: pinned memory and RDMA need it"
    yield Finding("locked memory", "ok" if unlimited else "warn", _amount(locked), cure)
    try:
        size = shutil.disk_usage("/dev/shm").total
    except OSError:
        yield Finding("shared memory", "fail", "there is no /dev/shm", "mount a tmpfs there")
        return
    large = size >= SHARED_MEMORY
    cure = "" if large else "docker run --ipc=host, or --shm-size=8g: the engine's processes share memory there"
    yield Finding("shared memory", "ok" if large else "fail", f"{size / (1 << 20):,.0f} MiB in /dev/shm", cure)


MACHINE = (python, gpu, packages, triton, transfer, mpi, locale, limits)


def _run(*command: str) -> str | None:
    """Runs a program and returns its standard output; None when it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=15, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", "replace").strip() if done.returncode == 0 else None


def _version(*names: str) -> str | None:
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _amount(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else f"{limit:,}"
