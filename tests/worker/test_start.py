"""What a worker or a frontend finds out before it waits for etcd and NATS, which are not there in these tests."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dynserve.config import TINY_MODEL
from dynserve.local.embedded import free_ports
from tests.conftest import DOUBLES


def start(module: str, *flags: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Runs a role without planes. It must end by itself."""
    (nobody,) = free_ports(1)
    command = [sys.executable, "-m", f"dynserve.{module}", *flags]
    command += ["--nats-url", f"nats://127.0.0.1:{nobody}", "--etcd-url", f"http://127.0.0.1:{nobody}"]
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", **environ}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


def changed_model(tmp_path: Path, **changes: Any) -> str:
    folder = tmp_path / "model"
    shutil.copytree(TINY_MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return str(folder)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--executor", "simulated", "--override-engine-args", '{"sped": 0}'], "unknown key 'sped' (did you mean speed?)"),
        (["--override-engine-args", '{"max_batch_size": 0}'], "max_batch_size must be at least 1"),
        (["--device", "cuda"], "--device cuda: "),
        (["--device", "cuda:7"], "--device cuda:7: "),
        (["--executor", "trtllm"], "needs TensorRT-LLM, which cannot be imported here"),
    ],
)  # fmt: skip
def test_a_wrong_option_ends_a_worker_that_has_no_planes(flags: list[str], message: str) -> None:
    done = start("worker", *flags)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"max_batch_size": "many"}, "--override-engine-args: max_batch_size: Input should be a valid integer"),
        ({"kv_cache_config": {"free_gpu_memory_fraction": 2}}, "must be a float between 0 and 1"),
        ({"max_batchsize": 3}, "unknown key 'max_batchsize' (did you mean max_batch_size?)"),
        (
            {"cache_transceiver_config": {"backend": "UCX", "transceiver_runtime": "PYTHON"}},
            "PYTHON needs backend NIXL",
        ),
    ],
)
def test_a_wrong_engine_option_ends_a_tensorrt_llm_worker_that_has_no_planes(
    engine: dict[str, Any], message: str
) -> None:
    flags = ["--executor", "trtllm", "--override-engine-args", json.dumps(engine)]
    done = start("worker", *flags, PYTHONPATH=str(DOUBLES))
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_an_adapter_that_is_missing_ends_a_tensorrt_llm_worker_that_has_no_planes() -> None:
    flags = ["--executor", "trtllm", "--lora-adapters", "french=/nowhere"]
    done = start("worker", *flags, PYTHONPATH=str(DOUBLES))
    assert done.returncode == 2 and "/nowhere" in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_an_unknown_model_or_a_broken_template_ends_a_worker_that_has_no_planes(tmp_path: Path) -> None:
    unknown = changed_model(tmp_path, architectures=["NobodyForCausalLM"], model_type="nobody")
    done = start("worker", "--model-path", unknown)
    assert done.returncode == 2 and "nobody" in done.stderr.lower() and "Traceback" not in done.stderr, done.stderr
    (Path(unknown) / "tokenizer.json").write_text("{")
    done = start("worker", "--model-path", unknown, "--executor", "simulated")
    assert done.returncode == 2 and "tokenizer.json" in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_link_port_in_use_ends_a_frontend_that_has_no_planes() -> None:
    with socket.create_server(("127.0.0.1", 0)) as occupied:
        port = str(occupied.getsockname()[1])
        done = start("frontend", "--link-port", port, "--http-port", "0")
    assert done.returncode == 2 and f"--link-port: cannot listen on 127.0.0.1:{port}" in done.stderr, done.stderr
