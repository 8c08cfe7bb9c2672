"""What dynserve costs beside its peers, in one run on one machine: CPU per token and per request, time to first token, gaps.

    python benchmarks/vs_peers.py [--quick] [--peers dynserve dynamo sglang-router vllm-router] [--clients 1 32 128 512]

Peers come from PyPI into virtual environments of their own (`--envs DIR`, kept between runs): NVIDIA Dynamo's frontend and a
Python worker on etcd and NATS; SGLang's and vLLM's routers as proxies before a stub. All are up together and take turns at the
same closed loop of raw connections, with an engine that costs nothing: tokens of a shared 5 ms grid, or at once. CPU
seconds are each process's own,
from /proc, so the load's cost is in none of them. A proxy renders nothing and knows no tokens; it is beside dynserve's frontend
only. Linux only.
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
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import load
from budget import Row, machine, report
from plane import cluster, cpu_seconds, resident

from dynserve.config import TINY_MODEL
from dynserve.local.embedded import etcd_command, free_ports, nats_command

TOKENS = 128  # per streamed answer
MODEL = TINY_MODEL.name
SHORT, LONG = " ".join(f"word{i % 7}" for i in range(50)), " ".join(f"word{i % 7}" for i in range(4000))
DYNAMO = "1.6.1"
STREAMED, UNARY, LONG_UNARY = "streamed, 5 ms, 128 clients", "unary, 1 token, 32 clients", "unary, 8k tokens, 8 clients"
BOUNDS = {
    (STREAMED, "dynamo"): 0.25,
    (STREAMED, "sglang-router"): 1.0,
    (STREAMED, "vllm-router"): 1.0,
    (UNARY, "dynamo"): 0.5,
    (LONG_UNARY, "dynamo"): 1.0,
}
PACKAGES = {
    "dynamo": (
        [f"ai-dynamo=={DYNAMO}", f"ai-dynamo-runtime=={DYNAMO}"],
        "uvloop aiohttp msgspec prometheus-client pyzmq tqdm typing_extensions pydantic<=2.13.5 certifi packaging zstandard "
        "pyyaml",
    ),
    "sglang-router": (["sglang-router==0.3.2"], "setproctitle aiohttp orjson uvicorn fastapi requests"),
    "vllm-router": (["vllm-router==0.1.17"], "setproctitle aiohttp orjson uvicorn fastapi requests"),
}
DYNAMO_WORKER = """
import asyncio, sys, time
import uvloop
from dynamo.llm import ModelInput, ModelType, WorkerType, register_model
from dynamo.runtime import dynamo_worker

STEP = float(sys.argv[2])

class Engine:
    async def generate(self, request, context=None):
        count = request["stop_conditions"].get("max_tokens") or 16
        step = 0
        for i in range(count):
            if STEP:  # a timer may fire early: never twice in one step
                step = max(step + 1, int(time.monotonic() / STEP) + 1)
                await asyncio.sleep(max(0.0, step * STEP - time.monotonic()))
            yield {"token_ids": [300 + i % 500], **({"finish_reason": "length"} if i == count - 1 else {})}

@dynamo_worker()
async def worker(runtime):
    endpoint = runtime.endpoint("dynamo.backend.generate")
    kinds = ModelType.Chat | ModelType.Completions
    await register_model(ModelInput.Tokens, kinds, endpoint, sys.argv[1], sys.argv[3], kv_cache_block_size=32,
                         worker_type=WorkerType.Aggregated)
    await endpoint.serve_endpoint(Engine().generate)

uvloop.run(worker())
"""


class Peer(NamedTuple):
    port: int
    pids: dict[str, list[int]]  # front, worker, nats


class Case(NamedTuple):
    name: str
    clients: int
    step_ms: float
    stream: bool
    chat: bool = False
    prompt: str = SHORT


class Found(NamedTuple):
    front: float  # us per token, or per unary request
    worker: float
    nats: float
    rate: float  # tokens or requests per second
    ttft_ms: float
    late_ms: float  # 99th percentile of the gaps between two chunks, less the step
    rss_mb: float


def environment(name: str, root: Path) -> Path:
    """The folder of a peer's programs; made once."""
    folder = root / name
    if not (folder / ".made").exists():
        print(f"installing {name} into {folder}", file=sys.stderr, flush=True)
        alone, light = PACKAGES[name]
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(folder / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *light.split()], check=True)
        subprocess.run([*pip, "--no-deps", *alone], check=True)
        (folder / ".made").touch()
    return folder / "bin"


@contextlib.contextmanager
def dynserve(step_ms: float, programs: Path) -> Iterator[Peer]:
    program = [str(Path(__file__).parent / "zero.py"), str(step_ms)]
    with cluster(["prefill_and_decode"], {}, program=program) as setup:
        yield Peer(
            setup.port, {"front": setup.pids["frontend"], "worker": setup.pids["worker"], "nats": setup.pids["nats"]}
        )


@contextlib.contextmanager
def dynamo(step_ms: float, programs: Path) -> Iterator[Peer]:
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        etcd, other, nats, http = free_ports(4)
        environ = {
            "ETCD_ENDPOINTS": f"http://127.0.0.1:{etcd}",
            "NATS_SERVER": f"nats://127.0.0.1:{nats}",
            "DYN_LOG": "error",
        }
        worker = Path(folder) / "worker.py"
        worker.write_text(DYNAMO_WORKER)
        _start(stack, etcd_command(Path(folder) / "etcd", etcd, other))
        nats_pid = _start(stack, nats_command(nats))
        time.sleep(1.0)
        python = str(programs / "python")
        engine = _start(stack, [python, str(worker), str(TINY_MODEL), str(step_ms / 1000), MODEL], environ)
        front = _start(stack, [python, "-m", "dynamo.frontend", "--http-port", str(http)], environ)
        _wait_for(http, MODEL)
        yield Peer(http, {"front": [front], "worker": [engine], "nats": [nats_pid]})


def proxy(name: str, command: list[str]) -> object:
    @contextlib.contextmanager
    def opened(step_ms: float, programs: Path) -> Iterator[Peer]:
        with contextlib.ExitStack() as stack:
            stub, http, metrics = free_ports(3)
            engine = _start(stack, [sys.executable, __file__, "--stub", str(stub), "--step-ms", str(step_ms)])
            _wait_for(stub, MODEL)
            where = ["--host", "127.0.0.1", "--port", str(http), "--prometheus-port", str(metrics)]
            flags = [*where, "--worker-urls", f"http://127.0.0.1:{stub}", "--policy", "round_robin"]
            front = _start(stack, [str(programs / command[0]), *command[1:], *flags])
            _wait_for(http, MODEL)
            yield Peer(http, {"front": [front], "worker": [engine], "nats": []})

    return opened


OPENERS = {
    "dynserve": dynserve,
    "dynamo": dynamo,
    "sglang-router": proxy("sglang-router", ["sglang-router", "launch"]),
    "vllm-router": proxy("vllm-router", ["vllm-router"]),
}


def _start(stack: contextlib.ExitStack, command: list[str], environ: dict[str, str] | None = None) -> int:
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | (environ or {})
    )
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process.pid


def _wait_for(port: int, text: str, seconds: float = 90.0) -> None:
    """Until a completion is answered."""
    deadline = time.monotonic() + seconds
    body = json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 1}).encode()
    while True:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", body, {"content-type": "application/json"}
        )
        with contextlib.suppress(OSError, ValueError), urllib.request.urlopen(request, timeout=5) as answer:
            if answer.status == 200 and text.encode() in answer.read():
                return
        if time.monotonic() > deadline:
            raise SystemExit("a peer did not start")
        time.sleep(0.2)


def measured(peer: Peer, case: Case, seconds: float, warm_s: float) -> Found:
    ask = load.PlacementQuery(MODEL, case.prompt, TOKENS if case.stream else 1, case.stream, case.chat)
    load.run(peer.port, ask, case.clients, warm_s)
    before = {name: cpu_seconds(pids) for name, pids in peer.pids.items()}
    answered = load.run(peer.port, ask, case.clients, seconds)
    count = max(1, answered.tokens if case.stream else answered.requests)
    spent = {name: (cpu_seconds(pids) - before[name]) / count * 1e6 for name, pids in peer.pids.items()}
    late = load.at(answered.gaps_s, 0.99) * 1000 - case.step_ms if answered.gaps_s else 0.0
    rss = sum(resident(pid) for pid in peer.pids["front"])
    ttft = load.at(answered.first_s, 0.5) * 1000
    return Found(spent["front"], spent["worker"], spent["nats"], count / answered.seconds, ttft, late, rss)


def in_turn(peers: dict[str, Peer], case: Case, rounds: int, seconds: float) -> dict[str, Found]:
    """Medians of several short turns of each: a shared machine that is slower for a minute is so for all of them."""
    found: dict[str, list[Found]] = {name: [] for name in peers}
    for number in range(rounds):
        for name, peer in peers.items():
            found[name].append(measured(peer, case, seconds, 0.3 if number else 1.0))
    return {
        name: Found(*(statistics.median(column) for column in zip(*turns, strict=True)))
        for name, turns in found.items()
    }


def cases(clients: list[int], *, quick: bool) -> list[Case]:
    found = [Case(f"streamed, 5 ms, {n} clients", n, 5.0, True) for n in clients]
    found += [Case(UNARY, 32, 5.0 if quick else 0.0, False)]  # one start of each peer will do for a first look
    if not quick:
        found += [Case(f"streamed, 0 ms, {n} clients", n, 0.0, True) for n in clients]
        found += [
            Case("chat, streamed, 5 ms, 32 clients", 32, 5.0, True, chat=True),
            Case("unary, 1 token, 1 client", 1, 0.0, False),
            Case("unary, chat, 32 clients", 32, 0.0, False, chat=True),
            Case(LONG_UNARY, 8, 0.0, False, prompt=LONG),
        ]
    return sorted(found, key=lambda case: -case.step_ms)  # one start of a peer per step


async def stub(port: int, step: float) -> None:
    """What a proxy stands before: an engine that costs nothing, as an OpenAI server."""
    chunk = {"id": "x", "object": "text_completion", "created": 1, "model": MODEL}
    piece = json.dumps(chunk | {"choices": [{"index": 0, "text": " word", "finish_reason": None}]}).encode()
    event = b"data: " + piece + b"\n\n"
    framed = b"%x\r\n%b\r\n" % (len(event), event)
    end = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = head.split(b"content-length:")[1].split(b"\r\n")[0] if b"content-length:" in head else b"0"
                body = await reader.readexactly(int(length))
                asked = json.loads(body) if body else {}
                if not asked.get("stream"):
                    answer = piece if body else json.dumps({"data": [{"id": MODEL}], "status": "ok"}).encode()
                    writer.write(_head(b"application/json", b"content-length: %d" % len(answer)) + answer)
                    continue
                writer.write(_head(b"text/event-stream", b"transfer-encoding: chunked"))
                at = 0
                for _ in range(asked.get("max_tokens") or 16):
                    if step:  # a timer may fire early: never twice in one step
                        at = max(at + 1, int(time.monotonic() / step) + 1)
                        await asyncio.sleep(max(0.0, at * step - time.monotonic()))
                    writer.write(framed)
                    await writer.drain()
                writer.write(end)

    server = await asyncio.start_server(serve, "127.0.0.1", port)
    await server.serve_forever()


def _head(kind: bytes, size: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\n%b\r\n\r\n" % (kind, size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="few cases, short: some minutes with the installations")
    parser.add_argument("--peers", nargs="+", default=list(OPENERS), choices=list(OPENERS))
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 32, 128, 512])
    parser.add_argument(
        "--envs", default=str(Path.home() / ".cache" / "dynserve-peers"), help="where peers are installed"
    )
    parser.add_argument("--stub", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--step-ms", type=float, default=0.0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stub:
        import uvloop

        uvloop.run(stub(args.stub, args.step_ms / 1000))
        return
    rounds, seconds = (2, 1.0) if args.quick else (3, 1.5)
    print(f"{TOKENS} tokens per stream, {machine()}\n")
    print(
        f"{'':<34} {'':<14} {'front us':>9} {'worker us':>9} {'nats us':>8} {'per s':>9} {'TTFT ms':>8} {'late ms':>8} {'MB':>5}"
    )
    table: dict[tuple[str, str], Found] = {}
    every = cases([1, 128] if args.quick else args.clients, quick=args.quick)
    programs = {name: environment(name, Path(args.envs)) if name in PACKAGES else Path() for name in args.peers}
    for step_ms in dict.fromkeys(case.step_ms for case in every):
        with contextlib.ExitStack() as stack:
            peers = {name: stack.enter_context(OPENERS[name](step_ms, programs[name])) for name in args.peers}  # type: ignore[operator]
            for case in every:
                if case.step_ms == step_ms:
                    for name, found in in_turn(peers, case, rounds, seconds).items():
                        table[case.name, name] = found
                        print(
                            f"{case.name:<34} {name:<14} {found.front:9.1f} {found.worker:9.1f} {found.nats:8.1f} "
                            f"{found.rate:9,.0f} {found.ttft_ms:8.2f} {found.late_ms:8.2f} {found.rss_mb:5.0f}", flush=True,
                        )  # fmt: skip
    _compare(every, table)


def _compare(every: list[Case], table: dict[tuple[str, str], Found]) -> None:
    """dynserve's part of each peer's CPU."""
    print("\ndynserve / peer: frontend alone, and the whole plane (frontend, worker, NATS)")
    rows = []
    for case in every:
        ours = table.get((case.name, "dynserve"))
        for (name, peer), theirs in table.items():
            if ours is None or name != case.name or peer == "dynserve":
                continue
            front, whole = ours.front / max(theirs.front, 1e-9), sum(ours[:3]) / max(sum(theirs[:3]), 1e-9)
            print(
                f"{case.name:<34} {peer:<14} front {front:5.2f}" + (f"  plane {whole:5.2f}" if peer == "dynamo" else "")
            )
            if (bound := BOUNDS.get((case.name, peer))) is not None:
                rows.append(Row(f"frontend's CPU / {peer}'s: {name}", front, bound))
                if case.stream and peer == "dynamo":
                    rows.append(Row(f"plane's CPU / {peer}'s: {name}", whole, bound))
    report(rows)


if __name__ == "__main__":
    main()
