"""What the planes cost: CPU per streamed token and per request of frontend, worker and NATS, and added time to first token.

    python benchmarks/plane.py [--quick]

Real processes and servers, a raw asyncio client, the simulated executor. CPU seconds are the processes' own (user and
system, from /proc), so the client's cost is in none of them; the worker's row includes the simulated engine's own
scheduling. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import load
from budget import Row, machine, report
from load import PlacementQuery

from dynserve.config import TINY_MODEL
from dynserve.local.embedded import etcd_command, free_ports, nats_command

TOKENS = 128  # per streamed answer
PROMPT = " ".join(f"word{i % 7}" for i in range(50))
STEPS_ONLY = {"prefill_us_per_token": 0, "decode_us_per_sequence": 0, "decode_us_per_ktoken": 0}  # a simulated engine
TICK = os.sysconf("SC_CLK_TCK")
FRONTEND, WORKER = "frontend us/token, 128 streams, 5 ms steps", "worker us/token, the same"
REQUEST = "frontend us/request, unary, 32 clients"
BUDGETS = {
    FRONTEND: 8.0,
    WORKER: 12.0,
    REQUEST: 350.0,
    "added TTFT ms, aggregated, p50": 2.0,
    "added TTFT ms, aggregated, p99": 5.0,
    "added TTFT ms, prefill + decode, p50": 4.0,
}


class Setup(NamedTuple):
    port: int
    pids: dict[str, list[int]]


@contextlib.contextmanager
def cluster(
    workers: list[str], engine: dict[str, Any], executor: str = "simulated", frontend_flags: Sequence[str] = (),
    worker_flags: Sequence[str] = (), under: Mapping[str, list[str]] | None = None, patience: float = 60.0,
    program: Sequence[str] = ("-m", "dynserve.worker"),
) -> Iterator[Setup]:  # fmt: skip
    """etcd, NATS, a frontend and workers in these roles; all gone at the end. `under`: what a role's program runs under;
    `program`: the workers'."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        etcd, peer, nats, http = free_ports(4)
        wrapped = under or {}

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
        serve = [*wrapped.get("frontend", []), sys.executable, "-m", "dynserve.frontend", *planes]
        frontend = start([*serve, "--http-port", str(http), *frontend_flags])
        options = ["--executor", executor, "--override-engine-args", json.dumps(engine), *worker_flags]
        work = [*wrapped.get("worker", []), sys.executable, *program, *planes, *options]
        pids = [start([*work, "--disaggregation-mode", role]) for role in workers]
        deadline = time.monotonic() + patience
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


def resident(pid: int) -> float:
    """Megabytes."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def measured(setup: Setup, clients: int, seconds: float, max_tokens: int, *, stream: bool) -> dict[str, float]:
    ask = PlacementQuery(TINY_MODEL.name, PROMPT, max_tokens, stream)
    load.run(setup.port, ask, clients, 0.5)
    before = {name: cpu_seconds(pids) for name, pids in setup.pids.items()}
    answered = load.run(setup.port, ask, clients, seconds)
    per = answered.requests * (max_tokens if stream else 1)
    spent = {name: (cpu_seconds(pids) - before[name]) / per * 1e6 for name, pids in setup.pids.items()}
    return spent | {"per second": per / answered.seconds}


def row(name: str, values: dict[str, float], unit: str) -> None:
    cells = "  ".join(f"{part} {values[part]:7.1f}" for part in ("frontend", "worker", "nats"))
    print(f"{name:<34} {cells}  us/{unit}   {values['per second']:>9,.0f} {unit}s/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="a tenth of the time, for a first look")
    quick = parser.parse_args().quick
    seconds, ttft_seconds = (1.0, 0.5) if quick else (8.0, 3.0)
    found: dict[str, float] = {}
    print(f"{TOKENS} tokens per stream, {len(PROMPT.split())} words of prompt, {machine()}\n")
    for step_ms in (5.0, 0.0):
        engine = STEPS_ONLY | {"step_ms": step_ms, "max_batch_size": 128, "num_blocks": 20_000}
        engine |= {} if step_ms else {"speed": 0}
        with cluster(["prefill_and_decode"], engine) as setup:
            for clients in (1, 32, 128):
                values = measured(setup, clients, seconds, TOKENS, stream=True)
                row(f"streamed, step {step_ms:.0f} ms, {clients} stream(s)", values, "token")
                if step_ms and clients == 128:
                    found |= {FRONTEND: values["frontend"], WORKER: values["worker"]}
            if not step_ms:
                for clients in (1, 32):
                    values = measured(setup, clients, seconds, 1, stream=False)
                    row(f"unary, 1 token, {clients} client(s)", values, "request")
                found[REQUEST] = values["frontend"]
    for name, roles in (("aggregated", ["prefill_and_decode"]), ("prefill + decode", ["prefill", "decode"])):
        with cluster(roles, {"speed": 0}) as setup:
            ask = PlacementQuery(TINY_MODEL.name, PROMPT, 2)
            load.run(setup.port, ask, 1, 0.3)
            times = load.run(setup.port, ask, 1, ttft_seconds).first_s
        p50, p99 = load.at(times, 0.5) * 1000, load.at(times, 0.99) * 1000
        print(f"added TTFT, one client, {name:<18} p50 {p50:.2f} ms, p99 {p99:.2f} ms", flush=True)
        found |= {f"added TTFT ms, {name}, p50": p50, f"added TTFT ms, {name}, p99": p99}
    report([Row(what, found[what], bound) for what, bound in BUDGETS.items()])


if __name__ == "__main__":
    main()
