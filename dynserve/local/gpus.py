"""The number of GPUs that this process may use, found without importing torch."""

from __future__ import annotations

import os
import subprocess

TIMEOUT = 10.0  # seconds; nvidia-smi takes one or two where no process keeps the driver awake


def gpus() -> int:
    """Returns the number of GPUs in `CUDA_VISIBLE_DEVICES`, or, if that is unset, in the list of nvidia-smi; 0 without
    nvidia-smi."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",") if name.strip()]
        return 0 if "-1" in names else len(names)
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=TIMEOUT, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listed.splitlines())
