"""`dynserve deploy status|scale|logs`, on this machine and with a real kubectl on a stand-in for Kubernetes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dynserve.child import ChildSpec
from dynserve.config import TINY_MODEL
from dynserve.deploy import control, operate
from dynserve.deploy import local as local_module
from dynserve.deploy.documents import Map, Place
from dynserve.deploy.graph import Component, Graph
from dynserve.deploy.local import LocalConfig, LocalDeployment
from dynserve.deploy.operate import OperateConfig
from dynserve.errors import ConfigError
from dynserve.local.embedded import free_ports
from dynserve.tasks import task_group
from tests.conftest import Process
from tests.deploy.kubernetes_stand_in import StandIn, serving
from tests.deploy.test_scripts import KUBECTL


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def local(runtime: Path) -> Iterator[Process]:
    (port,) = free_ports(1)
    path = runtime / "small.yaml"
    path.write_text(f"model: {TINY_MODEL}\nservedModelName: m\nexecutor: simulated\nprefill: {{}}\ndecode: {{}}\n")
    command = [sys.executable, "-m", "dynserve", "deploy", "local", str(path), "--http-port", str(port)]
    process = Process(command, runtime / "local.log", {"XDG_RUNTIME_DIR": str(runtime)})
    deadline = time.monotonic() + 60
    while "Ctrl-C stops everything." not in process.output():
        assert process.alive() and time.monotonic() < deadline, process.output()
        time.sleep(0.05)
    yield process
    process.kill(signal.SIGINT)
    assert process.wait(60) == 0
    assert not (runtime / "dynserve" / "small.sock").exists()


def deploy(*words: str, runtime: Path, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dynserve", "deploy", *words]
    environment = os.environ | {"XDG_RUNTIME_DIR": str(runtime), "PATH": str(runtime)}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, env=environment)


def rows(text: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split() for line in text.splitlines()[2:]}


def test_status_shows_processes_with_their_instances_in_one_table(local: Process, runtime: Path) -> None:
    done = deploy("status", runtime=runtime)
    assert done.returncode == 0 and done.stdout.startswith("small: healthy, models: m\n"), done.stderr
    found = rows(done.stdout)
    assert found.keys() == {"etcd", "nats", "frontend", "prefill", "decode"}
    assert found["decode"][3].startswith("decode-") and found["decode"][4:6] == ["decode", "ready"]


def test_scaling_starts_and_stops_workers_while_requests_go_on(local: Process, runtime: Path) -> None:
    assert deploy("scale", "small", "decode=3", runtime=runtime).returncode == 0

    def decoders() -> int:
        return deploy("status", "small", runtime=runtime).stdout.count(" ready ")

    deadline = time.monotonic() + 60
    while decoders() < 4:  # with the prefill worker
        assert time.monotonic() < deadline
        time.sleep(0.2)
    done = deploy("scale", "small", "decode=1", runtime=runtime)
    assert done.stdout == "small: decode has 1 replicas\n"
    text = deploy("status", "small", runtime=runtime).stdout
    assert sum(line.split()[0] == "decode" for line in text.splitlines()) == 1
    wrong = deploy("scale", "small", "decoder=1", runtime=runtime)
    assert wrong.returncode == 2 and "no component 'decoder'; it has decode, frontend, prefill" in wrong.stderr


def test_new_workers_get_the_gpus_that_no_running_one_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_module, "gpus", lambda: 4)
    started: list[ChildSpec] = []

    class Child:
        def __init__(self, spec: ChildSpec) -> None:
            self.spec, self.name = spec, spec.name

    async def add(spec: ChildSpec, group: list[Any]) -> None:
        started.append(spec)
        group.append(Child(spec))

    async def scenario() -> None:
        component = Component(
            "decode", "worker", "", 1, Place("f", 1), Map(), resources={"limits": {"nvidia.com/gpu": "2"}}
        )
        graph = Graph("g", "", Place("f", 1), "g", [component])
        running = ChildSpec("decode-0", [], {"CUDA_VISIBLE_DEVICES": "0,2"})
        frontend = ChildSpec("frontend-0", [])
        async with task_group() as tasks:
            deployment = LocalDeployment(
                graph, LocalConfig(), [], {"frontend": [frontend], "worker": [running]}, 1, tasks,
                lambda name, count: [ChildSpec(f"{name}-{number}", []) for number in range(count)],
            )  # fmt: skip
            monkeypatch.setattr(deployment._supervisor, "add", add)
            await deployment.scale("decode", 2)
            with pytest.raises(ConfigError, match="decode-2 needs 2 GPUs, and 0 of 4 are free"):
                await deployment.scale("decode", 3)

    asyncio.run(scenario())
    assert [spec.environment["CUDA_VISIBLE_DEVICES"] for spec in started] == ["1,3"]


def test_logs_are_those_of_one_component_and_go_on_with_follow(local: Process, runtime: Path) -> None:
    text = deploy("logs", "small", "--component", "decode", runtime=runtime).stdout
    assert "decode-0 | " in text and "prefill" not in {line.split("-")[0] for line in text.splitlines()}
    assert deploy("logs", "small", "--tail", "1", runtime=runtime).stdout.count("\n") == 1
    command = [
        sys.executable,
        "-m",
        "dynserve",
        "deploy",
        "logs",
        "small",
        "-f",
        "--tail",
        "1",
        "--component",
        "prefill",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"XDG_RUNTIME_DIR": str(runtime)}) as follower:  # fmt: skip
        assert follower.stdout is not None
        time.sleep(
            1
        )  # until it follows: a line that came earlier would not be seen, and the next command makes another
        deploy("scale", "small", "prefill=2", runtime=runtime)
        lines = [follower.stdout.readline()]
        while not lines[-1].startswith("prefill-1 | "):
            assert lines[-1].startswith("prefill-0 | ")
            lines.append(follower.stdout.readline())
        follower.send_signal(signal.SIGINT)
        assert follower.wait(10) == 130


def test_a_name_that_runs_nowhere_is_one_sentence(local: Process, runtime: Path) -> None:
    for words in (["status", "other"], ["scale", "other", "a=1"], ["logs", "other"]):
        done = deploy(*words, runtime=runtime)
        assert done.returncode == 2 and "kubectl is not installed, and no deployment of this name" in done.stderr
    assert "needs the NAME" in deploy("logs", runtime=runtime).stderr
    assert "of the form name=2" in deploy("scale", "small", "decode", runtime=runtime).stderr


def test_a_socket_that_a_killed_deployment_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(control.control_folder() / "dead.sock"))
    assert control.running() == ["dead"]
    with pytest.raises(ConfigError, match="dead does not run on this machine"):
        operate.status("dead", OperateConfig())
    assert control.running() == []
    (tmp_path / "dynserve").chmod(0o755)
    with pytest.raises(ConfigError, match="that only you can open"):
        control.control_folder()


# Kubernetes


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    if KUBECTL is None:
        pytest.skip("kubectl is not installed: `make install` unpacks it")
    stand_in = StandIn()
    with serving(stand_in) as url:
        config: dict[str, Any] = {
            "apiVersion": "v1", "kind": "Config", "current-context": "c", "users": [{"name": "u", "user": {}}],
            "clusters": [{"name": "c", "cluster": {"server": url}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u", "namespace": "ours"}}],
        }  # fmt: skip
        (tmp_path / "config").write_text(json.dumps(config))
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "kubectl").symlink_to(KUBECTL)
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        monkeypatch.setenv("HOME", str(tmp_path))
        yield stand_in


def test_status_on_kubernetes_joins_pods_with_the_instances_of_the_frontend(
    cluster: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, component, ip in (("frontend-1", "frontend", "10.0.0.1"), ("decode-1", "decode", "10.0.0.2")):
        cluster.add_pod("ours", f"chat-{name}")
        pod = cluster.objects["pods", "ours", f"chat-{name}"]
        pod["status"]["podIP"] = ip
        pod["metadata"]["labels"] = {"app.kubernetes.io/instance": "chat", "app.kubernetes.io/component": component}
    cluster.add_pod("ours", "other-frontend-1")
    cluster.add_pod("ours", "chat-b-frontend-1")  # of another deployment, as its label says
    cluster.objects["pods", "ours", "chat-b-frontend-1"]["metadata"]["labels"] = {
        "app.kubernetes.io/instance": "chat-b"
    }
    cluster.health["ours", "chat-frontend"] = {
        "status": "healthy", "models": ["m"], "planes": {"nats": True, "registered": False},
        "instances": [{
            "id": "decode-ab", "role": "decode", "state": "ready", "address": "http://10.0.0.2:9090", "warnings": ["SLOW"],
            "load": {"running": 3, "waiting": 1, "free_blocks": 75, "total_blocks": 100},
        }],
    }  # fmt: skip
    operate.status("chat", OperateConfig())
    text = capsys.readouterr().out
    assert text.startswith("chat: healthy, models: m\n  registered is down\n  decode-ab: SLOW\n")
    (line,) = [line for line in text.splitlines() if "chat-decode-1" in line]
    assert line.split() == ["decode", "chat-decode-1", "0", "1/1", "decode-ab", "decode", "ready", "3", "1", "25", "%"]
    assert "other-frontend" not in text and "chat-b" not in text
    with pytest.raises(ConfigError, match="nor has pods in elsewhere"):
        operate.status("chat", OperateConfig(namespace="elsewhere"))


def test_status_without_an_answer_of_the_frontend_still_lists_the_pods(
    cluster: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.add_pod("ours", "graph-trtllmdecodeworker-1-x", ready="0/1")  # of Dynamo's operator, without our labels
    operate.status("graph", OperateConfig())
    text = capsys.readouterr().out
    assert (
        "graph: no answer, models: none\n  kubectl get --raw" in text
        and "trtllmdecodeworker  graph-trtllmdecodeworker-1-x" in text
    )


def test_scale_on_kubernetes_sets_the_replicas_of_the_deployment(cluster: StandIn) -> None:
    cluster.objects["deployments", "ours", "chat-decode"] = {
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "chat-decode", "namespace": "ours"},
        "spec": {"replicas": 1},
    }  # fmt: skip
    operate.scale("chat", ["decode=4"], OperateConfig())
    assert cluster.objects["deployments", "ours", "chat-decode"]["spec"]["replicas"] == 4
    with pytest.raises(ConfigError, match="kubectl scale deployment/chat-prefill"):
        operate.scale("chat", ["prefill=4"], OperateConfig())
