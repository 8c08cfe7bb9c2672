"""The plan of one run of `chaos.py`: its cluster, requests and faults, all drawn from a seed before anything runs."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

from dynserve.config import Role
from dynserve.executors.simulated import FIRST_TOKEN
from dynserve.wire.requests import pack_tokens

LOAD_S = 2.0  # seconds in which faults begin, and requests arrive
MAX_TOKENS = 60  # of one answer

# kind -> how often it is drawn, and how long it lasts in seconds
FAULTS: dict[str, tuple[float, float, float]] = {
    "worker death": (3, 0, 0),
    "worker machine off": (1, 0, 0),  # as a death, but its connections fall silent instead of ending
    "worker freeze": (4, 0.05, 6),
    "engine death": (2, 0, 0),
    "worker drain": (2, 0, 0),
    "worker join": (2, 0, 0),
    "link cut": (4, 0, 0),
    "link silent": (0.5, 0, 0),
    "frontend death": (1.5, 0, 0),
    "frontend machine off": (0.4, 0, 0),
    "frontend join": (1, 0, 0),
    "bus silent": (2, 0.1, 4),
    "bus down": (2, 0.1, 4),
    "bus lossy": (4, 0.3, 5),
    "registry loss": (2, 0.1, 3),
    "registry down": (2, 0.1, 4),
    "handoffs lost": (4, 0, 0),
    "transfers fail": (2, 0.1, 2),
    "cache cleared": (1.5, 0, 0),
}


class Fault(NamedTuple):
    at: float
    kind: str
    seconds: float
    target: float  # 0 to 1: which of the processes that live then
    degree: float  # 0 to 1: how strong


class PlannedRequest(NamedTuple):
    at: float
    prompt: bytes
    max_tokens: int
    temperature: float
    seed: int
    ignore_eos: bool
    stop_at: int | None  # the stop string is the text of the answer's tokens from this one on
    stream: bool
    logprobs: bool
    salt: str
    session: str
    priority: int
    frontend: float  # 0 to 1: which of the frontends that live then
    disconnects: float | None  # seconds after its arrival
    cancelled: float | None  # as `disconnects`, but its task is cancelled
    slow: float  # share of the writes that take long, or are refused
    direct: bool  # the client has a writer: bytes need not pass through its task


class Plan(NamedTuple):
    seed: int
    frontends: int
    roles: list[Role]
    engine: dict[str, Any]
    frontend_options: dict[str, Any]
    worker_options: dict[str, Any]
    lease_s: float
    requests: list[PlannedRequest]
    faults: list[Fault]


def plan(seed: int) -> Plan:
    r = random.Random(f"plan {seed}")
    block_size = r.choice((4, 8, 16))
    requests, faults = _requests(r, block_size), _faults(r)
    frontends = 2 if any("frontend" in fault.kind for fault in faults) else r.choice((1, 1, 1, 2))
    return Plan(
        seed, frontends, _roles(r), _engine(r, block_size, requests), _frontend_options(r), _worker_options(r),
        r.uniform(0.5, 5.0), requests, faults,
    )  # fmt: skip


def _roles(r: random.Random) -> list[Role]:
    counts: dict[Role, int] = {"prefill": r.choice((1, 2, 2, 3)), "decode": r.choice((1, 2, 2, 3)), "aggregated": 0}
    if (kind := r.random()) < 0.1:
        counts = {"aggregated": r.randint(1, 3)}
    elif kind < 0.25:
        counts["aggregated"] = 1
    return [role for role, number in counts.items() for _ in range(number)]


def _engine(r: random.Random, block_size: int, requests: list[PlannedRequest]) -> dict[str, Any]:
    longest = max(len(request.prompt) // 4 for request in requests) + MAX_TOKENS
    blocks = -(-longest // block_size) + 2
    return {
        "num_blocks": int(blocks * r.choice((1, 1, 1.5, 10))),  # with few blocks answers are preempted
        "max_batch_size": r.choice((3, 8, 64)),
        "max_num_tokens": r.choice((64, 256, 2048)),  # long prompts are computed in chunks
        "step_ms": r.choice((10.0, 20.0, 40.0, 40.0)),
        "kv_cache_config": {"tokens_per_block": block_size},
        "cache_transceiver_config": {"kv_transfer_timeout_ms": r.choice((300, 1000, 4000))},
    }


def _frontend_options(r: random.Random) -> dict[str, Any]:
    return {
        "router_mode": r.choice(("kv", "kv", "kv", "round-robin", "random", "least-loaded", "power-of-two")),
        "local_prefill_tokens": r.choice((0, 0, 24, 1024)),
        "local_prefill_toll": r.choice((0, 1024)),
        "busy_kv_fraction": r.choice((1.0, 1.0, 0.3)),
        "busy_prefill_tokens": r.choice((1 << 20, 1 << 20, 100)),
        "max_queued": r.choice((1024, 1024, 3)),
        "max_queued_s": r.choice((30.0, 1.0)),
        "request_timeout_s": r.choice((60.0, 60.0, 4.0)),
        "max_stream_bytes": r.choice((4 << 20, 4 << 20, 1500)),
    }


def _worker_options(r: random.Random) -> dict[str, Any]:
    return {
        "max_queue": r.choice((1024, 1024, 4)),
        "kv_events": r.random() < 0.9,
        "drain_timeout_s": r.choice((0.2, 5.0)),
    }


def _requests(r: random.Random, block_size: int) -> list[PlannedRequest]:
    prefixes = [_tokens(r, 12 * block_size) for _ in range(3)]
    count = r.choice((5, 5, 6, 8, 8, 10, 14, 40))
    pace = LOAD_S * r.choice((0.1, 0.5, 1.0))  # a burst, or spread
    return [_request(r, block_size, prefixes, pace) for _ in range(count)]


def _request(r: random.Random, block_size: int, prefixes: list[list[int]], pace: float) -> PlannedRequest:
    size = max(1, int(block_size * r.choice((r.uniform(0.1, 3), r.uniform(0.1, 3), r.uniform(3, 20)))))
    tokens = _tokens(r, size)
    if r.random() < 0.5:
        tokens = r.choice(prefixes)[: r.randint(1, 12) * block_size] + tokens[: 2 * block_size]
    max_tokens = r.randint(1, r.choice((10, MAX_TOKENS)))
    leaves = r.random()
    return PlannedRequest(
        at=r.uniform(0.0, pace), prompt=pack_tokens(tokens), max_tokens=max_tokens,
        temperature=r.choice((0.0, 0.0, 0.7)), seed=r.getrandbits(31), ignore_eos=r.random() < 0.5,
        stop_at=r.randrange(max_tokens) if r.random() < 0.15 else None,
        stream=r.random() < 0.8, logprobs=r.random() < 0.1,
        salt=r.choice(("", "", "", "tenant")), session=r.choice(("", "", "", "a", "b")),
        priority=r.choice((0, 0, 0, 1)), frontend=r.random(),
        disconnects=r.uniform(0.0, 1.0) if leaves < 0.15 else None,
        cancelled=r.uniform(0.0, 1.0) if 0.15 <= leaves < 0.2 else None,
        slow=r.choice((0.0, 0.0, 0.0, 0.02, 0.3)), direct=r.random() < 0.5,
    )  # fmt: skip


def _tokens(r: random.Random, count: int) -> list[int]:
    return [FIRST_TOKEN + r.getrandbits(10) for _ in range(count)]


def _faults(r: random.Random) -> list[Fault]:
    kinds, weights = list(FAULTS), [weight for weight, _, _ in FAULTS.values()]
    found = []
    for kind in r.choices(kinds, weights, k=r.choice((0, 1, 1, 2, 2, 3, 4, 6))):
        _, shortest, longest = FAULTS[kind]
        # most faults are short beside the load, some are long
        seconds = min(r.uniform(shortest, longest), r.uniform(shortest, longest))
        found.append(Fault(r.uniform(0.0, LOAD_S), kind, seconds, r.random(), r.random()))
    return sorted(found)
