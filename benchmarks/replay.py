"""Replays request traces against a cluster of simulated workers in this process, on a virtual clock, and compares policies.

    python benchmarks/replay.py --traces DIR [--trace mooncake ...] [--load 0.5 0.8 1.1] [--policy kv round-robin ...]
    python benchmarks/replay.py --traces DIR --sweep          which weights the policy `kv` should have

Frontend, router, planes, workers, scheduler and block managers are the real ones; only the engine's arithmetic and the
passing of time are made up: an 8B model with 8 KV heads on one 80 GB GPU per worker (20,000 prefill tokens/s, decode
steps of 5 ms + 20 us per sequence + 40 us per thousand tokens of context, 480,000 tokens of KV cache, 50 GB/s between GPUs).

Load 1 is the rate of calls at which the prefill or the decode pool would be busy all the time if nothing that could be reused
were ever computed twice and every step were full. `kv` lets decode workers prefill short remainders, which takes work off
the prefill pool: `kv:local=0` is `kv` without that. A policy is a router mode, `package.module:Class`, `oracle` (`kv` that reads
the workers' caches and progress instead of being told), or a mode with options: `kv:overlap=4,local=256`.

The SLO of the goodput column: first token within 2 s, and then 25 tokens/s.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, get_args

import msgspec
import traces
from traces import Call, Demand, Paced, Trace

from dynserve import Cluster, clock
from dynserve.config import RouterMode
from dynserve.errors import DynserveError
from dynserve.executors.engine_args import EngineArgs
from dynserve.frontend.inference import InferenceRequest
from dynserve.frontend.reply import Record
from dynserve.routing.policy import Candidate, Kv, PolicyChoice, PolicyInput
from dynserve.routing.router import PlacementQuery
from dynserve.wire.requests import Generation, RenderOptions, SamplingParams, StopConditions

ENGINE = {
    "leap": 64, "max_seq_len": 262_144, "max_batch_size": 256, "max_num_tokens": 8192, "prefill_us_per_token": 50.0,
    "step_ms": 5.0, "decode_us_per_sequence": 20.0, "decode_us_per_ktoken": 40.0, "transfer_gb_per_s": 50.0,
    "bytes_per_token": 131_072, "cache_transceiver_config": {"kv_transfer_timeout_ms": 3_600_000},
}  # fmt: skip
ENGINE_ARGS = msgspec.convert(ENGINE, EngineArgs)
KV_TOKENS = 480_000
SLO_TTFT, SLO_ITL = 2.0, 0.04  # seconds
OPTIONS = {
    "overlap": "router_overlap_weight", "prefill": "router_prefill_weight", "transfer": "router_transfer_weight",
    "herd": "router_herd_factor", "temperature": "router_temperature", "local": "local_prefill_tokens",
    "toll": "local_prefill_toll",
}  # fmt: skip


class Answered(NamedTuple):
    """One call's end. A call that failed has infinite times."""

    at: float
    ttft: float
    total: float
    output: int
    prompt: int
    cached: int
    gap: float  # longest time between two tokens; of tokens that came in one piece, their mean
    prefiller: str  # the worker that computed the prompt, when it was a prefill worker


class Result(NamedTuple):
    """One run."""

    trace: str
    policy: str
    load: float
    seed: int
    rate: float  # calls per second
    reusable: float  # share of prompt tokens that one cache without end would have had
    calls: list[Answered]  # those that came while it was measured
    pairs: int
    wall_s: float


class Job(NamedTuple):
    folder: Path
    trace: str
    policy: str
    load: float
    seed: int
    calls: int
    pairs: int
    speedup: float | None


class Oracle:
    """`Kv` with the truth: what each worker's block manager holds this moment, what its engine has been given (queued
    commands included), and how far it is with each prompt."""

    uses_overlap = True

    def __init__(self, inner: Kv, cluster: Cluster) -> None:
        self._inner = inner
        self._engines = {worker.id: worker.executor for worker in cluster.workers}

    def overlaps(self, ask: PlacementQuery, size: int) -> dict[str, int]:
        """Instead of the router's own: in caches, or on the way into them."""
        hashes, found = ask.reusable(size), {}
        for worker, engine in self._engines.items():
            blocks = engine._scheduler.blocks.overlap(hashes)  # type: ignore[attr-defined]
            for sequence, _ in engine._live.values():  # type: ignore[attr-defined]
                if not sequence.generated:
                    blocks = max(blocks, _common(sequence.hashes, hashes))
            if blocks:
                found[worker] = blocks
        return found

    def choose(self, policy_input: PolicyInput, candidates: Sequence[Candidate]) -> PolicyChoice:
        for c in candidates:
            engine: Any = self._engines[c.worker]
            manager = engine._scheduler.blocks
            c.waiting_prefill = (
                sum(
                    max(0, len(s.tokens) - max(s.computed, manager.overlap(s.hashes) * manager.block_size))
                    for s, _ in engine._live.values()
                    if not s.generated
                )
                / manager.block_size
            )
        return self._inner.choose(policy_input, candidates)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Leading blocks that two prompts share: equal hashes at a place mean equal ones before it."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[middle - 1] == other[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low


def run(job: Job) -> Result:
    logging.getLogger("dynserve").setLevel(logging.ERROR)
    began = time.perf_counter()
    trace = traces.load(job.folder, job.trace, job.calls, job.seed)
    wanted = traces.demand(trace)
    rate = job.load * saturation(wanted, job.pairs)
    if job.speedup is not None:
        rate = job.speedup * (len(trace.calls) - 1) / max(call.at for call in trace.calls)
    paced = traces.at_rate(trace, rate, job.calls, job.seed)
    gc.collect()
    gc.freeze()
    gc.disable()  # some gigabytes of cycles at most, and each collection walks all requests in flight
    try:
        calls = clock.run(replay(trace, paced, job))
    finally:
        gc.enable()
    return Result(
        job.trace, job.policy, job.load, job.seed, rate, wanted.reusable, calls, job.pairs, time.perf_counter() - began
    )


def saturation(wanted: Demand, pairs: int) -> float:
    """Calls per second at which one of the two pools is always busy, however well they are placed."""
    engine = ENGINE_ARGS
    prefill_s = wanted.new_tokens * (engine.prefill_us_per_token / 1e6 + engine.step_ms / 1e3 / engine.max_num_tokens)
    batch = min(engine.max_batch_size, KV_TOKENS / wanted.context_tokens)
    step_s = engine.step_ms / 1e3 + batch / 1e6 * (
        engine.decode_us_per_sequence + wanted.context_tokens / 1000 * engine.decode_us_per_ktoken
    )
    return pairs * min(1 / prefill_s, batch / step_s / wanted.output_tokens)


async def replay(trace: Trace, paced: Paced, job: Job) -> list[Answered]:
    mode, _, rest = job.policy.partition(":")
    options: dict[str, Any] = {"request_timeout_s": 1e6, "max_queued": 1_000_000, "max_queued_s": 1e6}
    if mode not in (*get_args(RouterMode), "oracle"):
        options["router_policy"] = job.policy
    else:
        options["router_mode"] = "kv" if mode == "oracle" else mode
        options |= {OPTIONS[k]: int(v) if k in ("local", "toll") else float(v) for k, v in _pairs(rest)}
    engine = ENGINE | {
        "num_blocks": KV_TOKENS // trace.block_size, "kv_cache_config": {"tokens_per_block": trace.block_size},
    }  # fmt: skip
    cluster = Cluster(
        prefill=job.pairs, decode=job.pairs, executor="simulated", engine=engine, options=options, seed=job.seed
    )
    async with cluster:
        await asyncio.sleep(20)  # past the slow start
        if mode == "oracle":
            _make_oracle(cluster)
        return await _drive(paced, cluster)


def _pairs(rest: str) -> Iterable[tuple[str, str]]:
    for part in rest.split(","):
        if part:
            key, _, value = part.partition("=")
            if key not in OPTIONS:
                raise SystemExit(f"unknown option {key!r} of a policy; there are {', '.join(OPTIONS)}")
            yield key, value


def _make_oracle(cluster: Cluster) -> None:
    router = cluster.frontend.router
    inner = router.policy(cluster.model, "prefill")
    assert isinstance(inner, Kv)
    oracle = Oracle(inner, cluster)
    router.policies[cluster.model, "prefill"] = oracle
    router._overlaps = oracle.overlaps  # type: ignore[method-assign,assignment]


async def _drive(paced: Paced, cluster: Cluster) -> list[Answered]:
    loop, pipeline = asyncio.get_running_loop(), cluster.frontend.pipeline
    start = loop.time()
    done = [asyncio.Event() for _ in paced.calls]
    answered: list[Answered] = []

    async def one(number: int, call: Call) -> None:
        await asyncio.sleep(max(0.0, start + call.at - loop.time()))
        if call.after is not None:
            await done[call.after].wait()
        if loop.time() - start > paced.end:
            done[number].set()
            return
        tokens = call.prompt()
        began = loop.time()
        generation = Generation(
            prompt=tokens, sampling=SamplingParams(temperature=0.0),
            stop=StopConditions(max_tokens=call.output, ignore_eos=True),
            render=RenderOptions(kind="completion", response_id="r", model=cluster.model, created=0),
        )  # fmt: skip
        request = InferenceRequest(id=str(number), model=cluster.model, generation=generation)
        first = latest = gap = 0.0

        async def sink(burst: list[Record]) -> None:
            nonlocal first, latest, gap
            now = loop.time()
            first = first or now - began
            if latest and (count := sum(len(record.token_ids) for record in burst)):
                gap = max(gap, (now - latest) / count)
            latest = now

        try:
            with pipeline.run(request) as run:
                await run.deliver(sink)
            read = run.decision.placements[-1 if len(run.decision.placements) == 1 else -2]
            assert read.usage is not None
            answered.append(
                Answered(
                    began - start, first, loop.time() - began, call.output, len(tokens) // 4, read.usage.cached_tokens, gap,
                    read.worker if read.phase == "prefill" else "",
                )
            )  # fmt: skip
        except DynserveError:
            answered.append(Answered(began - start, math.inf, math.inf, call.output, len(tokens) // 4, 0, math.inf, ""))
        finally:
            done[number].set()

    async with asyncio.TaskGroup() as group:
        for number, call in enumerate(paced.calls):
            group.create_task(one(number, call))
    return sorted(call for call in answered if call.at >= paced.begin)


# tables


def quantile(values: Sequence[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def figures(result: Result) -> dict[str, float]:
    calls = result.calls
    ttft, total = [c.ttft for c in calls], [c.total for c in calls]
    longer = [c for c in calls if c.output > 1]
    good = sum(c.ttft <= SLO_TTFT and c.total - c.ttft <= SLO_ITL * max(1, c.output - 1) for c in calls)
    computed = Counter({c.prefiller: 0 for c in calls if c.prefiller})
    for c in calls:
        if c.prefiller:
            computed[c.prefiller] += c.prompt - c.cached
    tokens, span = sum(computed.values()), calls[-1].at - calls[0].at
    return {
        "hit": 100 * sum(c.cached for c in calls) / sum(c.prompt for c in calls),
        "ttft50": quantile(ttft, 0.5), "ttft90": quantile(ttft, 0.9), "ttft99": quantile(ttft, 0.99),
        "e2e50": quantile(total, 0.5), "e2e99": quantile(total, 0.99),
        "itl50": 1000 * quantile([(c.total - c.ttft) / (c.output - 1) for c in longer], 0.5),
        "gap50": 1000 * quantile([c.gap for c in longer], 0.5), "gap99": 1000 * quantile([c.gap for c in longer], 0.99),
        "good": 100 * good / len(calls), "imbalance": max(computed.values()) * len(computed) / max(1, tokens),
        "busy": 100 * tokens * ENGINE_ARGS.prefill_us_per_token / 1e6 / result.pairs / span,
        "came": 100 * len(calls) / span / result.rate, "failed": float(sum(c.ttft == math.inf for c in calls)),
    }  # fmt: skip


# hit, reuse: prompt tokens from the cache, and that one cache without end would have had. ITL: of a call's mean. gap: of a
# call's longest. busy: of the prefill workers' time, without what each step costs. came: of the calls per second that were
# meant (sessions wait for their answers). imbal: tokens computed by the busiest prefill worker by the mean. All but `fail`,
# the sum, are medians of the seeds.
HEAD = (
    "trace     load policy               hit%  reuse%   TTFT p50    p90    p99 s   E2E p50    p99 s   ITL p50"
    "  gap p50     p99 ms  good%  busy%  came%  imbal fail"
)


def table(results: list[Result]) -> str:
    lines = [HEAD]
    for trace, load, policy in sorted({(r.trace, r.load, r.policy) for r in results}):
        same = [r for r in results if (r.trace, r.load, r.policy) == (trace, load, policy)]
        found = [figures(r) for r in same]
        f = {key: statistics.median(one[key] for one in found) for key in found[0]}
        reuse = 100 * statistics.median(r.reusable for r in same)
        lines.append(
            f"{trace:<9} {load:>4.1f} {policy:<19} {f['hit']:>5.1f}  {reuse:>5.1f}   {f['ttft50']:>8.3f} {f['ttft90']:>6.2f}"
            f" {f['ttft99']:>6.2f}     {f['e2e50']:>6.2f}   {f['e2e99']:>6.1f}    {f['itl50']:>6.2f}   {f['gap50']:>6.1f}   {f['gap99']:>7.1f}"
            f"  {f['good']:>5.1f}  {f['busy']:>5.1f}  {f['came']:>5.1f}  {f['imbalance']:>5.2f} {sum(one['failed'] for one in found):>4.0f}"
        )
    return "\n".join(lines)


def factors(results: list[Result], ours: str) -> str:
    """How many times the TTFT of `ours` the others' is, per seed; the median and the range."""
    lines = [f"TTFT of the others by that of {ours}: median of the seeds (least to most)"]
    by = {(r.trace, r.load, r.policy, r.seed): figures(r) for r in results}
    for trace, load, policy in sorted({(r.trace, r.load, r.policy) for r in results if r.policy != ours}):
        pairs = [
            (by[trace, load, policy, seed], by[trace, load, ours, seed])
            for seed in sorted({r.seed for r in results})
            if (trace, load, policy, seed) in by and (trace, load, ours, seed) in by
        ]
        cells = []
        for key in ("ttft50", "ttft99", "e2e50"):
            found = sorted(other[key] / mine[key] for other, mine in pairs)
            cells.append(f"{key} {statistics.median(found):7.2f} ({found[0]:.2f} to {found[-1]:.2f})")
        hits = statistics.median(mine["hit"] - other["hit"] for other, mine in pairs)
        lines.append(
            f"{trace:<9} {load:>4.1f} {policy:<22} {'   '.join(cells)}   hit rate of {ours} {hits:+.1f} points"
        )
    return "\n".join(lines)


def plot(results: list[Result], path: Path) -> None:
    """TTFT over time, a line per policy, a panel per trace and load; the first seed."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install 'dynserve[bench]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = sorted({(r.trace, r.load) for r in results})
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(10, 2.6 * len(panels)), squeeze=False)
    for (trace, load), axis in zip(panels, axes[:, 0], strict=True):
        seed = min(r.seed for r in results)
        for result in [r for r in results if (r.trace, r.load, r.seed) == (trace, load, seed)]:
            bins: dict[int, list[float]] = {}
            width = max(1.0, result.calls[-1].at / 60)
            for call in result.calls:
                bins.setdefault(int(call.at / width), []).append(call.ttft)
            times = sorted(bins)
            axis.plot([t * width for t in times], [statistics.median(bins[t]) for t in times], label=result.policy)
        axis.set(title=f"{trace}, load {load}", ylabel="TTFT, s", yscale="log")
        axis.legend(fontsize=7)
    axes[-1, 0].set_xlabel("virtual seconds")
    figure.tight_layout()
    figure.savefig(path)
    print(f"wrote {path}")


SWEEP = [  # one weight at a time around the shipped ones
    "kv",
    *(f"kv:overlap={overlap}" for overlap in (0.5, 1, 2, 4, 16, 32)),
    *(f"kv:herd={herd}" for herd in (1.5, 2, 1000)),
    *(f"kv:transfer={transfer}" for transfer in (0, 0.3, 1)),
    *(f"kv:local={tokens}" for tokens in (0, 256, 4096)),
    *(f"kv:toll={tokens}" for tokens in (0, 256, 4096)),
]
CALLS = {"mooncake": 2500, "miniswe": 2500, "taubench": 8000, "azure": 3000}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--traces", type=Path, required=True, help="folder of the trace files (benchmarks/traces.py)")
    parser.add_argument("--trace", nargs="+", default=list(traces.NAMES), choices=traces.NAMES)
    parser.add_argument("--load", nargs="+", type=float, default=[0.5, 0.8, 1.1], help="parts of saturation")
    parser.add_argument("--speedup", type=float, help="instead of a load: the trace's own pace times this")
    parser.add_argument("--policy", nargs="+", default=["kv", "kv:local=0", "round-robin", "least-loaded", "oracle"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, help="default: 0; of a sweep 100: weights are judged on other runs")
    parser.add_argument("--calls", type=int, help=f"of each run, about; default: {CALLS}")
    parser.add_argument("--pairs", type=int, default=8, help="prefill workers, and as many decode workers")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--plot", type=Path, help="where to write TTFT over time, per policy (needs the bench extra)")
    parser.add_argument("--sweep", action="store_true", help="a grid of weights instead of --policy")
    parser.add_argument("--against", default=None, help="the policy that the factors are for; default: the first")
    options = parser.parse_args()
    policies = SWEEP if options.sweep else options.policy
    first_seed = options.first_seed if options.first_seed is not None else 100 if options.sweep else 0
    jobs = [
        Job(options.traces, trace, policy, load, seed, options.calls or CALLS[trace], options.pairs, options.speedup)
        for trace in options.trace
        for load in (options.load if options.speedup is None else [0.0])
        for seed in range(first_seed, first_seed + options.seeds)
        for policy in policies
    ]
    results = []
    for trace in options.trace:
        traces.load(
            options.traces, trace, options.calls or CALLS[trace], 0
        )  # what is read and tokenised here, all runs inherit
    with ProcessPoolExecutor(options.processes, mp_context=get_context("fork"), max_tasks_per_child=None) as pool:
        for i, result in enumerate(pool.map(run, jobs), 1):
            results.append(result)
            f = figures(result)
            print(
                f"{i}/{len(jobs)} {result.trace} load {result.load} {result.policy} seed {result.seed}: {result.rate:.1f} calls/s, "
                f"hit {f['hit']:.1f} %, TTFT p50 {f['ttft50']:.3f} p99 {f['ttft99']:.2f} s ({result.wall_s:.0f} s)",
                file=sys.stderr, flush=True,
            )  # fmt: skip
    print(table(results))
    print()
    print(factors(results, options.against or policies[0]))
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
