"""`dynserve up`: a whole cluster on this machine, and its supervisor.

All processes start at once: each one waits by itself for those that it needs. The same can be done by hand: `up` runs
`python -m dynserve.frontend` and `python -m dynserve.worker` with the flags that `ps` shows, and with NATS_URL and
ETCD_URL.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from dynserve.addresses import redacted
from dynserve.child import ChildSpec, Group, Supervisor
from dynserve.config import UpConfig, WorkerConfig, exit_with, load
from dynserve.errors import ConfigError
from dynserve.executors.engine_args import engine_args
from dynserve.frontend.keys import check_keys
from dynserve.hub import is_id, with_model_folder
from dynserve.local import trtllm
from dynserve.local.embedded import etcd_command, free_ports, nats_command
from dynserve.local.gpus import gpus
from dynserve.model_files import check_model_folder
from dynserve.process import StopSignal, run_process
from dynserve.server.serving import bind, tls_of
from dynserve.tasks import OwnedTasks, task_group

log = logging.getLogger("dynserve.up")

POLL = 0.1  # seconds
REPORT_EVERY = 2.0  # seconds between progress lines


class LaunchPlan(NamedTuple):
    servers: list[ChildSpec]
    frontend: ChildSpec
    workers: list[ChildSpec]
    etcd_url: str
    nats_url: str


async def run(config: UpConfig, stop: StopSignal) -> None:
    check(config)
    config = await with_model_folder(config)
    check_model_folder(Path(config.model_path))
    with tempfile.TemporaryDirectory(prefix="dynserve-") as folder:
        plan = make_plan(config, Path(folder))
        async with task_group() as tasks:
            cluster = _LocalCluster(config, plan, tasks)
            try:
                if shared := sum("--free-gpu-memory-fraction" in spec.command for spec in plan.workers):
                    print(f"there are fewer GPUs than workers: {shared} workers share a GPU with others", flush=True)
                await cluster.start()
                cluster.show()
                await stop.wait(cluster.broken)
                print("\nstopping: workers, frontend, servers", flush=True)
            finally:
                await cluster.stop()


def check(config: UpConfig) -> None:
    """Raises ConfigError, before any process is started, for options with which a child would fail at once."""
    if not is_id(config.model_path):
        check_model_folder(Path(config.model_path))
    if config.executor == "trtllm":
        trtllm.check(config)
    else:
        engine_args(
            WorkerConfig(extra_engine_args=config.extra_engine_args, override_engine_args=config.override_engine_args)
        )
    check_keys(config.api_keys_file)
    tls_of(config.tls_certificate, config.tls_key)
    bind(config.http_host, config.http_port, "--http-port").close()


def make_plan(config: UpConfig, folder: Path) -> LaunchPlan:
    etcd_port, peer_port, nats_port = free_ports(3)
    servers = []
    if config.etcd_url is None:
        servers.append(ChildSpec("etcd", etcd_command(folder / "etcd", etcd_port, peer_port)))
    if config.nats_url is None:
        servers.append(ChildSpec("nats", nats_command(nats_port)))
    etcd_url = config.etcd_url or f"http://127.0.0.1:{etcd_port}"
    nats_url = config.nats_url or f"nats://127.0.0.1:{nats_port}"
    common = ["--namespace", config.namespace, "--log-level", config.log_level]
    # not as flags: they may contain passwords. The system port of this process's environment would be that of all children.
    planes = {"NATS_URL": nats_url, "ETCD_URL": etcd_url, "DYN_SYSTEM_PORT": "0"}
    frontend = [
        sys.executable, "-m", "dynserve.frontend", *common, "--http-host", config.http_host,
        "--http-port", str(config.http_port), "--router-mode", config.router_mode,
    ]  # fmt: skip
    frontend += _handed_on(config, "api_keys_file", "tls_certificate", "tls_key", "allowed_hosts")
    worker = [sys.executable, "-m", "dynserve.worker", *common, "--model-path", config.model_path]
    worker += ["--executor", config.executor]
    worker += _handed_on(config, "served_model_name")
    roles = config.roles
    if config.executor == "trtllm":
        workers = [
            ChildSpec(name, [*worker, "--disaggregation-mode", role, *trtllm.flags(config, role)], planes | visible)
            for (name, role), visible in zip(roles, trtllm.visible_gpus(config), strict=True)
        ]
    else:
        available = gpus() if config.device != "cpu" and config.executor == "torch" else 0
        devices = spread(config.device, available, len(roles))
        options = _handed_on(config, "extra_engine_args", "override_engine_args")
        workers = [
            ChildSpec(name, [*worker, "--disaggregation-mode", role, *options, *device], planes)
            for (name, role), device in zip(roles, devices, strict=True)
        ]
    return LaunchPlan(servers, ChildSpec("frontend", frontend, planes), workers, etcd_url, nats_url)


def _handed_on(config: UpConfig, *names: str) -> list[str]:
    """Returns the flags of a child for those options of `up` that are set."""
    given = [(name, getattr(config, name)) for name in names if getattr(config, name) is not None]
    return [word for name, value in given for word in (f"--{name.replace('_', '-')}", value)]


def spread(device: str, gpus: int, workers: int) -> list[list[str]]:
    """Returns the flags that give each worker its own GPU, or a share of one if there are fewer GPUs than workers."""
    if not gpus:
        return [[] if device == "auto" else ["--device", device]] * workers
    sharing = [sum(other % gpus == number % gpus for other in range(workers)) for number in range(workers)]
    # each worker measures the free memory when it starts, while the others of its GPU are starting, too
    return [
        ["--device", f"cuda:{number % gpus}"]
        + (["--free-gpu-memory-fraction", f"{0.8 / share:.2f}"] if share > 1 else [])
        for number, share in enumerate(sharing)
    ]


class _LocalCluster:
    def __init__(self, config: UpConfig, plan: LaunchPlan, tasks: OwnedTasks) -> None:
        self._config, self._plan = config, plan
        # a server loses its data when it dies, so only workers and the frontend are started again
        self._supervisor = Supervisor(
            [Group(plan.servers, restart=False), Group([plan.frontend]), Group(plan.workers)], tasks
        )
        self.broken = self._supervisor.broken
        self._servers, (self._frontend,), self._workers = self._supervisor.groups
        self._began = time.monotonic()
        self._url = f"{'https' if config.tls_key else 'http'}://{config.http_host}:{config.http_port}"
        self._instances: list[dict[str, Any]] = []

    async def start(self) -> None:
        """Starts all processes, and returns when every worker can be routed to.

        Raises:
            ConfigError: the cluster was not ready within `start_limit_s`.
        """
        await self._supervisor.start()
        reported, last = 0.0, ""
        # not verified: the frontend is a child of this process, and its certificate may name another host
        async with httpx.AsyncClient(trust_env=False, timeout=1.0, verify=False) as client:
            while missing := await self._missing(client):
                if self.broken.done():
                    self.broken.result()
                waited = time.monotonic() - self._began
                if waited > self._config.start_limit_s:
                    raise ConfigError(
                        f"the cluster is not ready after --start-timeout-s {self._config.start_limit_s:.0f}: "
                        f"still waiting for {missing}"
                    )
                if missing != last or waited - reported >= REPORT_EVERY:
                    reported, last = waited, missing
                    print(f"waiting for {missing} ({waited:.1f} s)", flush=True)
                await asyncio.sleep(POLL)

    def show(self) -> None:
        elapsed = time.monotonic() - self._began
        print(f"\nready after {elapsed:.1f} s\n\n  {'process':<14} {'pid':>8}  {'role':<19} address")
        for child in self._servers:
            url = redacted(self._plan.etcd_url if child.name == "etcd" else self._plan.nats_url)
            print(f"  {child.name:<14} {child.pid or 0:>8}  {'server':<19} {url}")
        print(f"  {'frontend':<14} {self._frontend.pid or 0:>8}  {'frontend':<19} {self._url}")
        by_pid = {instance["pid"]: instance for instance in self._instances}
        for child in self._workers:
            instance = by_pid.get(child.pid, {})
            print(
                f"  {child.name:<14} {child.pid or 0:>8}  {instance.get('role', '?'):<19} {instance.get('address', '?')}"
            )
        model = self._instances[0]["model"]
        body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "What is 3+4?"}}]}}'
        print(f"\ntry it:\n  curl {self._url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'\n")
        print("Ctrl-C stops everything.", flush=True)

    async def stop(self) -> None:
        """Stops all processes: workers first, so that the frontend can still answer its clients; servers last."""
        await self._supervisor.stop()

    async def _missing(self, client: httpx.AsyncClient) -> str:
        """Returns the names of the processes that are not ready; empty when all are."""
        try:
            health = (await client.get(f"{self._url}/health")).json()
        except (httpx.HTTPError, ValueError):
            return "the frontend"
        self._instances = health["instances"]
        pids = {instance["pid"] for instance in self._instances if instance["state"] == "ready"}
        return ", ".join(child.name for child in self._workers if child.pid not in pids)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else argv
    try:
        config = load(UpConfig, "python -m dynserve up", arguments)
        with contextlib.suppress(BrokenPipeError):
            run_process(partial(run, config), "warning")
    except ConfigError as error:
        exit_with(error)
