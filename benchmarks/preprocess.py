"""What a long prompt costs the frontend before it is placed, and whether others notice.

    python benchmarks/preprocess.py [--quick]

A frontend and a simulated worker as real processes, the tiny model's tokenizer and template with a context of 131,072
tokens. Two clients send conversations of 40,000 tokens, one after the other, while the frontend watches how late its event
loop is (`dynserve_event_loop_lag_seconds`). First every conversation is new, then each is a further turn of one. Linux only.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from budget import Row, machine, report
from plane import Setup, cluster, cpu_seconds

from dynserve.config import TINY_MODEL
from dynserve.model_files import read_model_files
from dynserve.text.preprocess import Conversation, Preprocessor

TOKENS = 40_000
CLIENTS = 2
BUDGET = 10.0  # ms of loop lag, p99


class Measured(NamedTuple):
    requests: int
    cpu_ms: float  # of the frontend, per request
    wall_ms: float  # of one request, mean
    lag_p99_ms: float


def words(r: random.Random, preprocessor: Preprocessor, tokens: int) -> str:
    """English-like text of about so many tokens."""
    sample = " ".join(_word(r) for _ in range(2000))
    per_word = len(preprocessor.tokenize(sample)) / 2000
    return " ".join(_word(r) for _ in range(int(tokens / per_word)))


def _word(r: random.Random) -> str:
    return "".join(r.choices("etaoinshrdlu", k=r.randint(2, 8)))


def long_context(folder: Path) -> Path:
    """The tiny model's files with another context length; weights are not needed."""
    model = folder / "tiny_model"
    shutil.copytree(TINY_MODEL, model, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 131_072}
    (model / "config.json").write_text(json.dumps(config))
    return model


def in_process(preprocessor: Preprocessor, text: str) -> None:
    """Template and tokenizer alone, on one thread: what would hold up the loop if they ran on it."""
    chat: list[Any] = [{"role": "user", "content": text}]
    began = time.perf_counter()
    _, ids = preprocessor.chat(Conversation(chat))
    first = time.perf_counter() - began
    chat += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "And then?"}]
    began = time.perf_counter()
    preprocessor.chat(Conversation(chat))
    again = time.perf_counter() - began
    print(
        f"template and tokenizer, one thread, {len(ids):,} tokens: {first * 1000:.1f} ms; a further turn {again * 1000:.1f} ms"
    )


def ask(port: int, messages: list[Any]) -> tuple[float, int]:
    """Seconds of one request, and its prompt's tokens."""
    body = json.dumps({"model": "tiny_model", "messages": messages, "max_tokens": 1}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", body, {"content-type": "application/json"}
    )
    began = time.perf_counter()
    with urllib.request.urlopen(request, timeout=60) as answer:
        usage = json.load(answer)["usage"]
    return time.perf_counter() - began, usage["prompt_tokens"]


def lag_buckets(port: int) -> list[tuple[float, float]]:
    """Upper bound in seconds and cumulative count."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page:
        lines = page.read().decode().splitlines()
    found = [line for line in lines if line.startswith("dynserve_event_loop_lag_seconds_bucket")]
    return [(float(line.split('le="')[1].split('"')[0]), float(line.split()[-1])) for line in found]


def p99(before: list[tuple[float, float]], after: list[tuple[float, float]]) -> float:
    """Milliseconds, interpolated within its bucket."""
    counts = [(bound, late - early) for (bound, early), (_, late) in zip(before, after, strict=True)]
    wanted, lower, below = 0.99 * counts[-1][1], 0.0, 0.0
    for bound, count in counts:
        if count >= wanted:
            return 1000 * (lower + (bound - lower) * (wanted - below) / max(1.0, count - below))
        lower, below = bound, count
    return float("inf")


def measure(setup: Setup, conversations: list[list[list[Any]]]) -> Measured:
    """One list of conversations for each client."""
    before, lag = cpu_seconds(setup.pids["frontend"]), lag_buckets(setup.port)

    def client(mine: list[list[Any]]) -> list[float]:
        return [ask(setup.port, messages)[0] for messages in mine]

    with ThreadPoolExecutor(len(conversations)) as pool:
        times = [seconds for found in pool.map(client, conversations) for seconds in found]
    cpu = (cpu_seconds(setup.pids["frontend"]) - before) / len(times)
    return Measured(len(times), cpu * 1000, 1000 * sum(times) / len(times), p99(lag, lag_buckets(setup.port)))


def show(name: str, found: Measured) -> None:
    print(
        f"{name:<26} {found.requests:>4} requests   frontend CPU {found.cpu_ms:6.1f} ms each   "
        f"{found.wall_ms:6.1f} ms to the answer   loop lag p99 {found.lag_p99_ms:5.2f} ms",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="a fifth of the requests")
    count = 15 if parser.parse_args().quick else 75
    r = random.Random(1)
    preprocessor = Preprocessor(read_model_files(TINY_MODEL))
    print(f"{TOKENS:,} tokens a prompt, {CLIENTS} clients, {machine()}\n")
    in_process(preprocessor, words(r, preprocessor, TOKENS))
    fresh = [
        [[{"role": "user", "content": words(r, preprocessor, TOKENS)}] for _ in range(count)] for _ in range(CLIENTS)
    ]
    turns = []
    for _ in range(CLIENTS):
        chat: list[Any] = [{"role": "user", "content": words(r, preprocessor, TOKENS)}]
        mine = []
        for number in range(count):
            mine.append(list(chat))
            chat += [{"role": "assistant", "content": f"Yes, {number}."}, {"role": "user", "content": f"And {number}?"}]
        turns.append(mine)
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--model-path", str(long_context(Path(folder)))]
        engine = {"speed": 0, "num_blocks": 60_000}
        with cluster(["prefill_and_decode"], engine, worker_flags=flags) as setup:
            ask(setup.port, [{"role": "user", "content": "warm up"}])
            show("every conversation new", new := measure(setup, fresh))
            show("a further turn of one", measure(setup, turns))
    report([Row("long prompts: loop lag p99, ms", new.lag_p99_ms, BUDGET)])


if __name__ == "__main__":
    main()
