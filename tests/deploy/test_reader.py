from __future__ import annotations

import base64
from pathlib import Path

import pytest

from dynserve.deploy.documents import Notes
from dynserve.deploy.graph import Graph
from dynserve.deploy.reader import read_graph
from dynserve.errors import ConfigError

GUIDE = Path(__file__).parent / "guide" / "trtllm-disagg-qwen.yaml"
HEAD = "apiVersion: nvidia.com/{version}\nkind: DynamoGraphDeployment\nmetadata: {{name: g}}\nspec:\n"


def read(
    tmp_path: Path, spec: str, *, version: str = "v1alpha1", before: str = "", notes: Notes | None = None
) -> Graph:
    path = tmp_path / "f.yaml"
    text = "".join(f"  {line}\n" for line in spec.splitlines())
    path.write_text(before + HEAD.format(version=version) + text)
    return read_graph(path, notes or Notes())


def test_the_guides_file_is_read_whole() -> None:
    notes = Notes()
    graph = read_graph(GUIDE, notes)
    assert (graph.name, graph.namespace, graph.dynamo_namespace) == (
        "trtllm-disagg-qwen-full", "dynamo-cloud", "trtllm-disagg-qwen-full",
    )  # fmt: skip
    assert [(c.name, c.type, c.sub_type, c.replicas, c.gpus) for c in graph.components] == [
        ("Frontend", "frontend", "", 1, 0),
        ("TrtllmPrefillWorker", "worker", "prefill", 2, 1),
        ("TrtllmDecodeWorker", "worker", "decode", 2, 1),
    ]
    prefill = graph.components[1]
    assert prefill.resources == {
        "requests": {"cpu": "4", "memory": "16Gi", "nvidia.com/gpu": "1"}, "limits": {"nvidia.com/gpu": "1"},
    }  # fmt: skip
    assert [entry["name"] for entry in prefill.env] == ["NATS_URL", "ETCD_URL", "LC_ALL"]
    assert prefill.main["volumeMounts"][0]["mountPath"] == "/config" and "mainContainer" not in prefill.pod
    assert not notes.lines


def test_both_versions_describe_the_same_component(tmp_path: Path) -> None:
    alpha = read(tmp_path, """
services:
  w:
    componentType: worker
    subComponentType: decode
    replicas: 3
    sharedMemory: {size: 2Gi}
    envs: [{name: A, value: "1"}]
    resources: {limits: {gpu: 2, memory: 8Gi}}
    extraPodMetadata: {labels: {team: x}}
    extraPodSpec:
      nodeSelector: {zone: a}
      mainContainer: {image: i, args: [a]}
""")  # fmt: skip
    beta = read(tmp_path, """
components:
  - name: w
    type: decode
    replicas: 3
    sharedMemorySize: 2Gi
    podTemplate:
      metadata: {labels: {team: x}}
      spec:
        nodeSelector: {zone: a}
        containers:
          - name: main
            image: i
            args: [a]
            env: [{name: A, value: "1"}]
            resources: {limits: {nvidia.com/gpu: 2, memory: 8Gi}}
""", version="v1beta1")  # fmt: skip
    one, other = alpha.components[0], beta.components[0]
    for name in ("name", "sub_type", "replicas", "shared_memory", "env", "resources", "pod_labels", "pod", "gpus"):
        assert getattr(one, name) == getattr(other, name), name
    assert (one.main["image"], one.main["args"]) == (other.main["image"], other.main["args"])


def test_config_maps_and_secrets_of_the_file_are_read_and_other_documents_kept(tmp_path: Path) -> None:
    before = f"""kind: ConfigMap
metadata: {{name: c}}
data: {{a.yaml: "x: 1", n: 5}}
---
kind: Secret
metadata: {{name: s}}
data: {{TOKEN: {base64.b64encode(b"hidden").decode()}}}
stringData: {{OTHER: plain}}
---
kind: PersistentVolumeClaim
metadata: {{name: p}}
---
"""
    graph = read(tmp_path, "services: {f: {componentType: frontend}}", before=before)
    assert graph.config_maps == {"c": {"a.yaml": "x: 1", "n": "5"}}
    assert graph.secrets == {"s": {"OTHER": "plain", "TOKEN": "hidden"}}
    assert [other["kind"] for other in graph.others] == ["PersistentVolumeClaim"]


def test_what_kubectl_leaves_in_a_file_means_nothing(tmp_path: Path) -> None:
    graph = read(tmp_path, """
services:
  f:
    componentType: frontend
    resources: {}
    autoscaling: {}
    extraPodSpec: {containers: null, mainContainer: {name: "", resources: {}, image: i}}
""")  # fmt: skip
    assert graph.components[0].resources == {} and graph.components[0].sidecars == []


def test_settings_without_a_counterpart_are_reported_with_their_line(tmp_path: Path) -> None:
    notes = Notes()
    read(tmp_path, """
priorityClassName: high
services:
  f:
    componentType: frontend
    autoscaling: {enabled: true, minReplicas: 1}
    scalingAdapter: {enabled: true}
""", notes=notes)  # fmt: skip
    assert [line.rsplit("f.yaml:", 1)[1].partition(" is ignored")[0] for line in notes.lines] == [
        "6: DynamoGraphDeployment.spec.priorityClassName",
        "10: spec.services.f.autoscaling",
        "11: spec.services.f.scalingAdapter",
    ]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("services: {}", "0 components"),
        ("servics: {f: {}}", r"has no field 'servics' \(did you mean services\?\)"),
        ("services: {f: {componentTyp: frontend}}", r"has no field 'componentTyp' \(did you mean componentType\?\)"),
        ("services: {f: {replicas: -1}}", "replicas cannot be negative: -1"),
        ("services: {f: {replicas: two}}", "replicas must be a whole number"),
        ("services: {F: {}, f: {}}", "differ only in case"),
        ("services: {a_b: {}}", "'a_b' is not a name"),
        ("services: {f: {sharedMemory: {disabled: true, size: 1Gi}}}", "cannot have a size and be disabled"),
        ("services: {f: {eppConfig: {a: 1}}}", "eppConfig: there is no counterpart"),
        ("services: {f: {componentType: epp}}", "no gateway plug-in"),
        ("services: {f: {dynamoNamespace: a}, g: {dynamoNamespace: b}}", "'b' differs from 'a'"),
        ("pvcs: [{name: p, create: true}]\nservices: {f: {}}", "create needs size"),
        ("services: {f: {envs: [A]}}", "envs must be a list of keys and values"),
        ("services: {f: {volumeMounts: [{name: p}]}}", "needs a mountPoint"),
    ],
)
def test_an_invalid_deployment_is_an_error(tmp_path: Path, spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        read(tmp_path, spec)
    assert "f.yaml:" in str(raised.value)


def test_a_file_must_hold_one_deployment(tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    path.write_text("kind: ConfigMap\n")
    with pytest.raises(ConfigError, match="holds no DynamoGraphDeployment, but ConfigMap"):
        read_graph(path, Notes())
    with pytest.raises(ConfigError, match="2 DynamoGraphDeployments"):
        read(tmp_path, "services: {f: {}}", before=HEAD.format(version="v1alpha1") + "  services: {f: {}}\n---\n")
    with pytest.raises(ConfigError, match="f.yaml:1: apiVersion 'nvidia.com/v2' is not"):
        read(tmp_path, "services: {f: {}}", version="v2")
