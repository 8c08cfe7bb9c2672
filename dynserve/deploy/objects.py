"""What Kubernetes objects of all kinds are made of: names, labels, metadata, security settings."""

from __future__ import annotations

import re
from typing import Any

from dynserve.deploy.documents import Place
from dynserve.deploy.graph import Graph
from dynserve.errors import ConfigError

Object = dict[str, Any]

USER = 1000
NAME_LIMIT = 63
TLS = "/planes"  # where the certificates of the planes are mounted
TLS_VOLUME = "dynserve-plane-tls"
_LABEL = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")


def labels(graph: Graph, component: str = "") -> dict[str, str]:
    found = {"app.kubernetes.io/name": "dynserve", "app.kubernetes.io/instance": graph.name}
    return found | ({"app.kubernetes.io/component": component} if component else {})


def metadata(graph: Graph, name: str, component: str = "") -> Object:
    found: Object = {"name": name, "labels": labels(graph, component)}
    return found | ({"namespace": graph.namespace} if graph.namespace else {})


def shared_object(graph: Graph, api: str, kind: str, spec: Object, name: str = "") -> Object:
    """Returns an object of the whole deployment."""
    return {"apiVersion": api, "kind": kind, "metadata": metadata(graph, name or graph.name), "spec": spec}


def pod_security() -> Object:
    return {
        "runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER, "fsGroup": USER,
        "seccompProfile": {"type": "RuntimeDefault"},
    }  # fmt: skip


def container_security() -> Object:
    return {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}


def tls_volume(secret: str) -> Object:
    """Returns the volume of the planes' certificates, which the group of `USER` may read."""
    return {"name": TLS_VOLUME, "secret": {"secretName": secret, "defaultMode": 0o440}}


def tls_mount() -> Object:
    return {"name": TLS_VOLUME, "mountPath": TLS, "readOnly": True}


def checked_name(name: str, place: Place) -> str:
    """Returns a name that a Service may have. Raises ConfigError."""
    name = name.lower()
    if not _LABEL.fullmatch(name):
        raise ConfigError(
            f"{place}: {name!r} is not possible as the name of a Service: up to {NAME_LIMIT} lower-case letters, digits "
            "and dashes, beginning with a letter"
        )
    return name


def entry(name: str, value: Any) -> Object:
    """Returns an entry of an environment: `value` is a text, or a source such as a field of the pod."""
    return {"name": name, "value": value} if isinstance(value, str) else {"name": name, "valueFrom": value}


def plain(value: Any) -> Any:
    """Returns the value without the types that know their lines, for writing it as YAML."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value
