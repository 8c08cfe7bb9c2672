"""Real servers, once per session; and a helper that runs dynserve's own processes as a user would."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from dynserve import log_limit
from dynserve.config import TINY_MODEL
from dynserve.local.embedded import etcd_command, free_ports, nats_command
from dynserve.wire.requests import GenerateRequest, RenderOptions, SamplingParams, StopConditions, pack_tokens
from tests.certificates import Authority

os.environ.setdefault("GRPC_VERBOSITY", "NONE")
MODEL = TINY_MODEL.name


@pytest.fixture(autouse=True)
def _every_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns the limit of repeated log lines off: the lines of one test must not suppress those of the next."""
    monkeypatch.setattr(log_limit, "EVERY", 0.0)


class Process:
    """A child process whose output goes to a file."""

    def __init__(self, command: list[str], log: Path, env: dict[str, str] | None = None) -> None:
        self.log = log
        with log.open("ab") as out:
            self._popen = subprocess.Popen(
                command, stdout=out, stderr=out, start_new_session=True, env=os.environ | (env or {})
            )
        self.pid = self._popen.pid

    def alive(self) -> bool:
        return self._popen.poll() is None

    def kill(self, number: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._popen.send_signal(number)

    def wait(self, timeout: float = 60) -> int:
        """Returns the exit code. The timeout allows for a machine that is busy with other tests and is no requirement."""
        try:
            return self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it still runs after {timeout:.0f} s:\n{self.output()}") from None

    def output(self) -> str:
        return self.log.read_text(errors="replace")


def wait_for_port(port: int, seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.5):
            return
        assert time.monotonic() < deadline, f"nothing listens on {port}"
        time.sleep(0.02)


class Server:
    """etcd or nats-server, to be started, killed and started again on the same port."""

    def __init__(self, name: str, folder: Path) -> None:
        self.port, peer = free_ports(2)
        self.url = f"http://127.0.0.1:{self.port}" if name == "etcd" else f"nats://127.0.0.1:{self.port}"
        self._command = etcd_command(folder / "etcd", self.port, peer) if name == "etcd" else nats_command(self.port)
        self._log = folder / f"{name}.log"
        self._process: Process | None = None

    def start(self) -> None:
        self._process = Process(self._command, self._log)
        wait_for_port(self.port)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The authority of the cluster's certificates."""
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """URLs of one etcd and one NATS that all tests share; tests keep apart by namespace."""
    folder = tmp_path_factory.mktemp("servers")
    etcd, nats = Server("etcd", folder), Server("nats", folder)
    etcd.start()
    nats.start()
    yield etcd.url, nats.url
    etcd.kill()
    nats.kill()


@pytest.fixture(scope="session")
def secured(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """URLs of an etcd and a NATS that ask for certificates of the cluster."""
    folder = tmp_path_factory.mktemp("secured")
    etcd, nats = Server("etcd", folder), Server("nats", folder)
    etcd._command = [word.replace("http:", "https:") if f":{etcd.port}" in word else word for word in etcd._command]
    etcd._command += ["--cert-file", authority.certificate, "--key-file", authority.key]
    etcd._command += ["--client-cert-auth", "--trusted-ca-file", authority.ca]
    nats._command += ["--tls", "--tlscert", authority.certificate, "--tlskey", authority.key]
    nats._command += ["--tlsverify", "--tlscacert", authority.ca]
    etcd.start()
    nats.start()
    yield etcd.url.replace("http:", "https:"), nats.url.replace("nats:", "tls:")
    etcd.kill()
    nats.kill()


class Deployment:
    """A frontend and workers as real processes."""

    def __init__(self, folder: Path, etcd_url: str, nats_url: str, namespace: str) -> None:
        self._folder, self._count = folder, 0
        (self.port,) = free_ports(1)
        self.base = f"http://127.0.0.1:{self.port}"
        self.planes = ["--etcd-url", etcd_url, "--nats-url", nats_url, "--namespace", namespace]
        self.processes: list[Process] = []
        self.env: dict[str, str] = {}  # beside the test's own

    def run(self, module: str, *flags: str) -> Process:
        self._count += 1
        log = self._folder / f"{module}-{self._count}.log"
        process = Process([sys.executable, "-m", f"dynserve.{module}", *self.planes, *flags], log, self.env)
        self.processes.append(process)
        return process

    def frontend(self, *flags: str) -> Process:
        return self.run("frontend", "--http-port", str(self.port), *flags)

    def worker(self, role: str, *flags: str, engine: dict[str, Any] | None = None) -> Process:
        if engine:
            flags = (*flags, "--override-engine-args", json.dumps(engine))
        return self.run("worker", "--disaggregation-mode", role, *flags)

    def health(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = httpx.get(f"{self.base}/health", timeout=2, trust_env=False).json()
        except httpx.HTTPError:
            return {"instances": []}
        return found

    def wait_for(self, workers: int, seconds: float = 60) -> list[dict[str, Any]]:
        deadline = time.monotonic() + seconds
        while True:
            ready = [i for i in self.health()["instances"] if i["state"] == "ready"]
            if len(ready) == workers:
                return ready
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"{len(ready)} of {workers} workers\n" + "\n".join(p.output() for p in self.processes)
                )
            time.sleep(0.05)

    def worker_health(self) -> list[dict[str, Any]]:
        return [
            httpx.get(f"{i['address']}/health", timeout=5, trust_env=False).json() for i in self.health()["instances"]
        ]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()


@pytest.fixture(scope="session")
def deploy(servers: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """`deploy()` gives an empty deployment in a namespace of its own; everything is killed at the end."""
    made: list[Deployment] = []

    def make(etcd_url: str = "", nats_url: str = "") -> Deployment:
        name = f"test{len(made)}"
        deployment = Deployment(tmp_path_factory.mktemp(name), etcd_url or servers[0], nats_url or servers[1], name)
        made.append(deployment)
        return deployment

    yield make
    for deployment in made:
        deployment.stop()


DOUBLES = Path(__file__).parent / "doubles"


@pytest.fixture
def trtllm_double(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes the double of tensorrt_llm importable; its engine is a thread of this process."""
    monkeypatch.syspath_prepend(str(DOUBLES))
    monkeypatch.setenv("TLLM_WORKER_USE_SINGLE_PROCESS", "1")
    for name in ("TRITON_LIBCUDA_PATH", "LC_ALL", "HF_HUB_OFFLINE"):  # what the executor sets
        monkeypatch.setenv(name, os.environ.get(name, ""))
    yield
    for llm in getattr(sys.modules.get("tensorrt_llm.llmapi.llm"), "MADE", []):
        atexit.unregister(llm.shutdown)
        llm._executor.join()
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorrt_llm"]:
        del sys.modules[name]


@pytest.fixture(scope="session")
def disaggregated(deploy: Any) -> Deployment:
    """The standard cluster, shared by tests that leave it as they found it: 2 prefill, 2 decode, torch, tiny model."""
    deployment: Deployment = deploy()
    deployment.frontend()
    for role in ("prefill", "prefill", "decode", "decode"):
        deployment.worker(role)
    deployment.wait_for(4)
    return deployment


def make_request(token_ids: list[int], **changes: Any) -> GenerateRequest:
    """A greedy request for eight tokens, unless `changes` say otherwise."""
    sampling = changes.pop("sampling", SamplingParams(temperature=0.0))
    stop = changes.pop("stop", StopConditions(max_tokens=8, ignore_eos=True))
    render = RenderOptions(kind="completion", response_id="r", model=MODEL, created=0)
    fields: dict[str, Any] = {
        "id": "request", "stream": 1, "reply_to": "nobody", "model": MODEL, "phase": "aggregated", "timeout_s": 10.0,
    }  # fmt: skip
    return GenerateRequest(
        prompt=pack_tokens(token_ids), sampling=sampling, stop=stop, render=render, **(fields | changes)
    )


@contextlib.contextmanager
def reference_cycles(*kinds: type) -> Iterator[list[object]]:
    """Yields a list that is filled at the end with objects of these kinds that became garbage in reference cycles."""
    cyclic: list[object] = []
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield cyclic
        gc.collect()
        cyclic += [kept for kept in gc.garbage if isinstance(kept, kinds)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


async def until(condition: Any, seconds: float = 10) -> None:
    """Polls a condition that has no event; fails with the test's own line."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)
