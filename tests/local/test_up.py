"""`python -m dynserve up`, run as a command."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import psutil
import pytest

from dynserve.local.embedded import free_ports, nats_command
from tests.conftest import DOUBLES, MODEL, Process

SMALL = ["--executor", "simulated", "--override-engine-args", '{"speed": 0}', "--prefill", "1", "--decode", "1"]
CHAT: Any = {"model": MODEL, "messages": [{"role": "user", "content": "What is 3+4?"}]}


class Up:
    def __init__(self, folder: Path, *flags: str, **environ: str) -> None:
        (self.port,) = free_ports(1)
        self.folder = folder / "tmp"
        self.folder.mkdir()
        env = ["env", f"TMPDIR={self.folder}", *(f"{name}={value}" for name, value in environ.items())]
        command = [*env, sys.executable, "-m", "dynserve", "up", "--http-port", str(self.port), *flags]
        self.process = Process(command, folder / "up.log")

    def until(self, text: str, seconds: float = 60) -> str:
        deadline = time.monotonic() + seconds
        while text not in self.process.output():
            assert self.process.alive() and time.monotonic() < deadline, self.process.output()
            time.sleep(0.05)
        return self.process.output()

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def child(self, part: str) -> psutil.Process:
        return next(c for c in self.children() if part in " ".join(c.cmdline()))

    def ask(self) -> httpx.Response:
        return httpx.post(f"http://127.0.0.1:{self.port}/v1/chat/completions", json=CHAT, timeout=20, trust_env=False)


def gone(processes: list[psutil.Process], seconds: float = 15) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return not alive


def test_up_answers_restarts_a_dead_worker_and_stops_everything_at_ctrl_c(tmp_path: Path) -> None:
    up = Up(tmp_path)
    try:
        text = up.until("Ctrl-C stops everything.")
        assert "waiting for" in text and "curl http://127.0.0.1" in text
        for name in ("etcd", "nats", "frontend", "prefill-1", "prefill-2", "decode-1", "decode-2"):
            assert name in text
        assert up.ask().json()["choices"][0]["message"]["content"] == "7"
        children = up.children()
        assert len(children) == 7
        up.child("--disaggregation-mode decode").kill()
        text = up.until("starting again in")
        deadline = time.monotonic() + 30
        while len(httpx.get(f"http://127.0.0.1:{up.port}/health", trust_env=False).json()["instances"]) < 4:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert up.ask().status_code == 200
        children = up.children()
        up.process.kill(signal.SIGINT)
        assert up.process.wait(30) == 0
        assert gone(children, 1)
        assert list(up.folder.iterdir()) == []
    finally:
        up.process.kill()


def test_a_second_ctrl_c_kills_up_and_all_its_processes(tmp_path: Path) -> None:
    up = Up(tmp_path, *SMALL)
    try:
        up.until("Ctrl-C stops everything.")
        children = up.children()
        up.child("--disaggregation-mode decode").send_signal(signal.SIGSTOP)  # this process would delay the shutdown
        up.process.kill(signal.SIGINT)
        up.until("stopping")
        up.process.kill(signal.SIGINT)
        up.process.wait(5)
        for child in children:
            if child.is_running() and child.status() == psutil.STATUS_STOPPED:
                child.send_signal(signal.SIGCONT)
        assert gone(children)
    finally:
        up.process.kill()


def machine_with_gpus(folder: Path, count: int) -> dict[str, str]:
    """Returns the environment of a machine with TensorRT-LLM (the double) and some GPUs."""
    tools = folder / "bin"
    tools.mkdir()
    lines = "\n".join(f"GPU {number}: NVIDIA H100 80GB HBM3 (UUID: GPU-{number})" for number in range(count))
    (tools / "nvidia-smi").write_text(f"#!/bin/sh\necho '{lines}'\n")
    (tools / "nvidia-smi").chmod(0o755)
    return {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(DOUBLES)}


def test_up_gives_each_tensorrt_llm_worker_a_gpu_and_a_transceiver(tmp_path: Path) -> None:
    flags = [
        "--executor",
        "trtllm",
        "--prefill",
        "1",
        "--decode",
        "1",
        "--override-engine-args",
        '{"max_batch_size": 4}',
    ]
    up = Up(tmp_path, *flags, **machine_with_gpus(tmp_path, 2))
    try:
        up.until("Ctrl-C stops everything.")
        assert up.ask().json()["choices"][0]["message"]["content"] == "7"
        for role, gpu in (("prefill", "0"), ("decode", "1")):
            assert up.child(f"--disaggregation-mode {role}").environ()["CUDA_VISIBLE_DEVICES"] == gpu
        up.process.kill(signal.SIGINT)
        assert up.process.wait(60) == 0
    finally:
        up.process.kill()


@pytest.mark.parametrize(
    ("gpus", "flags", "message"),
    [
        (0, [], "4 TensorRT-LLM workers need 4 GPUs, and none is visible here"),
        (3, [], "4 TensorRT-LLM workers need 4 GPUs, and this machine has 3; use fewer workers"),
        (4, ["--override-engine-args", '{"tensor_parallel_size": 2}'], "need 8 GPUs, and this machine has 4"),
        (4, ["--override-engine-args", '{"cuda_graph_config": {"batch_sizes": [1], "max_batch_size": 2}}'], "has both"),
    ],
)
def test_up_refuses_tensorrt_llm_workers_that_could_not_start(
    tmp_path: Path, gpus: int, flags: list[str], message: str
) -> None:
    environment = {**os.environ, **machine_with_gpus(tmp_path, gpus)}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    command = [sys.executable, "-m", "dynserve", "up", "--executor", "trtllm", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, env=environment)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model-path", "/nowhere"], "--model-path /nowhere does not exist"),
        (["--model-path", str(Path(__file__).parent)], "has no config.json in it"),
        (["--decod", "1"], "unknown option --decod (did you mean --decode?)"),
        (["--executor", "trtllm"], "--executor trtllm needs TensorRT-LLM, which is not installed here"),
        (["--executor", "trtllm", "--device", "cpu"], "--executor trtllm needs GPUs"),
        (["--override-engine-args", '{"num_block": 1}'], "unknown key 'num_block' (did you mean num_blocks?)"),
    ],
)
def test_a_wrong_option_is_one_line_of_error_and_exit_code_2(flags: list[str], message: str) -> None:
    done = subprocess.run([sys.executable, "-m", "dynserve", "up", *flags], capture_output=True, text=True, timeout=30)
    assert done.returncode == 2 and message in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_port_in_use_is_an_error_and_exit_code_2() -> None:
    with socket.create_server(("127.0.0.1", 0)) as occupied:
        port = str(occupied.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-m", "dynserve", "up", "--http-port", port], capture_output=True, text=True, timeout=30
        )
    assert done.returncode == 2 and f"cannot listen on 127.0.0.1:{port}" in done.stderr


def test_an_unknown_command_suggests_the_right_one() -> None:
    done = subprocess.run([sys.executable, "-m", "dynserve", "worke"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 2 and "did you mean worker?" in done.stderr


def test_a_password_in_an_address_is_shown_to_nobody(tmp_path: Path) -> None:
    """Neither logs nor /health, nor the command lines of processes, nor help, nor errors have it."""
    (port,) = free_ports(1)
    password = "s3cret/pass,word"
    nats = Process([*nats_command(port), "--user", "u", "--pass", password], tmp_path / "nats.log")
    url = f"nats://u:{quote(password, safe='')}@127.0.0.1:{port}"
    up = Up(tmp_path, *SMALL, "--log-level", "debug", NATS_URL=url)
    try:
        up.until("Ctrl-C stops everything.")
        shown = [up.process.output(), httpx.get(f"http://127.0.0.1:{up.port}/health", trust_env=False).text]
        shown += [" ".join(child.cmdline()) for child in up.children()]
        assert up.ask().status_code == 200
        nats.kill()  # the reconnections are logged
        up.until("NATS", 30)
        shown.append(up.process.output())
    finally:
        up.process.kill(signal.SIGINT)
        up.process.wait(30)
        nats.kill()
    environ = {"PATH": os.environ["PATH"], "NATS_URL": url}
    for role in ("frontend", "worker", "up"):
        for flags in (["--help"], [f"--nats-ulr={url}"], [url], [f"--http-port={url}", f"--system-port={url}"]):
            done = subprocess.run(
                [sys.executable, "-m", "dynserve", role, *flags],
                capture_output=True,
                text=True,
                env=environ,
                timeout=60,
            )
            shown += [done.stdout, done.stderr]
    for text in shown:
        assert "s3cret" not in text, text
