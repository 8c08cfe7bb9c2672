"""The deployment guide's benchmark against any OpenAI-compatible server, with the guide's own figures beside what it finds.

    python benchmarks/guide.py benchmark [--url http://127.0.0.1:8000] [--name NAME] [--prompts text|ids] [--runs 10] [--sweep]
    python benchmarks/guide.py smoke | health [--url ...]

The first table is the guide's: five tests, one client, each request whole and on a connection of its own, temperature 0.7. Its
columns are comparable: duration is the wall clock of the request, throughput completion tokens by duration, cut to two
decimals; the average latency is that of five requests. What the guide's method cannot tell stands in the second table: time to
first token, tokens a second after it, median and 99th percentile of more runs after a warm-up. `--sweep` adds waves of 1 to 256
requests at once (128 tokens and 128 new ones each) with a plot. `ignore_eos` keeps answers at the length that is asked for.

`--prompts ids` sends token ids, of exactly the guide's lengths: for models whose tokenizer is not the guide's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import multiprocessing
import platform
import random
import ssl
import statistics
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

SHORT = "Hello, how are you?"
MEDIUM = "Explain neural networks in detail: what the forward pass, backpropagation and gradient descent do, and how they work together."
LONG = (
    "Tell the history of artificial intelligence from the first programs of the nineteen fifties over expert systems, neural "
    "networks and deep learning to the transformers of today, with the milestones of each decade and the people behind them. "
    "Then describe what all of that has changed in the economy, in science and in our daily lives."
)


class Test(NamedTuple):
    title: str
    row: str
    prompt: str
    tokens: int  # that the guide's tokenizer made of its prompt
    new: int
    seconds: float  # that the guide measured, on 4 H100: 2 prefill and 2 decode workers of TensorRT-LLM
    rate: float


TESTS = (
    Test("Test 1: Short Prompt (50 tokens)", "Short (50)", SHORT, 6, 50, 0.131210321, 381.06),
    Test("Test 2: Short Prompt (150 tokens)", "Short (150)", SHORT, 6, 150, 0.322301308, 465.40),
    Test("Test 3: Medium Prompt (100 tokens)", "Medium (100)", MEDIUM, 25, 100, 0.212671773, 470.20),
    Test("Test 4: Long Prompt (50 tokens)", "Long (50)", LONG, 64, 50, 0.129364922, 386.50),
)
LATENCY_RUNS, GUIDE_LATENCY = 5, 0.126
LEVELS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SWEEP_TOKENS = 128  # of prompt and of answer
IDS = range(1000, 100_000)


class Server:
    """Where the requests go."""

    def __init__(self, url: str, model: str | None, key: str | None) -> None:
        self.url, self._key = url.rstrip("/"), key
        self.model = model or self._first_model()

    def get(self, path: str) -> Any:
        return self._ask(urllib.request.Request(self.url + path))

    def complete(self, prompt: str | list[int], new: int, temperature: float) -> tuple[float, Any]:
        """Seconds on the wall clock, connection and all, and the answer."""
        began = time.perf_counter()
        request = urllib.request.Request(
            self.url + "/v1/completions", self.body(prompt, new, temperature, stream=False)
        )
        answer = self._ask(request)
        return time.perf_counter() - began, answer

    def body(self, prompt: str | list[int], new: int, temperature: float, *, stream: bool) -> bytes:
        fields: dict[str, Any] = {
            "model": self.model, "prompt": prompt, "max_tokens": new, "temperature": temperature, "ignore_eos": True,
        }  # fmt: skip
        if stream:
            fields |= {"stream": True, "stream_options": {"include_usage": True}}
        return json.dumps(fields).encode()

    def head(self, length: int) -> bytes:
        parts = urlsplit(self.url)
        key = f"authorization: Bearer {self._key}\r\n" if self._key else ""
        return (
            f"POST {parts.path}/v1/completions HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-type: application/json\r\n"
            f"{key}content-length: {length}\r\n\r\n"
        ).encode()

    def _first_model(self) -> str:
        models = self.get("/v1/models")["data"]
        if not models:
            raise SystemExit(f"{self.url} serves no model")
        return str(models[0]["id"])

    def _ask(self, request: urllib.request.Request) -> Any:
        request.add_header("content-type", "application/json")
        if self._key:
            request.add_header("authorization", f"Bearer {self._key}")
        try:
            with urllib.request.urlopen(request, timeout=300) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            raise SystemExit(
                f"{request.full_url}: {error.code} {error.read().decode(errors='replace')[:300]}"
            ) from None
        except OSError as error:
            raise SystemExit(f"{request.full_url} cannot be reached: {error}") from None


class Stream(NamedTuple):
    """One streamed answer, in seconds."""

    first: float
    whole: float
    tokens: int


class Connection(asyncio.Protocol):
    """Asks and takes the stream apart as little as it can, so that the client is not what is measured."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._first = 0.0
        self._ended: asyncio.Future[float] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self._buffer += data
        if not self._first and b"data: {" in self._buffer:
            self._first = now
        if self._ended is not None and not self._ended.done() and self._over():
            self._ended.set_result(now)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_exception(exc or ConnectionError(bytes(self._buffer[-300:]).decode(errors="replace")))

    async def ask(self, server: Server, body: bytes) -> Stream:
        self._buffer.clear()
        self._first = 0.0
        self._ended = asyncio.get_running_loop().create_future()
        began = time.perf_counter()
        self.transport.write(server.head(len(body)) + body)
        ended = await self._ended
        usage = self._buffer.rindex(b'"completion_tokens":') + len(b'"completion_tokens":')
        tokens = int(bytes(self._buffer[usage : usage + 12]).strip().split(b",")[0].split(b"}")[0])
        return Stream(self._first - began, ended - began, tokens)

    def _over(self) -> bool:
        if self._buffer[:13].startswith(b"HTTP/1.1 200"):
            return b"data: [DONE]" in self._buffer[-64:] and self._buffer.endswith(b"0\r\n\r\n")
        return b"\r\n\r\n" in self._buffer and self._fail()

    def _fail(self) -> bool:
        raise SystemExit(bytes(self._buffer[:600]).decode(errors="replace"))


async def connect(server: Server) -> Connection:
    parts = urlsplit(server.url)
    tls = ssl.create_default_context() if parts.scheme == "https" else None
    port = parts.port or (443 if tls else 80)
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(Connection, parts.hostname or "", port, ssl=tls)
    return connection


def prompt_of(test: Test, kind: str) -> str | list[int]:
    return test.prompt if kind == "text" else [random.choice(IDS) for _ in range(test.tokens)]


class Progress:
    """A bar on a terminal, lines elsewhere."""

    def __init__(self, steps: int) -> None:
        self._steps, self._done = steps, 0

    def step(self, text: str) -> None:
        self._done += 1
        filled = 30 * self._done // self._steps
        if sys.stderr.isatty():
            print(f"\r[{'#' * filled}{'.' * (30 - filled)}] {text:<40}", end="", file=sys.stderr, flush=True)
            if self._done == self._steps:
                print(file=sys.stderr)
        else:
            print(f"{self._done}/{self._steps} {text}", file=sys.stderr, flush=True)


def cut(value: float, decimals: int) -> str:
    """Truncated, as the guide's script does."""
    return f"{math.floor(value * 10**decimals) / 10**decimals:.{decimals}f}"


def percentile(values: Sequence[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(len(ordered) * part) - 1)]


class Found(NamedTuple):
    """What the guide's tests gave."""

    seconds: list[float]
    usages: list[dict[str, int]]
    texts: list[str]
    latency: float


def the_guides_tests(server: Server, kind: str, pause: float, progress: Progress) -> Found:
    seconds, usages, texts = [], [], []
    for test in TESTS:
        took, answer = server.complete(prompt_of(test, kind), test.new, 0.7)
        seconds.append(took)
        usages.append(answer["usage"])
        texts.append(answer["choices"][0]["text"])
        progress.step(test.title)
        time.sleep(pause)
    latencies = []
    for _ in range(LATENCY_RUNS):
        latencies.append(server.complete(prompt_of(TESTS[0], kind), 50, 0.7)[0])
        time.sleep(pause / 4)
    progress.step("Test 5: Latency Test (5 iterations)")
    return Found(seconds, usages, texts, sum(latencies) / len(latencies))


async def streams(server: Server, kind: str, runs: int, progress: Progress) -> list[list[Stream]]:
    connection = await connect(server)
    for _ in range(3):
        await connection.ask(server, server.body(prompt_of(TESTS[2], kind), 50, 0.0, stream=True))
    found = []
    for test in TESTS:
        found.append(
            [
                await connection.ask(server, server.body(prompt_of(test, kind), test.new, 0.0, stream=True))
                for _ in range(runs)
            ]
        )
        progress.step(f"{test.row}, {runs} streams")
    connection.transport.close()
    return found


class Level(NamedTuple):
    """A wave of so many requests at once."""

    number: int
    rate: float  # tokens a second, of all
    first: float  # seconds to the first token, mean
    between: float  # seconds between tokens, mean


def _wave(server: Server, number: int, barrier: Any, results: Any) -> None:
    async def run() -> list[tuple[float, float, float, int]]:
        random.seed()
        connections = [await connect(server) for _ in range(number)]
        ids = [[random.choice(IDS) for _ in range(SWEEP_TOKENS)] for _ in range(number)]
        bodies = [server.body(prompt, SWEEP_TOKENS, 0.0, stream=True) for prompt in ids]
        barrier.wait()
        began = time.perf_counter()
        answers = await asyncio.gather(*(c.ask(server, b) for c, b in zip(connections, bodies, strict=True)))
        return [(began, began + a.whole, a.first, a.tokens) for a in answers]

    try:
        results.put(asyncio.run(run()))
    except BaseException as error:
        results.put(repr(error))


def wave(server: Server, number: int) -> Level:
    """By up to four processes, so that the client is not the limit."""
    shares = [number // 4 + (i < number % 4) for i in range(min(4, number))] if number >= 4 else [number]
    barrier = multiprocessing.Barrier(len(shares))
    results: Any = multiprocessing.Queue()
    processes = [multiprocessing.Process(target=_wave, args=(server, share, barrier, results)) for share in shares]
    for process in processes:
        process.start()
    answers: list[tuple[float, float, float, int]] = []
    for _ in processes:
        found = results.get(timeout=300)
        if isinstance(found, str):
            raise SystemExit(f"a client failed: {found}")
        answers += found
    for process in processes:
        process.join()
    wall = max(end for _, end, _, _ in answers) - min(begin for begin, _, _, _ in answers)
    between = statistics.mean((end - begin - first) / (tokens - 1) for begin, end, first, tokens in answers)
    return Level(number, sum(t for *_, t in answers) / wall, statistics.mean(f for _, _, f, _ in answers), between)


def sweep(server: Server, progress: Progress, repeats: int = 3) -> list[Level]:
    levels = []
    for number in LEVELS:
        wave(server, number)
        found = [wave(server, number) for _ in range(repeats)]
        columns: list[Callable[[Level], float]] = [lambda x: x.rate, lambda x: x.first, lambda x: x.between]
        levels.append(Level(number, *(statistics.median(map(column, found)) for column in columns)))
        progress.step(f"{number} at once")
    return levels


def report(
    server: Server, name: str, kind: str, found: Found, streamed: list[list[Stream]], levels: list[Level]
) -> str:
    lines = [
        f"# {name}: the guide's benchmark", "", f"**Date:** {datetime.now():%Y-%m-%d %H:%M:%S}  ",
        f"**Server:** {server.url}  ", f"**Model:** {server.model}  ", f"**Prompts:** {kind}  ",
        f"**Client:** Python {platform.python_version()} on {platform.node()}", "", "## Results Summary", "",
        "| Test | Tokens | Duration | Throughput | guide: duration | guide: throughput | times |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for test, seconds, usage in zip(TESTS, found.seconds, found.usages, strict=True):
        rate = usage["completion_tokens"] / seconds
        lines.append(
            f"| {test.row} | {usage['completion_tokens']} | {seconds:.3f}s | {cut(rate, 2)} tok/s | {test.seconds:.3f}s "
            f"| {test.rate:.0f} tok/s | {rate / test.rate:.2f} |"
        )
    lines.append(
        f"| Latency (avg) | - | {cut(found.latency, 3)}s | - | {GUIDE_LATENCY}s | - | {GUIDE_LATENCY / found.latency:.2f} |"
    )
    lines += ["", "## Streamed", "", "| Test | prompt | TTFT p50 | p99 | tok/s after it | whole p50 | p99 | tok/s whole | times the guide |",
              "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for test, usage, runs in zip(TESTS, found.usages, streamed, strict=True):
        first, whole = statistics.median(r.first for r in runs), statistics.median(r.whole for r in runs)
        rate = statistics.median(r.tokens for r in runs) / whole
        after = (statistics.median(r.tokens for r in runs) - 1) / (whole - first)
        lines.append(
            f"| {test.row} | {usage['prompt_tokens']} | {1e3 * first:.1f} ms | {1e3 * percentile([r.first for r in runs], 0.99):.1f} "
            f"| {after:.0f} | {1e3 * whole:.1f} ms | {1e3 * percentile([r.whole for r in runs], 0.99):.1f} | {rate:.0f} | {rate / test.rate:.2f} |"
        )
    if levels:
        lines += ["", f"## Waves of requests ({SWEEP_TOKENS} tokens, {SWEEP_TOKENS} new ones)", "",
                  "| at once | tok/s | TTFT mean | ITL mean |", "|---|---|---|---|"]  # fmt: skip
        lines += [f"| {x.number} | {x.rate:.0f} | {1e3 * x.first:.1f} ms | {1e3 * x.between:.2f} ms |" for x in levels]
    for test, seconds, usage, text in zip(TESTS, found.seconds, found.usages, found.texts, strict=True):
        lines += [
            "", f"### {test.title}", "", f"- Duration: {seconds:.9f}s", f"- Prompt Tokens: {usage['prompt_tokens']}",
            f"- Completion Tokens: {usage['completion_tokens']}", f"- Total Tokens: {usage['total_tokens']}",
            f"- Throughput: {cut(usage['completion_tokens'] / seconds, 2)} tokens/sec", f"- Max Tokens Requested: {test.new}",
            "", "```", text[:200].replace("```", "'''"), "```",
        ]  # fmt: skip
    return "\n".join(lines) + "\n"


def plot(levels: list[Level], path: Path) -> bool:
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    mpl.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    numbers = [level.number for level in levels]
    left.plot(numbers, [level.rate for level in levels], marker="o")
    left.set(xscale="log", yscale="log", xlabel="requests at once", ylabel="tokens a second", title="throughput")
    right.plot(numbers, [1e3 * level.first for level in levels], marker="o", label="time to first token")
    right.plot(numbers, [1e3 * level.between for level in levels], marker="o", label="time between tokens")
    right.set(xscale="log", yscale="log", xlabel="requests at once", ylabel="ms", title="latency")
    right.legend()
    figure.tight_layout()
    figure.savefig(path)
    return True


def benchmark(server: Server, args: argparse.Namespace) -> None:
    progress = Progress(len(TESTS) + 1 + len(TESTS) + (len(LEVELS) if args.sweep else 0))
    found = the_guides_tests(server, args.prompts, args.pause, progress)
    streamed = asyncio.run(streams(server, args.prompts, args.runs, progress))
    levels = sweep(server, progress) if args.sweep else []
    text = report(server, args.name, args.prompts, found, streamed, levels)
    folder: Path = args.out
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{args.name}_benchmark_{datetime.now():%Y%m%d_%H%M%S}.md"
    path.write_text(text)
    if levels:
        plot(levels, path.with_suffix(".png"))
    print(text.split("### ")[0].rstrip())
    print(f"\nreport: {path}")


def smoke(server: Server) -> None:
    health(server)
    seconds, answer = server.complete("Hello", 20, 0.7)
    usage = answer["usage"]
    print(f"{usage['completion_tokens']} tokens in {seconds:.3f} s: {answer['choices'][0]['text']!r}")


def health(server: Server) -> None:
    found = server.get("/health")
    instances = found.get("instances", []) if isinstance(found, dict) else []
    print(json.dumps(found, indent=2) if not instances else f"{len(instances)} instances: " + ", ".join(
        f"{i.get('id', '?')} ({i.get('role', '?')}, {i.get('state', '?')})" for i in instances
    ))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", default="benchmark", choices=("benchmark", "smoke", "health"))
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", help="default: the first that the server lists")
    parser.add_argument("--api-key", help="if the server wants one")
    parser.add_argument("--name", default="dynserve", help="of the report")
    parser.add_argument("--prompts", default="text", choices=("text", "ids"))
    parser.add_argument("--runs", type=int, default=10, help="streams of each test")
    parser.add_argument("--pause", type=float, default=2.0, help="seconds between the guide's tests")
    parser.add_argument("--sweep", action="store_true", help="waves of 1 to 256 requests, too")
    parser.add_argument("--out", type=Path, default=Path("benchmark-results"))
    args = parser.parse_args()
    server = Server(args.url, args.model if args.command != "health" else args.model or "-", args.api_key)
    if args.command == "benchmark":
        benchmark(server, args)
    else:
        {"smoke": smoke, "health": health}[args.command](server)


if __name__ == "__main__":
    main()
