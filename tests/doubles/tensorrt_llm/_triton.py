"""What Triton does when it is imported: it asks ldconfig for libcuda, and takes its answer for UTF-8."""

import os
import subprocess


def load_triton() -> None:
    if os.environ.get("TRITON_LIBCUDA_PATH"):
        return
    ldconfig = os.environ.get("TRTLLM_DOUBLE_LDCONFIG")
    if ldconfig:
        subprocess.check_output([ldconfig, "-p"]).decode()
