"""What each field of a request costs everybody else: how long it holds up the event loop, and what it adds to a token.

    python benchmarks/fields.py [--quick]

The first table posts bodies that consist of one field, as small as those that are parsed on the event loop, as large as
its bounds allow, and as large as a body may be, to a frontend in this process, and says how long its event loop stood still.
The second one gives, for each field that is looked at for every token, the time of a token with the field at its bound, beside
one without: in the sampler, with a vocabulary as large as those of today's models, and in the renderer.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import hostile
import torch
import uvloop
from budget import Row, machine, report

from dynserve.api.body_bounds import BodyBounds
from dynserve.api.fields import MAX_BIASES, MAX_STOP_IDS, MAX_STOP_LENGTH, MAX_STOPS
from dynserve.cluster import Cluster
from dynserve.config import TINY_MODEL
from dynserve.executors.scheduler import Sequence
from dynserve.executors.torch.sampler import sample
from dynserve.frontend.__main__ import SWITCH_INTERVAL
from dynserve.model_files import read_model_files
from dynserve.process import settle_memory
from dynserve.render.renderer import Renderer
from dynserve.server.heads import HttpLimits
from dynserve.server.serving import bind, serving
from dynserve.text.detokenize import Vocabulary
from dynserve.text.preprocess import Preprocessor
from dynserve.wire.requests import (
    GenerateRequest,
    ReasoningParsing,
    RenderOptions,
    SamplingParams,
    StopConditions,
    TokenLogprob,
    ToolParsing,
    pack_tokens,
)

MOST_STALL = 50.0  # milliseconds
VOCABULARY = 152_000
MB = 1 << 20

# the longest bodies of each field that are not refused by their bounds, in bytes
WITHIN = {
    "token lists": 8_000, "token ids": 598_000, "texts": 127_000, "choices": 16_000, "unknown field": 65_000,
    "metadata": 64_000, "logit_bias": 64_000, "stop ids": 65_000, "schema": 270_000, "messages": 310_000, "parts": 280_000,
    "calls": 390_000, "tools": 90_000, "tool's description": 4_000_000, "escapes": 5_900_000, "a long text": hostile.LIMIT,
    "a long prompt": hostile.LIMIT, "detokenize": 598_000,
}  # fmt: skip


class Lag:
    """How late a timer of a millisecond fires, at the latest."""

    def __init__(self) -> None:
        self.longest = 0.0  # milliseconds

    async def watch(self) -> None:
        while True:
            began = time.perf_counter()
            await asyncio.sleep(0.001)
            self.longest = max(self.longest, (time.perf_counter() - began - 0.001) * 1000)


async def stalls(repeats: int) -> float:
    """The longest one. The bodies are posted by a process of its own, so that only the server's own work is seen."""
    logging.disable(logging.WARNING)
    worst = 0.0
    async with Cluster(aggregated=1, executor="simulated", engine={"speed": 0}) as cluster:
        sock = bind("127.0.0.1", 0, "port")
        async with serving(cluster.apps[0].served, sock, HttpLimits()), posting(sock.getsockname()[1]) as post:
            settle_memory()
            sys.setswitchinterval(SWITCH_INTERVAL)  # as a frontend does
            lag = Lag()
            watching = asyncio.ensure_future(lag.watch())
            print(
                f"{'field':<20} {'64 kB':>16} {'within its bounds':>22} {'8 MB':>16}    longest stall in ms, and the answer\n"
            )
            for name in hostile.LARGE:
                cells = []
                for size in (64_000, WITHIN[name], hostile.LIMIT):
                    found = [await post(name, size, lag) for _ in range(repeats)]
                    longest = max(stall for stall, _ in found)
                    worst = max(worst, longest)
                    cells.append(f"{longest:6.1f} ({found[0][1]})")
                print(f"{name:<20} {cells[0]:>16} {cells[1]:>22} {cells[2]:>16}", flush=True)
            watching.cancel()
    logging.disable(logging.NOTSET)
    return worst


Post = Callable[[str, int, Lag], Awaitable[tuple[float, str]]]  # a stall in ms, and the answer's status


@asynccontextmanager
async def posting(port: int) -> AsyncIterator[Post]:
    command = [sys.executable, hostile.__file__, "--poster", str(port)]
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    reader, writer = process.stdout, process.stdin
    assert reader is not None and writer is not None

    async def post(name: str, size: int, lag: Lag) -> tuple[float, str]:
        writer.write(f"{name} {size}\n".encode())
        await reader.readline()
        await asyncio.sleep(0.05)
        lag.longest = 0.0
        writer.write(b"\n")
        status = (await reader.readline()).decode().strip()
        await asyncio.sleep(0.02)
        return lag.longest, status

    try:
        yield post
    finally:
        process.kill()
        await process.wait()


SAMPLED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "greedy": ({"temperature": 0.0}, {}),
    "temperature": ({}, {}),
    "top_k": ({"top_k": 50}, {}),
    "top_p, min_p": ({"top_p": 0.9, "min_p": 0.05}, {}),
    "logit_bias": ({"temperature": 0.0, "logit_bias": dict.fromkeys(range(MAX_BIASES), 1.0)}, {}),
    "repetition_penalty": ({"temperature": 0.0, "repetition_penalty": 1.1}, {}),
    "presence_, frequency_penalty": ({"temperature": 0.0, "presence_penalty": 0.5, "frequency_penalty": 0.5}, {}),
    "stop_token_ids": ({"temperature": 0.0}, {"token_ids": tuple(range(MAX_STOP_IDS))}),
    "stop_token_ids, min_tokens": (
        {"temperature": 0.0},
        {"token_ids": tuple(range(MAX_STOP_IDS)), "min_tokens": 1 << 20},
    ),
    "logprobs": ({"temperature": 0.0, "logprobs": 20}, {}),
}


def sampler_costs(tokens: int) -> float:
    """Prints microseconds per token, behind a prompt of 8,192 tokens; gives the most that a field adds to one that is
    drawn, as a factor."""
    torch.set_num_threads(1)
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(1))
    print(f"\nsampler, {VOCABULARY:,} tokens in the vocabulary, 8,192 in the prompt")
    found: dict[str, float] = {}
    for name, (sampling, stop) in SAMPLED.items():
        request = _request(
            SamplingParams(seed=1, **sampling),
            StopConditions(max_tokens=1 << 20, **stop),
            RenderOptions(**_RENDER),
            8192,
        )
        sequence = Sequence(1, request, 32, frozenset({2}), 0.0)
        times = []
        for _ in range(tokens):
            began = time.perf_counter()
            (new,) = sample(logits, [sequence])
            _ = new.token_id in sequence.ends
            times.append(time.perf_counter() - began)
            sequence.tokens.append(new.token_id)
        found[name] = sorted(times)[tokens // 2] * 1e6
        print(f"  {name:<32} {found[name]:>10,.0f} us/token", flush=True)
    return max(found.values()) / found["temperature"]


_RENDER: dict[str, Any] = {"kind": "completion", "response_id": "r", "model": "m", "created": 0, "stream": True}
RENDERED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "plain": ({}, ()),
    "stop, 16 of 256": ({}, tuple("b" * (MAX_STOP_LENGTH - 1) + chr(97 + i) for i in range(MAX_STOPS))),
    "stop that nearly matches": (
        {}, (*("b" * (MAX_STOP_LENGTH - 1) for _ in range(MAX_STOPS - 1)), "a" * (MAX_STOP_LENGTH - 1) + "b"),
    ),
    "logprobs, 20": ({"logprobs": 20}, ()),
    "continuous usage": ({"usage": True, "continuous_usage": True}, ()),
    "512 tools": ({"kind": "chat", "tools": ToolParsing(parser="hermes", names=tuple(f"tool_{i}" for i in range(512)))}, ()),
    "reasoning": ({"kind": "chat", "reasoning": ReasoningParsing(parser="qwen3", open=True)}, ()),
}  # fmt: skip


def renderer_costs(tokens: int) -> float:
    """Prints microseconds per token; gives the most."""
    preprocessor = Preprocessor(read_model_files(TINY_MODEL))
    vocabulary = Vocabulary(preprocessor.tokenizer)
    letter: int = preprocessor.tokenizer.encode("a").ids[0]
    print("\nrenderer, an answer of the letter a")
    worst = 0.0
    for name, (render, stops) in RENDERED.items():
        made = RenderOptions(**(_RENDER | render))
        logprobs = [TokenLogprob(letter, -1.0, [(i, -1.0) for i in range(20)])] if made.logprobs else None
        renderer = Renderer(made, StopConditions(max_tokens=1 << 20, strings=stops), pack_tokens([1]), vocabulary)
        began = time.perf_counter()
        for _ in range(tokens):
            renderer.push([letter], logprobs)
        micros = (time.perf_counter() - began) / tokens * 1e6
        worst = max(worst, micros)
        print(f"  {name:<32} {micros:>10,.1f} us/token", flush=True)
    return worst


def _request(sampling: SamplingParams, stop: StopConditions, render: RenderOptions, prompt: int) -> GenerateRequest:
    return GenerateRequest(
        id="r", stream=1, reply_to="f", model="m", phase="aggregated", prompt=pack_tokens([7] * prompt),
        sampling=sampling, stop=stop, render=render, timeout_s=10.0,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="one body of each kind, few tokens")
    args = parser.parse_args()
    print(f"{machine()}; bounds: {BodyBounds()}\n")
    longest = uvloop.run(stalls(1 if args.quick else 3))
    factor = sampler_costs(20 if args.quick else 100)
    rendered = renderer_costs(2_000 if args.quick else 20_000)
    report(
        [
            Row("any body: longest stall of the event loop, ms", longest, MOST_STALL),
            Row("any field: a sampled token, times one with a temperature", factor, 1.5),
            Row("any field: a rendered token, us", rendered, 100),
        ]
    )


if __name__ == "__main__":
    main()
