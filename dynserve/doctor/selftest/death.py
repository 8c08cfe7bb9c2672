"""What is left when an engine is killed. It is the last fact: the decode engine is gone afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from dynserve.doctor.selftest.api import is_old
from dynserve.doctor.selftest.engines import Engines
from dynserve.doctor.selftest.fact import Fact
from dynserve.errors import EngineDied

NOTICED = 30.0  # seconds


async def answers_canary(engines: Engines) -> str:
    return "answers" if await engines.decode.engine.alive() else "does not answer"


async def killed(engines: Engines) -> str:
    """Kills the engine's processes with SIGKILL."""
    for pid in engines.processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    try:
        async with asyncio.timeout(NOTICED):
            await asyncio.shield(engines.decode.failed)
    except EngineDied as error:
        return f"dead, by its {'silence' if 'not even one token' in str(error) else 'own report'}"
    except TimeoutError:
        return f"not noticed within {NOTICED:.0f} s"
    return "alive"


def descendants(pid: int) -> set[int]:
    """Returns the processes that a process has started, and theirs. Linux only; empty elsewhere."""
    children: dict[int, list[int]] = {}
    for child, parent in _processes():
        children.setdefault(parent, []).append(child)
    found: set[int] = set()
    ahead = [pid]
    while ahead:
        for child in children.get(ahead.pop(), []):
            if child not in found:
                found.add(child)
                ahead.append(child)
    return found


def _processes() -> Iterator[tuple[int, int]]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            yield int(path.parent.name), int(path.read_text().rpartition(")")[2].split()[1])


def _without_processes(engines: Engines) -> str:
    if is_old(engines.decode.engine.api):
        return "a dead engine of this version blocks its whole process, which the worker then ends"
    return "" if engines.processes else "the engine has no processes of its own"


DEATH = [
    Fact("death", "a canary", "answers", answers_canary),
    Fact("death", "an engine that is killed", "dead, by its own report", killed, _without_processes),
]
