"""`dynserve doctor`: prints all findings, one line each with the remedy, and sets the exit code."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence

from dynserve.config import exit_with, load
from dynserve.doctor.cluster import CLUSTER
from dynserve.doctor.finding import Check, DoctorConfig, Finding
from dynserve.doctor.machine import MACHINE
from dynserve.errors import ConfigError


def findings(config: DoctorConfig, checks: Sequence[Check]) -> Iterator[Finding]:
    """Yields findings as they are made. A check that raises is reported as a warning, and the others still run."""
    for check in checks:
        try:
            yield from check(config)
        except Exception as error:
            yield Finding(check.__name__, "warn", f"the check failed: {type(error).__name__}: {error}")


def main(argv: Sequence[str] | None = None) -> None:
    try:
        config = load(DoctorConfig, "python -m dynserve doctor", sys.argv[1:] if argv is None else argv)
    except ConfigError as error:
        exit_with(error)
    if config.trtllm_selftest:
        from dynserve.doctor.selftest import run  # imports the executor

        run.main(config)
    found: list[Finding] = []
    if not config.json:
        print(f"{config.role or 'frontend and worker'}, executor {config.engine}\n")
    for finding in findings(config, [*MACHINE, *CLUSTER]):
        found.append(finding)
        if not config.json:
            print(finding.line, flush=True)
    failed = [finding for finding in found if finding.state == "fail"]
    if config.json:
        summary = {"role": config.role, "executor": config.engine, "ok": not failed}
        print(json.dumps(summary | {"findings": [finding._asdict() for finding in found]}, indent=2))
    else:
        warned = sum(finding.state == "warn" for finding in found)
        print(f"\nfailures: {len(failed)}, warnings: {warned}")
    raise SystemExit(1 if failed else 0)
