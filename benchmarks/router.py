"""What the router costs: placement, event application, memory of the index; and how each grows with the workers.

    python benchmarks/router.py [--quick]

One process, no planes. Prompts of 8,192 tokens in blocks of 32; a million blocks indexed, a part of them on several
workers, as conversations that have been answered in several places leave them. Times are the best of several rounds
(least disturbed by others on the machine) and the median.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
import tracemalloc
from collections.abc import Callable
from typing import NamedTuple

from budget import Row, machine, report

from dynserve.frontend.decisions import Decision
from dynserve.routing.index import PrefixIndex
from dynserve.routing.policy import IndexState
from dynserve.routing.router import PlacementQuery, Router
from dynserve.wire.requests import pack_tokens

TOKENS, BLOCK = 8192, 32
BLOCKS = 1_000_000
BUDGETS = {"placement us": 150.0, "events blocks/s": 500_000.0}


class Timed(NamedTuple):
    best: float
    median: float


def timed(rounds: int, work: Callable[[], None], each: int) -> Timed:
    """Seconds per piece of work, of which one call of `work` does `each`."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        times.append((time.perf_counter() - began) / each)
    return Timed(min(times), statistics.median(times))


def filled(workers: int, blocks: int, r: random.Random) -> tuple[Router, list[bytes]]:
    """A router that knows conversations of 256 blocks: one in four on one worker in eight, the others on one."""
    router = Router(rng=r)
    names = [f"prefill-{i:012x}" for i in range(workers)]
    for name in names:
        router.join(name, BLOCK, 1 << 20, -1000.0).index = IndexState.EXACT
    prompts = []
    per = TOKENS // BLOCK
    for number in range(blocks // per):
        prompt = pack_tokens([r.randrange(150_000) for _ in range(TOKENS)])
        hashes = PlacementQuery(prompt).hashes(BLOCK)
        for name in r.sample(names, max(1, workers // 8) if number % 4 == 0 else 1):
            router.index.store(name, hashes[: r.randrange(1, per + 1)] if number % 4 == 0 else hashes)
        if number < 200:
            prompts.append(prompt)
    return router, prompts


def placements(router: Router, prompts: list[bytes], rounds: int) -> Timed:
    targets = list(router.targets.values())

    def work() -> None:
        for prompt in prompts:
            router.place(PlacementQuery(prompt), "prefill", targets, 0.0).close()

    return timed(rounds, work, len(prompts))


def whole_requests(router: Router, prompts: list[bytes], rounds: int) -> Timed:
    """All that a request through prefill and decode asks of the router, with as many decode as prefill workers: may it stay
    on a decode worker, prefill, decode, and the two records of why."""
    prefillers = list(router.targets.values())
    decoders = [router.join(f"decode-{i:012x}", BLOCK, 1 << 20, -1000.0) for i in range(len(prefillers))]

    def work() -> None:
        for number, prompt in enumerate(prompts):
            ask = PlacementQuery(prompt)
            decision = Decision(str(number), "", ask.tokens, 0.0)
            router.local(ask, decoders, prefillers)
            prefill = router.place(ask, "prefill", prefillers, 0.0)
            decision.placed(prefill)
            prefill.close()
            decode = router.place(ask, "decode", decoders, 0.0)
            decision.placed(decode)
            decode.close()

    return timed(rounds, work, len(prompts))


def hashings(prompts: list[bytes], rounds: int) -> Timed:
    def work() -> None:
        for prompt in prompts:
            PlacementQuery(prompt).hashes(BLOCK)

    return timed(rounds, work, len(prompts))


def events(workers: int, rounds: int, r: random.Random) -> tuple[Timed, Timed]:
    """Seconds per block stored and per block removed, in events of 8 blocks."""
    index = PrefixIndex()
    names = [f"w{i}" for i in range(workers)]
    chains = [[r.getrandbits(64) for _ in range(8)] for _ in range(20_000)]
    owners = [r.choice(names) for _ in chains]
    stored: list[float] = []
    removed: list[float] = []
    for _ in range(rounds):
        for into, act in ((stored, index.store), (removed, index.remove)):
            began = time.perf_counter()
            for owner, chain in zip(owners, chains, strict=True):
                act(owner, chain)
            into.append((time.perf_counter() - began) / (8 * len(chains)))
    return Timed(min(stored), statistics.median(stored)), Timed(min(removed), statistics.median(removed))


def bytes_per_block(workers: int, blocks: int, r: random.Random) -> float:
    """What Python allocated for an index of `blocks`, held as in `filled`."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    index = PrefixIndex(1 << 34)
    names = [f"w{i}" for i in range(workers)]
    for number in range(blocks // 256):
        chain = [r.getrandbits(64) for _ in range(256)]
        for name in r.sample(names, max(1, workers // 8) if number % 4 == 0 else 1):
            index.store(name, chain)
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return used / len(index)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the blocks, fewer rounds")
    quick = parser.parse_args().quick
    blocks, rounds = (BLOCKS // 10, 5) if quick else (BLOCKS, 20)
    print(f"{TOKENS} tokens a prompt, blocks of {BLOCK}, {blocks:,} blocks indexed, {machine()}\n")
    print(
        "workers   placement us (median)   hashing of it   whole request us   store M blocks/s (median)   remove M blocks/s   bytes/block"
    )
    found: dict[str, float] = {}
    for workers in (8, 64, 1024):
        r = random.Random(1)
        router, prompts = filled(workers, blocks, r)
        gc.collect()
        gc.freeze()
        place = placements(router, prompts, rounds)
        hashing = hashings(prompts, rounds)
        whole = whole_requests(router, prompts, rounds)
        store, remove = events(workers, rounds, r)
        del router
        gc.unfreeze()
        gc.collect()
        size = bytes_per_block(workers, blocks // 4, r)
        print(
            f"{workers:>7}   {place.best * 1e6:>8.1f} ({place.median * 1e6:.1f})       {hashing.best * 1e6:>8.1f}           {whole.best * 1e6:>8.1f}  "
            f"{1 / store.best / 1e6:>12.2f} ({1 / store.median / 1e6:.2f})      {1 / remove.best / 1e6:>12.2f}   {size:>14.0f}",
            flush=True,
        )
        if workers == 64:
            found = {"placement us": place.median * 1e6, "events blocks/s": 1 / store.median}
    rows = [Row(f"64 workers: {what}", found[what], bound, what.endswith("/s")) for what, bound in BUDGETS.items()]
    report(rows)


if __name__ == "__main__":
    main()
