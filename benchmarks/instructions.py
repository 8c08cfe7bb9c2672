"""Instructions per token and per request of the real frontend and worker: figures without the noise of seconds.

    python benchmarks/instructions.py [--update] [--roles frontend worker]

Each process in turn runs under valgrind's callgrind, beside real servers, and its instructions are counted only while it is
asked something; what it takes when it idles is taken off, and the rest divided by what was answered. What is printed is compared
with `baseline.json`; the exit code is 1 when a path takes over 15 % more than there, three times. `--update` writes the
baseline anew. Needs valgrind; counts of another Python version are shown, not
judged. Kernel time is not in them: `plane.py` has it.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import load
from plane import PROMPT, STEPS_ONLY, cluster

from dynserve.config import TINY_MODEL

BASELINE = Path(__file__).parent / "baseline.json"
ALLOWED = 1.15
TRIES = 3
STEP_MS = 150.0  # long enough for a process that runs fifty times slower to keep pace
ENGINE = STEPS_ONLY | {"step_ms": STEP_MS, "max_batch_size": 128, "max_num_tokens": 65_536, "num_blocks": 20_000}
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
STREAMS = {"frontend": 128, "worker": 32}  # as many as keep pace: what goes by time is shared among their tokens


class Probe:
    """One role's process under callgrind, beside real servers."""

    def __init__(self, port: int, pid: int, folder: Path) -> None:
        self._port, self._pid, self._folder = port, pid, folder
        self._dumps = 0

    def idle(self, seconds: float) -> float:
        """Instructions per second of a process that nobody asks anything."""
        self._control("--instr=on")
        time.sleep(seconds)
        return self._taken() / seconds

    def per_request(self, clients: int, tokens: int, *, stream: bool, idle: float) -> float:
        """Instructions per answered request, without those that idling takes."""
        ask = load.PlacementQuery(TINY_MODEL.name, PROMPT, tokens, stream)
        load.run(self._port, ask, clients, 1.0)
        self._control("--instr=on")
        answered = load.run(self._port, ask, clients, 6.0)
        return (self._taken() - idle * answered.seconds) / answered.requests

    def _taken(self) -> int:
        self._control("--instr=off")
        self._control("--dump")
        self._dumps += 1
        dump = (self._folder / f"out.{self._dumps}").read_text()
        found = re.search(r"^totals: (\d+)", dump, re.MULTILINE)
        if found is None:
            raise SystemExit("callgrind has written no total")
        return int(found[1])

    def _control(self, what: str) -> None:
        subprocess.run(["callgrind_control", what, str(self._pid)], check=True, stdout=subprocess.DEVNULL)


def counted(role: str) -> dict[str, float]:
    """Thousands of instructions: of one more token of a stream, of a streamed request besides, of a short unary one."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder}/out"]
        flags = ("--suspect-s", "60", "--silence-s", "120")  # of a process that runs fifty times slower
        cluster_ = cluster(["prefill_and_decode"], ENGINE, under={role: command}, frontend_flags=flags, patience=300.0)
        with cluster_ as setup:
            (pid,) = setup.pids[role]
            probe = Probe(setup.port, pid, Path(folder))
            idle = probe.idle(2.0)
            unary = probe.per_request(32, 1, stream=False, idle=idle)
            short = probe.per_request(STREAMS[role], 2, stream=True, idle=idle)
            long = probe.per_request(STREAMS[role], 50, stream=True, idle=idle)
    token = (long - short) / 48
    found = {"token": token, "streamed request": short - 2 * token, "unary request": unary}
    return {f"{role}: {what}": round(number / 100) / 10 for what, number in found.items()}


def least(role: str, before: dict[str, float]) -> dict[str, float]:
    """Counted again where it seems too much, or where a request failed: a process that once fell behind has done more, and
    never less."""
    found: dict[str, float] = {}
    for attempt in range(TRIES):
        try:
            now = counted(role)
        except SystemExit as error:
            if attempt == TRIES - 1:
                raise
            print(f"counting again: {error}", flush=True)
            continue
        found = {what: min(number, found.get(what, number)) for what, number in now.items()}
        if all(number <= before.get(what, number) * ALLOWED for what, number in found.items()):
            break
    return found


def judged(found: dict[str, float], before: dict[str, float]) -> bool:
    """Prints the difference; False when a path takes too much."""
    fine = True
    print(f"{'thousands of instructions':<30} {'now':>9} {'baseline':>9}")
    for what, now in found.items():
        known = before.get(what)
        if known is None:
            print(f"{what:<30} {now:9.1f} {'none':>9}")
            continue
        verdict = "" if now <= known * ALLOWED else "   TOO MANY"
        fine = fine and not verdict
        print(f"{what:<30} {now:9.1f} {known:9.1f} {(now / known - 1) * 100:+7.1f} %{verdict}")
    return fine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--update", action="store_true", help="write what is found to baseline.json")
    parser.add_argument("--roles", nargs="+", default=list(STREAMS), choices=list(STREAMS))
    args = parser.parse_args()
    if shutil.which("valgrind") is None:
        sys.exit("valgrind is not installed; it counts the instructions")
    known = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    found: dict[str, float] = {}
    before = known.get(VERSION, {})
    for role in args.roles:
        found |= least(role, before)
    fine = judged(found, before)
    if args.update:
        BASELINE.write_text(json.dumps(known | {VERSION: known.get(VERSION, {}) | found}, indent=2) + "\n")
    elif not fine:
        sys.exit(f"over {ALLOWED - 1:.0%} more than the baseline; if that is what it takes, run with --update")


if __name__ == "__main__":
    main()
