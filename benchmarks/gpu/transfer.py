"""KV transfers between two GPUs of one machine: how long, how many GB/s, and what happens when a side dies.

    python benchmarks/gpu/transfer.py [--carriers cuda-ipc,nixl,tcp] [--shapes 0.5b,8b] [--runs 20]

Two processes with a KV cache each, on cuda:0 and cuda:1; the second fetches hand-offs of the first, as a decode worker does:
asking over TCP, moving, confirming. Beside it the time of a plain copy of as many bytes in one piece, by torch.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import signal
import statistics
import time
from typing import Any, NamedTuple

import msgspec
import torch
import uvloop

from dynserve.errors import HandoffError
from dynserve.executors.carriers import Carrier
from dynserve.executors.handoff import HandoffTable
from dynserve.executors.torch.attention import KvCache
from dynserve.executors.transceiver import TcpTransceivers
from dynserve.wire.requests import GenerateRequest, Handoff, RenderOptions, SamplingParams, StopConditions, pack_tokens

BLOCK = 32
TOKENS = (128, 1024, 4096, 8192, 32768)


class Model(NamedTuple):
    layers: int
    kv_heads: int
    head_dim: int


SHAPES = {"0.5b": Model(24, 2, 64), "8b": Model(32, 8, 128)}


def cache_of(model: Model, device: int, tokens: int) -> KvCache:
    return KvCache(
        num_blocks=tokens // BLOCK + 64, block_size=BLOCK, num_layers=model.layers, kv_heads=model.kv_heads,
        head_dim=model.head_dim, dtype=torch.bfloat16, device=torch.device("cuda", device), model="m",
    )  # fmt: skip


def carriers_of(name: str, cache: KvCache, model: Model, worker: str) -> list[Carrier]:
    from dynserve.executors.torch.cuda.kernels import Kernels, Shape
    from dynserve.executors.torch.cuda.peer import PeerCarrier
    from dynserve.executors.torch.nixl import NixlCarrier

    if name == "cuda-ipc":
        torch.cuda.set_device(cache.memory.device)
        shape = Shape(model.kv_heads, model.kv_heads, model.head_dim, 64, 64, 64, model.layers, BLOCK, 1e-6, False)
        return [PeerCarrier(cache, Kernels(shape, PeerCarrier.kernel_names))]
    return [NixlCarrier(cache, worker)] if name == "nixl" else []


def request() -> GenerateRequest:
    return GenerateRequest(
        id="r", stream=1, reply_to="nobody", model="m", prompt=pack_tokens([1]), phase="aggregated",
        sampling=SamplingParams(), timeout_s=60.0, stop=StopConditions(max_tokens=1),
        render=RenderOptions(kind="completion", response_id="r", model="m", created=0),
    )  # fmt: skip


def owner(carrier: str, model: Model, tokens: int, pipe: Any) -> None:
    async def run() -> None:
        cache = cache_of(model, 0, tokens)
        cache.memory.copy_(torch.randint(0, 250, cache.memory.shape, dtype=torch.bfloat16, device="cuda:0"))
        cache.memory[:, 0, 0, 0, 0, 0] = torch.arange(cache.num_blocks, dtype=torch.float32, device="cuda:0") % 251
        torch.cuda.synchronize(0)
        table = HandoffTable("owner", 600, lambda ticket, how: None)
        carriers = carriers_of(carrier, cache, model, f"owner-{os.getpid()}")
        async with TcpTransceivers(carriers).open(table, cache, "127.0.0.1") as transceiver:
            pipe.send("ready")
            ticket = 0
            while (blocks := await asyncio.to_thread(pipe.recv)) is not None:
                ticket += 1
                handoff = table.open(ticket, request(), blocks, 0, transceiver.state())
                pipe.send((msgspec.msgpack.encode(handoff), cache.memory[blocks].double().sum().item()))

    uvloop.run(run())


async def measure(carrier: str, shape: str, runs: int) -> None:
    model = SHAPES[shape]
    pipe, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=owner, args=(carrier, model, max(TOKENS), theirs))
    process.start()
    cache = cache_of(model, 1, max(TOKENS))
    table = HandoffTable("taker", 600, lambda ticket, how: None)
    carriers = carriers_of(carrier, cache, model, f"taker-{os.getpid()}")
    async with TcpTransceivers(carriers).open(table, cache, "127.0.0.1") as transceiver:
        await asyncio.to_thread(pipe.recv)
        for tokens in TOKENS:
            number = tokens // BLOCK
            theirs_, ours = list(range(40, 40 + number)), [(i * 7) % number for i in range(number)]
            if number % 7 == 0:
                ours = list(range(number))
            times = []
            for _ in range(runs if carrier != "tcp" else 5):
                pipe.send(theirs_)
                packed, expected = await asyncio.to_thread(pipe.recv)
                handoff = msgspec.msgpack.decode(packed, type=Handoff)
                began = time.perf_counter()
                await transceiver.fetch(handoff, ours, 0)
                times.append(time.perf_counter() - began)
                torch.cuda.synchronize(1)
            found = cache.memory[ours].double().sum().item()
            right = found == expected and bool(
                (
                    cache.memory[ours][:, 0, 0, 0, 0, 0].cpu()
                    == torch.tensor([b % 251 for b in theirs_], dtype=torch.bfloat16)
                ).all()
            )
            size = number * cache.block_bytes
            seconds = statistics.median(times[2:])
            print(
                f"{shape} {carrier} {tokens} tokens, {size / 1e6:.1f} MB: {seconds * 1e6:.0f} us "
                f"({min(times) * 1e6:.0f}..{max(times) * 1e6:.0f}), first {times[0] * 1e3:.1f} ms, {size / seconds / 1e9:.1f} GB/s, right {right}",
                flush=True,
            )
        await idle(transceiver, pipe, cache)
        await death(transceiver, pipe, process, cache)


async def idle(transceiver: Any, pipe: Any, cache: KvCache) -> None:
    """A transfer after a pause: what was open has been closed."""
    for _ in range(2):
        await asyncio.sleep(2.5)
        pipe.send(list(range(4)))
        handoff = msgspec.msgpack.decode((await asyncio.to_thread(pipe.recv))[0], type=Handoff)
        began = time.perf_counter()
        await transceiver.fetch(handoff, list(range(4)), 0)
        print(f"    128 tokens after a pause: {(time.perf_counter() - began) * 1e6:.0f} us", flush=True)


async def death(transceiver: Any, pipe: Any, process: Any, cache: KvCache) -> None:
    """The owner is killed in the middle of a transfer; the taker lives on."""
    number = max(TOKENS) // BLOCK
    for delay in (0.0005,):
        pipe.send(list(range(number)))
        handoff = msgspec.msgpack.decode((await asyncio.to_thread(pipe.recv))[0], type=Handoff)
        fetching = asyncio.ensure_future(transceiver.fetch(handoff, list(range(number)), 0))
        await asyncio.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        began = time.perf_counter()
        try:
            await asyncio.wait_for(fetching, 20)
            outcome = "arrived"
        except (HandoffError, TimeoutError) as error:
            outcome = f"{type(error).__name__}: {str(error)[:90]}"
        took = time.perf_counter() - began
    process.join()
    free = [round(torch.cuda.mem_get_info(0)[0] / 1e9, 1)]
    await asyncio.sleep(3)
    free.append(round(torch.cuda.mem_get_info(0)[0] / 1e9, 1))
    alive = bool((torch.ones(10, device="cuda:1") + 1).sum() == 20) and bool(cache.memory[:4].float().isfinite().all())
    print(
        f"    owner killed: {outcome} after {took * 1e3:.0f} ms; taker's GPU works: {alive}; free on cuda:0 {free} GB",
        flush=True,
    )


def plain_copies(runs: int) -> None:
    for size in (1 << 20, 12 << 20, 48 << 20, 64 << 20, 256 << 20, 400 << 20):
        source = torch.randint(0, 255, (size,), dtype=torch.uint8, device="cuda:0")
        target = torch.empty(size, dtype=torch.uint8, device="cuda:1")
        times = []
        for _ in range(runs):
            torch.cuda.synchronize(0)
            torch.cuda.synchronize(1)
            began = time.perf_counter()
            target.copy_(source)
            torch.cuda.synchronize(0)
            torch.cuda.synchronize(1)
            times.append(time.perf_counter() - began)
        seconds = statistics.median(times[3:])
        print(f"plain copy {size / 1e6:.1f} MB: {seconds * 1e6:.0f} us, {size / seconds / 1e9:.1f} GB/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--carriers", default="cuda-ipc,nixl,tcp")
    parser.add_argument("--shapes", default="0.5b,8b")
    parser.add_argument("--runs", type=int, default=20)
    args = parser.parse_args()
    multiprocessing.set_start_method("spawn")
    print([torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())], flush=True)
    plain_copies(args.runs)
    for shape in args.shapes.split(","):
        for carrier in args.carriers.split(","):
            try:
                uvloop.run(measure(carrier, shape, args.runs))
            except Exception as error:
                print(f"{shape} {carrier}: {type(error).__name__}: {error}", flush=True)


if __name__ == "__main__":
    main()
