"""The GPUs that this process may use, found without importing torch."""

from __future__ import annotations

import os
import subprocess

TIMEOUT = 10.0  # seconds; nvidia-smi takes one or two where no process keeps the driver awake


def gpus() -> int:
    """Returns the number of GPUs in `gpu_names`."""
    return len(gpu_names())


def gpu_names() -> list[str]:
    """Returns the GPUs in `CUDA_VISIBLE_DEVICES`, or, if that is unset, the numbers of those in the list of nvidia-smi;
    none without nvidia-smi."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",") if name.strip()]
        return [] if "-1" in names else names
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=TIMEOUT, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(number) for number in range(sum(line.startswith("GPU ") for line in listed.splitlines()))]
