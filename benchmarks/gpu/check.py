"""Whether answers on a GPU are right. Prints a line for each check, and ends with exit code 1 when one fails.

    python benchmarks/gpu/check.py [MODEL [CHECK...]]

MODEL is a folder that `dynserve make-model` wrote, for the checks in bfloat16; the tiny model serves for the others.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
import uvloop
from engine import Times, prompt_of, request, run

from dynserve.config import TINY_MODEL, WorkerConfig
from dynserve.errors import ConfigError
from dynserve.executors.base import Executor, Output, open_executor
from dynserve.executors.engine import Engine
from dynserve.executors.scheduler import Sequence
from dynserve.executors.torch.cuda.runner import CudaRunner
from dynserve.executors.torch.sampler import sample
from dynserve.wire.requests import GenerateRequest, Grammar, PriorOutput, SamplingParams, StopConditions

GOLDEN = Path(__file__).parents[2] / "tests" / "golden" / "tiny_model.json"
Opener = Callable[..., Awaitable[Executor]]


@asynccontextmanager
async def opener() -> AsyncIterator[Opener]:
    async with AsyncExitStack() as stack:
        count = 0

        async def make(model: Path, **fields: Any) -> Executor:
            nonlocal count
            count += 1
            engine = {"num_blocks": 2000, "max_num_tokens": 2048} | fields.pop("engine", {})
            config = WorkerConfig(model_path=str(model), override_engine_args=json.dumps(engine), **fields)
            return await stack.enter_async_context(open_executor(config, f"w{count}"))

        yield make


async def golden(make: Opener, model: Path) -> str:
    """The tiny model in float32 on the GPU says what the CPU said, alone and all at once."""
    cases = json.loads(GOLDEN.read_text())
    executor = await make(TINY_MODEL, device="cuda", dtype="float32")
    prompts = [case["prompt"] for case in cases]
    found = [times.tokens for times in await run(executor, prompts, 24)]
    wrong = sum(tokens != case["answer"] for tokens, case in zip(found, cases, strict=True))
    assert not wrong, f"{wrong} of {len(cases)} differ"
    return f"{len(cases)} answers"


async def one(executor: Executor, asked: GenerateRequest) -> tuple[list[int], Output]:
    last: list[Output] = []
    times = Times()

    def sink(output: Output) -> None:
        last.append(output)
        times(output)

    executor.submit(asked, sink)
    await times.done
    return times.tokens, last[-1]


async def disaggregated(make: Opener, model: Path) -> str:
    """Prefill and decode on two executors say what one says, in bfloat16, greedy and drawn."""
    both, prefill, decode = await make(model), await make(model), await make(model)
    number = 0
    for length in (1, 5, 31, 32, 33, 100, 256, 257, 700, 1999, 3000):
        for sampling in (SamplingParams(temperature=0.0), SamplingParams(temperature=0.8, top_p=0.9, seed=length)):
            asked = request(prompt_of(length), 40, sampling)
            expected, _ = await one(both, asked)
            first, handed = await one(prefill, msgspec.structs.replace(asked, phase="prefill"))
            assert handed.handoff is not None
            decoding = msgspec.structs.replace(asked, phase="decode", prior=PriorOutput(first), handoff=handed.handoff)
            rest, _ = await one(decode, decoding)
            assert first + rest == expected, f"{length} tokens, {sampling}"
            number += 1
    assert isinstance(decode, Engine) and decode.counters()["kv_transfers_done_total"] == number
    return f"{number} answers of 40 tokens"


async def eager(make: Opener, model: Path) -> str:
    """Captured graphs compute exactly what the same kernels do one by one."""
    graphs, plain = await make(model), await make(model)
    runners = [r for r in _runners if isinstance(r, CudaRunner)]
    runners[-1]._capture._graphs.clear()
    for length, crowd in ((3, 1), (50, 1), (200, 3), (400, 6), (900, 2), (20, 30)):
        prompts = [prompt_of(length + i) for i in range(crowd)]
        found = [[times.tokens for times in await run(executor, prompts, 30)] for executor in (graphs, plain)]
        assert crowd > 1 or found[0] == found[1], f"{crowd} prompts of {length} tokens"
    return "answers of single streams are the same"


async def cancelled(make: Opener, model: Path) -> str:
    """After 500 requests, a third of them given up, nothing is held."""
    executor = await make(model, engine={"num_blocks": 600, "max_batch_size": 64})
    gate, draw = asyncio.Semaphore(80), random.Random(3)

    async def ask(i: int) -> None:
        async with gate:
            times = Times()
            ticket = executor.submit(request(prompt_of(draw.randint(1, 900)), draw.randint(1, 60)), times)
            if i % 3 == 0:
                await asyncio.sleep(draw.random() * 0.05)
                executor.abort(ticket)
            else:
                await times.done

    await asyncio.gather(*(ask(i) for i in range(500)))
    for _ in range(200):
        await asyncio.sleep(0.01)
        load_ = executor.load()
        if load_.free_blocks == load_.total_blocks and not load_.running and not load_.waiting:
            return f"{load_.total_blocks} blocks are free"
    raise AssertionError(f"{load_}")


async def samplers(make: Opener, model: Path) -> str:
    """The device draws the tokens that the host draws from the same logits."""
    await make(model)
    runner = next(r for r in reversed(_runners) if isinstance(r, CudaRunner))
    fields = [
        SamplingParams(temperature=0.0), SamplingParams(temperature=1.0, seed=1), SamplingParams(temperature=0.7, seed=2, top_k=50),
        SamplingParams(temperature=1.0, seed=3, top_p=0.5), SamplingParams(temperature=1.3, seed=4, min_p=0.1),
        SamplingParams(temperature=0.9, seed=5, top_k=400, top_p=0.8, min_p=0.02), SamplingParams(temperature=2.0, seed=6, top_p=0.99),
        SamplingParams(temperature=0.8, seed=7, top_k=3000),
    ]  # fmt: skip
    differ = total = 0
    for spread in (0.5, 2.0, 8.0):
        for length in range(1, 40):
            logits = torch.randn(len(fields), runner._forward.logits.shape[1], device="cuda") * spread
            sequences = [
                Sequence(i, request(prompt_of(length), 9, s), 32, frozenset(), 0.0) for i, s in enumerate(fields)
            ]
            with torch.inference_mode(), runner._on_stream():
                runner._drawing.prepare(sequences, [length] * len(fields), range(len(fields)), len(fields))
                runner._forward.logits[: len(fields)] = logits
                drawn = runner._drawing.draw(sequences, [-1] * len(fields))
                torch.cuda.synchronize()
                found = [s.token_id for s in drawn.read()]
            expected = [s.token_id for s in sample(logits.cpu(), sequences)]
            differ += sum(a != b for a, b in zip(found, expected, strict=True))
            total += len(fields)
    assert differ <= total // 200, f"{differ} of {total} differ"  # sums of float32 in another order move a cut's edge
    return f"{total - differ} of {total} draws are the same"


async def grammars(make: Opener, model: Path) -> str:
    """Answers follow their grammar, beside others that have none."""
    executor = await make(TINY_MODEL, device="cuda", dtype="bfloat16")
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"],
    }
    tokenizer_file = TINY_MODEL / "tokenizer.json"
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    ids = tokenizer.encode("Give me an object.").ids
    asked = [
        msgspec.structs.replace(
            request(ids, 120, SamplingParams(temperature=0.5, seed=i)), stop=StopConditions(max_tokens=120),
            grammar=Grammar(kind="json", text=json.dumps(schema | {"additionalProperties": False})) if i % 2 else None,
        )
        for i in range(12)
    ]  # fmt: skip
    answers = await asyncio.gather(*(one(executor, r) for r in asked))
    whole = [
        tokenizer.decode(tokens)
        for (tokens, last), r in zip(answers, asked, strict=True)
        if r.grammar and last.reason == "stop"
    ]
    assert whole and all(set(json.loads(text)) == {"a", "b"} for text in whole), whole
    return f"{len(whole)} answers, {whole[0]!r} for one"


async def too_large(make: Opener, model: Path) -> str:
    """A GPU that is too small is a sentence that says what to lower."""
    taken = torch.empty(torch.cuda.mem_get_info()[0] - (2 << 30), dtype=torch.uint8, device="cuda")
    try:
        await make(model, engine={"num_blocks": None, "max_num_tokens": 16384})
    except ConfigError as error:
        return str(error)
    finally:
        del taken
        torch.cuda.empty_cache()
    raise AssertionError("it started")


_runners: list[Any] = []


def watch_runners() -> None:
    """Keeps every runner that is made, for the checks that look into one."""
    made = CudaRunner.__init__

    def noted(self: CudaRunner, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        _runners.append(self)

    CudaRunner.__init__ = noted  # type: ignore[method-assign]


async def main(model: Path) -> int:
    failed = 0
    watch_runners()
    for check in (golden, disaggregated, eager, cancelled, samplers, grammars, too_large):
        if sys.argv[2:] and check.__name__ not in sys.argv[2:]:
            continue
        name = (check.__doc__ or "").strip()
        try:
            async with opener() as make:
                print(f"pass  {name}  ({await check(make, model)})", flush=True)
        except Exception as error:
            failed += 1
            print(f"FAIL  {name}  {type(error).__name__}: {str(error)[:600]}", flush=True)
        _runners.clear()
        torch.cuda.empty_cache()
    return failed


if __name__ == "__main__":
    sys.exit(1 if uvloop.run(main(Path(sys.argv[1] if len(sys.argv) > 1 else TINY_MODEL))) else 0)
