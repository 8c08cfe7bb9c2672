"""The cluster of `drills.py`: real processes, and a proxy that cuts links.

The children die with the process that started them, however it ends (Linux only).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

from dynserve.local.embedded import etcd_command, free_ports, nats_command

HOST = "127.0.0.1"
ROLES = ("prefill", "prefill", "decode", "decode")
BATCH = 16  # sequences per step of a worker: two decode workers have room for 32 answers
START = 60.0  # seconds that a process may need to start, on a busy machine
HELD = 5.0  # seconds after the last answer until nothing may be held any more
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


# processes


class Process:
    """A child process. Its output is appended to a file."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        with log.open("ab") as out:
            # between fork and exec only the C library is called
            self._popen = subprocess.Popen(command, stdout=out, stderr=out, preexec_fn=_die_with_parent)
        self.pid = self._popen.pid

    def signal(self, number: int) -> None:
        self._popen.send_signal(number)  # which does nothing when the process has ended

    async def ended(self, seconds: float) -> int | None:
        """Returns the exit code, or None if the process still runs after `seconds`."""
        deadline = time.monotonic() + seconds
        while (code := self._popen.poll()) is None and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        return code

    async def kill(self) -> None:
        """Kills the process, also a stopped one, and waits for its end."""
        self._popen.kill()
        await self.ended(START)


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Server:
    """etcd or nats-server, which can be killed and started again on the same port."""

    def __init__(self, name: str, folder: Path) -> None:
        self._name, self._folder, self._lives = name, folder, 0
        self.port, self._peer_port = free_ports(2)
        self._process: Process | None = None

    @property
    def url(self) -> str:
        return f"{'http' if self._name == 'etcd' else 'nats'}://{HOST}:{self.port}"

    async def start(self, *, empty: bool = False) -> None:
        """Starts the server: with its earlier data, or `empty`."""
        self._lives += empty
        data = self._folder / f"etcd-{self._lives}"
        etcd = self._name == "etcd"
        command = etcd_command(data, self.port, self._peer_port) if etcd else nats_command(self.port)
        self._process = Process(command, self._folder / f"{self._name}.log")
        await until(lambda: _listens(self.port), START, f"{self._name} does not listen")

    async def kill(self) -> None:
        if self._process is not None:
            await self._process.kill()

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.signal(number)


class WorkerProcess(Process):
    """A worker, with the port of its system server."""

    def __init__(self, role: str, command: Sequence[str], log: Path) -> None:
        self.role = role
        (self.system_port,) = free_ports(1)
        super().__init__([*command, "--disaggregation-mode", role, "--system-port", str(self.system_port)], log)


class Setup(NamedTuple):
    """The kind of cluster that a drill needs. Drills of equal setups share one cluster while it is healthy."""

    frontends: int = 1
    frontend_flags: tuple[str, ...] = ()
    worker_flags: tuple[str, ...] = ()
    num_blocks: int = 4096
    proxied: bool = False  # the workers' links go through a `LinkProxy`
    mortal_engines: bool = False  # SIGUSR1 ends a worker's engine (`drill_worker.py`)


class Cluster:
    """etcd, NATS, frontends on one port, and workers. `open` starts them and kills them at the end."""

    def __init__(self, setup: Setup, folder: Path) -> None:
        self.setup, self._folder = setup, folder
        self.etcd, self.nats = Server("etcd", folder), Server("nats", folder)
        self.port, link_port = free_ports(2)
        # children of a group count up from the first one; a rolling restart may need more than there are frontends
        self._system_ports = _ports_in_a_row(1 if setup.frontends == 1 else 2 * setup.frontends)
        self.proxy = LinkProxy(link_port) if setup.proxied else None
        self.frontend: Process | None = None
        self.workers: list[WorkerProcess] = []
        self._started = 0

    @staticmethod
    @asynccontextmanager
    async def open(setup: Setup, folder: Path) -> AsyncIterator[Cluster]:
        cluster = Cluster(setup, folder)
        try:
            await asyncio.gather(cluster.etcd.start(), cluster.nats.start())
            cluster.start_frontend()
            if cluster.proxy is not None:
                await cluster.proxy.start()
            for role in ROLES:
                cluster.start_worker(role)
            await cluster.ready()
            yield cluster
        finally:
            await cluster._kill()

    async def _kill(self) -> None:
        for child in (self.frontend, *self.workers, self.etcd, self.nats):
            if child is not None:
                await child.kill()
        if self.proxy is not None:
            await self.proxy.close()

    def _command(self, module: str) -> list[str]:
        what = ["-m", f"dynserve.{module}"]
        if module == "worker" and self.setup.mortal_engines:
            what = [str(Path(__file__).parent / "drill_worker.py")]
        return [sys.executable, *what, "--etcd-url", self.etcd.url, "--nats-url", self.nats.url]

    def _log(self, name: str) -> Path:
        self._started += 1
        return self._folder / f"{self._started:02d}-{name}.log"

    def start_frontend(self) -> None:
        """Starts the frontend, or the parent of several, on the cluster's ports."""
        ports = ["--http-port", str(self.port), "--system-port", str(self._system_ports[0])]
        several = ["--workers", str(self.setup.frontends)] if self.setup.frontends > 1 else []
        # Without local prefills each request is handed over, so that all workers and their connections take part.
        flags = ["--local-prefill-tokens", "0", *ports, *several, *self.setup.frontend_flags]
        flags += self.proxy.frontend_flags if self.proxy is not None else []
        self.frontend = Process([*self._command("frontend"), *flags], self._log("frontend"))

    def start_worker(self, role: str) -> WorkerProcess:
        """Starts one more worker."""
        engine = {"step_ms": 15, "max_batch_size": BATCH, "num_blocks": self.setup.num_blocks}
        flags = ["--executor", "simulated", "--override-engine-args", json.dumps(engine), *self.setup.worker_flags]
        worker = WorkerProcess(role, [*self._command("worker"), *flags], self._log(role))
        self.workers.append(worker)
        return worker

    async def replace(self, worker: WorkerProcess) -> None:
        """Starts a worker in place of one that has been killed or has ended."""
        await worker.kill()
        self.workers.remove(worker)
        self.start_worker(worker.role)

    def of(self, role: str) -> list[WorkerProcess]:
        return [worker for worker in self.workers if worker.role == role]

    def frontend_pids(self) -> set[int]:
        """The processes that serve the HTTP port."""
        assert self.frontend is not None
        if self.setup.frontends == 1:
            return {self.frontend.pid}
        children = Path(f"/proc/{self.frontend.pid}/task/{self.frontend.pid}/children").read_text()
        return {int(pid) for pid in children.split()}

    # health

    async def frontend_healths(self) -> list[dict[str, Any]]:
        """The `/health` of each frontend that answers."""
        found = await asyncio.gather(*(_get(port, "/health") for port in self._system_ports))
        return [json.loads(body) for body in found if body]

    async def prediction_ratios(self) -> list[float]:
        """Cached tokens of prompts, predicted by reported, as the frontends see it for each worker."""
        pages = await asyncio.gather(*(_get(port, "/metrics") for port in self._system_ports))
        lines = [line for page in pages for line in page.decode().splitlines()]
        return [float(line.split()[-1]) for line in lines if line.startswith("dynserve_cached_tokens_predicted_ratio{")]

    async def ready(self, seconds: float = START) -> None:
        """Returns when every frontend can place requests on all workers, and on no other."""

        async def complete() -> bool:
            pids = {worker.pid for worker in self.workers}
            healths = await self.frontend_healths()
            ready = [{i["pid"] for i in health["instances"] if i["state"] == "ready"} for health in healths]
            return len(ready) == self.setup.frontends and all(found == pids for found in ready)

        await until(complete, seconds, "the workers are not ready")

    async def held(self) -> str:
        """Returns an empty text as soon as nothing is held any more; after `HELD` seconds, what still is."""
        found = ""

        async def nothing() -> bool:
            nonlocal found
            found = "; ".join([*await self._held_by_workers(), *await self._held_by_frontends()])
            return not found

        with contextlib.suppress(TimeoutError):
            await until(nothing, HELD, "held")
        return found

    async def _held_by_workers(self) -> list[str]:
        found = []
        for worker in self.workers:
            if not (body := await _get(worker.system_port, "/health")):
                found.append(f"a {worker.role} worker does not answer")
                continue
            health = json.loads(body)
            load, requests = health["load"], Counter(health["requests"])
            held = {name: load[name] for name in ("running", "waiting", "open_handoffs")}
            held["blocks"] = load["total_blocks"] - load["free_blocks"]
            held["uncounted requests"] = requests["accepted"] - sum(map(requests.get, _ENDS, (0, 0, 0)))
            found += [f"{health['id']}: {name} {value}" for name, value in held.items() if value]
        return found

    async def _held_by_frontends(self) -> list[str]:
        found = []
        for health in await self.frontend_healths():
            for instance in health["instances"]:
                found += [f"frontend: {instance['id']} {name} {n}" for name, n in instance["placed"].items() if n]
            found += [f"frontend: queued {length}" for length in health["queued"].values() if length]
        pages = await asyncio.gather(*(_get(port, "/metrics") for port in self._system_ports))
        for page in filter(None, pages):
            accepted, ended = (
                _sum(page, "dynserve_requests_accepted_total"),
                _sum(page, "dynserve_requests_ended_total"),
            )
            found += [f"frontend: accepted {accepted}, ended {ended}"] if accepted != ended else []
        return found or ([] if any(pages) else ["no frontend answers"])


_ENDS = ("finished", "failed", "cancelled")


def _sum(page: bytes, name: str) -> int:
    """The sum of all values of a metric."""
    lines = page.decode().splitlines()
    return int(sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{")))


async def until(condition: Callable[[], bool | Awaitable[bool]], seconds: float, what: str) -> None:
    """Polls a condition. Raises TimeoutError with `what` when it is still false after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found if isinstance(found, bool) else await found:
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} after {seconds:.0f} s")
        await asyncio.sleep(0.05)


def _listens(port: int, host: str = HOST) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), 0.5):
        return True
    return False


def _ports_in_a_row(count: int) -> list[int]:
    while True:
        (first,) = free_ports(1)
        with contextlib.suppress(OSError):
            for port in range(first + 1, first + count):
                socket.create_server((HOST, port)).close()
            return list(range(first, first + count))


async def _get(port: int, path: str) -> bytes:
    """The body of a GET; empty if the server does not answer within two seconds."""
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(2):
            reader, writer = await asyncio.open_connection(HOST, port)
            try:
                writer.write(f"GET {path} HTTP/1.1\r\nhost: {HOST}\r\nconnection: close\r\n\r\n".encode())
                return (await reader.read(-1)).partition(b"\r\n\r\n")[2]
            finally:
                writer.close()
    return b""


# links


class LinkProxy:
    """A TCP proxy for the links between the workers and one frontend, which can reset or stall those of one worker.

    The frontend listens on `::`, which asyncio binds for IPv6 only, and advertises 127.0.0.1. There, at the same port, the
    proxy listens on IPv4.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self.frontend_flags = ["--link-host", "::", "--link-port", str(port), "--advertise-host", HOST]
        self._server: asyncio.Server | None = None
        self._open: dict[asyncio.StreamWriter, bytes] = {}  # both ends, with the worker's hello, which has its id
        self._stalled = b""  # the id of the worker whose bytes are held back
        self._flowing = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Waits for the frontend, which does not start if its port is in use for IPv4, and listens."""
        await until(lambda: _listens(self._port, "::1"), START, "the frontend does not listen for links")
        self._server = await asyncio.start_server(self._accepted, HOST, self._port)

    async def close(self) -> None:
        """Ends all connections. To be called when both sides are gone."""
        if self._server is not None:
            self._server.close()
        for writer in list(self._open):
            writer.transport.abort()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def reset(self, worker_id: str) -> None:
        """Resets the connections of a worker, to both sides. It may connect again at once."""
        for writer in [writer for writer, hello in self._open.items() if worker_id.encode() in hello]:
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    @asynccontextmanager
    async def stalled(self, worker_id: str) -> AsyncIterator[None]:
        """Holds back all bytes of a worker while the block is open, and the ends of its connections."""
        self._stalled = worker_id.encode()
        self._flowing.clear()
        try:
            yield
        finally:
            self._stalled = b""
            self._flowing.set()

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            with contextlib.suppress(OSError):
                hello = await reader.read(1 << 16)
                frontend_reader, frontend_writer = await asyncio.open_connection("::1", self._port)
                self._open |= {writer: hello, frontend_writer: hello}
                frontend_writer.write(hello)
                await asyncio.gather(
                    self._pump(reader, frontend_writer, hello), self._pump(frontend_reader, writer, hello)
                )
        finally:
            writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, hello: bytes) -> None:
        try:
            with contextlib.suppress(OSError):
                while data := await reader.read(1 << 16):
                    await self._passable(hello)
                    writer.write(data)
                    await writer.drain()
            await self._passable(hello)
        finally:
            self._open.pop(writer, None)
            writer.close()

    async def _passable(self, hello: bytes) -> None:
        while self._stalled and self._stalled in hello:
            await self._flowing.wait()
