"""Request traces for `replay.py`, as calls with an arrival time, a prompt of token ids and an answer length.

The files are those that their authors publish; their folder is an argument. Names that are looked for, plain or `.gz`:

    mooncake_conversation*.jsonl   kvcache-ai/Mooncake, FAST25-release/traces/conversation_trace.jsonl
    azure_llm_2023_conv*.csv       Azure/AzurePublicDataset, data/AzureLLMInferenceTrace_conv.csv
    agent_miniswe*.jsonl           LMCache/lmcache-agent-trace, miniswe/ (all sessions in one file, sorted by time)
    agent_taubench*.jsonl          the same, taubench/
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from dynserve.config import TINY_MODEL
from dynserve.wire.hashing import rolling_hashes

FIRST, SPAN = 300, 1700  # made-up token ids: clear of special ones, within the tiny model's vocabulary
NAMES = ("mooncake", "miniswe", "taubench", "azure")
WARM_UP = 0.15  # part of a run whose requests are not measured: caches fill in it
WARM_UP_SESSIONS = 0.3
MOST_LOOKED_AT = 4000  # calls, for the mean demand
SERVICE, SERVICE_PER_TOKEN = 0.05, 0.01  # seconds that an answer takes, for a first guess of how long sessions last


class Call(NamedTuple):
    at: float  # seconds from the start
    prompt: Callable[[], bytes]  # token ids, u32 little-endian; made when asked for: a trace has gigabytes of them
    output: int  # tokens
    after: int | None = None  # number of the call that must have been answered before


class Trace(NamedTuple):
    name: str
    block_size: int
    calls: list[Call]
    sessions: Sequence[list[Call]] = ()  # the same, where calls follow one another; then `at` counts from the first


def load(folder: Path, name: str, count: int, seed: int) -> Trace:
    """About `count` calls. Of long traces each seed takes another window; of agents, other sessions in another order."""
    if name == "mooncake":
        return _mooncake(_lines(_find(folder, "mooncake_conversation*.jsonl*")), count, seed)
    if name == "azure":
        return _azure(_lines(_find(folder, "azure_llm_2023_conv*.csv*")), count, seed)
    if name in ("miniswe", "taubench"):
        return _agents(name, _find(folder, f"agent_{name}*.jsonl*"), count, seed)
    raise SystemExit(f"no trace {name!r}; there are {', '.join(NAMES)}")


class Paced(NamedTuple):
    """Calls at some rate, and what of them to measure."""

    calls: list[Call]
    begin: float
    end: float  # calls that come later are not made


def at_rate(trace: Trace, rate: float, count: int, seed: int) -> Paced:
    """The calls at `rate` per second, for as long as `count` of them take.

    Without sessions, time is compressed. Sessions begin at the pace that gives the rate, and a pause within one is shortened
    so far that the longest recorded session takes a quarter of the run. Besides, a call never comes before the answer of
    the one before it. The run begins as if it had been going on: with as many sessions as there are at any time, each
    somewhere in its middle (its past, which no cache has, is its first prompt).
    """
    if not trace.sessions:
        calls = trace.calls
        native = (len(calls) - 1) / (calls[-1].at - calls[0].at)
        calls = [call._replace(at=(call.at - calls[0].at) * native / rate) for call in calls]
        return Paced(calls, WARM_UP * calls[-1].at, calls[-1].at)
    r = random.Random(seed)
    end = count / rate
    shorter = min(1.0, end / 4 / max(session[-1].at for session in trace.sessions))
    lasts = [
        session[-1].at * shorter + sum(SERVICE + SERVICE_PER_TOKEN * c.output for c in session)
        for session in trace.sessions
    ]
    per_s = rate * len(trace.sessions) / len(trace.calls)
    there = round(per_s * sum(lasts) / len(lasts))
    calls, now = [], 0.0
    for number, session in enumerate(trace.sessions):
        first, start = 0, now
        if number < there:
            first = r.randrange(len(session))
            start = r.uniform(0, SERVICE_PER_TOKEN * 100) - session[first].at * shorter
        else:
            now += r.expovariate(per_s)
        for i, call in enumerate(session[first:]):
            calls.append(call._replace(at=start + call.at * shorter, after=len(calls) - 1 if i else None))
        if now > end:
            return Paced(calls, WARM_UP_SESSIONS * end, end)
    raise SystemExit(f"{len(trace.sessions)} sessions are not enough for {count} calls: {there} are open at any time")


class Demand(NamedTuple):
    """What the mean call of a trace asks of a cluster."""

    prompt_tokens: float
    new_tokens: float  # that one cache without end, which saw all calls in order, would not have had
    output_tokens: float
    context_tokens: float  # mean length while it is answered

    @property
    def reusable(self) -> float:
        return 1 - self.new_tokens / self.prompt_tokens


def demand(trace: Trace) -> Demand:
    seen: set[int] = set()
    prompts, new, outputs, contexts = 0, 0, 0, 0.0
    calls = trace.calls if trace.sessions else sorted(trace.calls, key=lambda c: c.at)
    calls = calls[: max(MOST_LOOKED_AT, len(calls) // 3)]
    for call in calls:
        prompt = call.prompt()
        tokens, hashes = len(prompt) // 4, rolling_hashes(prompt, trace.block_size)
        known = next((i for i, hash_ in enumerate(hashes) if hash_ not in seen), len(hashes))
        seen.update(hashes[known:])
        prompts, outputs = prompts + tokens, outputs + call.output
        new += max(1, tokens - known * trace.block_size)
        contexts += (tokens + call.output / 2) * call.output
    n = len(calls)
    return Demand(prompts / n, new / n, outputs / n, contexts / outputs)


def _mooncake(lines: Iterator[str], count: int, seed: int) -> Trace:
    rows = [json.loads(line) for line in lines]
    r = random.Random(seed)
    first = 0 if count >= len(rows) else r.randrange(len(rows) - count)
    rows = rows[first : first + count]
    start = rows[0]["timestamp"]
    # arrivals lie on a grid of three seconds: spread over it
    spread = sorted((row["timestamp"] - start) / 1000 + r.uniform(0, 3) for row in rows)
    prompts = [partial(_of_ids, row["hash_ids"], row["input_length"]) for row in rows]
    calls = [
        Call(at, prompt, max(1, row["output_length"])) for at, prompt, row in zip(spread, prompts, rows, strict=True)
    ]
    return Trace("mooncake", 64, calls)


def _of_ids(ids: list[int], length: int) -> bytes:
    """512 tokens per hash id, different for different ids."""
    blocks = [array("I", [FIRST + id_ % SPAN, FIRST + id_ // SPAN, FIRST, FIRST + 1]).tobytes() * 128 for id_ in ids]
    return b"".join(blocks)[: 4 * length]


def _azure(lines: Iterator[str], count: int, seed: int) -> Trace:
    rows = list(csv.DictReader(lines))
    first = 0 if count >= len(rows) else random.Random(seed).randrange(len(rows) - count)
    rows = rows[first : first + count]
    times = [datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp() for row in rows]
    calls = []
    for i, (at, row) in enumerate(zip(times, rows, strict=True)):
        prompt = partial(_noise, first + i, int(row["ContextTokens"]))
        calls.append(Call(at - times[0], prompt, max(1, int(row["GeneratedTokens"]))))
    return Trace("azure", 32, calls)


def _noise(number: int, length: int) -> bytes:
    """A prompt that shares nothing with any other: the trace says nothing of prefixes."""
    ids = np.random.default_rng(number).integers(FIRST, FIRST + SPAN, max(1, length), dtype=np.uint32)
    return ids.tobytes()


Session = list[tuple[float, "np.ndarray[Any, Any]", int]]  # seconds since its first call, prompt, answer tokens


def _agents(name: str, path: Path, count: int, seed: int) -> Trace:
    """Sessions with their real text, repeated with other content as often as `count` needs.

    A repetition is a session of its own: tokens behind what all sessions have in common are exchanged for others.
    """
    encoded, common = _encoded(path)
    r = random.Random(seed)
    repeated: list[list[Call]] = []
    while sum(map(len, repeated)) < 6 * count or len(repeated) < 100:
        for session in r.sample(encoded, len(encoded)):
            turn = len(repeated) + 1
            repeated.append([Call(at, partial(_exchanged, ids, common, turn), output) for at, ids, output in session])
    calls = [call for session in repeated for call in session]
    return Trace(name, 64 if name == "miniswe" else 32, calls, repeated)


@lru_cache
def _encoded(path: Path) -> tuple[list[Session], int]:
    """The sessions, tokenised, and how many leading tokens all of them share."""
    tokenizer = Tokenizer.from_file(str(TINY_MODEL / "tokenizer.json"))
    sessions: dict[str, list[dict[str, Any]]] = {}
    for line in _lines(path):
        row = json.loads(line)
        sessions.setdefault(row["session_id"], []).append(row)
    encoded: list[Session] = []
    for rows in sessions.values():
        prompts = [
            np.array(e.ids or [FIRST], np.uint32) for e in tokenizer.encode_batch([_text(r["input"]) for r in rows])
        ]
        lengths = [max(1, len(e.ids)) for e in tokenizer.encode_batch([_text(r["output"]) for r in rows])]
        starts = [(row["timestamp"] - rows[0]["timestamp"]) / 1e6 for row in rows]
        encoded.append(list(zip(starts, prompts, lengths, strict=True)))
    return encoded, _common([session[0][1] for session in encoded])


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _exchanged(ids: np.ndarray[Any, Any], common: int, turn: int) -> bytes:
    changed = ids.copy()
    rest = changed[common:]
    rest[:] = np.where(rest >= FIRST, FIRST + (rest - FIRST + 7 * turn) % SPAN, rest)
    # one token that no other session has: texts without any exchangeable token would stay equal
    if len(rest):
        rest[0] = FIRST + turn % SPAN
    return changed.tobytes()


def _common(prompts: list[np.ndarray[Any, Any]]) -> int:
    shortest = min(map(len, prompts))
    stacked = np.stack([prompt[:shortest] for prompt in prompts])
    differs = np.nonzero((stacked != stacked[0]).any(axis=0))[0]
    return int(differs[0]) if len(differs) else shortest


def _find(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if not found:
        raise SystemExit(f"no {pattern} in {folder}; see benchmarks/traces.py for where the traces come from")
    return found[0]


def _lines(path: Path) -> Iterator[str]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        yield from io.TextIOWrapper(file, "utf-8")
