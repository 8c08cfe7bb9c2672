"""Reads `DynamoGraphDeployment`s of both versions, v1alpha1 and v1beta1, with the ConfigMaps and Secrets beside them.

Every field is read, refused or reported as ignored; an unknown one is an error with the nearest known name. The fields and
their meaning: the custom resource definitions of ai-dynamo 0.3 to 1.6.
"""

from __future__ import annotations

import base64
import binascii
import re
from pathlib import Path
from typing import Any

from dynserve.deploy.cluster import Cluster, cluster_graph, is_cluster, parse_cluster
from dynserve.deploy.documents import Document, Fields, Map, Notes, Place, Seq, read_documents
from dynserve.deploy.graph import Claim, Component, Graph, texts
from dynserve.errors import ConfigError

KIND = "DynamoGraphDeployment"
MAX_COMPONENTS = 25
TYPES = ("frontend", "worker", "prefill", "decode", "planner", "epp")
_NAME = re.compile(r"[a-zA-Z0-9]([-a-zA-Z0-9]{0,61}[a-zA-Z0-9])?")
_SCHEDULER = "it belongs to Grove and topology-aware scheduling, which are not used here"
_TOPOLOGY = ("priorityClassName", "topologyConstraint", "experimental", "providerOverride", "restart")


def read_graph(path: str | Path, notes: Notes) -> Graph:
    """Reads the one deployment of a file.

    Raises:
        ConfigError: the file has no deployment or several, or one that is invalid.
    """
    return _graph_of(path, read_documents(path), notes)


def read_deployment(path: str | Path, notes: Notes) -> tuple[Graph, Cluster | None]:
    """Reads a file with one deployment, or a `cluster.yaml`, whose settings are returned as well.

    Raises:
        ConfigError: as `read_graph` and `parse_cluster`.
    """
    documents = read_documents(path)
    if len(documents) == 1 and is_cluster(documents[0]):
        cluster = parse_cluster(documents[0])
        return cluster_graph(documents[0], cluster), cluster
    return _graph_of(path, documents, notes), None


def _graph_of(path: str | Path, documents: list[Document], notes: Notes) -> Graph:
    found = [document for document in documents if document.kind == KIND]
    if len(found) != 1:
        kinds = ", ".join(sorted({document.kind or "?" for document in documents})) or "nothing"
        what = f"{len(found)} {KIND}s; put each into a file of its own" if found else f"no {KIND}, but {kinds}"
        raise ConfigError(f"{path} holds {what}")
    graph = parse_graph(found[0], notes)
    for document in documents:
        if document is found[0]:
            continue
        if document.kind == "ConfigMap":
            graph.config_maps[document.name] = _config_map(document, notes)
        elif document.kind == "Secret":
            graph.secrets[document.name] = _secret(document, notes)
        else:
            graph.others.append(document.content)
    return graph


def parse_graph(document: Document, notes: Notes) -> Graph:
    """Converts one document. Raises ConfigError."""
    root = Fields(document.path, document.content, KIND, notes)
    root.get("kind", str, "")
    version = root.get("apiVersion", str, "")
    if version not in ("nvidia.com/v1alpha1", "nvidia.com/v1beta1"):
        raise ConfigError(
            f"{root.place('apiVersion')}: apiVersion {version!r} is not nvidia.com/v1alpha1 or nvidia.com/v1beta1"
        )
    metadata, spec = root.inner("metadata"), root.inner("spec")
    root.get("status", Map, Map())  # of an object that was read back from a cluster
    root.finish()
    name = metadata.get("name", str, "")
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{root.place('metadata')}: metadata.name {name!r} is not a name of letters, digits and dashes"
        )
    graph = Graph(name, metadata.get("namespace", str, ""), root.place("kind"), "", [])
    graph.labels, graph.annotations = _texts(spec, "labels"), _texts(spec, "annotations")
    spec.get("backendFramework", str, "")
    for key in _TOPOLOGY:
        spec.ignore(key, _SCHEDULER if key != "restart" else "restart pods with `kubectl rollout restart`")
    if version.endswith("v1alpha1"):
        _alpha(document.path, spec, graph, notes)
    else:
        _beta(document.path, spec, graph, notes)
    spec.finish()
    _check_components(graph)
    return graph


# v1alpha1: a map of services


def _alpha(path: str, spec: Fields, graph: Graph, notes: Notes) -> None:
    graph.env = _maps(spec, "envs")
    graph.claims = [_claim(Fields(path, claim, "pvcs", notes)) for claim in _maps(spec, "pvcs")]
    spec.ignore("dynamoGraph", "it is no longer used")
    services = spec.get("services", Map, Map())
    namespaces: dict[str, Place] = {}
    for name, content in services.items():
        place = Place(path, services.line_of(name))
        if not isinstance(content, Map):
            raise ConfigError(f"{place}: spec.services.{name} must be keys and values")
        service = Fields(path, content, f"spec.services.{name}", notes)
        namespaces.setdefault(service.get("dynamoNamespace", str, ""), service.place("dynamoNamespace"))
        if service.get("globalDynamoNamespace", bool, False):
            namespaces = {"dynamo": place}
        graph.components.append(_alpha_service(name, service, place, notes))
    named = [one for one in namespaces if one]
    if len(named) > 1:
        raise ConfigError(
            f"{namespaces[named[1]]}: dynamoNamespace {named[1]!r} differs from {named[0]!r} of another service: they "
            "would not see each other"
        )
    graph.dynamo_namespace = named[0] if named else graph.name


def _alpha_service(name: str, service: Fields, place: Place, notes: Notes) -> Component:
    pod = service.inner("extraPodSpec")
    content = Map(place.line)
    content.update(service.get("extraPodSpec", Map, Map()))
    main = pod.get("mainContainer", Map, Map(place.line))
    content.pop("mainContainer", None)
    component = Component(
        name, service.get("componentType", str, ""), service.get("subComponentType", str, ""), _replicas(service), place,
        main, content, [item for item in content.pop("containers", None) or [] if isinstance(item, Map)],
    )  # fmt: skip
    service.get("serviceName", str, "")
    metadata = service.inner("extraPodMetadata")
    component.pod_labels, component.pod_annotations = _texts(metadata, "labels"), _texts(metadata, "annotations")
    metadata.finish()
    component.labels, component.annotations = _texts(service, "labels"), _texts(service, "annotations")
    component.env = [*_entries(main, place), *_maps(service, "envs")]
    component.secrets = [secret] if (secret := service.get("envFromSecret", str, "")) else []
    component.resources = _resources(service.inner("resources"), main)
    component.shared_memory = _shared_memory(service.inner("sharedMemory"))
    component.claims = _mounts(service, notes, place.path)
    for probe in ("livenessProbe", "readinessProbe"):
        if (given := service.get(probe, Map, Map())) != {}:
            main[probe] = given
    ingress = service.get("ingress", Map, Map())
    component.ingress = ingress if ingress.get("enabled") else None
    nodes = service.inner("multinode")
    component.nodes = nodes.get("nodeCount", int, 2 if service.get("multinode", Map, Map()) else 1)
    service.ignore("autoscaling", "use an autoscaler that reads the frontend's metrics")
    service.ignore("scalingAdapter", "replicas are set by whatever scales the Deployment")
    service.ignore("modelRef", "adapters are named by --lora-adapters")
    for key in ("topologyConstraint", "priorityClassName", "providerOverride"):
        service.ignore(key, _SCHEDULER)
    for key in ("eppConfig", "checkpoint", "frontendSidecar", "gpuMemoryService", "failover"):
        service.refuse(key, "there is no counterpart here; remove it")
    service.finish()
    return component


def _mounts(service: Fields, notes: Notes, path: str) -> dict[str, str]:
    found = {}
    old = service.get("pvc", Map, Map())  # before 0.5
    for mount in [*_maps(service, "volumeMounts"), *([old] if old else [])]:
        fields = Fields(path, mount, "volumeMounts", notes)
        for key in ("create", "size", "storageClass", "volumeAccessMode", "useAsCompilationCache"):
            fields.get(key, object, None)
        where = fields.get("mountPoint", str, "")
        if where:
            found[where] = fields.get("name", str, "")
        elif not mount.get("useAsCompilationCache"):
            raise ConfigError(f"{fields.place('name')}: a volume mount needs a mountPoint")
        fields.get("name", str, "")
        fields.finish()
    return found


def _shared_memory(fields: Fields) -> str:
    disabled, size = fields.get("disabled", bool, False), fields.get("size", str, "")
    fields.finish()
    if disabled and size:
        raise ConfigError(f"{fields.place('size')}: sharedMemory cannot have a size and be disabled")
    return "0" if disabled else size or "8Gi"


# v1beta1: a list of components with pod templates


def _beta(path: str, spec: Fields, graph: Graph, notes: Notes) -> None:
    graph.env = _maps(spec, "env")
    graph.dynamo_namespace = graph.name
    components = spec.get("components", Seq, Seq())
    for content, line in zip(components, components.lines, strict=True):
        place = Place(path, line)
        if not isinstance(content, Map):
            raise ConfigError(f"{place}: a component must be keys and values")
        fields = Fields(path, content, "spec.components", notes)
        graph.components.append(_beta_component(fields, place, notes))
        if fields.get("globalDynamoNamespace", bool, False):
            graph.dynamo_namespace = "dynamo"
        fields.finish()


def _beta_component(fields: Fields, place: Place, notes: Notes) -> Component:
    name, kind = fields.get("name", str, ""), fields.get("type", str, "")
    if kind and kind not in TYPES:
        raise ConfigError(f"{fields.place('type')}: type {kind!r} is not one of {', '.join(TYPES)}")
    template = fields.inner("podTemplate")
    metadata, pod = template.inner("metadata"), Map(place.line)
    pod.update(template.get("spec", Map, Map()))
    template.finish()
    containers = [item for item in pod.pop("containers", None) or [] if isinstance(item, Map)]
    main = next((one for one in containers if one.get("name") in (None, "", "main")), Map(place.line))
    component = Component(
        name, kind, kind if kind in ("prefill", "decode") else "", _replicas(fields), place, main, pod,
        [one for one in containers if one is not main],
    )  # fmt: skip
    component.pod_labels, component.pod_annotations = _texts(metadata, "labels"), _texts(metadata, "annotations")
    component.env = _entries(main, place)
    component.resources = _resources(Fields(place.path, Map(), "resources", notes), main)
    component.shared_memory = fields.get("sharedMemorySize", str, "8Gi")
    component.nodes = fields.inner("multinode").get("nodeCount", int, 2 if fields.get("multinode", Map, Map()) else 1)
    cache = fields.inner("compilationCache")
    if claim := cache.get("pvcName", str, ""):
        component.claims[cache.get("mountPath", str, "/root/.cache")] = claim
    for key in ("minAvailable", "topologyConstraint"):
        fields.ignore(key, _SCHEDULER)
    fields.ignore("scalingAdapter", "replicas are set by whatever scales the Deployment")
    fields.ignore("modelRef", "adapters are named by --lora-adapters")
    fields.ignore("runtimeVersionOverride", "the image decides the version")
    for key in ("eppConfig", "frontendSidecar", "dynamoSidecar", "experimental"):
        fields.refuse(key, "there is no counterpart here; remove it")
    return component


# both


def _check_components(graph: Graph) -> None:
    if not 0 < len(graph.components) <= MAX_COMPONENTS:
        raise ConfigError(f"{graph.place}: {len(graph.components)} components; a deployment has 1 to {MAX_COMPONENTS}")
    seen: dict[str, Component] = {}
    for component in graph.components:
        if not _NAME.fullmatch(component.name):
            raise ConfigError(f"{component.place}: {component.name!r} is not a name of letters, digits and dashes")
        other = seen.setdefault(component.key, component)
        if other is not component:
            raise ConfigError(
                f"{component.place}: {component.name} and {other.name} differ only in case: their objects need two names"
            )
        if component.type == "epp":
            raise ConfigError(f"{component.place}: {component.name}: there is no gateway plug-in (epp) here; remove it")


def _replicas(fields: Fields) -> int:
    count = fields.get("replicas", int, 1)
    if count < 0:
        raise ConfigError(f"{fields.place('replicas')}: replicas cannot be negative: {count}")
    return count


def _claim(fields: Fields) -> Claim:
    found = Claim(
        fields.get("name", str, ""), fields.get("create", bool, False), fields.get("size", str, ""),
        fields.get("storageClass", str, ""), fields.get("volumeAccessMode", str, ""),
    )  # fmt: skip
    fields.finish()
    if not found.name:
        raise ConfigError(f"{fields.place()}: an entry of pvcs needs a name")
    if found.create and not (found.size and found.storage_class and found.access_mode):
        raise ConfigError(
            f"{fields.place('create')}: pvc {found.name}: create needs size, storageClass and volumeAccessMode"
        )
    return found


def _resources(fields: Fields, main: Map) -> dict[str, dict[str, str]]:
    """Returns requests and limits under Kubernetes' names. A service's own entries win over the container's."""
    found: dict[str, dict[str, str]] = {}
    own: Any = main.get("resources") or {}
    for side in ("requests", "limits"):
        amounts = texts(own.get(side) or {})
        given = fields.inner(side)
        for short in ("cpu", "memory", "ephemeral-storage"):
            if amount := given.get(short, str, ""):
                amounts[short] = amount
        gpu, kind = given.get("gpu", str, ""), given.get("gpuType", str, "")
        if gpu:
            amounts[kind or "nvidia.com/gpu"] = gpu
        amounts |= _texts(given, "custom")
        given.finish()
        if amounts:
            found[side] = amounts
    fields.ignore("claims", "dynamic resource allocation is not supported; use a number of GPUs")
    fields.finish()
    return found


def _maps(fields: Fields, key: str) -> list[Map]:
    items = fields.get(key, Seq, Seq())
    for item in items:
        if not isinstance(item, Map):
            raise ConfigError(f"{fields.place(key)}: {key} must be a list of keys and values")
    return list(items)


def _entries(main: Map, place: Place) -> list[Map]:
    entries = main.get("env") or []
    if not isinstance(entries, list) or not all(isinstance(entry, Map) for entry in entries):
        raise ConfigError(f"{Place(place.path, main.line_of('env'))}: env must be a list of names and values")
    return list(entries)


def _texts(fields: Fields, key: str) -> dict[str, str]:
    return texts(fields.get(key, Map, Map()))


def _config_map(document: Document, notes: Notes) -> dict[str, str]:
    fields = Fields(document.path, document.content, "ConfigMap", notes)
    return _texts(fields, "data")


def _secret(document: Document, notes: Notes) -> dict[str, str]:
    fields = Fields(document.path, document.content, "Secret", notes)
    found = _texts(fields, "stringData")
    for key, value in _texts(fields, "data").items():
        try:
            found.setdefault(key, base64.b64decode(value, validate=True).decode())
        except (binascii.Error, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{fields.place('data')}: Secret {document.name}: {key} is not base64 of a text"
            ) from error
    return found
