"""The Helm chart: its templates make of a values file what `dynserve deploy render` makes of it."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import kubernetes_validate
import msgspec
import pytest
import yaml

from dynserve.deploy.cluster import Cluster, values_schema
from dynserve.deploy.documents import Notes
from dynserve.deploy.render_command import RenderConfig, manifests
from dynserve.errors import ConfigError
from dynserve.plane_tls import PlaneTls
from tests.deploy.test_render import VERSIONS

CHART = Path(__file__).parent.parent.parent / "docker" / "helm" / "dynserve"
HELM = shutil.which("helm", path=Path(sys.executable).parent) or shutil.which("helm")
CUSTOM = {"PodMonitor", "ScaledObject", "HTTPRoute"}
pytestmark = pytest.mark.skipif(HELM is None, reason="helm is not installed: `make install` unpacks it")

SMALL = """
model: /models/qwen
prefill: {}
decode: {}
"""
GUIDE = """
model: Qwen/Qwen2.5-0.5B-Instruct
image: registry.example/dynserve:0.1.0-trtllm
executor: trtllm
frontend: {}
prefill:
  replicas: 2
  gpus: 1
  resources: {requests: {cpu: 4, memory: 16Gi}}
  engine: {max_batch_size: 16, max_num_tokens: 4096.0, enable_chunked_prefill: true, cache_transceiver_config: {backend: DEFAULT}}
decode:
  replicas: 2
  gpus: 1
  engine: {kv_cache_config: {free_gpu_memory_fraction: 0.8}, cuda_graph_config: {batch_sizes: [1, 2, 4]}, note: "a < b & c > 'ü'"}
"""
ALL = """
name: chat
model: org/model
servedModelName: "yes"
image: registry.example/dynserve:1
imagePullPolicy: Always
imagePullSecrets: [pull, pull2]
executor: torch
frontend:
  replicas: 3
  maxReplicas: 6
  routerMode: least-loaded
  ttftSloMs: 500
  image: registry.example/frontend:1
  args: [--max-queued, "7"]
  env: {DYN_LOG_LEVEL: debug, DYN_ROUTER_MODE: random, POD_NAME: other, A: "1"}
  resources: {requests: {cpu: 500m}, limits: {memory: 1Gi}}
  labels: {team: a}
  annotations: {note: "true"}
  topologySpreadConstraints: [{maxSkew: 2, topologyKey: zone, whenUnsatisfiable: DoNotSchedule}]
  terminationGracePeriodSeconds: 90
prefill:
  replicas: 0
  maxReplicas: 8
  gpus: 2
  rdma: rdma/ib
  sharedMemory: 80Gi
  nodeSelector: {gpu: h100}
  tolerations: [{key: a, operator: Exists}]
  affinity: {nodeAffinity: {}}
  priorityClassName: high
  runtimeClassName: nvidia
  volumes: [{name: scratch, emptyDir: {}}]
  volumeMounts: [{name: scratch, mountPath: /tmp/}, {name: scratch, mountPath: /dev/shm}]
  env: {HF_TOKEN: x, DYN_MODEL_PATH: /other}
decode:
  replicas: 2
  maxReplicas: 4
  sharedMemory: "0"
gpuResource: example.com/gpu
nats: {url: "nats://a:4222,nats://b:4222"}
etcd: {image: "registry.example/etcd:1", resources: {limits: {memory: 1Gi}}}
modelCache: {size: 50Gi, storageClass: fast}
hfTokenSecret: hf
apiKeysSecret: keys
planeTls: {enabled: true, secret: planes}
podMonitor: true
ingress: {host: chat.example.com, className: nginx, tlsSecret: t, annotations: {a: b, nginx.ingress.kubernetes.io/proxy-buffering: "on"}}
route: {hostnames: [chat.example.com], parentRefs: [{name: gateway, namespace: infra}]}
autoscaling: {kind: keda, prometheus: "http://prometheus:9090", kvOccupancyPercent: 65, waitingRequests: 3, missedPercent: 5}
"""
AGGREGATED = """
model: m
aggregated: {replicas: 4, maxReplicas: 8, gpus: 1, engine: {max_batch_size: 8}}
etcd: {url: "http://etcd:2379"}
nats: {urlSecret: nats-address}
modelCache: {claim: have}
networkPolicy: false
"""
CASES = {"small": SMALL, "guide": GUIDE, "all": ALL, "aggregated": AGGREGATED}


def helm(*words: str | Path) -> subprocess.CompletedProcess[str]:
    assert HELM is not None
    return subprocess.run([HELM, *map(str, words)], capture_output=True, text=True, timeout=60, check=False)


def from_chart(values: str, tmp_path: Path, *flags: str) -> list[dict[str, Any]]:
    (tmp_path / "values.yaml").write_text(values)
    done = helm("template", "rel", CHART, "-f", tmp_path / "values.yaml", *flags)
    assert done.returncode == 0, done.stderr
    return [one for one in yaml.safe_load_all(done.stdout) if one]


def from_render(values: str, tmp_path: Path) -> list[dict[str, Any]]:
    path = tmp_path / "rel.yaml"
    path.write_text(values)
    return manifests(str(path), RenderConfig(), Notes())


def comparable(objects: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Returns objects by kind and name, without the labels that Helm's conventions ask for, and without its test."""
    found = {}
    for one in objects:
        metadata = one["metadata"]
        if "helm.sh/hook" in metadata.get("annotations", {}):
            continue
        metadata["labels"] = {
            key: value
            for key, value in metadata["labels"].items()
            if key not in ("helm.sh/chart", "app.kubernetes.io/managed-by")
        }
        if metadata.get("annotations") == {"helm.sh/resource-policy": "keep"}:
            del metadata["annotations"]
        found[f"{one['kind']} {metadata['name']}"] = one
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_chart_makes_what_render_makes(case: str, tmp_path: Path) -> None:
    chart, ours = comparable(from_chart(CASES[case], tmp_path)), comparable(from_render(CASES[case], tmp_path))
    assert chart.keys() == ours.keys()
    for name in ours:
        assert chart[name] == json.loads(json.dumps(ours[name])), name


@pytest.mark.parametrize("version", VERSIONS)
def test_objects_of_the_chart_are_valid_in_every_version_of_kubernetes(version: str, tmp_path: Path) -> None:
    for case in CASES.values():
        for one in from_chart(case, tmp_path, "--kube-version", version):
            if one["kind"] not in CUSTOM:
                kubernetes_validate.validate(one, version, strict=True)


def test_rendering_twice_gives_the_same_but_for_generated_certificates(tmp_path: Path) -> None:
    assert from_chart(ALL, tmp_path) == from_chart(ALL, tmp_path)
    values = SMALL + "planeTls: {enabled: true}"
    first, second = (comparable(from_chart(values, tmp_path)) for _ in range(2))
    assert {name for name in first if first[name] != second[name]} == {"Secret rel-plane-tls"}


def test_the_chart_may_be_part_of_another_one(tmp_path: Path) -> None:
    assert from_chart(SMALL + "global: {a: b}", tmp_path) == from_chart(SMALL, tmp_path)


@pytest.mark.parametrize("case", CASES)
def test_lint_has_nothing_to_say(case: str, tmp_path: Path) -> None:
    (tmp_path / "values.yaml").write_text(CASES[case])
    done = helm("lint", "--strict", CHART, "-f", tmp_path / "values.yaml")
    assert done.returncode == 0, done.stdout


def test_the_schema_of_values_is_that_of_the_types() -> None:
    hint = "run: python -m dynserve.deploy.cluster > docker/helm/dynserve/values.schema.json"
    assert json.loads((CHART / "values.schema.json").read_text()) == values_schema(), hint


def test_the_values_file_states_the_defaults_of_the_types(tmp_path: Path) -> None:
    """Else render and chart would differ in what a file leaves out."""
    stated = yaml.safe_load((CHART / "values.yaml").read_text())
    assert stated.pop("model") == ""
    assert from_render(SMALL + yaml.safe_dump(stated), tmp_path) == from_render(SMALL, tmp_path)
    named = {field.encode_name for field in msgspec.structs.fields(Cluster)}
    assert stated.keys() | {"model", "prefill", "decode", "aggregated", "namespace"} == named


WRONG = {
    "prefill: {}\ndecode: {}": "model is missing",
    "model: m": "has no workers",
    "model: m\nprefill: {}": "prefill and decode need each other",
    "model: m\nprefil: {}": ":2: file has no key 'prefil' (did you mean prefill?)",
    "model: m\nprefill: {}\ndecode:\n  replicas: two": ":4: replicas: expected `int`, got `str`",
    "model: m\nprefill: {}\ndecode:\n  gpu: 1": ":4: decode has no key 'gpu' (did you mean gpus?)",
    "model: m\naggregated: {replicas: -1}": "replicas: expected `int` >= 0",
    "model: m\naggregated: {}\nexecutor: vllm": "executor: invalid enum value 'vllm'",
    "model: m\naggregated: {}\nplaneTls: {secret: s}": ":3: planeTls.secret needs planeTls.enabled: true",
    "model: m\naggregated: {}\nautoscaling: {kind: keda}": "autoscaling.kind keda needs autoscaling.prometheus",
    "model: m\naggregated: {env: {NATS_URL: x}}": "aggregated.env.NATS_URL: use nats.url and etcd.url",
    "model: m\naggregated: {replicas: 4, maxReplicas: 2}": "aggregated.maxReplicas 2 is less than replicas 4",
    "model: m\naggregated: {args: [--system-port=1]}": "aggregated.args: --system-port cannot be changed here",
    "model: m\naggregated: {}\nfrontend: {args: [--http-port, '1']}": "frontend.args: --http-port cannot be changed",
    "model: m\naggregated: {}\nfrontend: {maxReplicas: 2}": "needs frontend.resources.requests.cpu",
    "model: m\naggregated: {args: [1]}": "args: expected `str`, got `int`",
    "model: m\naggregated: {resources: {limits: {memory: 16GB}}}": "limits: expected `str` matching regex",
}


@pytest.mark.parametrize("values", WRONG)
def test_wrong_values_are_refused_by_both(values: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        from_render(values, tmp_path)
    assert WRONG[values] in str(error.value) and "rel.yaml" in str(error.value)
    (tmp_path / "values.yaml").write_text(values)
    done = helm("template", "rel", CHART, "-f", tmp_path / "values.yaml")
    assert done.returncode != 0 and done.stdout == ""


def test_a_namespace_is_helms_own_option(tmp_path: Path) -> None:
    values = SMALL + "namespace: here"
    assert all(one["metadata"]["namespace"] == "here" for one in from_render(values, tmp_path))
    (tmp_path / "values.yaml").write_text(values)
    assert "use helm's --namespace" in helm("template", "rel", CHART, "-f", tmp_path / "values.yaml").stderr


def test_certificates_of_the_planes_are_generated(tmp_path: Path) -> None:
    values = SMALL + "planeTls: {enabled: true}"
    (secret,) = [one for one in from_chart(values, tmp_path, "--namespace", "here") if one["kind"] == "Secret"]
    for name, content in secret["data"].items():
        (tmp_path / name).write_bytes(base64.b64decode(content))
    PlaneTls(*(str(tmp_path / name) for name in ("tls.crt", "tls.key", "ca.crt")))
    command = ["openssl", "x509", "-noout", "-ext", "subjectAltName", "-in", str(tmp_path / "tls.crt")]
    if shutil.which("openssl"):
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "DNS:rel-nats," in names and "DNS:rel-etcd.here.svc" in names
    with pytest.raises(ConfigError, match=r"planeTls\.enabled needs planeTls\.secret"):
        from_render(values, tmp_path)


def test_the_test_hook_is_valid_and_as_confined_as_the_other_pods(tmp_path: Path) -> None:
    (hook,) = [one for one in from_chart(SMALL, tmp_path) if one["kind"] == "Pod"]
    kubernetes_validate.validate(hook, VERSIONS[-1], strict=True)
    assert hook["spec"]["securityContext"]["runAsNonRoot"] is True
    compile(hook["spec"]["containers"][0]["command"][2], "hook", "exec")
