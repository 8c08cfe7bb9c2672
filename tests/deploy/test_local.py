"""`dynserve deploy local`, run as a command on the guide's file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

from dynserve.config import TINY_MODEL
from dynserve.local.embedded import free_ports
from tests.conftest import Process
from tests.deploy.test_reader import GUIDE

MODEL = "Qwen/Qwen2.5-0.5B-Instruct"


def test_the_guides_file_serves_its_model_survives_a_dead_worker_and_ends_at_ctrl_c(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "dynserve", "deploy", "local", str(GUIDE), "--http-port", str(port)]
    command += ["--model-path", str(TINY_MODEL), "--executor", "simulated", "--scale", "TrtllmDecodeWorker=1"]
    process = Process(command, tmp_path / "local.log", {"TMPDIR": str(tmp_path)})
    base = f"http://127.0.0.1:{port}"

    def until(condition: str) -> str:
        deadline = time.monotonic() + 60
        while condition not in process.output():
            assert process.alive() and time.monotonic() < deadline, process.output()
            time.sleep(0.05)
        return process.output()

    def instances() -> list[dict[str, object]]:
        found: list[dict[str, object]] = httpx.get(f"{base}/health", timeout=5, trust_env=False).json()["instances"]
        return [one for one in found if one["state"] == "ready"]

    try:
        text = until("Ctrl-C stops everything.")
        assert "note: etcd and nats run here" in text
        assert sorted(str(one["role"]) for one in instances()) == ["decode", "prefill", "prefill"]
        body = {"model": MODEL, "prompt": "Hello world", "max_tokens": 5, "ignore_eos": True}
        answer = httpx.post(f"{base}/v1/completions", json=body, timeout=30, trust_env=False).json()
        assert answer["model"] == MODEL and answer["usage"]["completion_tokens"] == 5
        victim = next(one for one in instances() if one["role"] == "prefill")
        psutil.Process(int(str(victim["pid"]))).kill()
        until("starting again")
        deadline = time.monotonic() + 60
        while len({one["id"] for one in instances()} - {victim["id"]}) < 3:
            assert time.monotonic() < deadline, process.output()
            time.sleep(0.1)
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill(signal.SIGINT)
        assert process.wait(60) == 0
        assert not psutil.wait_procs(children, timeout=5)[1]
        assert [path.name for path in tmp_path.iterdir()] == ["local.log"]  # its files are removed
    finally:
        process.kill()


def health_of(port: int) -> Any:
    return httpx.get(f"http://127.0.0.1:{port}/health", timeout=5, trust_env=False).json()


def test_a_cluster_file_is_served_with_its_engine_options(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    path = tmp_path / "cluster.yaml"
    path.write_text(
        f"model: {TINY_MODEL}\nservedModelName: small\nexecutor: simulated\nfrontend: {{routerMode: round-robin}}\n"
        "prefill: {engine: {num_blocks: 77}}\ndecode: {gpus: 1, env: {A: b}}\n"
    )
    command = [sys.executable, "-m", "dynserve", "deploy", "local", str(path), "--http-port", str(port)]
    process = Process(command, tmp_path / "local.log")
    try:
        deadline = time.monotonic() + 60
        while "Ctrl-C stops everything." not in process.output():
            assert process.alive() and time.monotonic() < deadline, process.output()
            time.sleep(0.05)
        health = health_of(port)
        while not all(one["load"] for one in health["instances"]):  # the first report takes a moment
            assert time.monotonic() < deadline
            time.sleep(0.05)
            health = health_of(port)
        assert health["models"] == ["small"] and health["router_mode"] == "round-robin"
        blocks = {one["role"]: one["load"]["total_blocks"] for one in health["instances"]}
        assert blocks["prefill"] == 77 != blocks["decode"]
        process.kill(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait(60)


def test_errors_are_sentences_with_exit_code_2(tmp_path: Path) -> None:
    def run(*words: str) -> str:
        command = [sys.executable, "-m", "dynserve", "deploy", *words]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        return done.stderr

    assert "unknown command deploy 'loca' (did you mean local?)" in run("loca")
    assert "needs a FILE" in run("local")
    assert "No such file" in run("local", str(tmp_path / "x.yaml"))
    assert f"--model-path {MODEL}: the cache does not have it, and HF_HUB_OFFLINE" in run("local", str(GUIDE))
    assert "--scale" in run("local", str(GUIDE), "--scale", "decode")


def test_dynamos_commands_run_dynserve(tmp_path: Path) -> None:
    from dynserve.deploy.entry import PATH

    def run(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(PATH), "HOME": str(tmp_path)} | env
        command = [sys.executable, "-m", *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    assert "--model-path" in run("dynamo.trtllm", "--help").stdout
    refused = run("dynamo.vllm", "--model", str(TINY_MODEL), "--data-parallel-size", "2")
    assert refused.returncode == 2 and "run more replicas instead" in refused.stderr
    options = {"max_batch_sizes": 3}
    wrong = run(
        "dynamo.trtllm", "--model-path", str(TINY_MODEL), "--publish-metrics", "--override-engine-args", json.dumps(options),
        DYN_EXECUTOR="simulated", NATS_SERVER="127.0.0.1:1", ETCD_ENDPOINTS="127.0.0.1:port",
    )  # fmt: skip
    assert "dynserve: dynamo.trtllm --publish-metrics has no meaning here" in wrong.stderr
    assert wrong.returncode == 2 and "ETCD_URL '127.0.0.1:port' is not an address" in wrong.stderr
