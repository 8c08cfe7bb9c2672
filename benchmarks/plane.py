"""What the planes cost: CPU per streamed token and per request of frontend, worker and NATS, and added time to first token.

    python benchmarks/plane.py [--quick]

Real processes and servers, a raw asyncio client, the simulated executor. CPU seconds are the processes' own (user and
system, from /proc), so the client's cost is in none of them; the worker's row includes the simulated engine's own
scheduling. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dynserve.config import TINY_MODEL
from dynserve.local.embedded import etcd_command, free_ports, nats_command

TOKENS = 128  # per streamed answer
PROMPT = " ".join(f"word{i % 7}" for i in range(50))
TICK = os.sysconf("SC_CLK_TCK")
BUDGETS = {"frontend us/token": 8.0, "worker us/token": 12.0, "frontend us/request": 350.0, "TTFT p50 ms": 2.0}


class Setup(NamedTuple):
    port: int
    pids: dict[str, list[int]]


@contextlib.contextmanager
def cluster(
    workers: list[str], engine: dict[str, Any], executor: str = "simulated", frontend_flags: Sequence[str] = (),
    worker_flags: Sequence[str] = (),
) -> Iterator[Setup]:  # fmt: skip
    """etcd, NATS, a frontend and workers in these roles; all gone at the end."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        etcd, peer, nats, http = free_ports(4)

        def start(command: list[str]) -> int:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process.pid

        planes = [
            "--etcd-url",
            f"http://127.0.0.1:{etcd}",
            "--nats-url",
            f"nats://127.0.0.1:{nats}",
            "--log-level",
            "warning",
        ]
        start(etcd_command(Path(folder) / "etcd", etcd, peer))
        nats_pid = start(nats_command(nats))
        frontend = start(
            [sys.executable, "-m", "dynserve.frontend", *planes, "--http-port", str(http), *frontend_flags]
        )
        options = ["--executor", executor, "--override-engine-args", json.dumps(engine), *worker_flags]
        pids = [
            start([sys.executable, "-m", "dynserve.worker", *planes, *options, "--disaggregation-mode", role])
            for role in workers
        ]
        deadline = time.monotonic() + 60
        while len(_instances(http)) < len(workers):
            if time.monotonic() > deadline:
                raise SystemExit("the cluster did not start")
            time.sleep(0.1)
        yield Setup(http, {"frontend": [frontend], "worker": pids, "nats": [nats_pid]})


def _instances(port: int) -> list[Any]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as response:
            return [i for i in json.load(response)["instances"] if i["state"] == "ready"]
    except (OSError, ValueError):
        return []


def cpu_seconds(pids: list[int]) -> float:
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICK


def request_bytes(max_tokens: int, *, stream: bool) -> bytes:
    body = json.dumps(
        {"model": TINY_MODEL.name, "prompt": PROMPT, "max_tokens": max_tokens, "ignore_eos": True, "stream": stream}
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


class Client:
    """One connection, one request at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @staticmethod
    async def open(port: int) -> Client:
        return Client(*await asyncio.open_connection("127.0.0.1", port))

    async def stream(self, request: bytes) -> tuple[float, int]:
        """Seconds to the first chunk of the body, and chunks with data."""
        began = time.perf_counter()
        self._writer.write(request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in head.split(b"\r\n", 1)[0]:
            raise SystemExit(f"not a 200: {head!r}")
        first, seen, tail = 0.0, 0, b""
        while not tail.endswith(b"0\r\n\r\n"):
            data = await self._reader.read(1 << 16)
            if not data:
                raise SystemExit("the stream broke")
            first = first or time.perf_counter() - began
            seen += data.count(b"data: {")
            tail = (tail + data)[-8:]
        return first, seen

    async def unary(self, request: bytes) -> None:
        self._writer.write(request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        await self._reader.readexactly(length)

    def close(self) -> None:
        self._writer.close()


async def load(port: int, clients: int, seconds: float, max_tokens: int, *, stream: bool) -> int:
    """Closed loop: each client asks again when it is answered. Requests that ended in time."""
    request = request_bytes(max_tokens, stream=stream)
    stop = time.perf_counter() + seconds
    done = 0

    async def one() -> None:
        nonlocal done
        client = await Client.open(port)
        while time.perf_counter() < stop:
            await (client.stream(request) if stream else client.unary(request))
            done += 1
        client.close()

    await asyncio.gather(*(one() for _ in range(clients)))
    return done


async def measured(setup: Setup, clients: int, seconds: float, max_tokens: int, *, stream: bool) -> dict[str, float]:
    await load(setup.port, clients, 0.5, max_tokens, stream=stream)
    before = {name: cpu_seconds(pids) for name, pids in setup.pids.items()}
    began = time.perf_counter()
    requests = await load(setup.port, clients, seconds, max_tokens, stream=stream)
    wall = time.perf_counter() - began
    per = requests * (max_tokens if stream else 1)
    spent = {name: (cpu_seconds(pids) - before[name]) / per * 1e6 for name, pids in setup.pids.items()}
    return spent | {"per second": per / wall}


async def first_tokens(port: int, count: int) -> list[float]:
    client = await Client.open(port)
    request = request_bytes(2, stream=True)
    times = [(await client.stream(request))[0] * 1000 for _ in range(count + 20)]
    client.close()
    return times[20:]


def row(name: str, values: dict[str, float], unit: str) -> None:
    cells = "  ".join(f"{part} {values[part]:7.1f}" for part in ("frontend", "worker", "nats"))
    print(f"{name:<34} {cells}  us/{unit}   {values['per second']:>9,.0f} {unit}s/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="a tenth of the time, for a first look")
    quick = parser.parse_args().quick
    seconds, count = (1.0, 60) if quick else (8.0, 500)
    found: dict[str, float] = {}
    print(
        f"{TOKENS} tokens per stream, {len(PROMPT.split())} words of prompt, {os.cpu_count()} cores, Python {sys.version.split()[0]}\n"
    )
    for step_ms in (5.0, 0.0):
        engine = {"step_ms": step_ms, "prefill_us_per_token": 0, "decode_us_per_sequence": 0, "max_batch_size": 128}
        engine |= {"num_blocks": 20_000} | ({} if step_ms else {"speed": 0})
        with cluster(["prefill_and_decode"], engine) as setup:
            for clients in (1, 32, 128):
                values = asyncio.run(measured(setup, clients, seconds, TOKENS, stream=True))
                row(f"streamed, step {step_ms:.0f} ms, {clients} stream(s)", values, "token")
                if step_ms and clients == 128:
                    found |= {"frontend us/token": values["frontend"], "worker us/token": values["worker"]}
            if not step_ms:
                for clients in (1, 32):
                    values = asyncio.run(measured(setup, clients, seconds, 1, stream=False))
                    row(f"unary, 1 token, {clients} client(s)", values, "request")
                found["frontend us/request"] = values["frontend"]
    for name, roles in (("aggregated", ["prefill_and_decode"]), ("prefill + decode", ["prefill", "decode"])):
        with cluster(roles, {"speed": 0}) as setup:
            times = sorted(asyncio.run(first_tokens(setup.port, count)))
        p50, p99 = statistics.median(times), times[int(len(times) * 0.99)]
        print(f"added TTFT, one client, {name:<18} p50 {p50:.2f} ms, p99 {p99:.2f} ms", flush=True)
        found.setdefault("TTFT p50 ms", p50)
    print("\nbudget")
    for what, budget in BUDGETS.items():
        print(f"  {what:<22} {found[what]:8.2f}   budget {budget:6.1f}   {'pass' if found[what] <= budget else 'MISS'}")


if __name__ == "__main__":
    main()
