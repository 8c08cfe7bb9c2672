"""How long until dynserve is there: the import, a frontend, a worker with the tiny model. Planes are up before.

python benchmarks/startup.py
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from budget import Row, report

from dynserve.local.embedded import etcd_command, free_ports, nats_command

RUNS = 5
BUDGETS = {"import dynserve": 0.3, "frontend ready": 1.0, "tiny worker ready": 3.0}


@contextlib.contextmanager
def process(command: list[str]) -> Iterator[None]:
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        running.terminate()
        running.wait()


def health(port: int) -> dict[str, object] | None:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/health")
    try:
        with urllib.request.urlopen(request, timeout=1) as response:
            found: dict[str, object] = json.load(response)
            return found
    except urllib.error.HTTPError as error:
        return dict(json.load(error))
    except (OSError, ValueError):
        return None


def wait(port: int, *, healthy: bool) -> float:
    began = time.perf_counter()
    while time.perf_counter() - began < 60:
        found = health(port)
        if found is not None and (not healthy or found["status"] == "healthy"):
            return time.perf_counter() - began
        time.sleep(0.005)
    raise SystemExit("not ready within 60 s")


def once() -> dict[str, float]:
    times: dict[str, float] = {}
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    bare = time.perf_counter() - began
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import dynserve"], check=True)
    times["import dynserve"] = max(0.0, time.perf_counter() - began - bare)
    etcd, peer, nats, http = free_ports(4)
    planes = ["--etcd-url", f"http://127.0.0.1:{etcd}", "--nats-url", f"nats://127.0.0.1:{nats}"]
    with (
        tempfile.TemporaryDirectory() as folder,
        process(etcd_command(Path(folder) / "etcd", etcd, peer)),
        process(nats_command(nats)),
    ):
        time.sleep(2)
        with process([sys.executable, "-m", "dynserve.frontend", *planes, "--http-port", str(http)]):
            times["frontend ready"] = wait(http, healthy=False)
            with process([sys.executable, "-m", "dynserve.worker", *planes]):
                times["tiny worker ready"] = wait(http, healthy=True)
    return times


def main() -> None:
    runs = [once() for _ in range(RUNS)]
    rows = []
    for what, budget in BUDGETS.items():
        times = sorted(run[what] for run in runs)
        print(f"{what:<20} median {times[RUNS // 2]:.2f} s, worst {times[-1]:.2f} s")
        rows.append(Row(f"{what}, s", times[RUNS // 2], budget))
    report(rows)


if __name__ == "__main__":
    main()
