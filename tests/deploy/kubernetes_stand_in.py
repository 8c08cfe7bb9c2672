"""A server that speaks as much of Kubernetes' API as `kubectl apply`, `get` and `delete` need, with its objects in memory."""

from __future__ import annotations

import copy
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

RESOURCES = {  # plural -> group version, kind, short name
    "pods": ("v1", "Pod", "po"),
    "services": ("v1", "Service", "svc"),
    "configmaps": ("v1", "ConfigMap", "cm"),
    "deployments": ("apps/v1", "Deployment", "deploy"),
    "dynamographdeployments": ("nvidia.com/v1alpha1", "DynamoGraphDeployment", "dgd"),
}
_PATH = re.compile(r"/(?:api/v1|apis/([\w.]+/\w+))/namespaces/([\w-]+)/(\w+)(?:/([\w.-]+))?(/scale)?")
_HEALTH = re.compile(r"/api/v1/namespaces/([\w-]+)/services/([\w-]+):8000/proxy/health")
Key = tuple[str, str, str]  # plural, namespace, name


class StandIn:
    """The objects of the server, and the changes that were requested."""

    def __init__(self) -> None:
        self.objects: dict[Key, dict[str, Any]] = {}
        self.requests: list[str] = []
        self.health: dict[tuple[str, str], dict[str, Any]] = {}  # namespace and service -> the answer of its /health

    def add_pod(self, namespace: str, name: str, ready: str = "1/1") -> None:
        good, total = map(int, ready.split("/"))
        statuses = [{"name": f"c{i}", "ready": i < good, "restartCount": 0} for i in range(total)]
        self.objects["pods", namespace, name] = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {"containers": [{"name": one["name"]} for one in statuses]},
            "status": {"phase": "Running", "containerStatuses": statuses},
        }

    def names(self, plural: str) -> list[str]:
        return sorted(name for kind, _, name in self.objects if kind == plural)


@contextmanager
def serving(stand_in: StandIn) -> Iterator[str]:
    """Yields the server's address."""
    handler = type("_Handler", (_Handler,), {"stand_in": stand_in})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    stand_in: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        if (discovered := _discovery(path)) is not None:
            self._answer(200, discovered)
        elif (proxied := _HEALTH.fullmatch(path)) is not None and proxied.groups() in self.stand_in.health:
            self._answer(200, self.stand_in.health[proxied[1], proxied[2]])
        elif (found := _PATH.fullmatch(path)) is None:
            self._status(404, path)
        elif found[4]:
            self._one(found)
        else:
            self._list(found[3], found[2], "Table" in self.headers.get("accept", ""), query)

    def do_POST(self) -> None:
        found, body = _PATH.fullmatch(urlsplit(self.path).path), self._body()
        assert found is not None
        key = (found[3], found[2], str(body["metadata"]["name"]))
        self.stand_in.requests.append(f"create {key[0]} {key[2]}")
        body["metadata"] |= {"namespace": found[2], "resourceVersion": "1", "uid": "u"}
        self.stand_in.objects[key] = body
        self._answer(201, body)

    def do_PATCH(self) -> None:
        found, body = _PATH.fullmatch(urlsplit(self.path).path), self._body()
        assert found is not None
        key = (found[3], found[2], found[4])
        if key not in self.stand_in.objects:
            self._status(404, found[4])
            return
        self.stand_in.requests.append(f"patch {key[0]} {key[2]}")
        stored = self.stand_in.objects[key]
        _merge(stored, body)
        self._answer(200, _scale(stored) if found[5] else stored)

    def do_DELETE(self) -> None:
        found = _PATH.fullmatch(urlsplit(self.path).path)
        assert found is not None
        self._body()
        gone = self.stand_in.objects.pop((found[3], found[2], found[4]), None)
        if gone is None:
            self._status(404, found[4])
            return
        self.stand_in.requests.append(f"delete {found[3]} {found[4]}")
        self._answer(200, {"kind": "Status", "apiVersion": "v1", "status": "Success", "details": {"name": found[4]}})

    def _one(self, found: re.Match[str]) -> None:
        stored = self.stand_in.objects.get((found[3], found[2], found[4]))
        if stored is None:
            self._status(404, found[4])
        elif found[5]:
            self._answer(200, _scale(stored))
        else:
            self._answer(200, stored)

    def _list(self, plural: str, namespace: str, table: bool, query: dict[str, list[str]]) -> None:
        version, kind, _ = RESOURCES[plural]
        chosen = _selector(query.get("labelSelector", [""])[0])
        items = [
            one
            for (what, where, _), one in self.stand_in.objects.items()
            if what == plural and where == namespace and chosen.items() <= (one["metadata"].get("labels") or {}).items()
        ]
        if table and plural == "pods":
            self._answer(200, _pod_table(items))
            return
        self._answer(200, {"kind": f"{kind}List", "apiVersion": version, "metadata": {}, "items": items})

    def _body(self) -> Any:
        content = self.rfile.read(int(self.headers.get("content-length") or 0))
        return json.loads(content) if content else {}

    def _status(self, code: int, what: str) -> None:
        reason = {404: "NotFound"}.get(code, "")
        body = {
            "kind": "Status",
            "apiVersion": "v1",
            "status": "Failure",
            "reason": reason,
            "code": code,
            "message": what,
        }
        self._answer(code, body)

    def _answer(self, code: int, body: Any) -> None:
        content = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _selector(text: str) -> dict[str, str]:
    return dict(part.split("=", 1) for part in text.split(",") if "=" in part)


def _scale(stored: dict[str, Any]) -> dict[str, Any]:
    metadata, replicas = stored["metadata"], stored["spec"].get("replicas", 1)
    return {
        "kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": metadata, "spec": {"replicas": replicas},
        "status": {"replicas": replicas},
    }  # fmt: skip


def _merge(into: dict[str, Any], change: dict[str, Any]) -> None:
    for key, value in change.items():
        if value is None:
            into.pop(key, None)
        elif isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = copy.deepcopy(value)


def _pod_table(items: list[dict[str, Any]]) -> dict[str, Any]:
    columns = [{"name": name, "type": "string"} for name in ("Name", "Ready", "Status", "Restarts", "Age")]
    rows = []
    for one in items:
        statuses = one.get("status", {}).get("containerStatuses", [])
        ready = f"{sum(status['ready'] for status in statuses)}/{len(statuses)}"
        cells = [one["metadata"]["name"], ready, one.get("status", {}).get("phase", "Pending"), "0", "1m"]
        partial = {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": one["metadata"]}
        rows.append({"cells": cells, "object": partial})
    return {
        "kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": {}, "columnDefinitions": columns, "rows": rows,
    }  # fmt: skip


def _discovery(path: str) -> Any:
    """Returns what kubectl asks about the API itself; None for other paths."""
    groups = sorted({version for version, _, _ in RESOURCES.values() if "/" in version})
    if path == "/version":
        return {"major": "1", "minor": "33", "gitVersion": "v1.33.0"}
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        versions = [{"groupVersion": one, "version": one.split("/")[1]} for one in groups]
        items = [{"name": v["groupVersion"].split("/")[0], "versions": [v], "preferredVersion": v} for v in versions]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": items}
    if path == "/openapi/v3":
        return {"paths": {f"api{'s' if '/' in one else ''}/{one}": {"serverRelativeURL": f"/openapi/v3/{one}"} for one in ["v1", *groups]}}  # fmt: skip
    if path.startswith("/openapi/v3/"):
        return _openapi(path.removeprefix("/openapi/v3/"))
    version = path.removeprefix("/apis/") if path.startswith("/apis/") else "v1" if path == "/api/v1" else ""
    if version not in ["v1", *groups]:
        return None
    verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
    resources = [
        {"name": plural, "kind": kind, "namespaced": True, "verbs": verbs, "shortNames": [short], "singularName": kind.lower()}
        for plural, (of, kind, short) in RESOURCES.items()
        if of == version
    ]  # fmt: skip
    if version == "apps/v1":
        scale = {"name": "deployments/scale", "kind": "Scale", "group": "autoscaling", "version": "v1"}
        resources.append({**scale, "namespaced": True, "verbs": ["get", "patch", "update"], "singularName": ""})
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": resources}


def _openapi(version: str) -> dict[str, Any]:
    """Says that patches are validated here, so that kubectl does not ask for the schemas of all objects."""
    paths = {}
    for plural, (of, kind, _) in RESOURCES.items():
        if of == version:
            group, _, number = version.rpartition("/")
            patch = {
                "x-kubernetes-group-version-kind": {"group": group, "version": number, "kind": kind},
                "parameters": [{"name": "fieldValidation", "in": "query"}],
            }
            paths[f"/{plural}/{{name}}"] = {"patch": patch}
    return {"openapi": "3.0.0", "info": {"title": "stand-in", "version": "1"}, "paths": paths, "components": {}}
