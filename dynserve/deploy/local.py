"""`dynserve deploy local FILE`: a `DynamoGraphDeployment` or a `cluster.yaml` as processes on this machine.

Each pod is a process with the file's own command, environment and mounted files. Its `python3 -m dynamo.MODULE` is dynserve
(`entry.py`). etcd and NATS are started here, unless the file names servers that this machine reaches.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from dynserve.child import ChildSpec, Group, Supervisor
from dynserve.config import ExecutorName, LogLevel, Port, PositiveFloat, check_bounds, exit_with, load, option
from dynserve.deploy.cluster import Cluster
from dynserve.deploy.control import check_name, controlled
from dynserve.deploy.documents import Notes
from dynserve.deploy.graph import Graph
from dynserve.deploy.plan import (
    Overrides,
    Planes,
    Role,
    default_mode,
    given_planes,
    hub_models,
    load_folder,
    roles_of,
    specs,
)
from dynserve.deploy.reader import read_deployment
from dynserve.errors import ConfigError
from dynserve.hub import model_folder
from dynserve.local.embedded import etcd_command, free_ports, nats_command
from dynserve.local.gpus import gpus
from dynserve.process import StopSignal, run_process
from dynserve.server.serving import bind
from dynserve.tasks import OwnedTasks, detached, task_group

POLL = 0.1  # seconds
REPORT_EVERY = 2.0  # seconds between progress lines
DEFAULT_PORT = 8000
VISIBLE = "CUDA_VISIBLE_DEVICES"
MAX_LINES = 2000  # of the processes' output, kept for `dynserve deploy logs`


@dataclass(frozen=True, kw_only=True)
class LocalConfig:
    """The options of `dynserve deploy local`."""

    model_path: str | None = option(None, "folder of the model, in place of the one that the file names")
    executor: ExecutorName | None = option(None, "torch, simulated or trtllm, in place of the command's own")
    scale: str | None = option(None, "replicas by component, as name=2,name=0")
    config_maps: str | None = option(
        None, "folder with the files of ConfigMaps that are not in FILE; default: FILE's own"
    )
    http_port: Port = option(0, "port of the frontend; 0: 8000, or the next free one")
    nats_url: str | None = option(
        None, "NATS of your own; default: the file's, if it can be reached, else one is started"
    )
    etcd_url: str | None = option(
        None, "etcd of your own; default: the file's, if it can be reached, else one is started"
    )
    start_timeout_s: PositiveFloat = option(300.0, "longest time until the deployment is ready; then the command fails")
    log_level: LogLevel = option("warning", "debug, info, warning or error, of this command itself")

    def __post_init__(self) -> None:
        check_bounds(self)


async def run(path: str, config: LocalConfig, stop: StopSignal) -> None:
    notes = Notes()
    graph, cluster = read_deployment(path, notes)
    check_name(graph.name)
    if cluster is not None:
        config = _with_settings(config, cluster, notes)
    load_folder(graph, Path(config.config_maps or Path(path).parent), Path(path))
    overrides = Overrides(config.model_path, config.executor, scale_of(config.scale))
    roles = roles_of(graph, overrides, notes)
    for model, weights in hub_models(graph, roles, overrides).items():  # once, before the workers need it
        await detached(partial(model_folder, weights=weights), model)
    with tempfile.TemporaryDirectory(prefix="dynserve-") as folder:
        servers, planes = _servers(graph, config, Path(folder), notes)
        port = free_port(config.http_port)
        processes = _processes(graph, roles, Path(folder), planes, overrides, port, notes)
        for line in notes.lines:
            print(f"note: {line}", flush=True)
        async with task_group() as tasks:
            replicas = partial(_replicas, graph, roles, Path(folder), planes, overrides, port)
            deployment = LocalDeployment(graph, config, servers, processes, port, tasks, replicas)
            try:
                await deployment.start()
                deployment.show()
                async with controlled(graph.name, deployment):
                    await stop.wait(deployment.broken)
                print("\nstopping: workers, frontend, servers", flush=True)
            finally:
                await deployment.stop()


def _with_settings(config: LocalConfig, cluster: Cluster, notes: Notes) -> LocalConfig:
    """Returns the configuration with the servers of a `cluster.yaml`, and notes what of it has no meaning here."""
    for key, given in (("planeTls", cluster.plane_tls.enabled), ("apiKeysSecret", cluster.api_keys_secret)):
        if given:
            notes.warn(None, f"{key} does not apply here: there are no Secrets")
    nats_url, etcd_url = config.nats_url or cluster.nats.url or None, config.etcd_url or cluster.etcd.url or None
    return replace(config, nats_url=nats_url, etcd_url=etcd_url)


def scale_of(text: str | None, flag: str = "--scale") -> dict[str, int]:
    """Parses `name=2,name=0`. Raises ConfigError."""
    found = {}
    for part in filter(None, (text or "").split(",")):
        name, _, count = part.strip().partition("=")
        if not name or not count.isdecimal() or len(count) > 4:
            raise ConfigError(f"{flag}: {part.strip()!r} is not of the form name=2")
        found[name.lower()] = int(count)
    return found


def free_port(wanted: int) -> int:
    """Returns the port that is wanted, or the first free one from 8000 on. Raises ConfigError if it is in use."""
    if wanted:
        bind("127.0.0.1", wanted, "--http-port").close()
        return wanted
    for port in range(DEFAULT_PORT, DEFAULT_PORT + 100):
        with contextlib.suppress(ConfigError):
            bind("127.0.0.1", port, "--http-port").close()
            return port
    raise ConfigError(f"no port from {DEFAULT_PORT} to {DEFAULT_PORT + 99} is free; use --http-port")


def _servers(graph: Graph, config: LocalConfig, folder: Path, notes: Notes) -> tuple[list[ChildSpec], Planes]:
    given = given_planes(graph)
    etcd_port, peer_port, nats_port = free_ports(3)
    nats_url, etcd_url = config.nats_url or given.nats_url, config.etcd_url or given.etcd_url
    started = []
    if not etcd_url:
        started.append(ChildSpec("etcd", etcd_command(folder / "etcd", etcd_port, peer_port)))
    if not nats_url:
        started.append(ChildSpec("nats", nats_command(nats_port)))
    if started:
        names = " and ".join(spec.name for spec in started)
        notes.warn(None, f"{names} run here: the file names none that this machine reaches")
    return started, Planes(nats_url or f"nats://127.0.0.1:{nats_port}", etcd_url or f"http://127.0.0.1:{etcd_port}")


def share_gpus(roles: Sequence[Role], available: int, notes: Notes) -> list[list[list[int]]]:
    """Returns the GPUs of each process of each role, all different; nothing where this machine has none.

    Raises:
        ConfigError: there are GPUs, but too few.
    """
    wanted = [0 if role.is_frontend else role.component.gpus for role in roles]
    total = sum(count * role.replicas for count, role in zip(wanted, roles, strict=True))
    if not available:
        if total:
            notes.warn(None, f"the file asks for {total} GPUs and this machine has none: workers run on the CPU")
        return [[] for _ in roles]
    if total > available:
        raise ConfigError(f"the file asks for {total} GPUs and this machine has {available}; use --scale name=1")
    numbers = iter(range(available))
    return [
        [[next(numbers) for _ in range(count)] for _ in range(role.replicas)]
        for count, role in zip(wanted, roles, strict=True)
    ]


def _processes(
    graph: Graph, roles: Sequence[Role], folder: Path, planes: Planes, overrides: Overrides, port: int, notes: Notes,
    *, on_gpus: bool = True,
) -> dict[str, list[ChildSpec]]:  # fmt: skip
    """Returns the processes by role. Without `on_gpus` they get none yet."""
    mode = default_mode(roles)
    found: dict[str, list[ChildSpec]] = {"frontend": [], "worker": []}
    available = 0 if overrides.executor == "simulated" or not on_gpus else gpus()
    for role, numbers in zip(roles, share_gpus(roles, available, notes), strict=True):
        made = specs(graph, role, folder, planes, overrides, numbers, port)
        if mode is not None and not role.is_frontend and role.translation.value("--disaggregation-mode") is None:
            made = [spec._replace(environment={**spec.environment, "DYN_ROLE": mode}) for spec in made]
        found[role.translation.role] += made
    return found


def _replicas(
    graph: Graph, roles: Sequence[Role], folder: Path, planes: Planes, overrides: Overrides, port: int,
    name: str, count: int,
) -> list[ChildSpec]:  # fmt: skip
    """Returns the processes of one component if it has so many replicas. Raises ConfigError."""
    changed = [role._replace(replicas=count) if role.component.key == name else role for role in roles]
    if name not in {role.component.key for role in roles}:
        known = ", ".join(sorted(role.component.key for role in roles))
        raise ConfigError(f"{graph.name} has no component {name!r}; it has {known}")
    made = _processes(graph, changed, folder, planes, overrides, port, Notes(), on_gpus=False)
    prefix = f"{name}-"
    return [spec for specs in made.values() for spec in specs if spec.name.removeprefix(prefix).isdecimal()]


class LocalDeployment:
    """The processes of a deployment. `replicas(component, count)` returns those of one component."""

    def __init__(
        self, graph: Graph, config: LocalConfig, servers: Sequence[ChildSpec], processes: dict[str, list[ChildSpec]],
        port: int, tasks: OwnedTasks, replicas: Callable[[str, int], list[ChildSpec]],
    ) -> None:  # fmt: skip
        self._graph, self._config, self._replicas = graph, config, replicas
        self.lines: deque[str] = deque(maxlen=MAX_LINES)
        self.listeners: list[Callable[[str], None]] = []
        self._scaling = asyncio.Lock()
        self._gpus = 0 if config.executor == "simulated" else gpus()
        groups = [Group(processes["frontend"]), Group(processes["worker"])]
        if servers:  # a server loses its data when it dies, so only the others are started again
            groups.insert(0, Group(servers, restart=False))
        self._supervisor = Supervisor(groups, tasks, self._heard)
        self.broken = self._supervisor.broken
        self._url, self._began = f"http://127.0.0.1:{port}", time.monotonic()
        self._expected = len(processes["worker"])
        self._instances: list[dict[str, Any]] = []

    async def start(self) -> None:
        """Starts all processes, and returns when every worker is ready.

        Raises:
            ConfigError: a process has a wrong configuration, or they were not ready within `start_timeout_s`.
        """
        await self._supervisor.start()
        reported = 0.0
        async with httpx.AsyncClient(trust_env=False, timeout=1.0) as client:
            while (ready := await self._ready(client)) < self._expected or ready == 0:
                if self.broken.done():
                    self.broken.result()
                waited = time.monotonic() - self._began
                state = f"{ready} of {self._expected} workers are ready"
                if waited > self._config.start_timeout_s:
                    limit = f"--start-timeout-s {self._config.start_timeout_s:.0f}"
                    raise ConfigError(f"{self._graph.name} is not ready after {limit}: {state}")
                if waited - reported >= REPORT_EVERY:
                    reported = waited
                    print(f"{state} ({waited:.1f} s)", flush=True)
                await asyncio.sleep(POLL)

    async def _ready(self, client: httpx.AsyncClient) -> int:
        try:
            self._instances = (await client.get(f"{self._url}/health")).json()["instances"]
        except (httpx.HTTPError, ValueError, KeyError):
            return 0
        return sum(instance["state"] == "ready" for instance in self._instances)

    def show(self) -> None:
        elapsed = time.monotonic() - self._began
        print(f"\n{self._graph.name} is ready after {elapsed:.1f} s\n\n  {'process':<28} {'pid':>8}")
        for child in (child for group in self._supervisor.groups for child in group):
            print(f"  {child.name:<28} {child.pid or 0:>8}")
        model = self._instances[0]["model"]
        body = f'{{"model": "{model}", "prompt": "Hello world", "max_tokens": 50}}'
        print(f"\ntry it:\n  curl {self._url}/v1/completions -H 'content-type: application/json' -d '{body}'\n")
        print("Ctrl-C stops everything.", flush=True)

    def _heard(self, name: str, line: str) -> None:
        text = f"{name} | {line}"
        self.lines.append(text)
        for listener in self.listeners:
            listener(text)

    def processes(self) -> list[dict[str, Any]]:
        """Returns name, pid (0 while it is started again) and number of restarts of each process."""
        return [
            {"name": child.name, "pid": child.pid or 0, "restarts": max(0, child.starts - 1)}
            for group in self._supervisor.groups
            for child in group
        ]

    @property
    def url(self) -> str:
        return self._url

    async def scale(self, name: str, count: int) -> None:
        """Starts or stops processes until the component has `count`; the newest ones are stopped first, after a drain.

        Raises:
            ConfigError: there is no such component, or too few GPUs.
        """
        async with self._scaling:
            wanted = self._replicas(name, count)
            group = next(
                (
                    g
                    for g in self._supervisor.groups
                    if any(child.name.removeprefix(f"{name}-").isdecimal() for child in g)
                ),
                self._supervisor.groups[-1],
            )
            running = [child for child in group if child.name.removeprefix(f"{name}-").isdecimal()]
            names = {child.name for child in running}
            for spec in wanted:
                if spec.name not in names:
                    await self._supervisor.add(self._on_free_gpus(name, spec), group)
            await asyncio.gather(*(self._supervisor.remove(child, group) for child in running[len(wanted) :]))

    def _on_free_gpus(self, name: str, spec: ChildSpec) -> ChildSpec:
        """Gives a new process GPUs that no running one has, if this machine has any.

        Raises:
            ConfigError: too few are free.
        """
        children = [child for group in self._supervisor.groups for child in group]
        used = {number for child in children for number in child.spec.environment.get(VISIBLE, "").split(",")}
        free = [str(number) for number in range(self._gpus) if str(number) not in used]
        wanted = next(one.gpus for one in self._graph.components if one.key == name)
        if not wanted or not self._gpus:
            return spec
        if wanted > len(free):
            raise ConfigError(f"{spec.name} needs {wanted} GPUs, and {len(free)} of {self._gpus} are free")
        return spec._replace(environment={**spec.environment, VISIBLE: ",".join(free[:wanted])})

    async def stop(self) -> None:
        await self._supervisor.stop()


def main(argv: Sequence[str]) -> None:
    if not argv or argv[0].startswith("-"):
        argv = ["", *argv]
    path, arguments = argv[0], argv[1:]
    try:
        config = load(LocalConfig, "dynserve deploy local FILE", arguments)
        if not path:
            raise ConfigError("deploy local needs a FILE: dynserve deploy local FILE [options]")
        with contextlib.suppress(BrokenPipeError):
            run_process(partial(run, path, config), config.log_level)
    except ConfigError as error:
        exit_with(error)


if __name__ == "__main__":
    main(sys.argv[1:])
