"""Who may reach a deployment: Ingress and HTTPRoute for clients, network policy between pods, PodMonitor for metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dynserve.deploy.cluster import Route
from dynserve.deploy.documents import Map
from dynserve.deploy.graph import Graph
from dynserve.deploy.objects import Object, labels, shared_object

Maker = Callable[[str, str, Object], Object]  # of an object of the frontend, from API version, kind and spec


def ingress(make: Maker, given: Map, service: str, port: int) -> Object:
    """Returns an Ingress. `given` has the keys of v1alpha1's `ingress`, or `fullHost`."""
    parts = f"{given.get('hostPrefix') or ''}{given.get('host') or ''}.{given.get('hostSuffix') or 'local'}"
    host = str(given.get("fullHost") or parts)
    backend = {"service": {"name": service, "port": {"number": port}}}
    path = {"path": "/", "pathType": "Prefix", "backend": backend}
    spec: Object = {"rules": [{"host": host, "http": {"paths": [path]}}]}
    if name := given.get("ingressControllerClassName"):
        spec["ingressClassName"] = str(name)
    if secret := (given.get("tls") or {}).get("secretName"):
        spec["tls"] = [{"hosts": [host], "secretName": str(secret)}]
    found = make("networking.k8s.io/v1", "Ingress", spec)
    found["metadata"]["annotations"] = {
        # answers are streams: nothing may be held back or cut off
        "nginx.ingress.kubernetes.io/proxy-buffering": "off",
        "nginx.ingress.kubernetes.io/proxy-read-timeout": "3600",
        **found["metadata"].get("annotations", {}), **(given.get("annotations") or {}),
    }  # fmt: skip
    return found


def http_route(make: Maker, route: Route, service: str, port: int) -> Object:
    """Returns an HTTPRoute of the Gateway API, without a limit for the time of a request."""
    rule = {"backendRefs": [{"name": service, "port": port}], "timeouts": {"request": "0s"}}
    spec: Object = {"parentRefs": list(route.parent_refs), "rules": [rule]}
    if route.hostnames:
        spec["hostnames"] = list(route.hostnames)
    return make("gateway.networking.k8s.io/v1", "HTTPRoute", spec)


def network_policy(graph: Graph, ports: Sequence[int]) -> Object:
    """Links, KV transfers, NATS and etcd are open to pods of this deployment only; `ports` (the API, `/metrics`) to all."""
    peers = {"podSelector": {"matchLabels": labels(graph)}}
    open_ports = {"ports": [{"protocol": "TCP", "port": port} for port in ports]}
    return shared_object(graph, "networking.k8s.io/v1", "NetworkPolicy", {
        "podSelector": {"matchLabels": labels(graph)}, "policyTypes": ["Ingress"],
        "ingress": [{"from": [peers]}, open_ports],
    })  # fmt: skip


def pod_monitor(graph: Graph) -> Object:
    endpoints = [{"port": port, "path": "/metrics", "interval": "15s"} for port in ("http", "system")]
    spec = {"selector": {"matchLabels": labels(graph)}, "podMetricsEndpoints": endpoints}
    return shared_object(graph, "monitoring.coreos.com/v1", "PodMonitor", spec)
