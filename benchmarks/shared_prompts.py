"""What KV-aware routing is worth with real processes and the real tiny model: shared system prompts, `kv` against others.

    python benchmarks/shared_prompts.py [--quick]

2 prefill and 2 decode workers on torch, etcd, NATS, one frontend; 24 system prompts of some 1,300 tokens, each asked with
many different questions by 4 clients that stream. One prefill worker's cache holds about two thirds of the prompts: kept
apart they fit, mixed they push each other out. Every mode starts with empty caches and sees the same requests; the first
24 are not measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from typing import NamedTuple

from budget import machine
from plane import cluster

from dynserve.config import TINY_MODEL

PROMPTS, CLIENTS, ANSWER = 24, 4, 8
ENGINE = {"num_blocks": 700, "max_num_tokens": 2048, "num_threads": 1}


class Seen(NamedTuple):
    ttft: float  # seconds
    prompt: int  # tokens
    cached: int


def requests(count: int) -> list[bytes]:
    r = random.Random(11)
    words = [f"{a}{b}" for a in ("key", "value", "block", "token", "cache") for b in range(40)]
    systems = [" ".join(r.choice(words) for _ in range(420)) for _ in range(PROMPTS)]
    order = [*range(PROMPTS), *(r.randrange(PROMPTS) for _ in range(count))]
    bodies = []
    for number, which in enumerate(order):
        messages = [
            {"role": "system", "content": systems[which]},
            {"role": "user", "content": f"Question {number}: what is {number % 9}+{which % 9}?"},
        ]
        options = {"stream_options": {"include_usage": True}, "max_tokens": ANSWER, "ignore_eos": True}
        bodies.append(json.dumps({"model": TINY_MODEL.name, "messages": messages, "stream": True, **options}).encode())
    return bodies


async def ask(port: int, body: bytes) -> Seen:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n"
    began = time.perf_counter()
    writer.write(head + f"content-length: {len(body)}\r\n\r\n".encode() + body)
    seen, first = b"", 0.0
    while data := await reader.read(1 << 16):
        seen += data
        first = first or (time.perf_counter() - began if b"data: {" in seen else 0.0)
    writer.close()
    events = [line[6:] for line in seen.split(b"\n") if line.startswith(b"data: {")]
    usage = json.loads(events[-1])["usage"]
    return Seen(first, usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"])


async def measured(port: int, bodies: list[bytes]) -> list[Seen]:
    waiting = list(reversed(list(enumerate(bodies))))
    seen: list[tuple[int, Seen]] = []

    async def client() -> None:
        while waiting:
            number, body = waiting.pop()
            seen.append((number, await ask(port, body)))

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return [one for number, one in seen if number >= PROMPTS]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer requests")
    count = 60 if parser.parse_args().quick else 300
    print(f"{count} requests, {machine()}\n")
    p50: dict[str, float] = {}
    for mode in ("kv", "least-loaded", "round-robin"):
        flags = ["--router-mode", mode]
        with cluster(["prefill", "prefill", "decode", "decode"], ENGINE, "torch", flags) as setup:
            seen = asyncio.run(measured(setup.port, requests(count)))
        times = sorted(one.ttft for one in seen)
        p50[mode] = statistics.median(times)
        hit = sum(one.cached for one in seen) / sum(one.prompt for one in seen)
        print(
            f"{mode:<14} TTFT p50 {p50[mode] * 1000:7.1f} ms   p99 {times[int(0.99 * len(times))] * 1000:7.1f} ms   "
            f"cached {100 * hit:5.1f} % of {statistics.mean(one.prompt for one in seen):.0f} tokens",
            flush=True,
        )
    print(
        f"\nround-robin / kv: {p50['round-robin'] / p50['kv']:.2f}, least-loaded / kv: {p50['least-loaded'] / p50['kv']:.2f}"
    )


if __name__ == "__main__":
    main()
