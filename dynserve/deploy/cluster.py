"""`cluster.yaml`: a deployment in dynserve's own terms, which is also the values file of the Helm chart.

    model: Qwen/Qwen2.5-0.5B-Instruct
    image: registry.example/dynserve:0.1.0-cuda
    executor: torch
    frontend: {}
    prefill: {replicas: 2, gpus: 1}
    decode: {replicas: 2, gpus: 1}

The types below are the only description of the file: the chart's `values.schema.json` is made of them, and what `dynserve
deploy render` makes of a file is what the chart's templates must make of it (`tests/deploy/test_chart.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from dynserve.config import ExecutorName, NotNegative, RouterMode, nearest
from dynserve.deploy.documents import Document, Map, Place, Seq
from dynserve.deploy.graph import Claim, Component, Graph
from dynserve.errors import ConfigError

MODELS, CONFIG, KEYS = "/models", "/config", "/keys"  # mount points
GPU = "nvidia.com/gpu"
FIXED = ("--http-host", "--http-port", "--system-host", "--system-port", "--tls-certificate", "--tls-key", "--workers")

Text = Annotated[str, Meta(min_length=1)]
Quantity = Annotated[str, Meta(pattern=r"^[0-9.]+([eE][0-9]+|[numkKMGTPE]i?)?$", description="such as 500m or 16Gi")]


class Strict(Struct, forbid_unknown_fields=True, rename="camel", kw_only=True, omit_defaults=True):
    """A part of the file. Unknown keys are errors."""


class Resources(Strict):
    """Kubernetes' resources of a container, without GPUs."""

    requests: dict[str, Quantity | int] = {}
    limits: dict[str, Quantity | int] = {}


class Pods(Strict):
    """One kind of pod."""

    replicas: NotNegative = 1
    max_replicas: Annotated[int, Meta(ge=0, description="0: a fixed number, else an autoscaler goes up to this")] = 0
    image: Annotated[str, Meta(description="in place of the image of all pods")] = ""
    args: Annotated[list[str], Meta(description="further options of the command")] = []
    env: dict[str, str] = {}
    resources: Resources = msgspec.field(default_factory=Resources)
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    node_selector: dict[str, str] = {}
    tolerations: list[dict[str, Any]] = []
    affinity: dict[str, Any] = {}
    topology_spread_constraints: list[dict[str, Any]] = []
    priority_class_name: str = ""
    runtime_class_name: str = ""
    volumes: list[dict[str, Any]] = []
    volume_mounts: list[dict[str, Any]] = []
    termination_grace_period_seconds: Annotated[
        int, Meta(ge=1, description="longer than the drain: 30 s, or --drain-timeout-s")
    ] = 60


class Frontend(Pods):
    """The frontends."""

    router_mode: RouterMode = "kv"
    ttft_slo_ms: Annotated[int, Meta(ge=0, description="objective for the first token; 0: none")] = 0


class Workers(Pods):
    """The workers of one role."""

    gpus: NotNegative = 0
    engine: Annotated[dict[str, Any], Meta(description="engine options, as in --extra-engine-args")] = {}
    shared_memory: Annotated[str, Meta(description="size of /dev/shm")] = "8Gi"
    rdma: Annotated[str, Meta(description="resource of a network card for KV transfers, such as rdma/ib")] = ""


class Server(Strict):
    """NATS or etcd. Without an address the deployment gets a small server of its own."""

    url: str = ""
    url_secret: Annotated[
        str, Meta(description="Secret with the address under the key `url`, for one with a password")
    ] = ""
    image: str = ""
    resources: Resources = msgspec.field(default_factory=Resources)


class ModelCache(Strict):
    """A volume for models, at /models, which is HF_HOME: a claim that exists, or one that is made."""

    claim: str = ""
    size: Annotated[str, Meta(description="makes a claim of this size")] = ""
    storage_class: str = ""
    access_mode: Literal["ReadWriteOnce", "ReadWriteMany", "ReadOnlyMany"] = "ReadWriteMany"


class PlaneTls(Strict):
    """Mutual TLS between the pods, and with NATS and etcd."""

    enabled: bool = False
    secret: Annotated[
        str, Meta(description="with ca.crt, tls.crt and tls.key; the chart makes one if this is empty")
    ] = ""


class Ingress(Strict):
    """An Ingress for the API."""

    host: str = ""
    class_name: str = ""
    tls_secret: str = ""
    annotations: dict[str, str] = {}


class Route(Strict):
    """An HTTPRoute of the Gateway API for the API."""

    hostnames: list[str] = []
    parent_refs: list[dict[str, Any]] = []


class Autoscaling(Strict):
    """How worker roles with maxReplicas are scaled: KEDA reads the frontends' metrics from Prometheus, an HPA reads them
    through a metrics adapter. Frontends are scaled by CPU."""

    kind: Literal["hpa", "keda"] = "hpa"
    prometheus: Annotated[str, Meta(description="address of Prometheus, for KEDA")] = ""
    kv_occupancy_percent: Annotated[int, Meta(gt=0, le=100, description="KV blocks in use, per worker")] = 70
    waiting_requests: Annotated[int, Meta(gt=0, description="requests in the queues, per worker")] = 4
    missed_percent: Annotated[int, Meta(gt=0, le=100, description="KEDA: requests that miss frontend.ttftSloMs")] = 10


class Cluster(Strict):
    """The whole file."""

    model: Annotated[str, Meta(min_length=1, description="folder in the pods, or Hugging Face id")]
    image: Text = "dynserve:cpu"
    name: Annotated[str, Meta(description="of all objects; default: the file's name, or the Helm release's")] = ""
    namespace: Annotated[str, Meta(description="of Kubernetes; Helm has --namespace instead")] = ""
    served_model_name: Annotated[str, Meta(description="name that clients use; default: model")] = ""
    executor: ExecutorName = "torch"
    image_pull_policy: Literal["", "Always", "IfNotPresent", "Never"] = ""
    image_pull_secrets: Annotated[list[str], Meta(description="names of Secrets")] = []
    frontend: Frontend = msgspec.field(default_factory=Frontend)
    prefill: Workers | UnsetType | None = UNSET
    decode: Workers | UnsetType | None = UNSET
    aggregated: Workers | UnsetType | None = UNSET
    gpu_resource: Text = GPU
    nats: Server = msgspec.field(default_factory=Server)
    etcd: Server = msgspec.field(default_factory=Server)
    model_cache: ModelCache = msgspec.field(default_factory=ModelCache)
    hf_token_secret: Annotated[str, Meta(description="Secret with the key HF_TOKEN")] = ""
    api_keys_secret: Annotated[str, Meta(description="Secret with the key `keys`: a file of `dynserve key`")] = ""
    plane_tls: PlaneTls = msgspec.field(default_factory=PlaneTls)
    network_policy: bool = True
    pod_monitor: Annotated[bool, Meta(description="needs the Prometheus operator")] = False
    ingress: Ingress = msgspec.field(default_factory=Ingress)
    route: Route = msgspec.field(default_factory=Route)
    autoscaling: Autoscaling = msgspec.field(default_factory=Autoscaling)

    def workers(self) -> Iterator[tuple[str, Workers]]:
        """Yields the worker roles that there are, by name."""
        for role in ("aggregated", "decode", "prefill"):
            if isinstance(found := getattr(self, role), Workers):
                yield role, found


def is_cluster(document: Document) -> bool:
    """Whether a document is a `cluster.yaml` and not an object of Kubernetes."""
    return "apiVersion" not in document.content and "kind" not in document.content


def parse_cluster(document: Document) -> Cluster:
    """Returns the checked content of a file.

    Raises:
        ConfigError: a key or value is wrong; the message names file, line and the nearest key.
    """
    try:
        found = msgspec.convert(document.content, Cluster)
    except msgspec.ValidationError as error:
        raise ConfigError(_wrong(document, str(error))) from error
    if not list(found.workers()):
        raise ConfigError(f"{document.path} has no workers: give prefill and decode, or aggregated")
    if isinstance(found.prefill, Workers) != isinstance(found.decode, Workers):
        raise ConfigError(f"{document.path}: prefill and decode need each other")
    if found.plane_tls.secret and not found.plane_tls.enabled:
        line = document.content["planeTls"].line_of("secret")
        raise ConfigError(f"{document.path}:{line}: planeTls.secret needs planeTls.enabled: true")
    for role, pods in (("frontend", found.frontend), *found.workers()):
        if problem := _pods_problem(pods):
            raise ConfigError(f"{document.path}: {role}{problem}")
    if found.frontend.max_replicas and "cpu" not in found.frontend.resources.requests:
        raise ConfigError(
            f"{document.path}: frontend.maxReplicas needs frontend.resources.requests.cpu: it scales by that"
        )
    if found.autoscaling.kind == "keda" and not found.autoscaling.prometheus:
        raise ConfigError(f"{document.path}: autoscaling.kind keda needs autoscaling.prometheus")
    return found


def _pods_problem(pods: Pods) -> str:
    """Returns what is wrong with settings that depend on each other; empty if nothing is."""
    if 0 < pods.max_replicas < pods.replicas:
        return f".maxReplicas {pods.max_replicas} is less than replicas {pods.replicas}"
    for word in pods.args:
        if word.partition("=")[0] in FIXED:
            return f".args: {word.partition('=')[0]} cannot be changed here, since probes and Services depend on it"
    for name in ("NATS_URL", "NATS_SERVER", "ETCD_URL", "ETCD_ENDPOINTS"):
        if name in pods.env:
            return f".env.{name}: use nats.url and etcd.url"
    return ""


def _wrong(document: Document, message: str) -> str:
    """Returns an error of msgspec with its line, and the nearest key if one is unknown."""
    what, _, path = message.partition(" - at `")
    keys = re.findall(r"\.(\w+)|\[(\d+)\]|\[\.\.\.\]", path)
    at: Any = document.content
    line, kind = document.content.line, "file"
    for key, number in keys:
        if key and isinstance(at, Map):
            line, at, kind = at.line_of(key), at.get(key), key
        elif number and isinstance(at, Seq) and int(number) < len(at):
            line, at = at.lines[int(number)], at[int(number)]
    if unknown := re.search(r"unknown field `(\w+)`", what):
        line = at.line_of(unknown[1]) if isinstance(at, Map) else line
        return f"{document.path}:{line}: {kind} has no key {unknown[1]!r}{nearest(unknown[1], _known(keys))}"
    if missing := re.search(r"missing required field `(\w+)`", what):
        return f"{document.path}: {missing[1]} is missing"
    return f"{document.path}:{line}: {kind}: {what[0].lower()}{what[1:]}"


def _known(keys: list[tuple[str, str]]) -> list[str]:
    """Returns the keys that are allowed below a path."""
    kind: Any = Cluster
    for key, _ in keys:
        fields = {field.encode_name: field.type for field in msgspec.structs.fields(kind)}
        options = getattr(fields.get(key), "__args__", (fields.get(key),))
        kind = next((one for one in options if isinstance(one, type) and issubclass(one, Struct)), None)
        if kind is None:
            return []
    return [field.encode_name for field in msgspec.structs.fields(kind)]


def values_schema() -> dict[str, Any]:
    """Returns the JSON schema of the file, as Helm reads it from `values.schema.json`."""
    schema = msgspec.json.schema(Cluster)
    schema["$schema"] = "http://json-schema.org/draft-07/schema#"
    text = json.dumps(schema).replace("#/$defs/", "#/definitions/").replace('"$defs"', '"definitions"')
    found: dict[str, Any] = json.loads(text)
    found["definitions"]["Cluster"]["properties"]["global"] = {"type": "object"}  # Helm's own, for charts within charts
    return found


# conversion


def cluster_graph(document: Document, cluster: Cluster) -> Graph:
    """Returns the deployment that a `cluster.yaml` describes."""
    name = cluster.name or re.sub(r"[^a-z0-9-]+", "-", Path(document.path).stem.lower()).strip("-") or "dynserve"
    place = Place(document.path, document.content.line)
    graph = Graph(name, cluster.namespace, place, name, [])
    graph.components.append(_frontend(cluster, place))
    for role, workers in cluster.workers():
        line = document.content.line_of(role)
        graph.components.append(_workers(cluster, name, role, workers, Place(document.path, line)))
        if workers.engine:
            graph.config_maps[f"{name}-{role}"] = {"engine.yaml": engine_text(workers.engine)}
    if cluster.model_cache.size:
        cache = cluster.model_cache
        claim = cache.claim or f"{name}-models"
        graph.claims.append(Claim(claim, True, cache.size, cache.storage_class, cache.access_mode))
    return graph


def engine_text(engine: dict[str, Any]) -> str:
    """Returns engine options as the chart's templates write them: JSON, which is YAML, with HTML's characters escaped."""
    text = json.dumps(_whole(engine), indent=2, sort_keys=True, ensure_ascii=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text + "\n"


def _whole(value: Any) -> Any:
    """Returns the value with `4096` for `4096.0`, as Helm has only one type of number."""
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _map(**content: Any) -> Map:
    """Returns a mapping in the type that the other readers of this package make, at all depths."""
    found = Map()
    found.update({key: _deep(value) for key, value in content.items()})
    return found


def _deep(value: Any) -> Any:
    if isinstance(value, list):
        return [_deep(item) for item in value]
    return _map(**value) if isinstance(value, dict) else value


def _entry(name: str, value: str) -> Map:
    return _map(name=name, value=value)


def _component(cluster: Cluster, role: str, pods: Pods, place: Place, command: list[str], env: list[Map]) -> Component:
    """Makes what frontends and workers have in common."""
    main, pod = _map(command=command[:4], args=[*command[4:], *pods.args]), _map()
    main["image"] = pods.image or cluster.image
    if cluster.image_pull_policy:
        main["imagePullPolicy"] = cluster.image_pull_policy
    if cluster.image_pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in cluster.image_pull_secrets]
    for key, value in (
        ("nodeSelector", pods.node_selector), ("tolerations", pods.tolerations), ("affinity", pods.affinity),
        ("topologySpreadConstraints", pods.topology_spread_constraints),
        ("priorityClassName", pods.priority_class_name), ("runtimeClassName", pods.runtime_class_name),
    ):  # fmt: skip
        if value:
            pod[key] = _deep(value)
    pod["terminationGracePeriodSeconds"] = pods.termination_grace_period_seconds
    pod["volumes"], main["volumeMounts"] = _deep(pods.volumes), _deep(pods.volume_mounts)
    given = pods.resources
    resources: dict[str, dict[str, Any]] = {"requests": dict(given.requests), "limits": dict(given.limits)}
    for name, server in (("NATS_URL", cluster.nats), ("ETCD_URL", cluster.etcd)):
        if server.url_secret:
            env = [*env, _map(name=name, valueFrom={"secretKeyRef": {"name": server.url_secret, "key": "url"}})]
    component = Component(
        role, "frontend" if role == "frontend" else "worker", "", pods.replicas, place, main, pod,
        pod_labels=dict(pods.labels), pod_annotations=dict(pods.annotations),
        resources={side: found for side, found in resources.items() if found},
        env=[*env, *(_entry(name, value) for name, value in sorted(pods.env.items()))],
    )  # fmt: skip
    component.max_replicas = pods.max_replicas
    return component


def _mount(component: Component, name: str, path: str, **volume: Any) -> None:
    component.pod["volumes"].append(_map(name=name, **volume))
    component.main["volumeMounts"].append(_map(name=name, mountPath=path, readOnly=True))


def _frontend(cluster: Cluster, place: Place) -> Component:
    env = [_entry("DYN_ROUTER_MODE", cluster.frontend.router_mode)]
    if cluster.frontend.ttft_slo_ms:
        env.append(_entry("DYN_TTFT_SLO_MS", str(cluster.frontend.ttft_slo_ms)))
    if cluster.api_keys_secret:
        env.append(_entry("DYN_API_KEYS_FILE", f"{KEYS}/keys"))
    command = ["python3", "-m", "dynserve", "frontend"]
    component = _component(cluster, "frontend", cluster.frontend, place, command, env)
    component.shared_memory = "0"
    if cluster.ingress.host:
        ingress = cluster.ingress
        component.ingress = _map(
            fullHost=ingress.host, ingressControllerClassName=ingress.class_name, tls={"secretName": ingress.tls_secret},
            annotations=ingress.annotations,
        )  # fmt: skip
    if cluster.api_keys_secret:
        _mount(component, "api-keys", KEYS, secret={"secretName": cluster.api_keys_secret})
    return component


def _workers(cluster: Cluster, name: str, role: str, workers: Workers, place: Place) -> Component:
    env = [
        _entry("DYN_MODEL_PATH", cluster.model),
        _entry("DYN_MODEL_NAME", cluster.served_model_name or cluster.model),
        _entry("DYN_EXECUTOR", cluster.executor),
    ]
    cache = cluster.model_cache
    if cache.claim or cache.size:
        env.append(_entry("HF_HOME", MODELS))
    if cluster.hf_token_secret:
        reference = _map(name=cluster.hf_token_secret, key="HF_TOKEN", optional=True)
        env.append(_map(name="HF_TOKEN", valueFrom=_map(secretKeyRef=reference)))
    mode = "prefill_and_decode" if role == "aggregated" else role
    command = ["python3", "-m", "dynserve", "worker", "--disaggregation-mode", mode]
    if workers.engine:
        command += ["--extra-engine-args", f"{CONFIG}/engine.yaml"]
    component = _component(cluster, role, workers, place, command, env)
    if workers.engine:
        _mount(component, "engine", CONFIG, configMap={"name": f"{name}-{role}"})
    if cache.claim or cache.size:
        component.claims[MODELS] = cache.claim or f"{name}-models"
    component.shared_memory = workers.shared_memory
    _devices(cluster, workers, component)
    return component


def _devices(cluster: Cluster, workers: Workers, component: Component) -> None:
    """Adds GPUs, with the toleration that their nodes usually need, and a network card for RDMA."""
    wanted = {cluster.gpu_resource: workers.gpus, workers.rdma: 1 if workers.rdma else 0}
    for resource, count in wanted.items():
        for side in ("requests", "limits") if count else ():
            component.resources.setdefault(side, {})[resource] = str(count)
    if workers.gpus and not workers.tolerations:
        toleration = {"key": cluster.gpu_resource, "operator": "Exists", "effect": "NoSchedule"}
        component.pod["tolerations"] = [toleration]
    if workers.rdma:  # memory is registered with the card
        component.main["securityContext"] = {"capabilities": {"drop": ["ALL"], "add": ["IPC_LOCK"]}}


if __name__ == "__main__":
    # python -m dynserve.deploy.cluster > docker/helm/dynserve/values.schema.json
    print(json.dumps(values_schema(), indent=2))
