"""Whole clusters with random faults: `benchmarks/chaos.py` on a few seeds, and the proof that it notices failures."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "chaos.py"
SEED = "1"  # of a run with many faults


def chaos(*options: str, hash_seed: str = "0") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARK), *options], capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONHASHSEED": hash_seed},
    )  # fmt: skip


def test_requests_end_right_or_with_an_explained_error_under_random_faults() -> None:
    done = chaos("--seeds", "200")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("200 seeds, 0 failed")


def test_the_same_seed_has_the_same_log() -> None:
    first, second = (chaos("--seed", SEED, "--log", hash_seed=hash_seed) for hash_seed in ("1", "2"))
    assert first.returncode == 0, first.stdout + first.stderr
    assert "FAULT" in first.stdout and "ended: finished" in first.stdout
    assert first.stdout == second.stdout


@pytest.mark.parametrize("what", ["cancels", "tokens"])
def test_a_fault_of_dynserve_itself_is_noticed_and_can_be_replayed(what: str) -> None:
    found = chaos("--seeds", "16", "--break", what)
    assert found.returncode == 1
    replay = re.search(r"replay: python benchmarks/chaos\.py (.*)\n    (.*)\n", found.stdout)
    assert replay is not None, found.stdout + found.stderr
    again = chaos(*replay[1].split())
    assert again.returncode == 1 and replay[2] in again.stdout
