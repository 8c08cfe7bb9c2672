"""All benchmarks with a budget, and at the end one table of what was found.

    python benchmarks/bench.py [--quick] [--all]

`--all` adds the two that take long: the peers, which are installed from PyPI first, and ten minutes of 512 streams. The exit
code is 1 when a benchmark itself fails; a missed budget is a row of the table.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from budget import COLLECT, collected

HERE = Path(__file__).parent
USUAL = ("startup", "router", "plane", "frontends", "trtllm", "preprocess", "shared_prompts", "limit")
LONG = ("vs_peers", "soak")
NO_QUICK = ("startup", "instructions", "limit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="a first look: short runs, noisy figures")
    parser.add_argument("--all", action="store_true", help="with the peers and the ten minutes")
    args = parser.parse_args()
    names = [*USUAL, *(["instructions"] if shutil.which("valgrind") else []), *(LONG if args.all else ())]
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows"
        rows.touch()
        for name in names:
            print(f"\n== {name}\n", flush=True)
            quick = ["--quick"] if args.quick and name not in NO_QUICK else []
            command = [sys.executable, str(HERE / f"{name}.py"), *quick]
            if subprocess.run(command, env=os.environ | {COLLECT: str(rows)}).returncode:
                failed.append(name)
        print("\n== budget\n")
        for row in collected(rows):
            print(row)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
