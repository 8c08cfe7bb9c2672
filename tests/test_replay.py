"""The replay benchmark on small traces in the formats of the published ones."""

from __future__ import annotations

import csv
import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "replay.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Traces with forty calls of each kind."""
    made, r = tmp_path_factory.mktemp("traces"), random.Random(2)
    with gzip.open(made / "mooncake_conversation.jsonl.gz", "wt") as file:
        for i in range(40):
            ids = [0, 1, *(10 * i + j for j in range(2, 2 + i % 5))]
            row = {
                "timestamp": 3000 * (i // 4),
                "input_length": 512 * len(ids) - 7,
                "output_length": 20,
                "hash_ids": ids,
            }
            file.write(json.dumps(row) + "\n")
    with (made / "azure_llm_2023_conv.csv").open("w") as plain:
        writer = csv.writer(plain)
        writer.writerow(["TIMESTAMP", "ContextTokens", "GeneratedTokens"])
        for i in range(40):
            writer.writerow([f"2023-11-16 18:17:{i:02d}.9799600", r.randrange(50, 500), r.randrange(1, 30)])
    for name in ("miniswe", "taubench"):
        with (made / f"agent_{name}.jsonl").open("w") as plain:
            for turn in range(1, 11):
                for session in range(4):
                    text = f"Common words that all of them share. Session {session}. " + "It said so. " * 20 * turn
                    row = {
                        "timestamp": 1_760_000_000_000_000 + turn * 2_000_000 + session,
                        "session_id": f"s{session}", "input": text, "output": "Yes, it said so.",
                    }  # fmt: skip
                    plain.write(json.dumps(row) + "\n")
    return made


def replay(folder: Path, *options: str) -> str:
    command = [sys.executable, str(BENCHMARK), "--traces", str(folder), "--calls", "40", "--pairs", "2", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_kinds_of_traces_are_replayed_with_reproducible_results(folder: Path) -> None:
    options = ("--load", "0.5", "--seeds", "1", "--policy", "kv", "round-robin", "oracle", "kv:overlap=1,local=64")
    first = replay(folder, *options)
    rows = [line.split() for line in first.split("\n\n")[0].splitlines()[1:]]
    assert {(row[0], row[2]) for row in rows} == {
        (trace, policy)
        for trace in ("mooncake", "azure", "miniswe", "taubench")
        for policy in ("kv", "round-robin", "oracle", "kv:overlap=1,local=64")
    }
    assert all(row[-1] == "0" for row in rows), "a call failed"
    assert replay(folder, *options) == first


def test_a_custom_policy_can_be_replayed_and_plotted(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "ttft.png"
    options = ("--trace", "miniswe", "--speedup", "2", "--seeds", "1", "--plot", str(picture))
    found = replay(folder, *options, "--policy", "dynserve.routing.policy:PowerOfTwo", "kv")
    assert "dynserve.routing.policy:PowerOfTwo" in found
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_missing_trace_is_an_error_that_names_the_download_script(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(BENCHMARK), "--traces", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1 and "traces.py" in done.stderr
