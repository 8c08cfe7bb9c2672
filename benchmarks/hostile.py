"""What hostile clients and strangers on the planes cost everybody else.

    python benchmarks/hostile.py [--only NAME,NAME] [--seconds 6] [--package-path FOLDER]

A cluster of real processes (etcd, NATS, a frontend, a prefill and a decode worker with the tiny model) serves polite
clients: four that send a short request each second, and two streams. One attack after the other runs beside them, in a
process of its own, and the table says what the polite ones noticed: how long they waited, beside how long they wait when
nobody attacks, how many streams ended, which processes died, and what became of the memory. An attack passes when the
longest wait of the others is at most 0.1 s over the longest without it, no stream ends, nothing dies, and the memory
returns. `--package-path` measures another checkout's servers. All traffic stays on 127.0.0.1, and every attack is bounded
in time. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import aetcd
import httpx
import msgspec
import nats
import psutil
from budget import Row, machine, report

from dynserve.addresses import host_port
from dynserve.config import TINY_MODEL
from dynserve.local.embedded import etcd_command, free_ports, nats_command

MODEL = "tiny"
WARM = 7.0  # seconds before anything is measured
QUIET = 6.0  # seconds of polite clients alone
LONGER = 100.0  # milliseconds that others may wait longer
KEPT = (
    128.0  # megabytes that may stay: caches, which have bounds of their own (of compiled grammars 256 in each worker)
)
SURPLUS = "<surplus>"  # a token that the tokenizer has and the model has not
MB = 1 << 20
LIMIT = 8 * MB - 1000  # bytes: the largest body that is not refused for its size


class Target(NamedTuple):
    """Where everything listens."""

    http: int
    link: int
    etcd: str
    nats: str
    kv: list[int]


# the attacks


def body(**fields: Any) -> bytes:
    return json.dumps({"model": MODEL, "max_tokens": 4} | fields).encode()


def filled(field: str, item: bytes, size: int, around: tuple[bytes, bytes] = (b"[", b"]"), **fields: Any) -> bytes:
    """A body whose `field` repeats `item` up to `size` bytes."""
    start = body(**fields)[:-1] + b', "' + field.encode() + b'": ' + around[0]
    items = item + (b"," + item) * ((size - len(start) - len(around[1]) - 1) // (len(item) + 1) - 1)
    return start + items + around[1] + b"}"


def keyed(field: str, size: int, **fields: Any) -> bytes:
    """The same with an object of many keys."""
    start = body(**fields)[:-1] + b', "' + field.encode() + b'": {'
    items = b",".join(b'"%d":1' % number for number in range(size // 11))
    return start + items + b"}}"


CHAT = {"messages": [{"role": "user", "content": "x"}]}
LARGE: dict[str, tuple[str, Callable[[int], bytes]]] = {
    "token lists": ("completions", lambda size: filled("prompt", b"[1]", size)),
    "token ids": ("completions", lambda size: filled("prompt", b"1", size)),
    "texts": ("completions", lambda size: filled("prompt", b'"a"', size)),
    "choices": ("completions", lambda size: filled("guided_choice", b'"a"', size, prompt="x")),
    "unknown field": ("completions", lambda size: filled("nobody_knows", b"[]", size, prompt="x")),
    "metadata": ("completions", lambda size: keyed("metadata", size, prompt="x")),
    "logit_bias": ("completions", lambda size: keyed("logit_bias", size, prompt="x")),
    "stop ids": ("completions", lambda size: filled("stop_token_ids", b"7", size, prompt="x")),
    "schema": ("chat/completions", lambda size: filled(
        "response_format", b'{"type":"string"}', size,
        (b'{"type": "json_schema", "json_schema": {"schema": {"anyOf": [', b"]}}}"), **CHAT)),
    "messages": ("chat/completions", lambda size: filled("messages", b'{"role":"user","content":"x"}', size)),
    "parts": ("chat/completions", lambda size: filled(
        "messages", b'{"type":"text","text":"x"}', size, (b'[{"role": "user", "content": [', b"]}]"))),
    "calls": ("responses", lambda size: filled(
        "input", b'{"type":"function_call","call_id":"c","name":"f"}', size)),
    "tools": ("chat/completions", lambda size: filled(
        "tools", b"[]", size, (b'[{"type": "function", "function": {"name": "f", "parameters": {"x": [', b"]}}}]"), **CHAT)),
    "tool's description": ("chat/completions", lambda size: filled(
        "tools", b"word word word word word word word", size,
        (b'[{"type": "function", "function": {"name": "f", "description": "', b'"}}]'), **CHAT)),
    "escapes": ("chat/completions", lambda size: filled(
        "messages", b"\\u0041\\u0041\\u0041\\u0041", size, (b'[{"role": "user", "content": "', b'"}]'))),
    "a long text": ("chat/completions", lambda size: filled(
        "messages", b"some words of a text that no context can hold", size, (b'[{"role": "user", "content": "', b'"}]'))),
    "a long prompt": ("completions", lambda size: filled(
        "prompt", b"some words of a text that no context can hold", size, (b'"', b'"'))),
    "detokenize": ("../detokenize", lambda size: filled("tokens", b"7", size)),
}  # fmt: skip


async def post(target: Target, data: bytes, path: str = "completions", *, wait: bool = True) -> bytes:
    """The first line of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", target.http)
    head = f"POST /v1/{path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: close\r\n"
    if path.startswith("../"):
        head = head.replace("/v1/../", "/")
    writer.write(head.encode() + b"content-length: %d\r\n\r\n" % len(data) + data)
    answer = b""
    with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
        async with asyncio.timeout(30):
            await writer.drain()
            if wait:
                answer = await reader.readline()
                while await reader.read(1 << 16):
                    pass
    writer.transport.abort()
    return answer.strip()


async def poster(port: int) -> None:
    """For another program: a body is made for each line `name size` of standard input, and posted at the next line."""
    target = Target(port, 0, "", "", [])
    for line in sys.stdin:
        name, _, size = line.strip().rpartition(" ")
        path, make = LARGE[name]
        data = make(int(size)).replace(b'"model": "tiny"', b'"model": "tiny_model"')
        print("made", flush=True)
        sys.stdin.readline()
        answer = (await post(target, data, path)).decode().split()
        print(answer[1] if len(answer) > 1 else "?", flush=True)


async def repeated(until: float, attack: Callable[[], Awaitable[Any]], at_once: int = 2) -> None:
    async def one() -> None:
        while time.monotonic() < until:
            with contextlib.suppress(OSError, TimeoutError):
                print(await attack() or "", flush=True)

    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(max(0.0, until - time.monotonic()) + 5):
            await asyncio.gather(*(one() for _ in range(at_once)))


async def large(name: str, size: int, target: Target, until: float) -> None:
    path, make = LARGE[name]
    data = make(size)
    await repeated(until, lambda: post(target, data, path))


async def pipelines(target: Target, until: float) -> None:
    one = b"GET /live HTTP/1.1\r\nhost: localhost\r\n\r\n"

    async def attack() -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", target.http)
        writer.write(one * (240_000 // len(one)))
        await asyncio.sleep(0.5)
        writer.transport.abort()

    await repeated(until, attack, at_once=20)


async def unfinished(target: Target, until: float) -> None:
    writers = []
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 31000000\r\n\r\n"
    for _ in range(30):
        _, writer = await asyncio.open_connection("127.0.0.1", target.http)
        writer.write(head)
        writers.append(writer)
    for _ in range(28):
        for writer in writers:
            if not writer.is_closing():
                writer.write(b" " * 1_000_000)
        await asyncio.sleep(0.02)
    await asyncio.sleep(max(0.0, until - time.monotonic()))
    for writer in writers:
        writer.transport.abort()


async def leaving(target: Target, until: float) -> None:
    data = body(prompt=["one two three four"] * 512, max_tokens=200) + b" " * 200_000

    async def attack() -> None:
        await post(target, data, wait=False)
        await asyncio.sleep(1.0)

    await repeated(until, attack, at_once=1)


async def per_token(target: Target, until: float, **fields: Any) -> None:
    data = body(**({"prompt": "one two", "stream": True, "ignore_eos": True, "max_tokens": 400} | fields))
    await repeated(until, lambda: post(target, data), at_once=6)


async def grammars(target: Target, until: float) -> None:
    numbers = iter(range(100_000))

    async def attack() -> bytes:
        properties = {f"p{next(numbers)}": {"type": "string"} for _ in range(60)}
        schema = {"type": "object", "properties": properties}
        form = {"type": "json_schema", "json_schema": {"schema": schema}}
        return await post(target, body(response_format=form, **CHAT), "chat/completions")

    await repeated(until, attack, at_once=4)


async def slow_grammars(target: Target, until: float) -> None:
    numbers = iter(range(100_000))

    async def attack() -> bytes:
        heavy = f"(([a-z]{{0,400}}x){{0,400}}y){{0,50}}{next(numbers)}"
        return await post(target, body(prompt="x", guided_regex=heavy))

    await repeated(until, attack, at_once=8)


async def surplus(target: Target, until: float) -> None:
    data = body(prompt=f"{SURPLUS} {SURPLUS}")
    await repeated(until, lambda: post(target, data))


async def upgrades(target: Target, until: float) -> None:
    smuggled = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\nupgrade: websocket\r\n"

    async def attack() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", target.http)
        writer.write(head + b"content-length: %d\r\n\r\n" % len(smuggled))
        await asyncio.sleep(0.01)
        writer.write(smuggled)
        answer = await asyncio.wait_for(reader.read(1 << 16), 5)
        if b'"instances"' in answer:
            print("SMUGGLED: a body was answered as a request", flush=True)
        writer.transport.abort()

    await repeated(until, attack, at_once=8)


async def connections(port: int, until: float, data: bytes, count: int) -> None:
    """Connections that say `data` and then nothing."""
    writers = []
    for _ in range(count):
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            with contextlib.suppress(OSError, TimeoutError):
                writer.write(data)
                await asyncio.wait_for(writer.drain(), 2)
            writers.append(writer)
    await asyncio.sleep(max(0.0, until - time.monotonic()))
    for writer in writers:
        writer.transport.abort()


async def half_frames(target: Target, until: float) -> None:
    await connections(target.link, until, struct.pack("<I", 41 * MB) + b"x" * 40 * MB, 10)


async def link_noise(target: Target, until: float) -> None:
    async def attack() -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", target.link)
        writer.write(b"\x05\0\0\0hello")
        await asyncio.sleep(0.005)
        writer.transport.abort()

    await repeated(until, attack, at_once=16)


async def kv_noise(target: Target, until: float) -> None:
    for port in target.kv:
        await connections(port, time.monotonic() + 1, b"\x01", 400)
    await asyncio.sleep(max(0.0, until - time.monotonic()))


async def etcd_noise(target: Target, until: float) -> None:
    host, port = host_port(target.etcd, "etcd", 2379)
    prefix = b"dynserve/v1/default/instances/"
    client = aetcd.Client(host, port)
    try:
        for key in (b"\xff\xfe\xfd", b"decode/\xff", b"frontend/x", b"decode/x"):
            for value in (b"\xff", b"{}", b"[" * 5000, b'{"type": "frontend", "id": "x", "host": "h", "pid": -1}'):
                await client.put(prefix + key, value)
        await asyncio.sleep(max(0.0, until - time.monotonic()))
        for key in (b"\xff\xfe\xfd", b"decode/\xff", b"frontend/x", b"decode/x"):
            await client.delete(prefix + key)
    finally:
        await client.close()


async def nats_noise(target: Target, until: float) -> None:
    connection = await nats.connect(target.nats)
    with urlopened(f"http://127.0.0.1:{target.http}/health") as health:
        workers = [(one["role"], one["id"]) for one in health["instances"]]
    encode = msgspec.msgpack.encode
    while time.monotonic() < until:
        for role, worker in workers:
            for number in (float("nan"), -(2**40), float("inf")):
                await connection.publish(
                    f"dyn.default.{role}.{worker}.load", encode([worker, [number, 0, 0, 0, 0, 0], 0, 0])
                )
                await connection.publish(f"dyn.default.{role}.{worker}.kv", encode([worker, number, 0, [["c"]]]))
            await connection.publish(
                "dyn.default.frontend.x.placed", encode(["x", True, [[worker, float("nan"), -5, -5]]])
            )
            await connection.publish(f"dyn.default.{role}.{worker}.generate", b"\xff\xff")
        await asyncio.sleep(0.001)
    await connection.close()


ATTACKS: dict[str, Callable[[Target, float], Awaitable[None]]] = {
    **{f"8 MB: {name}": partial(large, name, LIMIT) for name in LARGE},
    **{f"31 MB: {name}": partial(large, name, 31 * MB) for name in ("messages", "a long text")},
    "pipelines": pipelines,
    "unfinished bodies": unfinished,
    "clients that leave": leaving,
    "200,000 stop ids": lambda target, until: per_token(target, until, stop_token_ids=list(range(3, 1003)) * 200),
    "1,000 stop ids": lambda target, until: per_token(target, until, stop_token_ids=list(range(2000, 2040)) * 25),
    "1,024 biases": lambda target, until: per_token(target, until, logit_bias={str(i): -1 for i in range(3, 1027)}),
    "penalties": lambda target, until: per_token(
        target, until, prompt=list(range(300, 1300)), repetition_penalty=1.1, presence_penalty=0.5, frequency_penalty=0.5
    ),
    "stop strings": lambda target, until: per_token(
        target, until, stop=["b" * 255 + chr(97 + i) for i in range(15)] + ["a" * 256], guided_regex="a{400}"
    ),
    "small grammars": grammars,
    "slow grammars": slow_grammars,
    "ids beyond the model": surplus,
    "upgrades": upgrades,
    "idle connections": lambda target, until: connections(target.http, until, b"", 500),
    "half frames": half_frames,
    "noise on the link": link_noise,
    "noise at the KV port": kv_noise,
    "noise in etcd": etcd_noise,
    "noise on NATS": nats_noise,
}  # fmt: skip


# the polite ones


class Polite:
    """Four clients with a request a second each, and two streams, one after the other."""

    def __init__(self, port: int) -> None:
        self._client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False)
        self.waits: list[float] = []  # milliseconds
        self.wrong = 0
        self.ended = 0  # streams that did not end well
        self._number = 0

    async def run(self) -> None:
        async with self._client, asyncio.TaskGroup() as group:
            for number in range(4):
                group.create_task(self._each_second(number / 4))
            for _ in range(2):
                group.create_task(self._streams())

    def taken(self) -> tuple[list[float], int, int]:
        found = sorted(self.waits), self.wrong, self.ended
        self.waits, self.wrong, self.ended = [], 0, 0
        return found

    async def _each_second(self, offset: float) -> None:
        await asyncio.sleep(offset)
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            self._number += 1
            ask = {"model": MODEL, "prompt": f"{self._number} one two three", "max_tokens": 4}
            began = loop.time()
            try:
                good = (await self._client.post("/v1/completions", json=ask)).status_code == 200
            except httpx.HTTPError:
                good = False
            self.wrong += not good
            self.waits.append((loop.time() - began) * 1000)
            due = max(due + 1.0, loop.time())
            await asyncio.sleep(due - loop.time())

    async def _streams(self) -> None:
        ask = {"model": MODEL, "prompt": "one two", "max_tokens": 400, "ignore_eos": True, "stream": True}
        while True:
            last = ""
            try:
                async with self._client.stream("POST", "/v1/completions", json=ask) as answer:
                    async for line in answer.aiter_lines():
                        last = line or last
            except httpx.HTTPError:
                pass
            self.ended += last != "data: [DONE]"
            await asyncio.sleep(0.2)


# the cluster


class Cluster(NamedTuple):
    target: Target
    processes: dict[str, subprocess.Popen[bytes]]
    logs: Path

    def megabytes(self, kind: str) -> float:
        """Of the frontend, or of all workers with the processes that they start."""
        total = 0
        for name, process in self.processes.items():
            if name.startswith(kind) and process.poll() is None:
                with contextlib.suppress(psutil.Error):
                    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
                    total += sum(one.memory_info().rss for one in tree)
        return total / MB

    def dead(self) -> list[str]:
        return [name for name, process in self.processes.items() if process.poll() is not None]

    def log_lines(self) -> int:
        return sum(path.read_bytes().count(b"\n") for path in self.logs.glob("*.log"))


@contextlib.contextmanager
def urlopened(url: str) -> Iterator[Any]:
    yield httpx.get(url, timeout=5, trust_env=False).json()


@contextlib.contextmanager
def cluster(package_path: str | None) -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        etcd, peer, bus, http, link = free_ports(5)
        environment = os.environ | ({"PYTHONPATH": package_path} if package_path else {})
        processes: dict[str, subprocess.Popen[bytes]] = {}

        def start(name: str, command: list[str]) -> None:
            out = stack.enter_context((folder / f"{name}.log").open("wb"))
            processes[name] = process = subprocess.Popen(
                command, stdout=out, stderr=out, env=environment, cwd=package_path
            )
            stack.callback(process.wait)
            stack.callback(process.kill)

        planes = ["--etcd-url", f"http://127.0.0.1:{etcd}", "--nats-url", f"nats://127.0.0.1:{bus}"]
        start("etcd", etcd_command(folder / "etcd", etcd, peer))
        start("nats", nats_command(bus))
        frontend = ["--http-port", str(http), "--link-port", str(link), "--log-level", "warning"]
        start("frontend", [sys.executable, "-m", "dynserve.frontend", *planes, *frontend])
        model = with_a_surplus_token(folder / MODEL)
        system: list[int] = []
        for role in ("prefill", "decode"):
            system += free_ports(1)
            options = ["--model-path", str(model), "--disaggregation-mode", role, "--system-port", str(system[-1])]
            start(
                f"worker-{role}", [sys.executable, "-m", "dynserve.worker", *planes, *options, "--log-level", "warning"]
            )
        deadline = time.monotonic() + 90
        while not ready(http):
            if time.monotonic() > deadline:
                raise SystemExit("the cluster did not start")
            time.sleep(0.1)
        kv = [port for name, process in processes.items() if name.startswith("worker")
              for port in listening(process.pid) if port not in system]  # fmt: skip
        target = Target(http, link, f"http://127.0.0.1:{etcd}", f"nats://127.0.0.1:{bus}", kv)
        yield Cluster(target, processes, folder)


def ready(port: int) -> bool:
    try:
        with urlopened(f"http://127.0.0.1:{port}/health") as health:
            return len([one for one in health["instances"] if one["state"] == "ready"]) == 2
    except (httpx.HTTPError, ValueError):
        return False


def listening(pid: int) -> list[int]:
    return [c.laddr.port for c in psutil.Process(pid).net_connections("tcp") if c.status == psutil.CONN_LISTEN]


def with_a_surplus_token(folder: Path) -> Path:
    """The tiny model, with a tokenizer that has one more token than the model has rows."""
    shutil.copytree(TINY_MODEL, folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    tokenizer["added_tokens"].append({"id": rows, "content": SURPLUS} | flags)
    path.write_text(json.dumps(tokenizer))
    return folder


# the measuring


class Found(NamedTuple):
    waits: list[float]
    wrong: int
    ended: int
    frontend: tuple[float, float, float]  # megabytes before, at the height, after
    workers: tuple[float, float, float]
    dead: list[str]
    log_lines: int
    said: str  # by the attack

    def verdict(self, quiet: float) -> str:
        faults = []
        if self.waits and self.waits[-1] > quiet + LONGER:
            faults.append("others wait")
        if self.ended or self.wrong:
            faults.append("others fail")
        if self.dead:
            faults.append(f"{', '.join(self.dead)} died")
        if max(self.frontend[2] - self.frontend[0], self.workers[2] - self.workers[0]) > KEPT:
            faults.append("memory stays")
        if "SMUGGLED" in self.said:
            faults.append("smuggled")
        return ", ".join(faults) or "pass"


async def attacked(running: Cluster, polite: Polite, name: str, seconds: float) -> Found:
    before = running.megabytes("frontend"), running.megabytes("worker")
    height, lines = list(before), running.log_lines()
    polite.taken()
    command = [sys.executable, __file__, "--attack", name, "--target", json.dumps(running.target)]
    process = await asyncio.create_subprocess_exec(
        *command, "--seconds", str(seconds), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        preexec_fn=lambda: os.nice(19),  # a real attacker brings a machine of its own
    )  # fmt: skip
    ended = asyncio.ensure_future(process.communicate())
    while not ended.done():
        for at, kind in enumerate(("frontend", "worker")):
            height[at] = max(height[at], running.megabytes(kind))
        await asyncio.sleep(0.1)
    said = (await ended)[0].decode(errors="replace")
    await asyncio.sleep(1.0)  # who began to wait during the attack is counted
    waits, wrong, broken = polite.taken()
    after = running.megabytes("frontend"), running.megabytes("worker")
    for _ in range(20):
        if max(after[0] - before[0], after[1] - before[1]) <= KEPT / 2:
            break
        await asyncio.sleep(0.5)
        after = running.megabytes("frontend"), running.megabytes("worker")
    return Found(
        waits, wrong, broken, (before[0], height[0], after[0]), (before[1], height[1], after[1]), running.dead(),
        running.log_lines() - lines, said,
    )  # fmt: skip


def quantile(values: list[float], part: float) -> float:
    return values[min(len(values) - 1, int(len(values) * part))] if values else float("nan")


async def all_attacks(names: list[str], seconds: float, package_path: str | None) -> tuple[int, int]:
    """How many passed, of how many."""
    passed, quiet = 0, 0.0
    for name in names:
        with cluster(package_path) as running:
            polite = Polite(running.target.http)
            clients = asyncio.ensure_future(polite.run())
            await asyncio.sleep(WARM)
            polite.taken()
            await asyncio.sleep(QUIET)
            alone, _, _ = polite.taken()
            quiet = alone[-1]
            found = await attacked(running, polite, name, seconds)
            clients.cancel()
            await asyncio.gather(clients, return_exceptions=True)
        verdict = found.verdict(quiet)
        passed += verdict == "pass"
        statuses = sorted(set(re.findall(r"HTTP/1\.1 (\d+)", found.said)))
        print(
            f"{name:<26} {quiet:>6.0f} {quantile(found.waits, 0.5):>6.0f} {quantile(found.waits, 0.99):>6.0f} "
            f"{found.waits[-1] if found.waits else float('nan'):>7.0f} {found.ended + found.wrong:>5} "
            f"{'/'.join(f'{mb:.0f}' for mb in found.frontend):>13} {'/'.join(f'{mb:.0f}' for mb in found.workers):>15} "
            f"{found.log_lines:>6}  {' '.join(statuses):<12} {verdict}",
            flush=True,
        )
        if "Traceback" in found.said:
            print(found.said[-2000:], flush=True)
    return passed, len(names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", help="names of attacks, or beginnings of them, with commas")
    parser.add_argument("--seconds", type=float, default=6.0, help="that each attack takes")
    parser.add_argument("--package-path", help="folder of another checkout, whose servers are attacked")
    parser.add_argument("--quick", action="store_true", help="three seconds each")
    parser.add_argument("--attack", help=argparse.SUPPRESS)
    parser.add_argument("--target", help=argparse.SUPPRESS)
    parser.add_argument("--poster", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.poster:
        asyncio.run(poster(args.poster))
        return
    if args.attack:
        target = Target(*json.loads(args.target))
        asyncio.run(ATTACKS[args.attack](target, time.monotonic() + args.seconds))  # type: ignore[arg-type]
        return
    wanted = tuple(args.only.split(",")) if args.only else ("",)
    names = [name for name in ATTACKS if name.startswith(wanted)]
    print(
        f"{machine()}\n\nothers' waits in ms; memory in MB before, at its height and after; log lines of all processes\n"
    )
    print(
        f"{'attack':<26} {'quiet':>6} {'p50':>6} {'p99':>6} {'longest':>7} {'fails':>5} {'frontend':>13} {'workers':>15} "
        f"{'lines':>6}  {'answers':<12} verdict"
    )
    seconds = 3.0 if args.quick else args.seconds
    passed, total = asyncio.run(all_attacks(names, seconds, args.package_path))
    report([Row("hostile clients: attacks that cost others nothing", passed, total, at_least=True)])


if __name__ == "__main__":
    main()
