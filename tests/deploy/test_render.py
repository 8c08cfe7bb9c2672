from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from dynserve.deploy.documents import Notes
from dynserve.deploy.render_command import RenderConfig, manifests, write
from dynserve.errors import ConfigError
from tests.deploy.test_reader import GUIDE, HEAD

VERSIONS = [f"1.{minor}" for minor in range(27, 38)]
NAME = "trtllm-disagg-qwen-full"
IMAGE = {"image": "registry.example/dynserve:1"}
VLLM = "mainContainer: {command: [python3, -m, dynamo.vllm, --model, m]"


def rendered(spec: str | Path, tmp_path: Path, notes: Notes | None = None, **options: Any) -> list[dict[str, Any]]:
    path = spec
    if isinstance(spec, str):
        path = tmp_path / "f.yaml"
        path.write_text(HEAD.format(version="v1alpha1") + "".join(f"  {line}\n" for line in spec.splitlines()))
    return manifests(str(path), RenderConfig(**(IMAGE | options)), notes or Notes())


def services(frontend: str = "", worker: str = "", command: str = VLLM + "}") -> str:
    return f"services:\n  f: {{componentType: frontend{frontend}}}\n  w: {{componentType: worker{worker}, extraPodSpec: {{{command}}}}}\n"


def one(objects: list[dict[str, Any]], kind: str, name: str) -> Any:
    (found,) = [item for item in objects if item["kind"] == kind and item["metadata"]["name"] == name]
    return found


def container(objects: list[dict[str, Any]], name: str) -> Any:
    return one(objects, "Deployment", name)["spec"]["template"]["spec"]["containers"][0]


def env(objects: list[dict[str, Any]], name: str) -> dict[str, Any]:
    entries = container(objects, name)["env"]
    assert len({entry["name"] for entry in entries}) == len(entries)
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in entries}


@pytest.mark.parametrize("version", VERSIONS)
def test_everything_rendered_is_valid_in_every_version_of_kubernetes(version: str, tmp_path: Path) -> None:
    spec = """pvcs: [{name: cache, create: true, size: 50Gi, storageClass: fast, volumeAccessMode: ReadWriteMany}]
envs: [{name: HF_HOME, value: /cache}]
""" + services(
        ", ingress: {enabled: true, host: chat, tls: {secretName: t}}, replicas: 2, resources: {requests: {cpu: '1'}}",
        ", replicas: 3, envFromSecret: s, volumeMounts: [{name: cache, mountPoint: /cache}], resources: {limits: {gpu: 1}}",
        VLLM + ", env: [{name: N, valueFrom: {resourceFieldRef: {resource: limits.cpu}}}]}, nodeSelector: {a: b}",
    )
    for objects in (rendered(GUIDE, tmp_path), rendered(spec, tmp_path, max_replicas="f=5,w=9")):
        for item in objects:
            kubernetes_validate.validate(item, version, strict=True)


def test_the_guides_objects_have_the_names_that_its_commands_use(tmp_path: Path) -> None:
    objects = rendered(GUIDE, tmp_path)
    for part, replicas in (("frontend", 1), ("trtllmprefillworker", 2), ("trtllmdecodeworker", 2)):
        deployment = one(objects, "Deployment", f"{NAME}-{part}")
        assert deployment["spec"]["replicas"] == replicas and deployment["metadata"]["namespace"] == "dynamo-cloud"
        assert (
            deployment["spec"]["selector"]["matchLabels"].items()
            <= deployment["spec"]["template"]["metadata"]["labels"].items()
        )
    service = one(objects, "Service", f"{NAME}-frontend")["spec"]
    assert service["ports"] == [{"name": "http", "port": 8000, "targetPort": 8000}]
    worker = container(objects, f"{NAME}-trtllmprefillworker")
    assert "TRITON" not in worker["args"][0]
    assert worker["command"] == ["/bin/bash", "-c"] and "exec python3 -m dynamo.trtllm" in worker["args"][0]
    assert worker["resources"]["limits"] == {"nvidia.com/gpu": "1"}
    config = one(objects, "ConfigMap", "trtllm-config")
    assert sorted(config["data"]) == ["trtllm-decode-config.yaml", "trtllm-prefill-config.yaml"]


def test_all_components_get_the_servers_that_any_of_them_names(tmp_path: Path) -> None:
    objects = rendered(GUIDE, tmp_path)
    frontend, worker = env(objects, f"{NAME}-frontend"), env(objects, f"{NAME}-trtllmdecodeworker")
    for name in ("NATS_URL", "ETCD_URL", "DYN_NAMESPACE"):
        assert frontend[name] == worker[name]
    assert worker["NATS_URL"] == "nats://dynamo-platform-nats.dynamo-cloud:4222" and frontend["DYN_ROUTER_MODE"] == "kv"
    assert not [item for item in objects if item["metadata"]["name"].endswith(("-nats", "-etcd"))]
    other = rendered(GUIDE, tmp_path, nats_url="nats://n:1")
    assert (
        env(other, f"{NAME}-trtllmdecodeworker")["NATS_URL"]
        == env(other, f"{NAME}-frontend")["NATS_URL"]
        == "nats://n:1"
    )


def test_servers_are_rendered_where_the_file_names_none(tmp_path: Path) -> None:
    objects = rendered(services(), tmp_path)
    assert (
        env(objects, "g-w")["NATS_URL"] == "nats://g-nats:4222"
        and env(objects, "g-w")["ETCD_URL"] == "http://g-etcd:2379"
    )
    for name, port in (("g-nats", 4222), ("g-etcd", 2379)):
        assert one(objects, "Service", name)["spec"]["ports"][0]["port"] == port


def test_a_pod_announces_its_address_and_the_files_entries_keep_their_order(tmp_path: Path) -> None:
    given = ", envs: [{name: A, value: '$(POD_IP)'}, {name: B, value: '$(A)'}, {name: DYN_NAMESPACE, value: mine}]"
    objects = rendered(services(worker=given), tmp_path)
    names = list(env(objects, "g-w"))
    assert names.index("POD_IP") < names.index("DYN_ADVERTISE_HOST") < names.index("A") < names.index("B")
    assert env(objects, "g-w")["DYN_NAMESPACE"] == "mine" and env(objects, "g-w")["DYN_ADVERTISE_HOST"] == "$(POD_IP)"
    assert env(objects, "g-f")["DYN_HTTP_HOST"] == "0.0.0.0"


def test_pods_are_hardened_and_the_files_own_settings_win(tmp_path: Path) -> None:
    own = ", securityContext: {capabilities: {add: [IPC_LOCK], drop: [ALL]}}, livenessProbe: {tcpSocket: {port: 9090}}}"
    objects = rendered(services(command=VLLM + own + ", terminationGracePeriodSeconds: 600"), tmp_path)
    pod = one(objects, "Deployment", "g-w")["spec"]["template"]["spec"]
    main = pod["containers"][0]
    assert pod["securityContext"]["runAsNonRoot"] and pod["automountServiceAccountToken"] is False
    assert main["securityContext"]["readOnlyRootFilesystem"] and main["securityContext"]["capabilities"]["add"] == [
        "IPC_LOCK"
    ]
    assert (
        main["livenessProbe"] == {"tcpSocket": {"port": 9090}}
        and main["readinessProbe"]["httpGet"]["path"] == "/health"
    )
    assert pod["terminationGracePeriodSeconds"] == 600


def test_folders_that_the_read_only_root_needs_are_mounted_once(tmp_path: Path) -> None:
    own = ", volumeMounts: [{name: mine, mountPath: /tmp}]}, volumes: [{name: mine, emptyDir: {}}]"
    objects = rendered(services(worker=", sharedMemory: {size: 2Gi}", command=VLLM + own), tmp_path)
    pod = one(objects, "Deployment", "g-w")["spec"]["template"]["spec"]
    mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts == {"/tmp": "mine", "/dev/shm": "dynserve-shared-memory"}
    assert {"name": "dynserve-shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}} in pod["volumes"]
    none = rendered(services(worker=", sharedMemory: {disabled: true}"), tmp_path)
    assert "/dev/shm" not in {mount["mountPath"] for mount in container(none, "g-w")["volumeMounts"]}


def test_the_port_of_a_frontend_follows_its_command(tmp_path: Path) -> None:
    command = ", extraPodSpec: {mainContainer: {args: [-m, dynamo.frontend, --http-port, '8123'], command: [python3]}}"
    objects = rendered(services(command), tmp_path)
    assert one(objects, "Service", "g-f")["spec"]["ports"][0] == {"name": "http", "port": 8000, "targetPort": 8123}
    assert container(objects, "g-f")["readinessProbe"]["httpGet"]["port"] == 8123
    assert {"port": 8123, "protocol": "TCP"} in one(objects, "NetworkPolicy", "g")["spec"]["ingress"][1]["ports"]


def test_an_autoscaler_owns_the_number_of_frontends(tmp_path: Path) -> None:
    objects = rendered(services(", replicas: 2, resources: {requests: {cpu: '1'}}"), tmp_path, max_replicas="f=4")
    assert "replicas" not in one(objects, "Deployment", "g-f")["spec"]
    scaler = one(objects, "HorizontalPodAutoscaler", "g-f")["spec"]
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (2, 4)


def test_a_changed_config_map_restarts_the_pods(tmp_path: Path) -> None:
    def checksum() -> str:
        found = one(rendered(copy, tmp_path), "Deployment", f"{NAME}-trtllmprefillworker")
        return str(found["spec"]["template"]["metadata"]["annotations"]["dynserve/config"])

    for path in GUIDE.parent.iterdir():
        (tmp_path / path.name).write_text(path.read_text())
    copy = tmp_path / GUIDE.name
    before = checksum()
    assert checksum() == before
    (tmp_path / "trtllm-prefill-config.yaml").write_text("max_batch_size: 3\n")
    assert checksum() != before


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        (services(), {"image": None}, "f has no image; use --image"),
        (services().replace("f:", "f" * 62 + ":"), {}, "not possible as the name of a Service"),
        (services(worker=", multinode: {nodeCount: 2}"), {}, "no workers of 2 nodes"),
        (services(), {"scale": "x=1"}, "has no component 'x'"),
    ],
)
def test_what_cannot_be_rendered_is_an_error(spec: str, options: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        rendered(spec, tmp_path, **options)


def test_the_command_prints_documents_or_writes_files(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dynserve", "deploy", "render", str(GUIDE), "--image", "i"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    printed = list(yaml.safe_load_all(done.stdout))
    assert printed == rendered(GUIDE, tmp_path, image="i")
    subprocess.run([*command, "-o", str(tmp_path / "out")], timeout=60, check=True)
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert len(files) == len(printed) and f"deployment-{NAME}-frontend.yaml" in files
    with pytest.raises(ConfigError, match="--output"):
        write(printed, str(GUIDE))


def test_autoscalers_that_could_not_work_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="f has no request of cpu"):
        rendered(services(), tmp_path, max_replicas="f=4")
    with pytest.raises(ConfigError, match="w: at most 2 replicas are less than its 3"):
        rendered(services(worker=", replicas: 3"), tmp_path, max_replicas="w=2")
    with pytest.raises(ConfigError, match="has no component 'x'"):
        rendered(services(), tmp_path, max_replicas="x=2")


def test_workers_are_scaled_by_what_the_frontends_publish_of_their_role(tmp_path: Path) -> None:
    prefill = VLLM.replace("--model, m", "--model, m, --is-prefill-worker")
    plain = one(
        rendered(services(command=prefill + "}"), tmp_path, max_replicas="w=5"), "HorizontalPodAutoscaler", "g-w"
    )
    selectors = [metric["external"]["metric"]["selector"]["matchLabels"] for metric in plain["spec"]["metrics"]]
    assert selectors == [{"cluster": "g", "role": "prefill"}] * 3
    scaled = one(
        rendered(services(command=prefill + "}"), tmp_path, max_replicas="w=5", keda_prometheus="http://p"), "ScaledObject", "g-w"
    )  # fmt: skip
    assert all('role="prefill"' in trigger["metadata"]["query"] for trigger in scaled["spec"]["triggers"])
    assert scaled["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleDown"]
