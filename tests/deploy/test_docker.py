"""The Dockerfile, the compose file and the lock file, as far as they can be checked without building an image."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent.parent
DOCKER = ROOT / "docker"
HERE = Path(sys.executable).parent


def run(*words: str | Path) -> None:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dockerfile_passes_hadolint() -> None:
    run(HERE / "hadolint", DOCKER / "Dockerfile")


def test_the_compose_file_fits_its_schema() -> None:
    run(HERE / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", DOCKER / "compose.yaml")


def test_all_containers_of_the_compose_file_are_confined() -> None:
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    assert {"etcd", "nats", "frontend", "prefill", "decode", "prometheus"} == services.keys()
    for name, service in services.items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"], name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
    assert services["prefill"]["deploy"]["replicas"] == services["decode"]["deploy"]["replicas"] == 2


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def versions(path: Path) -> dict[str, str]:
    found = re.findall(r"^([\w.-]+)==([\w.]+)", path.read_text(), re.MULTILINE)
    return {normal(name): version for name, version in found}


def test_the_lock_file_has_the_versions_of_the_constraints_and_all_packages_of_a_frontend() -> None:
    locked, constrained = versions(DOCKER / "core.lock"), versions(DOCKER / "constraints.txt")
    assert {name: constrained[name] for name in locked if name in constrained} == {
        name: version for name, version in locked.items() if name in constrained
    }
    text = (DOCKER / "core.lock").read_text()
    assert all("--hash=sha256:" in part for part in re.split(r"(?m)^(?=[\w.-]+==)", text)[1:])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {normal(re.split(r"[<>=!;\[ ]", line)[0]) for line in project["dependencies"]}
    assert needed <= locked.keys()
