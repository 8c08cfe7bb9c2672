"""`Graph`: a deployment as read from a file, whichever version of the custom resource it was written in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dynserve.deploy.documents import Map, Place


@dataclass
class Component:
    """One kind of pod: a frontend, or the workers of one role. The role itself comes from the command's flags."""

    name: str  # as written
    type: str  # frontend, worker, prefill, decode, planner, epp, or empty
    sub_type: str
    replicas: int
    place: Place
    main: Map  # the main container, in Kubernetes' terms
    pod: Map = field(default_factory=Map)  # the pod's other fields, without containers
    sidecars: list[Map] = field(default_factory=list)
    pod_labels: dict[str, str] = field(default_factory=dict)
    pod_annotations: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)  # of every object
    annotations: dict[str, str] = field(default_factory=dict)
    resources: dict[str, dict[str, str]] = field(default_factory=dict)  # of the main container, over its own
    env: list[Map] = field(default_factory=list)  # the main container's own and the service's, in order
    secrets: list[str] = field(default_factory=list)  # whose keys become environment variables
    claims: dict[str, str] = field(default_factory=dict)  # mount point -> persistent volume claim
    shared_memory: str = "8Gi"  # size of /dev/shm; "0" for none
    ingress: Map | None = None
    nodes: int = 1
    max_replicas: int = 0  # 0: no autoscaler

    @property
    def key(self) -> str:
        """The name in lower case, with which objects and processes are named."""
        return self.name.lower()

    @property
    def gpus(self) -> int:
        """The number of GPUs of one pod."""
        found = [
            amount
            for side in ("limits", "requests")
            for name, amount in self.resources.get(side, {}).items()
            if name.endswith("/gpu") or name.startswith("nvidia.com/mig-")
        ]
        return int(found[0]) if found else 0


@dataclass
class Claim:
    """A persistent volume claim that the deployment makes, or expects to exist."""

    name: str
    create: bool = False
    size: str = ""
    storage_class: str = ""
    access_mode: str = ""


@dataclass
class Graph:
    """A deployment."""

    name: str
    namespace: str  # of Kubernetes; empty: the one that is applied to
    place: Place
    dynamo_namespace: str  # the part of the cluster's processes that see each other
    components: list[Component]
    env: list[Map] = field(default_factory=list)  # of all components; a component's own entries win
    claims: list[Claim] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)
    config_maps: dict[str, dict[str, str]] = field(default_factory=dict)  # name -> file -> content
    secrets: dict[str, dict[str, str]] = field(default_factory=dict)
    others: list[Map] = field(default_factory=list)  # further documents of the file, kept as they are


def merged_env(*sources: list[Map]) -> list[Map]:
    """Returns environment entries in the order of their first occurrence; the last entry of a name wins."""
    found: dict[str, Map] = {}
    for source in sources:
        for entry in source:
            found[str(entry.get("name", ""))] = entry
    return list(found.values())


def texts(content: Mapping[str, Any]) -> dict[str, str]:
    """Returns labels or annotations; values that YAML read as other types become the texts that Kubernetes expects."""
    return {name: _text(value) for name, value in content.items()}


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
