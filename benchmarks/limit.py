"""What a bound in time costs on a request's path: `dynserve.tasks.Limit` beside `asyncio.timeout`, in microseconds.

python benchmarks/limit.py
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import uvloop
from budget import Row, machine, report

from dynserve.tasks import Limit

COUNT = 50_000


async def with_timeout() -> None:
    async with asyncio.timeout(60):  # noqa: ASYNC100  # nothing to wait for is the point
        pass


async def with_limit() -> None:
    with Limit(asyncio.get_running_loop().time() + 60):
        pass


async def with_limit_of_others() -> None:
    with Limit():
        pass


async def microseconds(block: Callable[[], Awaitable[None]]) -> float:
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(COUNT):
            await block()
        best = min(best, time.perf_counter() - began)
    return best / COUNT * 1e6


async def main() -> None:
    print(machine())
    theirs = await microseconds(with_timeout)
    ours, untimed = await microseconds(with_limit), await microseconds(with_limit_of_others)
    print(f"  asyncio.timeout {theirs:.2f} us, Limit with a deadline {ours:.2f} us, without {untimed:.2f} us")
    report([Row("Limit with a deadline, part of asyncio.timeout", ours / theirs, 0.75)])


if __name__ == "__main__":
    uvloop.run(main())
