"""What a TensorRT-LLM worker spends per token around `generate_async`: cursor, rendering, link.

    python benchmarks/trtllm.py [--quick]

Real processes, the double of tests/doubles with dummy weights (tokens are made up, in a process of their own). The worker's
CPU time is read from /proc; what the double's own client side takes of it, which stands for TensorRT-LLM's, is measured
beside it by a process that does nothing but iterate results, and taken off. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import uvloop
from budget import Row, machine, report
from plane import TOKENS, cluster, measured

from dynserve.config import TINY_MODEL

DOUBLES = Path(__file__).parent.parent / "tests" / "doubles"
BUDGET = 25.0  # us per token
ENGINE: dict[str, Any] = {
    "load_format": "DUMMY", "max_batch_size": 128, "kv_cache_config": {"max_tokens": 1_000_000},
    "enable_iter_perf_stats": True,
}  # fmt: skip


async def bare(clients: int, seconds: float) -> float:
    """Microseconds of CPU per token of a client that only iterates."""
    sys.path.insert(0, str(DOUBLES))
    package: Any = __import__("tensorrt_llm")
    llm = package.LLM(TINY_MODEL, skip_tokenizer_init=True, **ENGINE)
    stop, tokens = 0.0, 0

    async def one() -> None:
        nonlocal tokens
        while time.perf_counter() < stop:
            params = package.SamplingParams(
                end_id=-1, pad_id=0, detokenize=False, max_tokens=TOKENS, temperature=0.0, return_perf_metrics=True
            )
            async for result in llm.generate_async(list(range(300, 350)), params, streaming=True):
                tokens += len(result.outputs[0].token_ids_diff)

    for length in (0.5, seconds):
        stop, tokens, spent = time.perf_counter() + length, 0, time.process_time()
        await asyncio.gather(*(one() for _ in range(clients)))
    used = time.process_time() - spent
    llm.shutdown()
    return used / tokens * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="a tenth of the time, for a first look")
    parser.add_argument("--bare", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    seconds = 1.0 if args.quick else 8.0
    if args.bare:
        print(uvloop.run(bare(args.bare, seconds)))
        return
    os.environ["PYTHONPATH"] = str(DOUBLES)
    print(f"{TOKENS} tokens per stream, 50 words of prompt, {machine()}\n")
    worst = 0.0
    for step_ms in (5, 0):
        os.environ["TRTLLM_DOUBLE_STEP_MS"] = str(step_ms)
        with cluster(["prefill_and_decode"], ENGINE, executor="trtllm") as setup:
            for clients in (32, 128):
                values = measured(setup, clients, seconds, TOKENS, stream=True)
                command = [sys.executable, __file__, "--bare", str(clients), *(["--quick"] if args.quick else [])]
                theirs = float(subprocess.check_output(command))
                own = values["worker"] - theirs
                worst = max(worst, own)
                print(
                    f"step {step_ms} ms, {clients:>3} streams   worker {values['worker']:6.1f}, of which the double's client "
                    f"{theirs:6.1f}, own {own:6.1f}  us/token   {values['per second']:>9,.0f} tokens/s", flush=True,
                )  # fmt: skip
    report([Row("trtllm worker: own us/token", worst, BUDGET)])


if __name__ == "__main__":
    main()
