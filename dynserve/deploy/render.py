"""Kubernetes manifests of a deployment. They need no operator; PodMonitor, ScaledObject and HTTPRoute are made only on
request.

The rules for probes, ports, shared memory and the order of environment entries are those of Dynamo's operator, so that a
file behaves as it did there. Security settings and disruption budgets are ours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dynserve.deploy.autoscalers import by_cpu, by_role, keda
from dynserve.deploy.cluster import Autoscaling, Cluster, Route, Server
from dynserve.deploy.commands import OWN
from dynserve.deploy.documents import Notes
from dynserve.deploy.exposure import http_route, ingress, network_policy, pod_monitor
from dynserve.deploy.graph import Claim, Graph, merged_env
from dynserve.deploy.objects import (
    TLS,
    Object,
    checked_name,
    container_security,
    entry,
    labels,
    metadata,
    plain,
    pod_security,
    tls_mount,
    tls_volume,
)
from dynserve.deploy.plan import GRACE, Role, default_mode
from dynserve.deploy.server_objects import servers_of
from dynserve.errors import ConfigError

HTTP_PORT, SYSTEM_PORT = 8000, 9090
FRONTEND_DEADLINE_S, LOAD_DEADLINE_S = 600, 7200  # until a Deployment whose pods are not ready is reported as failed
PRE_STOP_S = 5  # seconds for which a frontend serves on after it was removed from its Service
SHARED, SHARED_NAME, TMP = "/dev/shm", "dynserve-shared-memory", "dynserve-tmp"


class RenderOptions(NamedTuple):
    """The settings that a `DynamoGraphDeployment` does not have. A `cluster.yaml` has all of them."""

    image: str | None = None  # of all components, in place of the file's
    nats: Server = Server()
    etcd: Server = Server()
    executor: str | None = None
    pod_monitor: bool = False  # needs the Prometheus operator
    network_policy: bool = True
    max_replicas: Mapping[str, int] = {}  # component in lower case -> replicas that an autoscaler may reach
    autoscaling: Autoscaling = Autoscaling()
    objective: bool = False  # the frontends have an objective for the first token
    plane_tls_secret: str = ""  # with ca.crt, tls.crt and tls.key
    route: Route = Route()


def options_of(cluster: Cluster, given: RenderOptions) -> RenderOptions:
    """Returns the settings of a `cluster.yaml`, over which those that were given on the command line win."""
    tls = cluster.plane_tls
    if tls.enabled and not (tls.secret or given.plane_tls_secret):
        raise ConfigError(
            "planeTls.enabled needs planeTls.secret: make the files with docker/scripts/plane-certificates.sh, and of them "
            "a Secret (the Helm chart makes both itself)"
        )
    return given._replace(
        nats=given.nats if given.nats.url else cluster.nats, etcd=given.etcd if given.etcd.url else cluster.etcd,
        pod_monitor=given.pod_monitor or cluster.pod_monitor, network_policy=cluster.network_policy,
        autoscaling=cluster.autoscaling if given.autoscaling == Autoscaling() else given.autoscaling,
        objective=cluster.frontend.ttft_slo_ms > 0, route=cluster.route,
        plane_tls_secret=given.plane_tls_secret or (tls.secret if tls.enabled else ""),
    )  # fmt: skip


def render(graph: Graph, roles: Sequence[Role], options: RenderOptions, notes: Notes) -> list[Object]:
    """Returns the objects of a deployment, in the order in which they should be applied.

    Raises:
        ConfigError: a name is not possible in Kubernetes, or a component has no image.
    """
    nats, etcd, servers = servers_of(graph, options.nats, options.etcd, options.plane_tls_secret)
    found = [_config_map(graph, name, content) for name, content in graph.config_maps.items()]
    found += [_claim(graph, one) for one in graph.claims if one.create]
    found += [*servers, _service_account(graph)]
    mode, ports = default_mode(roles), set[int]()
    for role in roles:
        own = {"DYN_ROLE": mode} if mode and role.translation.value("--disaggregation-mode") is None else {}
        workload = _Workload(graph, role, options, {"NATS_URL": nats, "ETCD_URL": etcd} | own, notes)
        ports.add(workload.port)
        found += workload.objects()
    if options.network_policy:
        found.append(network_policy(graph, sorted(ports)))
    if options.pod_monitor:
        found.append(pod_monitor(graph))
    return found + [dict(other) for other in graph.others]


class _Workload:
    """The objects of one component."""

    def __init__(
        self, graph: Graph, role: Role, options: RenderOptions, planes: Mapping[str, str], notes: Notes
    ) -> None:
        self._graph, self._role, self._options, self._planes, self._notes = graph, role, options, planes, notes
        self._component = role.component
        self.name = checked_name(f"{graph.name}-{role.component.key}", role.component.place)
        self._labels = labels(graph, role.component.key)
        own = role.translation.value("--http-port") or ""
        self.port = SYSTEM_PORT if not role.is_frontend else int(own) if own.isdecimal() else HTTP_PORT

    def objects(self) -> list[Object]:
        found = [self._deployment(), self._service(), self._budget()]
        if self._max_replicas:
            found.append(self._autoscaler())
        if self._role.is_frontend and self._component.ingress is not None:
            found.append(ingress(self._object, self._component.ingress, self.name, HTTP_PORT))
        if self._role.is_frontend and self._options.route.parent_refs:
            found.append(http_route(self._object, self._options.route, self.name, HTTP_PORT))
        return found

    @property
    def _max_replicas(self) -> int:
        return self._options.max_replicas.get(self._component.key) or self._component.max_replicas

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
            "progressDeadlineSeconds": FRONTEND_DEADLINE_S if self._role.is_frontend else LOAD_DEADLINE_S,
            "template": {"metadata": self._pod_metadata(), "spec": self._pod()},
        }
        if not self._max_replicas:  # else the autoscaler sets it
            spec["replicas"] = self._role.replicas
        return self._object("apps/v1", "Deployment", spec)

    def _pod_metadata(self) -> Object:
        component = self._component
        found: Object = {"labels": component.pod_labels | self._labels}
        annotations = dict(component.pod_annotations)
        if content := self._mounted_content():  # engines read their files once: a changed ConfigMap must restart them
            annotations["dynserve/config"] = hashlib.sha256(content.encode()).hexdigest()[:16]
        return found | ({"annotations": annotations} if annotations else {})

    def _mounted_content(self) -> str:
        """Returns names and content of the ConfigMaps that the pods mount."""
        volumes = [volume.get("configMap") or {} for volume in self._component.pod.get("volumes") or []]
        names = sorted({str(source["name"]) for source in volumes if "name" in source})
        return "".join(
            f"{name}/{file}\n{content}\n"
            for name in names
            for file, content in sorted(self._graph.config_maps.get(name, {}).items())
        )

    def _pod(self) -> Object:
        component = self._component
        pod: Object = {
            "serviceAccountName": self._graph.name,
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": int(GRACE),
            "securityContext": pod_security(),
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
        if self._options.plane_tls_secret:
            found.append(tls_volume(self._options.plane_tls_secret))
        claims = dict.fromkeys(self._component.claims.values())
        return found + [{"name": name, "persistentVolumeClaim": {"claimName": name}} for name in claims]

    def _container(self) -> Object:
        component, role = self._component, self._role
        given = {key: value for key, value in plain(component.main).items() if value not in (None, "", {}, [])}
        image = self._options.image or given.get("image")
        if not image:
            raise ConfigError(f"{component.place}: {component.name} has no image; use --image")
        if not self._options.image and role.command.module not in OWN:
            self._notes.warn(
                component.place,
                f"{component.name}: its image {image} must have dynserve in it; --image gives another one",
            )
        container: Object = {
            "name": "main", "image": image,
            "command": ["python3", "-m", "dynamo.frontend"] if role.is_frontend else [],
            "ports": [{"name": "http", "containerPort": self.port}] if role.is_frontend
            else [{"name": "system", "containerPort": SYSTEM_PORT}],
            "securityContext": container_security(),
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
        if self._options.plane_tls_secret:
            found.append(tls_mount())
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
        if self._options.plane_tls_secret:
            files = {"CERTIFICATE": "tls.crt", "KEY": "tls.key", "CA": "ca.crt"}
            defaults |= {f"DYN_PLANE_TLS_{name}": f"{TLS}/{file}" for name, file in files.items()}
        entries = merged_env(self._graph.env, self._component.env)
        given = {str(entry.get("name")) for entry in entries}
        own = [entry(name, value) for name, value in defaults.items() if name not in given]
        # Dynamo's own names of the servers' addresses count as well
        skipped = {"NATS_URL"} & given or {"NATS_SERVER"} & given, {"ETCD_URL"} & given or {"ETCD_ENDPOINTS"} & given
        forced = {"NATS_URL": self._options.nats.url, "ETCD_URL": self._options.etcd.url}
        for name, present in zip(("NATS_URL", "ETCD_URL"), skipped, strict=True):
            if not present or forced[name]:
                own.append(entry(name, self._planes[name]))
        own += [entry(name, value) for name, value in self._planes.items() if name == "DYN_ROLE" and name not in given]
        replaced = {name for name, value in forced.items() if value}
        if self._options.executor and not self._role.is_frontend:
            own.append(entry("DYN_EXECUTOR", self._options.executor))
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
        least, most = max(1, self._role.replicas), self._max_replicas
        component = self._component
        if most < least:
            raise ConfigError(f"{component.place}: {component.name}: at most {most} replicas are less than its {least}")
        if self._role.is_frontend:
            own = (component.main.get("resources") or {}).get("requests") or {}
            if "cpu" not in {**own, **component.resources.get("requests", {})}:
                raise ConfigError(
                    f"{component.place}: {component.name} has no request of cpu, by which it would be scaled"
                )
            return self._object("autoscaling/v2", "HorizontalPodAutoscaler", by_cpu(self.name, least, most))
        mode = (
            self._role.translation.value("--disaggregation-mode")
            or self._planes.get("DYN_ROLE")
            or "prefill_and_decode"
        )
        settings, cluster = self._options.autoscaling, self._graph.dynamo_namespace
        if settings.kind == "keda":
            spec = keda(self.name, least, most, settings, cluster, mode, objective=self._options.objective)
            return self._object("keda.sh/v1alpha1", "ScaledObject", spec)
        spec = by_role(self.name, least, most, settings, cluster, mode)
        return self._object("autoscaling/v2", "HorizontalPodAutoscaler", spec)


def _probes(port: int, *, frontend: bool) -> Object:
    live = {"httpGet": {"path": "/live", "port": port}, "periodSeconds": 10, "timeoutSeconds": 4, "failureThreshold": 3}
    ready = {
        "httpGet": {"path": "/health", "port": port},
        "periodSeconds": 10,
        "timeoutSeconds": 4,
        "failureThreshold": 3,
    }
    start = {"httpGet": {"path": "/live", "port": port}, "periodSeconds": 10, "timeoutSeconds": 5}
    return {
        "livenessProbe": live,
        "readinessProbe": ready,
        "startupProbe": start | {"failureThreshold": 30 if frontend else 720},
    }


def _config_map(graph: Graph, name: str, content: Mapping[str, str]) -> Object:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata(graph, name), "data": dict(content)}


def _claim(graph: Graph, claim: Claim) -> Object:
    spec: Object = {"accessModes": [claim.access_mode], "resources": {"requests": {"storage": claim.size}}}
    if claim.storage_class:
        spec["storageClassName"] = claim.storage_class
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata(graph, claim.name), "spec": spec}


def _service_account(graph: Graph) -> Object:
    own = metadata(graph, graph.name)
    return {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": own, "automountServiceAccountToken": False}
