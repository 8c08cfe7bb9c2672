"""What mutual TLS between the processes costs: CPU per streamed token, added time to first token, and KV transfers.

    python benchmarks/tls.py [--rounds 3]

Rounds without and with TLS alternate, on the same machine; the medians are printed. Tokens are measured as by `plane.py`, whose
NATS and etcd have no TLS here: tokens go over links. A KV transfer is one hand-off of 64 MB from one process to another over
loopback, from host memory. Needs openssl. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path

import load
import msgspec
import uvloop
from budget import machine
from load import PlacementQuery
from plane import PROMPT, STEPS_ONLY, TOKENS, cluster, measured

from dynserve.config import TINY_MODEL
from dynserve.executors.handoff import HandoffTable
from dynserve.executors.transceiver import HostBlocks, TcpTransceivers
from dynserve.plane_tls import PlaneTls
from dynserve.wire.requests import GenerateRequest, Handoff, RenderOptions, SamplingParams, StopConditions, pack_tokens

SCRIPT = Path(__file__).parent.parent / "docker" / "scripts" / "plane-certificates.sh"
FILES = {"DYN_PLANE_TLS_CERTIFICATE": "tls.crt", "DYN_PLANE_TLS_KEY": "tls.key", "DYN_PLANE_TLS_CA": "ca.crt"}
BLOCK_BYTES, BLOCKS, TRANSFERS = 1 << 20, 64, 12
REQUEST = GenerateRequest(
    id="r", stream=1, reply_to="nobody", model="m", prompt=pack_tokens([1]), phase="aggregated",
    sampling=SamplingParams(), timeout_s=60.0, stop=StopConditions(max_tokens=1),
    render=RenderOptions(kind="completion", response_id="r", model="m", created=0),
)  # fmt: skip


class Memory(HostBlocks):
    def __init__(self) -> None:
        self.layout, self.block_bytes = "same", BLOCK_BYTES
        self._bytes = bytearray(os.urandom(BLOCK_BYTES)) * BLOCKS

    def view(self, block: int) -> memoryview:
        return memoryview(self._bytes)[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]


def planes(rounds_s: float) -> dict[str, float]:
    """Returns microseconds per token of frontend and worker, and milliseconds to the first token."""
    found: dict[str, float] = {}
    engine = STEPS_ONLY | {"step_ms": 5.0, "max_batch_size": 128, "num_blocks": 20_000}
    with cluster(["prefill_and_decode"], engine) as setup:
        for clients in (1, 128):
            values = measured(setup, clients, rounds_s, TOKENS, stream=True)
            for part in ("frontend", "worker"):
                found[f"{part}, us/token, {clients} stream(s)"] = values[part]
    with cluster(["prefill", "decode"], {"speed": 0}) as setup:
        ask = PlacementQuery(TINY_MODEL.name, PROMPT, 2)
        load.run(setup.port, ask, 1, 0.3)
        times = load.run(setup.port, ask, 1, 2.0).first_s
    found["added TTFT, prefill + decode, ms p50"] = load.at(times, 0.5) * 1000
    return found


def owner(tls: PlaneTls | None, pipe: Connection) -> None:
    async def run() -> None:
        table, memory = HandoffTable("owner", 600, lambda ticket, how: None), Memory()
        async with TcpTransceivers(tls=tls).open(table, memory, "127.0.0.1") as transceiver:
            for ticket in range(TRANSFERS):
                handoff = table.open(ticket, REQUEST, list(range(BLOCKS)), 0, transceiver.state())
                pipe.send(msgspec.msgpack.encode(handoff))
            await asyncio.to_thread(pipe.recv)

    uvloop.run(run())


def owner_of(files: Mapping[str, str], pipe: Connection) -> None:
    owner(PlaneTls(*(files[name] for name in FILES)) if files else None, pipe)


async def transfers(files: Mapping[str, str]) -> dict[str, float]:
    """Returns the rate of hand-offs in GB/s."""
    pipe, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=owner_of, args=(files, theirs))
    process.start()
    tls = PlaneTls(*(files[name] for name in FILES)) if files else None
    times = []
    table = HandoffTable("taker", 600, lambda ticket, how: None)
    async with TcpTransceivers(tls=tls).open(table, Memory(), "127.0.0.1") as transceiver:
        for _ in range(TRANSFERS):
            handoff = msgspec.msgpack.decode(await asyncio.to_thread(pipe.recv), type=Handoff)
            began = time.perf_counter()
            await transceiver.fetch(handoff, list(range(BLOCKS)), 0)
            times.append(time.perf_counter() - began)
    pipe.send(None)
    process.join()
    return {"KV transfer, GB/s": BLOCKS * BLOCK_BYTES / statistics.median(times[1:]) / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([SCRIPT, f"{folder}/planes"], check=True, stdout=subprocess.DEVNULL)
        files = {name: f"{folder}/planes/{file}" for name, file in FILES.items()}
        found: dict[bool, list[dict[str, float]]] = {False: [], True: []}
        for number in range(rounds):
            for secured in (False, True):
                os.environ.update(files if secured else dict.fromkeys(FILES, ""))
                found[secured].append(planes(5.0) | uvloop.run(transfers(files if secured else {})))
                print(f"round {number + 1} of {rounds}, {'with' if secured else 'without'} TLS", file=sys.stderr)
    print(f"{machine()}\n\n{'':<40} {'without':>9} {'with TLS':>9}")
    for name in found[False][0]:
        plain, secured_ = (statistics.median(one[name] for one in found[kind]) for kind in (False, True))
        print(f"{name:<40} {plain:>9.2f} {secured_:>9.2f}   {100 * (secured_ / plain - 1):+.0f} %")


if __name__ == "__main__":
    main()
