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
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from dynserve.config import TINY_MODEL
from dynserve.routing.hashing import rolling_hashes

FIRST, SPAN = 300, 1700  # made-up token ids: clear of special ones, within the tiny model's vocabulary
NAMES = ("mooncake", "miniswe", "taubench", "azure")
WARM_UP = 0.15  # part of a run whose requests are not measured: caches fill in it


class Call(NamedTuple):
    at: float  # seconds from the start
    prompt: Callable[[], bytes]  # token ids, u32 little-endian; made when asked for: a trace has gigabytes of them
    output: int  # tokens
    session: str = ""
    after: int | None = None  # number of the call of the same session that must have been answered before


class Trace(NamedTuple):
    name: str
    block_size: int
    calls: list[Call]
    sessions: bool  # calls depend on one another, and load is a matter of sessions per second


def load(folder: Path, name: str, count: int, seed: int) -> Trace:
    """About `count` calls. Of long traces each seed takes another window; of agents, other sessions in another order."""
    if name == "mooncake":
        return _mooncake(_lines(_find(folder, "mooncake_conversation*.jsonl*")), count, seed)
    if name == "azure":
        return _azure(_lines(_find(folder, "azure_llm_2023_conv*.csv*")), count, seed)
    if name in ("miniswe", "taubench"):
        return _agents(name, _find(folder, f"agent_{name}*.jsonl*"), count, seed)
    raise SystemExit(f"no trace {name!r}; there are {', '.join(NAMES)}")


def at_rate(trace: Trace, rate: float, seed: int) -> tuple[Trace, float, float]:
    """The same calls at `rate` per second on the whole, and between which times to measure.

    Without sessions, time is compressed. Sessions begin at the pace that gives the rate; the pauses within them are
    shortened so far that the longest recorded session takes a quarter of the time in which they begin (and whatever its
    answers take: a call never comes before the answer of the one before it). What is measured begins in the second half
    of that time, when as many sessions end as begin.
    """
    if not trace.sessions:
        native = (len(trace.calls) - 1) / (trace.calls[-1].at - trace.calls[0].at)
        calls = [call._replace(at=call.at * native / rate) for call in trace.calls]
        return trace._replace(calls=calls), WARM_UP * calls[-1].at, calls[-1].at
    r = random.Random(seed)
    names = list(dict.fromkeys(call.session for call in trace.calls))
    starts: dict[str, float] = {}
    now = 0.0
    for name in names:
        starts[name] = now
        now += r.expovariate(rate * len(names) / len(trace.calls))
    shorter = min(1.0, now / 4 / max(call.at for call in trace.calls))
    calls = [call._replace(at=starts[call.session] + call.at * shorter) for call in trace.calls]
    return trace._replace(calls=calls), now / 2, now


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
    for call in sorted(trace.calls, key=lambda c: c.at):
        prompt = call.prompt()
        tokens, hashes = len(prompt) // 4, rolling_hashes(prompt, trace.block_size)
        known = next((i for i, hash_ in enumerate(hashes) if hash_ not in seen), len(hashes))
        seen.update(hashes[known:])
        prompts, outputs = prompts + tokens, outputs + call.output
        new += max(1, tokens - known * trace.block_size)
        contexts += (tokens + call.output / 2) * call.output
    n = len(trace.calls)
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
    return Trace("mooncake", 64, calls, False)


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
    return Trace("azure", 32, calls, False)


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
    calls: list[Call] = []
    turn = 0
    while len(calls) < count:
        for session in r.sample(encoded, len(encoded)):
            turn += 1
            for i, (at, ids, output) in enumerate(session):
                prompt = partial(_exchanged, ids, common, turn)
                calls.append(Call(at, prompt, output, f"s{turn}", len(calls) - 1 if i else None))
    return Trace(name, 64 if name == "miniswe" else 32, calls, True)


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
