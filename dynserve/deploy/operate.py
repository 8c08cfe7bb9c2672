"""`dynserve deploy status|scale|logs`: what runs of a deployment, on this machine or on Kubernetes.

A name that runs here (`dynserve deploy local`) is handled here; others with kubectl, in the namespace and context that it
would use itself.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from dynserve.addresses import host_port
from dynserve.config import NotNegative, check_bounds, exit_with, load, option
from dynserve.deploy import control
from dynserve.deploy.local import scale_of
from dynserve.errors import ConfigError

SCALE_TIMEOUT = 120.0  # seconds; workers finish their answers before they stop
KUBECTL_TIMEOUT = 30.0  # seconds

Row = dict[str, str]
COLUMNS = ("component", "process", "restarts", "ready", "instance", "role", "state", "running", "waiting", "KV")


@dataclass(frozen=True, kw_only=True)
class OperateConfig:
    """The options that status, scale and logs share."""

    namespace: str | None = option(None, "or -n: Kubernetes namespace; default: that of kubectl's context")


@dataclass(frozen=True, kw_only=True)
class LogsConfig(OperateConfig):
    component: str | None = option(None, "one component only, such as decode")
    follow: bool = option(False, "or -f: go on until Ctrl-C")
    tail: NotNegative = option(100, "lines from before; of each pod on Kubernetes")

    def __post_init__(self) -> None:
        check_bounds(self)


# status


def status(name: str | None, config: OperateConfig) -> None:
    """Prints a table of processes or pods with the instances that the frontend knows, and what it says of itself."""
    if name is None:
        names = control.running()
        if not names:
            raise ConfigError(
                "nothing runs on this machine; name a deployment on Kubernetes: dynserve deploy status NAME"
            )
        for one in names:
            try:
                status(one, config)
            except ConfigError as error:  # such as a socket that a killed one left
                print(error)
        return
    rows, health = local_status(name) if _is_local(name, config) else kubernetes_status(name, config)
    print(f"{name}: {health.get('status', 'no answer')}, models: {', '.join(health.get('models') or ['none'])}")
    if reason := health.get("reason"):
        print(f"  {reason}")
    for problem in problems(health):
        print(f"  {problem}")
    print(table(rows))


def problems(health: dict[str, Any]) -> list[str]:
    found = [f"{plane} is down" for plane, up in (health.get("planes") or {}).items() if not up]
    for one in health.get("instances") or []:
        found += [f"{one['id']}: {warning}" for warning in one.get("warnings") or []]
    return found


def _is_local(name: str, config: OperateConfig) -> bool:
    return config.namespace is None and name in control.running()


def local_status(name: str) -> tuple[list[Row], dict[str, Any]]:
    """Returns the rows of a deployment on this machine, and the frontend's health."""
    answer = asyncio.run(control.ask(name, {"what": "status"}, 10.0))
    health = _health(f"{answer['url']}/health")
    by_pid = {one["pid"]: one for one in health.get("instances") or []}
    rows = []
    for process in answer["processes"]:
        component, _, number = process["name"].rpartition("-")
        row = {"component": component if number.isdecimal() else process["name"], "process": str(process["pid"] or "-")}
        rows.append(row | {"restarts": str(process["restarts"])} | _instance(by_pid.pop(process["pid"], None)))
    return rows + [_instance(one) for one in by_pid.values()], health


def kubernetes_status(name: str, config: OperateConfig) -> tuple[list[Row], dict[str, Any]]:
    """Returns the rows of a deployment on Kubernetes, and the frontend's health, through the API server's proxy."""
    pods = [
        one for one in json.loads(_kubectl(config, "get", "pods", "--output", "json"))["items"] if _belongs(one, name)
    ]
    if not pods:
        raise ConfigError(f"{name} neither runs on this machine nor has pods in {config.namespace or 'this namespace'}")
    health = _service_health(name, config)
    instances = {host_port(one["address"], "address", 0)[0]: one for one in health.get("instances") or []}
    rows = []
    for pod in pods:
        statuses = pod.get("status", {}).get("containerStatuses") or []
        row = {
            "component": component_of(pod, name),
            "process": pod["metadata"]["name"],
            "restarts": str(sum(one["restartCount"] for one in statuses)),
            "ready": f"{sum(one['ready'] for one in statuses)}/{len(statuses)}",
        }
        rows.append(row | _instance(instances.pop(pod.get("status", {}).get("podIP", ""), None)))
    return rows + [_instance(one) for one in instances.values()], health


def _belongs(pod: dict[str, Any], name: str) -> bool:
    """Whether a pod is of a deployment: of ours by its label, of Dynamo's operator by its name."""
    labels = pod["metadata"].get("labels") or {}
    instance = labels.get("app.kubernetes.io/instance") or labels.get("nvidia.com/dynamo-graph-deployment-name")
    return bool(instance == name if instance else pod["metadata"]["name"].startswith(f"{name}-"))


def component_of(pod: dict[str, Any], name: str) -> str:
    labels = pod["metadata"].get("labels") or {}
    given = labels.get("app.kubernetes.io/component") or labels.get("nvidia.com/dynamo-component")
    return str(given or pod["metadata"]["name"].removeprefix(f"{name}-").partition("-")[0])


def _service_health(name: str, config: OperateConfig) -> dict[str, Any]:
    space = (
        config.namespace
        or _kubectl(config, "config", "view", "--minify", "--output", "jsonpath={..namespace}")
        or "default"
    )
    path = f"/api/v1/namespaces/{space}/services/{name}-frontend:8000/proxy/health"
    try:
        found: dict[str, Any] = json.loads(_kubectl(config, "get", "--raw", path))
    except (
        ConfigError,
        ValueError,
    ) as error:  # kubectl reports a frontend without a model, which answers 503, as an error
        return {"reason": str(error)}
    return found


def _health(url: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = httpx.get(url, timeout=5.0, trust_env=False).json()
    except (httpx.HTTPError, ValueError):
        return {}
    return found


def _instance(one: dict[str, Any] | None) -> Row:
    if one is None:
        return {}
    load = one.get("load") or {}
    total = load.get("total_blocks") or 0
    used = f"{100 * (1 - load['free_blocks'] / total):.0f} %" if total else "-"
    return {
        "instance": one["id"], "role": one["role"], "state": one["state"], "KV": used,
        "running": str(load.get("running", "-")), "waiting": str(load.get("waiting", "-")),
    }  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Returns rows as a table, without columns that are empty everywhere."""
    columns = [name for name in COLUMNS if any(row.get(name) for row in rows)]
    lines = [columns, *([row.get(name) or "-" for name in columns] for row in rows)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(columns))]
    padded = ["  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(f"  {line}".rstrip() for line in padded)


# scale


def scale(name: str, words: Sequence[str], config: OperateConfig) -> None:
    """Sets the replicas of components, given as `decode=3`."""
    wanted = scale_of(",".join(words), "scale")
    if not wanted:
        raise ConfigError("give components and replicas: dynserve deploy scale NAME decode=3")
    if _is_local(name, config):
        asyncio.run(control.ask(name, {"what": "scale", "scale": wanted}, SCALE_TIMEOUT))
    else:
        for component, count in wanted.items():
            _kubectl(config, "scale", f"deployment/{name}-{component}", f"--replicas={count}")
    print(f"{name}: " + ", ".join(f"{component} has {count} replicas" for component, count in wanted.items()))


# logs


def logs(name: str, config: LogsConfig) -> None:
    """Prints the lines of all processes, or of one component's."""
    if _is_local(name, config):
        request = {"what": "logs", "component": config.component, "tail": config.tail, "follow": config.follow}
        asyncio.run(_print_lines(name, request))
        return
    label = f"app.kubernetes.io/instance={name}"
    if config.component:
        label += f",app.kubernetes.io/component={config.component}"
    words = ["logs", "--selector", label, "--prefix", f"--tail={config.tail}", "--max-log-requests=100"]
    command = _command(config, *words, *(["--follow"] if config.follow else []))
    code = subprocess.run(command, check=False).returncode
    if code:
        raise SystemExit(code)


async def _print_lines(name: str, request: dict[str, Any]) -> None:
    async for line in control.follow(name, request):
        print(line, flush=True)


def _command(config: OperateConfig, *words: str) -> list[str]:
    program = shutil.which("kubectl")
    if program is None:
        raise ConfigError("kubectl is not installed, and no deployment of this name runs on this machine")
    return [program, *(["--namespace", config.namespace] if config.namespace else []), *words]


def _kubectl(config: OperateConfig, *words: str) -> str:
    command = _command(config, *words)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=KUBECTL_TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"kubectl has not answered within {KUBECTL_TIMEOUT:.0f} s") from None
    if done.returncode:
        raise ConfigError(f"kubectl {' '.join(words[:3])}: {done.stderr.strip()[:500]}")
    return done.stdout


# commands


def _run(command: str, argv: Sequence[str]) -> None:
    short = {"-n": "--namespace", "-f": "--follow"}
    at = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    positional, rest = list(argv[:at]), [short.get(word, word) for word in argv[at:]]
    kind = LogsConfig if command == "logs" else OperateConfig
    config = load(kind, f"dynserve deploy {command} NAME{' COMPONENT=N…' if command == 'scale' else ''}", rest)
    if command == "status" and len(positional) <= 1:
        status(positional[0] if positional else None, config)
    elif command == "scale" and positional:
        scale(positional[0], positional[1:], config)
    elif command == "logs" and len(positional) == 1 and isinstance(config, LogsConfig):
        logs(positional[0], config)
    else:
        raise ConfigError(
            f"deploy {command} needs the NAME of one deployment first; see dynserve deploy {command} --help"
        )


def main(command: str, argv: Sequence[str]) -> None:
    try:
        _run(command, argv)
    except ConfigError as error:
        exit_with(error)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
