"""NATS and etcd of a deployment: those that it names, or a small server of each without lasting data."""

from __future__ import annotations

from typing import NamedTuple

from dynserve.deploy.cluster import Server
from dynserve.deploy.graph import Graph
from dynserve.deploy.objects import (
    TLS,
    Object,
    container_security,
    labels,
    metadata,
    pod_security,
    tls_mount,
    tls_volume,
)

NATS_IMAGE, ETCD_IMAGE = "nats:2.10.29-alpine", "quay.io/coreos/etcd:v3.5.21"
NATS_PORT, ETCD_PORT = 4222, 2379
SECRET = "in a Secret"  # in place of an address that only the pods know


class Servers(NamedTuple):
    """The addresses of both servers, and the objects of those that the deployment brings itself."""

    nats_url: str
    etcd_url: str
    objects: list[Object]


def servers_of(graph: Graph, nats: Server, etcd: Server, tls_secret: str) -> Servers:
    """Returns the servers. With `tls_secret`, own ones require certificates of the planes."""
    env: dict[str, str] = {}
    for source in (*(one.env for one in graph.components), graph.env):
        env |= {str(entry.get("name")): str(entry["value"]) for entry in source if entry.get("value")}
        env |= {str(entry.get("name")): SECRET for entry in source if entry.get("valueFrom")}
    nats_url = nats.url or env.get("NATS_URL") or env.get("NATS_SERVER") or ""
    etcd_url = etcd.url or env.get("ETCD_URL") or env.get("ETCD_ENDPOINTS") or ""
    found: list[Object] = []
    if not nats_url:
        nats_url = f"{'tls' if tls_secret else 'nats'}://{graph.name}-nats:{NATS_PORT}"
        found += _server(graph, "nats", nats, NATS_IMAGE, NATS_PORT, _nats_command(bool(tls_secret)), tls_secret)
    if not etcd_url:
        etcd_url = f"http{'s' if tls_secret else ''}://{graph.name}-etcd:{ETCD_PORT}"
        found += _server(
            graph, "etcd", etcd, ETCD_IMAGE, ETCD_PORT, _etcd_command(etcd_url, bool(tls_secret)), tls_secret
        )
    return Servers(nats_url, etcd_url, found)


def _nats_command(tls: bool) -> list[str]:
    found = ["nats-server", f"--port={NATS_PORT}"]
    if tls:
        found += [
            "--tls",
            f"--tlscert={TLS}/tls.crt",
            f"--tlskey={TLS}/tls.key",
            "--tlsverify",
            f"--tlscacert={TLS}/ca.crt",
        ]
    return found


def _etcd_command(url: str, tls: bool) -> list[str]:
    listen = f"http{'s' if tls else ''}://0.0.0.0:{ETCD_PORT}"
    found = ["etcd", "--data-dir=/data/etcd", f"--listen-client-urls={listen}", f"--advertise-client-urls={url}"]
    if tls:
        found += [f"--cert-file={TLS}/tls.crt", f"--key-file={TLS}/tls.key"]
        found += ["--client-cert-auth", f"--trusted-ca-file={TLS}/ca.crt"]
    return found


def _server(
    graph: Graph, name: str, server: Server, image: str, port: int, command: list[str], tls_secret: str
) -> list[Object]:
    """A single server. Processes register again when it comes back empty, so it needs no lasting data."""
    own, full = labels(graph, name), f"{graph.name}-{name}"
    container: Object = {
        "name": name, "image": server.image or image, "command": command,
        "ports": [{"name": name, "containerPort": port}],
        "readinessProbe": {"tcpSocket": {"port": port}, "periodSeconds": 5},
        "securityContext": container_security(),
        "volumeMounts": [{"name": "data", "mountPath": "/data"}],
    }  # fmt: skip
    resources = {"requests": server.resources.requests, "limits": server.resources.limits}
    if found := {side: dict(amounts) for side, amounts in resources.items() if amounts}:
        container["resources"] = found
    pod: Object = {
        "automountServiceAccountToken": False, "containers": [container], "securityContext": pod_security(),
        "volumes": [{"name": "data", "emptyDir": {}}],
    }  # fmt: skip
    if tls_secret:
        pod["volumes"].append(tls_volume(tls_secret))
        container["volumeMounts"].append(tls_mount())
    template = {"metadata": {"labels": own}, "spec": pod}
    spec = {"serviceName": full, "replicas": 1, "selector": {"matchLabels": own}, "template": template}
    ports = [{"name": name, "port": port, "targetPort": port}]
    return [
        {"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": metadata(graph, full, name), "spec": spec},
        {
            "apiVersion": "v1", "kind": "Service", "metadata": metadata(graph, full, name),
            "spec": {"selector": own, "ports": ports},
        },
    ]  # fmt: skip
