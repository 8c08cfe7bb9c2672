"""Kubernetes manifests of a deployment, from built-in kinds only: no operator and no custom resource is needed.

The rules for probes, ports, shared memory and the order of environment entries are those of Dynamo's operator, so that a
file behaves as it did there. Security settings and disruption budgets are ours.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dynserve.deploy.documents import Map, Notes
from dynserve.deploy.graph import Graph, merged_env
from dynserve.deploy.plan import GRACE, Role, default_mode
from dynserve.errors import ConfigError

HTTP_PORT, SYSTEM_PORT = 8000, 9090
USER = 1000
PRE_STOP_S = 5  # seconds for which a frontend serves on after it was removed from its Service
NATS_IMAGE, ETCD_IMAGE = "nats:2.10.29-alpine", "quay.io/coreos/etcd:v3.5.21"
NAME_LIMIT = 63
SHARED, SHARED_NAME, TMP = "/dev/shm", "dynserve-shared-memory", "dynserve-tmp"
_LABEL = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")

Object = dict[str, Any]


class RenderOptions(NamedTuple):
    """The settings that a file does not have."""

    image: str | None = None  # of all components, in place of the file's
    nats_url: str | None = None  # None: the file's, else a server of our own
    etcd_url: str | None = None
    executor: str | None = None
    pod_monitor: bool = False  # needs the Prometheus operator
    autoscale: int = 0  # frontends at most, by CPU; 0: a fixed number


def render(graph: Graph, roles: Sequence[Role], options: RenderOptions, notes: Notes) -> list[Object]:
    """Returns the objects of a deployment, in the order in which they should be applied.

    Raises:
        ConfigError: a name is not possible in Kubernetes, or a component has no image.
    """
    nats, etcd, servers = _servers(graph, options)
    found = [_config_map(graph, name, content) for name, content in graph.config_maps.items()]
    found += [_claim(graph, one) for one in graph.claims if one.create]
    found += [*servers, _service_account(graph)]
    mode, ports = default_mode(roles), set[int]()
    for role in roles:
        own = {"DYN_ROLE": mode} if mode and role.translation.value("--disaggregation-mode") is None else {}
        workload = _Workload(graph, role, options, {"NATS_URL": nats, "ETCD_URL": etcd} | own, notes)
        ports.add(workload.port)
        found += workload.objects()
    found.append(_network_policy(graph, sorted(ports)))
    if options.pod_monitor:
        found.append(_pod_monitor(graph))
    return found + [dict(other) for other in graph.others]


def labels(graph: Graph, component: str = "") -> dict[str, str]:
    found = {"app.kubernetes.io/name": "dynserve", "app.kubernetes.io/instance": graph.name}
    return found | ({"app.kubernetes.io/component": component} if component else {})


class _Workload:
    """The objects of one component."""

    def __init__(
        self, graph: Graph, role: Role, options: RenderOptions, planes: Mapping[str, str], notes: Notes
    ) -> None:
        self._graph, self._role, self._options, self._planes, self._notes = graph, role, options, planes, notes
        self._component = role.component
        self.name = checked_name(f"{graph.name}-{role.component.key}", role)
        self._labels = labels(graph, role.component.key)
        own = role.translation.value("--http-port") or ""
        self.port = SYSTEM_PORT if not role.is_frontend else int(own) if own.isdecimal() else HTTP_PORT

    def objects(self) -> list[Object]:
        found = [self._deployment(), self._service(), self._budget()]
        if self._role.is_frontend:
            if self._options.autoscale:
                found.append(self._autoscaler())
            if self._component.ingress is not None:
                found.append(self._ingress(self._component.ingress))
        return found

    def _object(self, api: str, kind: str, spec: Object, name: str = "") -> Object:
        component = self._component
        metadata: Object = {"name": name or self.name, "labels": self._graph.labels | component.labels | self._labels}
        if self._graph.namespace:
            metadata["namespace"] = self._graph.namespace
        if annotations := self._graph.annotations | component.annotations:
            metadata["annotations"] = annotations
        return {"apiVersion": api, "kind": kind, "metadata": metadata, "spec": spec}

    def _deployment(self) -> Object:
        surge = {"maxSurge": 1, "maxUnavailable": 0} if self._role.is_frontend else {"maxSurge": 0, "maxUnavailable": 1}
        spec: Object = {
            "selector": {"matchLabels": self._labels},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": surge},  # GPUs are scarce: no surge of workers
            "template": {"metadata": self._pod_metadata(), "spec": self._pod()},
        }
        if not (self._role.is_frontend and self._options.autoscale):  # else the autoscaler sets it
            spec["replicas"] = self._role.replicas
        return self._object("apps/v1", "Deployment", spec)

    def _pod_metadata(self) -> Object:
        # engines read their files once: a changed ConfigMap must restart them
        content = json.dumps(self._graph.config_maps, sort_keys=True).encode()
        annotations = self._component.pod_annotations | {"dynserve/config": hashlib.sha256(content).hexdigest()[:16]}
        return {"labels": self._component.pod_labels | self._labels, "annotations": annotations}

    def _pod(self) -> Object:
        component = self._component
        pod: Object = {
            "serviceAccountName": self._graph.name,
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": int(GRACE),
            "securityContext": {
                "runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER, "fsGroup": USER,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
        }  # fmt: skip
        if self._role.is_frontend:
            pod["topologySpreadConstraints"] = [{
                "maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": self._labels},
            }]  # fmt: skip
        given = plain(component.pod)
        pod["securityContext"] = pod["securityContext"] | (given.pop("securityContext", None) or {})
        pod |= {key: value for key, value in given.items() if value is not None}
        pod["volumes"] = [*(given.get("volumes") or []), *self._own_volumes()]
        pod["containers"] = [self._container(), *(plain(one) for one in component.sidecars)]
        return pod

    def _own_volumes(self) -> list[Object]:
        found: list[Object] = []
        if self._needs("/tmp"):
            found.append({"name": TMP, "emptyDir": {}})
        if self._needs(SHARED):
            memory = {"medium": "Memory", "sizeLimit": self._component.shared_memory}
            found.append({"name": SHARED_NAME, "emptyDir": memory})
        claims = dict.fromkeys(self._component.claims.values())
        return found + [{"name": name, "persistentVolumeClaim": {"claimName": name}} for name in claims]

    def _container(self) -> Object:
        component, role = self._component, self._role
        given = {key: value for key, value in plain(component.main).items() if value not in (None, "", {}, [])}
        image = self._options.image or given.get("image")
        if not image:
            raise ConfigError(f"{component.place}: {component.name} has no image; use --image")
        if not self._options.image:
            self._notes.warn(
                component.place,
                f"{component.name}: its image {image} must have dynserve in it; --image gives another one",
            )
        container: Object = {
            "name": "main", "image": image,
            "command": ["python3", "-m", "dynamo.frontend"] if role.is_frontend else [],
            "ports": [{"name": "http", "containerPort": self.port}] if role.is_frontend
            else [{"name": "system", "containerPort": SYSTEM_PORT}],
            "securityContext": {
                "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
            },
            **_probes(self.port, frontend=role.is_frontend),
        }  # fmt: skip
        if role.is_frontend:  # clients are no longer sent here before it stops
            container["lifecycle"] = {"preStop": {"exec": {"command": ["sleep", str(PRE_STOP_S)]}}}
        security = container["securityContext"] | (given.pop("securityContext", None) or {})
        if "args" in given and "command" not in given and role.is_frontend:
            del container["command"]
        container |= given | {"name": "main", "image": image, "securityContext": security, "env": self._env()}
        if not container.get("command"):
            container.pop("command", None)
        if component.resources:
            container["resources"] = {**component.resources}
        sources = [*(given.get("envFrom") or []), *({"secretRef": {"name": name}} for name in component.secrets)]
        if sources:
            container["envFrom"] = sources
        container["volumeMounts"] = [*(given.get("volumeMounts") or []), *self._own_mounts()]
        return container

    def _own_mounts(self) -> list[Object]:
        found = [{"name": TMP, "mountPath": "/tmp"}] if self._needs("/tmp") else []
        if self._needs(SHARED):
            found.append({"name": SHARED_NAME, "mountPath": SHARED})
        return found + [{"name": claim, "mountPath": point} for point, claim in self._component.claims.items()]

    def _needs(self, point: str) -> bool:
        """Whether a folder has to be mounted here: the root is read-only, and the file has no mount of its own."""
        mounted = {str(mount.get("mountPath")).rstrip("/") for mount in self._component.main.get("volumeMounts") or []}
        return point not in mounted and (point != SHARED or self._component.shared_memory != "0")

    def _env(self) -> list[Object]:
        """Defaults, then the file's entries, in its order: `$(NAME)` refers to earlier ones only."""
        defaults: dict[str, Any] = {
            "POD_IP": {"fieldRef": {"fieldPath": "status.podIP"}},
            "POD_NAME": {"fieldRef": {"fieldPath": "metadata.name"}},
            "DYN_NAMESPACE": self._graph.dynamo_namespace,
            "DYN_LINK_HOST": "0.0.0.0",
            "DYN_SYSTEM_HOST": "0.0.0.0",
            "DYN_ADVERTISE_HOST": "$(POD_IP)",
        }
        if self._role.is_frontend:
            defaults |= {"DYN_HTTP_HOST": "0.0.0.0", "DYN_HTTP_PORT": str(HTTP_PORT)}
        else:
            defaults |= {"DYN_SYSTEM_PORT": str(SYSTEM_PORT)}
        entries = merged_env(self._graph.env, self._component.env)
        given = {str(entry.get("name")) for entry in entries}
        own = [_entry(name, value) for name, value in defaults.items() if name not in given]
        # Dynamo's own names of the servers' addresses count as well
        skipped = {"NATS_URL"} & given or {"NATS_SERVER"} & given, {"ETCD_URL"} & given or {"ETCD_ENDPOINTS"} & given
        forced = {"NATS_URL": self._options.nats_url, "ETCD_URL": self._options.etcd_url}
        for name, present in zip(("NATS_URL", "ETCD_URL"), skipped, strict=True):
            if not present or forced[name]:
                own.append(_entry(name, self._planes[name]))
        own += [_entry(name, value) for name, value in self._planes.items() if name == "DYN_ROLE" and name not in given]
        replaced = {name for name, value in forced.items() if value}
        if self._options.executor and not self._role.is_frontend:
            own.append(_entry("DYN_EXECUTOR", self._options.executor))
            replaced.add("DYN_EXECUTOR")
        return own + [plain(entry) for entry in entries if entry.get("name") not in replaced]

    def _service(self) -> Object:
        if self._role.is_frontend:
            ports = [{"name": "http", "port": HTTP_PORT, "targetPort": self.port}]
            return self._object("v1", "Service", {"selector": self._labels, "ports": ports})
        ports = [{"name": "system", "port": SYSTEM_PORT, "targetPort": SYSTEM_PORT}]
        return self._object("v1", "Service", {"clusterIP": "None", "selector": self._labels, "ports": ports})

    def _budget(self) -> Object:
        bound: Object = {"maxUnavailable": 1}
        if self._role.is_frontend and self._role.replicas > 1:
            bound = {"minAvailable": 1}
        return self._object("policy/v1", "PodDisruptionBudget", {"selector": {"matchLabels": self._labels}, **bound})

    def _autoscaler(self) -> Object:
        target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": self.name}
        cpu = {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 80}}
        return self._object("autoscaling/v2", "HorizontalPodAutoscaler", {
            "scaleTargetRef": target, "minReplicas": max(1, self._role.replicas), "maxReplicas": self._options.autoscale,
            "metrics": [{"type": "Resource", "resource": cpu}],
        })  # fmt: skip

    def _ingress(self, given: Map) -> Object:
        host = f"{given.get('hostPrefix') or ''}{given.get('host') or ''}.{given.get('hostSuffix') or 'local'}"
        backend = {"service": {"name": self.name, "port": {"number": HTTP_PORT}}}
        path = {"path": "/", "pathType": "Prefix", "backend": backend}
        spec: Object = {"rules": [{"host": host, "http": {"paths": [path]}}]}
        if name := given.get("ingressControllerClassName"):
            spec["ingressClassName"] = str(name)
        if secret := (given.get("tls") or {}).get("secretName"):
            spec["tls"] = [{"hosts": [host], "secretName": str(secret)}]
        found = self._object("networking.k8s.io/v1", "Ingress", spec)
        found["metadata"]["annotations"] = {
            # answers are streams: nothing may be held back or cut off
            "nginx.ingress.kubernetes.io/proxy-buffering": "off",
            "nginx.ingress.kubernetes.io/proxy-read-timeout": "3600",
            **found["metadata"].get("annotations", {}), **(given.get("annotations") or {}),
        }  # fmt: skip
        return found


def _probes(port: int, *, frontend: bool) -> Object:
    live = {"httpGet": {"path": "/live", "port": port}, "periodSeconds": 10, "timeoutSeconds": 4, "failureThreshold": 3}
    ready = {
        "httpGet": {"path": "/health", "port": port},
        "periodSeconds": 10,
        "timeoutSeconds": 4,
        "failureThreshold": 3,
    }
    start = {"httpGet": {"path": "/live", "port": port}, "periodSeconds": 10, "timeoutSeconds": 5}
    # a worker answers /live at once, but its image and model may take long to load
    return {
        "livenessProbe": live,
        "readinessProbe": ready,
        "startupProbe": start | {"failureThreshold": 30 if frontend else 720},
    }


def _servers(graph: Graph, options: RenderOptions) -> tuple[str, str, list[Object]]:
    """Returns the addresses of NATS and etcd, and the objects of those that the file does not name."""
    env = {
        str(entry.get("name")): str(entry.get("value"))
        for one in graph.components
        for entry in one.env
        if entry.get("value")
    }
    env |= {str(entry.get("name")): str(entry.get("value")) for entry in graph.env if entry.get("value")}
    nats = options.nats_url or env.get("NATS_URL") or env.get("NATS_SERVER") or ""
    etcd = options.etcd_url or env.get("ETCD_URL") or env.get("ETCD_ENDPOINTS") or ""
    found = []
    if not nats:
        found += _server(graph, "nats", NATS_IMAGE, 4222, [])
        nats = f"nats://{graph.name}-nats:4222"
    if not etcd:
        flags = ["/usr/local/bin/etcd", "--data-dir=/data", "--listen-client-urls=http://0.0.0.0:2379"]
        found += _server(
            graph, "etcd", ETCD_IMAGE, 2379, [*flags, f"--advertise-client-urls=http://{graph.name}-etcd:2379"]
        )
        etcd = f"http://{graph.name}-etcd:2379"
    return nats, etcd, found


def _server(graph: Graph, name: str, image: str, port: int, command: list[str]) -> list[Object]:
    """A single server without lasting data: processes register again when it comes back empty."""
    own, full = labels(graph, name), f"{graph.name}-{name}"
    metadata: Object = {"name": full, "labels": own} | ({"namespace": graph.namespace} if graph.namespace else {})
    container: Object = {
        "name": name, "image": image, "ports": [{"name": name, "containerPort": port}],
        "readinessProbe": {"tcpSocket": {"port": port}, "periodSeconds": 5},
        "securityContext": {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [{"name": "data", "mountPath": "/data"}, {"name": "data", "mountPath": "/tmp"}],
    } | ({"command": command} if command else {})  # fmt: skip
    pod = {
        "automountServiceAccountToken": False, "containers": [container], "volumes": [{"name": "data", "emptyDir": {}}],
        "securityContext": {
            "runAsNonRoot": True, "runAsUser": USER, "fsGroup": USER, "seccompProfile": {"type": "RuntimeDefault"},
        },
    }  # fmt: skip
    template = {"metadata": {"labels": own}, "spec": pod}
    spec = {"replicas": 1, "selector": {"matchLabels": own}, "strategy": {"type": "Recreate"}, "template": template}
    ports = [{"name": name, "port": port, "targetPort": port}]
    return [
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata, "spec": spec},
        {"apiVersion": "v1", "kind": "Service", "metadata": dict(metadata), "spec": {"selector": own, "ports": ports}},
    ]


def _metadata(graph: Graph, name: str) -> Object:
    return {"name": name, "labels": labels(graph)} | ({"namespace": graph.namespace} if graph.namespace else {})


def _config_map(graph: Graph, name: str, content: Mapping[str, str]) -> Object:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": _metadata(graph, name), "data": dict(content)}


def _claim(graph: Graph, claim: Any) -> Object:
    spec = {
        "accessModes": [claim.access_mode], "storageClassName": claim.storage_class,
        "resources": {"requests": {"storage": claim.size}},
    }  # fmt: skip
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": _metadata(graph, claim.name), "spec": spec}


def _service_account(graph: Graph) -> Object:
    metadata = _metadata(graph, graph.name)
    return {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata, "automountServiceAccountToken": False}


def _network_policy(graph: Graph, ports: Sequence[int]) -> Object:
    """Links, KV transfers, NATS and etcd are open to pods of this deployment only; `ports` (the API, `/metrics`) to all."""
    peers = {"podSelector": {"matchLabels": labels(graph)}}
    open_ports = {"ports": [{"protocol": "TCP", "port": port} for port in ports]}
    spec = {
        "podSelector": {"matchLabels": labels(graph)}, "policyTypes": ["Ingress"],
        "ingress": [{"from": [peers]}, open_ports],
    }  # fmt: skip
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(graph, graph.name),
        "spec": spec,
    }


def _pod_monitor(graph: Graph) -> Object:
    endpoints = [{"port": port, "path": "/metrics", "interval": "15s"} for port in ("http", "system")]
    spec = {"selector": {"matchLabels": labels(graph)}, "podMetricsEndpoints": endpoints}
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": _metadata(graph, graph.name),
        "spec": spec,
    }


def checked_name(name: str, role: Role) -> str:
    """Returns a name that a Service may have. Raises ConfigError."""
    name = name.lower()
    if not _LABEL.fullmatch(name):
        raise ConfigError(
            f"{role.component.place}: {name!r} is not possible as the name of a Service: up to {NAME_LIMIT} lower-case "
            "letters, digits and dashes, beginning with a letter"
        )
    return name


def _entry(name: str, value: Any) -> Object:
    return {"name": name, "value": value} if isinstance(value, str) else {"name": name, "valueFrom": value}


def plain(value: Any) -> Any:
    """Returns the value without the types that know their lines, for writing it as YAML."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value
