"""Images that are built and run: `make images`. The pods are those that `dynserve deploy render` makes.

podman plays Kubernetes' pods on one machine, but has no Services, Deployments and StatefulSets: each replica becomes a pod of
its own here, and those of NATS and etcd get the names of their Services.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from dynserve.deploy.documents import Notes
from dynserve.deploy.render_command import RenderConfig, manifests
from dynserve.local.embedded import free_ports
from tests.conftest import wait_for_port
from tests.deploy.test_docker import DOCKER
from tests.deploy.test_guide import FORWARD
from tests.deploy.test_reader import GUIDE
from tests.images.podman import Podman, missing

WANTED = os.environ.get("DYNSERVE_IMAGES") == "1"
pytestmark = pytest.mark.skipif(not WANTED or missing() != "", reason=missing() or "`make images` runs these")

NATS, ETCD = "nats://platform-nats:4222", "http://platform-etcd:2379"
MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
ALONE = ("--no-healthcheck", "--network", "none")  # podman's health checks need systemd
BODY = {"model": MODEL, "prompt": "one, two, three,", "max_tokens": 16, "ignore_eos": True}


@pytest.fixture(scope="session")
def podman() -> Iterator[Podman]:
    # not below pytest's folder, whose path would be too long for the sockets of containers
    kept = os.environ.get("DYNSERVE_IMAGES_FOLDER")  # keeps layers from one run to the next
    folder = Path(kept or tempfile.mkdtemp(prefix="dyn-", dir="/var/tmp"))
    folder.mkdir(exist_ok=True)
    made = Podman(folder)
    try:
        with made.network():
            yield made
    finally:
        made.reset(keep_images=kept is not None)


@pytest.fixture(scope="session")
def images(podman: Podman) -> dict[str, str]:
    base = podman.make_base()
    return {target: podman.build(target, base) for target in ("frontend", "cpu")}


def until(condition: Callable[[], Any], podman: Podman, seconds: float = 90) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, podman.logs()
        time.sleep(0.2)
    return found


def test_images_say_what_they_are_and_run_as_an_unprivileged_user(podman: Podman, images: dict[str, str]) -> None:
    for target, image in images.items():
        config = json.loads(podman.run("inspect", "--type", "image", image))[0]
        assert config["Config"]["User"] == "1000:1000"
        assert config["Config"]["Labels"]["org.opencontainers.image.title"] == "dynserve"
        assert config["Config"]["Entrypoint"][0] == "/usr/bin/tini"
        print(f"{target}: {config['Size'] / 1e6:.0f} MB with the base")
    assert "torch" not in podman.run("run", "--rm", *ALONE, "--entrypoint", "pip", images["frontend"], "list")


def test_a_wrong_flag_in_a_container_is_one_sentence_and_exit_code_2(podman: Podman, images: dict[str, str]) -> None:
    podman.run("run", "--name", "wrong", *ALONE, images["frontend"], "frontend", "--htp-port", "1", check=False)
    assert json.loads(podman.run("inspect", "wrong"))[0]["State"]["ExitCode"] == 2
    assert podman.run("rm", "wrong")


def test_the_cpu_image_is_a_whole_cluster_by_itself_on_a_read_only_root(podman: Podman, images: dict[str, str]) -> None:
    confined = ["--read-only", "--read-only-tmpfs=false", "--tmpfs", "/tmp", "--cap-drop", "ALL"]
    podman.run(
        "run", "--detach", "--name", "alone", "--no-healthcheck", *confined, "--network", "dynserve", images["cpu"]
    )
    try:
        networks = json.loads(podman.run("inspect", "alone"))[0]["NetworkSettings"]["Networks"]
        base = f"http://{networks['dynserve']['IPAddress']}:8000"
        until(lambda: status(f"{base}/health") == 200, podman)
        body = BODY | {"model": "tiny_model", "max_tokens": 4}
        answer = httpx.post(f"{base}/v1/completions", json=body, timeout=60, trust_env=False).json()
        assert answer["choices"][0]["text"].startswith(" four")
        began = time.monotonic()
        podman.run("stop", "--time", "60", "alone")
        assert json.loads(podman.run("inspect", "alone"))[0]["State"]["ExitCode"] == 0
        assert time.monotonic() - began < 30
    finally:
        podman.run("rm", "--force", "alone")


def status(url: str) -> int:
    try:
        return httpx.get(url, timeout=2, trust_env=False).status_code
    except httpx.HTTPError:
        return 0


class Cluster:
    """The guide's deployment, rendered and played as pods."""

    def __init__(self, podman: Podman, image: str) -> None:
        self._podman, self._image = podman, image
        # the guide's file names servers of Dynamo's platform, whose names podman cannot give
        # the simulated executor, since five pods that import torch on two cores stall each other for seconds
        options = RenderConfig(image=image, executor="simulated", nats_url=NATS, etcd_url=ETCD)
        objects = manifests(str(GUIDE), options, Notes())
        with tempfile.TemporaryDirectory() as folder:
            platform = Path(folder) / "platform.yaml"
            platform.write_text(f"model: m\nimage: {image}\naggregated: {{}}\n")
            objects += [
                one for one in manifests(str(platform), RenderConfig(), Notes()) if one["kind"] == "StatefulSet"
            ]
        self.maps = [one for one in objects if one["kind"] == "ConfigMap"]
        self.pods: dict[str, dict[str, Any]] = {}
        for one in objects:
            if one["kind"] in ("Deployment", "StatefulSet"):
                self._add(one)

    def _add(self, workload: dict[str, Any]) -> None:
        name, replicas = workload["metadata"]["name"], workload["spec"]["replicas"]
        for number in range(replicas):
            pod = name if workload["kind"] == "StatefulSet" else f"{name}-{number}"
            template = copy.deepcopy(workload["spec"]["template"])
            (container,) = template["spec"]["containers"]
            container["image"], container["imagePullPolicy"] = self._image, "Never"
            for key in ("livenessProbe", "readinessProbe", "startupProbe", "ports"):
                container.pop(key, None)  # they need systemd; ports would be published on the host
            container["env"] = [
                entry
                for entry in container.get("env", [])
                if entry["name"] not in ("POD_IP", "DYN_ADVERTISE_HOST")  # podman has no status.podIP
            ]
            if workload["kind"] == "Deployment" and "frontend" not in name:
                container["env"].append({"name": "DYN_MODEL_PATH", "value": TINY})
            template["spec"].pop("topologySpreadConstraints", None)
            container.get("resources", {}).pop("limits", None)  # GPUs
            container.get("resources", {}).pop("requests", None)
            metadata = {"name": pod, "labels": template["metadata"]["labels"]}
            self.pods[pod] = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}

    def start(self) -> str:
        """Starts all pods, and returns the frontend's address when all workers are ready."""
        self._podman.play([*self.maps, *self.pods.values()])
        self.base = f"http://{self._podman.address(self.named('frontend')[0])}:8000"
        until(lambda: len(self.ready()) == 4, self._podman, 180)
        return self.base

    def named(self, part: str) -> list[str]:
        return sorted(name for name in self.pods if part in name)

    def ready(self) -> list[dict[str, Any]]:
        try:
            body = httpx.get(f"{self.base}/health", timeout=2, trust_env=False).json()
        except httpx.HTTPError:
            return []
        return [one for one in body["instances"] if one["state"] == "ready"]

    def stop(self, pod: str, grace: int = 60) -> int:
        """Stops a pod as Kubernetes does, removes it, and returns the exit code of its main container."""
        # `pod stop` would take the network away while the worker finishes its answers; Kubernetes does that afterwards
        self._podman.run("stop", "--time", str(grace), f"{pod}-main", timeout=grace + 30)
        code = json.loads(self._podman.run("inspect", f"{pod}-main"))[0]["State"]["ExitCode"]
        self._podman.run("pod", "rm", "--force", pod)
        return int(code)

    def restart(self, pod: str) -> None:
        self._podman.play([*self.maps, self.pods[pod]])


TINY = "/opt/app/dynserve/local/tiny_model"


@pytest.fixture(scope="session")
def cluster(podman: Podman, images: dict[str, str]) -> Cluster:
    made = Cluster(podman, images["cpu"])
    made.start()
    return made


def test_the_guides_pods_answer_through_prefill_and_decode(cluster: Cluster, podman: Podman) -> None:
    assert sorted(one["role"] for one in cluster.ready()) == ["decode", "decode", "prefill", "prefill"]
    answer = httpx.post(f"{cluster.base}/v1/completions", json=BODY, timeout=60, trust_env=False)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 16
    for pod in cluster.named("worker"):
        state = podman.run("exec", f"{pod}-main", "sh", "-c", "id -u; touch /x 2>&1; grep CapEff /proc/self/status")
        user, error, capabilities = state.splitlines()
        assert user == "1000" and "Read-only file system" in error and int(capabilities.split()[1], 16) == 0


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
def test_the_smoke_test_of_the_scripts_passes_on_the_pods(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "forward.py").write_text(FORWARD.replace('"127.0.0.1", int(sys.argv[2])', "sys.argv[2], 8000"))
    (port,) = free_ports(1)
    forward = [sys.executable, tmp_path / "forward.py", str(port), httpx.URL(cluster.base).host]
    environment = os.environ | {"LOCAL_PORT": str(port), "MODEL_ID": MODEL}
    with subprocess.Popen(forward) as forwarding:
        try:
            wait_for_port(port)
            command = ["bash", DOCKER / "scripts" / "benchmark-trtllm.sh", "smoke"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
        finally:
            forwarding.terminate()
    assert done.returncode == 0 and "smoke test passed" in done.stdout, done.stderr


def test_each_worker_is_replaced_under_load_without_a_failed_request(cluster: Cluster, podman: Podman) -> None:
    done, failed, ended = 0, list[str](), threading.Event()

    def ask() -> None:
        nonlocal done
        with httpx.Client(timeout=60, trust_env=False) as client:
            while not ended.is_set():
                answer = client.post(f"{cluster.base}/v1/completions", json=BODY)
                if answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 16:
                    done += 1
                else:
                    failed.append(answer.text)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for pod in cluster.named("worker"):
            before = {one["id"] for one in cluster.ready()}
            assert cluster.stop(pod) == 0
            cluster.restart(pod)
            until(lambda: len(found := cluster.ready()) == 4 and {one["id"] for one in found} - before, podman)  # noqa: B023
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert failed == [] and done > 50


def test_a_frontend_ends_with_exit_code_0(cluster: Cluster, podman: Podman) -> None:
    (pod,) = cluster.named("frontend")
    assert cluster.stop(pod) == 0
    cluster.restart(pod)
    cluster.base = f"http://{podman.address(pod)}:8000"
    until(lambda: len(cluster.ready()) == 4, podman)


def test_the_compose_file_starts_a_cluster_that_answers(podman: Podman, images: dict[str, str], tmp_path: Path) -> None:
    program = tmp_path / "podman"
    program.write_text(podman.wrapper())
    program.chmod(0o755)
    (port,) = free_ports(1)
    services = ("etcd", "nats", "frontend", "prefill", "decode")
    override = {"services": {name: {"healthcheck": {"disable": True}} for name in services}}  # they need systemd
    (tmp_path / "override.yaml").write_text(json.dumps(override))
    # the image for a laptop has both servers
    settings = dict.fromkeys(("DYNSERVE_IMAGE", "ETCD_IMAGE", "NATS_IMAGE"), images["cpu"]) | {
        "DYNSERVE_PORT": str(port)
    }
    compose = [Path(sys.executable).parent / "podman-compose", "--podman-path", program, "--no-ansi"]
    compose += ["-f", DOCKER / "compose.yaml", "-f", tmp_path / "override.yaml"]

    def run(*words: str) -> str:
        done = subprocess.run([*compose, *words], capture_output=True, text=True, timeout=180, check=False, env=os.environ | settings)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    try:
        run("up", "--detach", "--no-build")
        base = f"http://127.0.0.1:{port}"

        def ready() -> int:
            try:
                found = httpx.get(f"{base}/health", timeout=2, trust_env=False).json()["instances"]
            except httpx.HTTPError:
                return 0
            return sum(one["state"] == "ready" for one in found)

        until(lambda: ready() == 4, podman, 120)
        body = BODY | {"model": "tiny_model", "max_tokens": 4}
        answer = httpx.post(f"{base}/v1/completions", json=body, timeout=60, trust_env=False).json()
        assert answer["choices"][0]["text"].startswith(" four")
    finally:
        run("down", "--timeout", "40")
