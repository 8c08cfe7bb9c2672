"""The torch executor on one GPU, without a frontend: how fast it is by itself, and whether it is right.

    python benchmarks/gpu/engine.py MODEL [--what check,single,concurrency,prefill,context,memory,profile]

MODEL is a folder that `dynserve make-model` wrote. Prompts are random token ids, greedy, `ignore_eos`. `check` compares the
kernels' logits with those of torch's operations in float32 on the same weights.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from dynserve.config import WorkerConfig
from dynserve.executors.base import Executor, Output, open_executor
from dynserve.wire.requests import GenerateRequest, RenderOptions, SamplingParams, StopConditions, pack_tokens

GUIDE = ((6, 50), (6, 150), (25, 100), (64, 50))  # prompt and answer tokens of the guide's tests
random.seed(1)


def request(prompt: list[int], new: int, sampling: SamplingParams | None = None) -> GenerateRequest:
    return GenerateRequest(
        id=f"r{random.getrandbits(60):x}", stream=1, reply_to="nobody", model="m", prompt=pack_tokens(prompt),
        phase="aggregated", sampling=sampling or SamplingParams(temperature=0.0), timeout_s=60.0,
        stop=StopConditions(max_tokens=new, ignore_eos=True),
        render=RenderOptions(kind="completion", response_id="r", model="m", created=0),
    )  # fmt: skip


def prompt_of(length: int) -> list[int]:
    return [random.randrange(1000, 120_000) for _ in range(length)]


class Times:
    """When the tokens of one request came."""

    def __init__(self) -> None:
        self.began, self.tokens = time.perf_counter(), list[int]()
        self.at: list[float] = []
        self.done = asyncio.get_running_loop().create_future()

    def __call__(self, output: Output) -> None:
        if output.error is not None:
            self.done.set_exception(output.error)
            return
        self.at += [time.perf_counter()] * len(output.token_ids)
        self.tokens += output.token_ids
        if output.reason is not None:
            self.done.set_result(None)

    @property
    def whole(self) -> float:
        return self.at[-1] - self.began

    @property
    def first(self) -> float:
        return self.at[0] - self.began


async def run(
    executor: Executor, prompts: list[list[int]], new: int, sampling: SamplingParams | None = None
) -> list[Times]:
    running = []
    for prompt in prompts:
        times = Times()
        executor.submit(request(prompt, new, sampling), times)
        running.append(times)
    await asyncio.gather(*(times.done for times in running))
    return running


def median(values: list[float]) -> str:
    values = sorted(values)
    return f"{statistics.median(values) * 1e3:.2f} ms ({values[0] * 1e3:.2f}..{values[-1] * 1e3:.2f})"


async def single(executor: Executor) -> None:
    for sampling, name in ((None, "greedy"), (SamplingParams(temperature=0.7, seed=1), "temperature 0.7"),
                           (SamplingParams(temperature=0.7, top_p=0.9, top_k=50, seed=1), "top-k 50, top-p 0.9")):  # fmt: skip
        await run(executor, [prompt_of(25)], 50, sampling)
        for length, new in GUIDE:
            found = [(await run(executor, [prompt_of(length)], new, sampling))[0] for _ in range(10)]
            whole = statistics.median(t.whole for t in found)
            first = statistics.median(t.first for t in found)
            print(
                f"single {name} {length}/{new}: {median([t.whole for t in found])} {new / whole:.0f} tok/s; "
                f"TTFT {first * 1e3:.2f} ms, ITL {(whole - first) / (new - 1) * 1e6:.0f} us", flush=True,
            )  # fmt: skip


async def concurrency(executor: Executor) -> None:
    for number in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        found: list[tuple[float, float, float]] = []
        for repeat in range(4):
            began = time.perf_counter()
            times = await run(executor, [prompt_of(128) for _ in range(number)], 128)
            if repeat:
                whole = max(t.at[-1] for t in times) - began
                itl = statistics.mean((t.at[-1] - t.at[0]) / 127 for t in times)
                found.append((whole, statistics.mean(t.first for t in times), itl))
        whole, first, itl = (statistics.median(column) for column in zip(*found, strict=True))
        print(
            f"concurrency {number}: {number * 128 / whole:.0f} tok/s, TTFT mean {first * 1e3:.1f} ms, ITL mean {itl * 1e3:.3f} ms",
            flush=True,
        )


async def prefill(executor: Executor) -> None:
    for length in (6, 64, 128, 256, 1024, 4096, 16384):
        found = [(await run(executor, [prompt_of(length)], 1))[0].first for _ in range(7)][2:]
        print(f"prefill {length}: TTFT {median(found)}", flush=True)


async def context(executor: Executor) -> None:
    for length in (200, 1000, 4000, 16000):
        found = []
        for _ in range(3):
            times = (await run(executor, [prompt_of(length)], 100))[0]
            found.append((times.whole - times.first) / 99)
        print(f"decode behind {length} tokens: {median(found)} a token", flush=True)


@torch.inference_mode()
def check(folder: Path) -> None:
    """Logits of prompts and of the steps behind them, by the kernels and by torch in float32."""
    from dynserve.executors.engine_args import EngineArgs, KvCacheOptions
    from dynserve.executors.kv_blocks import BlockManager
    from dynserve.executors.scheduler import Scheduler, Sequence
    from dynserve.executors.torch.attention import KvCache as KvBlocks
    from dynserve.executors.torch.loading import ComputeTarget, load
    from dynserve.executors.torch.model import Transformer

    args = EngineArgs(max_batch_size=64, max_num_tokens=4096, kv_cache_config=KvCacheOptions(max_tokens=40_000))
    _, _, runner = load(folder, args, ComputeTarget.choose("cuda", "bfloat16"))
    exact, cache, _ = load(folder, args, ComputeTarget.choose("cuda", "float32"))
    ordinary = Transformer(exact.config, folder, torch.device("cuda"), torch.bfloat16)
    theirs = KvBlocks(
        num_blocks=1250, block_size=32, num_layers=exact.config.num_layers, kv_heads=exact.config.num_kv_heads,
        head_dim=exact.config.head_dim, dtype=torch.bfloat16, device=exact.device, model="m",
    )  # fmt: skip
    scheduler = Scheduler(
        BlockManager(1200, 32), max_batch_size=64, max_num_tokens=4096, max_seq_len=4096, chunked=True
    )
    errors: dict[str, list[float]] = {}
    usual: list[float] = []  # errors of torch's operations in bfloat16
    wrong = total = 0
    for lengths in ((6,), (64,), (5, 9), (1, 2, 3, 100), tuple(range(2, 40)), (1500, 700, 3), (3000,), (37,) * 60):
        for number, length in enumerate(lengths):
            asked = request(prompt_of(length), 12)
            scheduler.add(Sequence(number, asked, 32, frozenset(), 0.0))
        while not scheduler.idle:
            step = runner.begin(scheduler.schedule(0.0), None)
            sampled = step.result()
            rows = [s for s in step.work if s.samples]
            layout, owners = cache.lay_out(step.work)
            logits = exact.logits(exact.forward(cache, layout)[layout.sampling])
            rough = ordinary.logits(ordinary.forward(theirs, theirs.lay_out(step.work)[0])[layout.sampling])
            usual += [float(e) for e in (rough - logits).norm(dim=-1) / logits.norm(dim=-1)]
            order = [step.work[owner] for owner in owners]
            size = sum(s.size for s in step.work)
            kind = (
                f"{size if size <= 4 and all(s.size == 1 for s in step.work) else 'graph' if size <= 256 else 'long'}"
            )
            for row, slice_ in enumerate(rows):
                expected, found = logits[order.index(slice_)], runner._forward.logits[row]  # type: ignore[attr-defined]
                errors.setdefault(kind, []).append(float((found - expected).norm() / expected.norm()))
                wrong += int(found.argmax()) != int(expected.argmax())
                total += 1
            scheduler.commit(step.work, sampled)
    for kind, found_errors in errors.items():
        print(
            f"check {kind}: relative error of logits {max(found_errors):.1e} at most, {statistics.mean(found_errors):.1e} on average, {len(found_errors)} rows"
        )
    print(
        f"check: torch's own operations in bfloat16: {max(usual):.1e} at most, {statistics.mean(usual):.1e} on average"
    )
    print(f"check: the likeliest token differs from float32's in {wrong} of {total}")
    assert max(max(e) for e in errors.values()) < 0.05


async def memory(executor: Executor, seconds: float) -> None:
    """Streams of 128 for a while: nothing may grow."""
    import psutil

    process = psutil.Process()
    end, began = time.monotonic() + seconds, time.monotonic()
    said = 0.0
    while time.monotonic() < end:
        await run(executor, [prompt_of(random.randrange(10, 400)) for _ in range(128)], random.randrange(20, 200))
        if time.monotonic() - said > seconds / 6:
            said = time.monotonic()
            print(
                f"memory after {said - began:.0f} s: host {process.memory_info().rss / 1e6:.0f} MB, "
                f"GPU {torch.cuda.memory_allocated() / 1e6:.0f} MB allocated, {torch.cuda.memory_reserved() / 1e6:.0f} MB reserved",
                flush=True,
            )


def breakdown(path: Path, name: str) -> None:
    """GPU time by kernel, of what was recorded into a file of torch's profiler."""
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("cat") == "kernel"]
    if not events:
        return
    span = max(e["ts"] + e["dur"] for e in events) - min(e["ts"] for e in events)
    busy: dict[str, tuple[int, float]] = {}
    for event in events:
        number, micros = busy.get(event["name"][:60], (0, 0.0))
        busy[event["name"][:60]] = number + 1, micros + event["dur"]
    print(f"profile {name}: {len(events)} kernels, busy {sum(b for _, b in busy.values()):.0f} us of {span:.0f}")
    for kernel, (number, micros) in sorted(busy.items(), key=lambda item: -item[1][1])[:12]:
        print(f"    {micros:9.0f} us  {number:6} x {micros / number:7.2f}  {kernel}")


async def profiled(executor: Executor, folder: Path) -> None:
    from torch.profiler import ProfilerActivity, profile

    for number, length, new in (
        (1, 64, 40),
        (4, 64, 40),
        (16, 64, 40),
        (64, 64, 40),
        (256, 64, 40),
        (1, 1024, 1),
        (1, 16000, 1),
    ):
        await run(executor, [prompt_of(length) for _ in range(number)], new)
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            await run(executor, [prompt_of(length) for _ in range(number)], new)
        path = folder / f"trace_{number}_{length}.json"
        recorded.export_chrome_trace(str(path))
        breakdown(path, f"{number} streams of {length} + {new} tokens")
        path.unlink()


KINDS = {"single": single, "concurrency": concurrency, "prefill": prefill, "context": context}


async def measure(args: argparse.Namespace) -> None:
    engine: dict[str, Any] = json.loads(args.engine)
    config = WorkerConfig(model_path=str(args.model), override_engine_args=json.dumps(engine))
    began = time.perf_counter()
    async with open_executor(config) as executor:
        print(f"ready after {time.perf_counter() - began:.1f} s", flush=True)
        await run(executor, [prompt_of(30)], 30)
        for what in args.what.split(","):
            if what == "memory":
                await memory(executor, args.seconds)
            elif what == "profile":
                await profiled(executor, Path("/tmp"))
            elif what != "check":
                await KINDS[what](executor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--what", default="check,single,concurrency,prefill,context")
    parser.add_argument("--engine", default="{}", help="engine options, JSON")
    parser.add_argument("--seconds", type=float, default=300.0, help="of the memory test")
    args = parser.parse_args()
    logging.basicConfig(level="INFO", format="%(message)s")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    if "check" in args.what.split(","):
        check(args.model)
    if args.what != "check":
        asyncio.run(measure(args))


if __name__ == "__main__":
    main()
