"""`--workers`: several frontends on one port."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import Any

import httpx
import pytest

from dynserve.config import FrontendConfig
from dynserve.errors import ConfigError
from dynserve.http import bind
from tests.conftest import MODEL, free_ports


def pids(base: str, count: int, seconds: float = 30.0) -> set[int]:
    """Of the processes that answer, once there are so many; each question is a new connection."""
    deadline, found = time.monotonic() + seconds, set[int]()
    while len(found) < count:
        assert time.monotonic() < deadline, found
        try:
            health = httpx.get(f"{base}/health", timeout=2, trust_env=False).json()
        except httpx.HTTPError:
            continue
        if health["models"]:
            found.add(health["pid"])
    return found


def two_ports() -> tuple[int, int]:
    """Free ones in a row."""
    while True:
        (first,) = free_ports(1)
        with contextlib.suppress(ConfigError), bind("127.0.0.1", first + 1, "--system-port"):
            return first, first + 1


def completion(base: str) -> int:
    body = {"model": MODEL, "prompt": "hi", "max_tokens": 3, "ignore_eos": True}
    response = httpx.post(f"{base}/v1/completions", json=body, timeout=10, trust_env=False)
    return int(response.json()["usage"]["completion_tokens"])


def test_two_processes_serve_one_port_and_one_that_dies_comes_back(deploy: Any) -> None:
    deployment = deploy()
    first, second = two_ports()
    group = deployment.frontend("--workers", "2", "--system-port", str(first))
    deployment.worker("prefill_and_decode", "--executor", "simulated")
    deployment.wait_for(1)
    both = pids(deployment.base, 2)
    assert [completion(deployment.base) for _ in range(10)] == [3] * 10
    own = [httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).json()["pid"] for port in (first, second)]
    assert set(own) == both
    metrics = httpx.get(f"http://127.0.0.1:{first}/metrics", trust_env=False).text
    assert "dynserve_frontends 2.0" in metrics  # they hear of each other's placements
    assert httpx.post(f"http://127.0.0.1:{first}/v1/completions", json={}, trust_env=False).status_code == 404

    os.kill(own[0], signal.SIGKILL)
    deadline = time.monotonic() + 30
    while len(now := pids(deployment.base, 1)) and own[0] in now:
        assert time.monotonic() < deadline
    assert completion(deployment.base) == 3
    again = pids(deployment.base, 2)
    assert own[1] in again and own[0] not in again

    late = deployment.frontend("--workers", "2")  # the port is taken, although it could be shared
    assert late.wait() == 2 and "--http-port" in late.output()
    group.kill(signal.SIGTERM)
    assert group.wait() == 0, group.output()
    for pid in again:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_group_ends_with_the_error_of_its_processes(deploy: Any) -> None:
    deployment = deploy()
    with bind("127.0.0.1", 0, "--system-port") as taken:
        taken.listen()
        group = deployment.frontend("--workers", "2", "--system-port", str(taken.getsockname()[1]))
        assert group.wait() == 2
    assert "--system-port" in group.output()


@pytest.mark.parametrize("flags", [{"workers": 0}, {"workers": 3, "link_port": 65534}, {"system_port": 70000}])
def test_numbers_of_processes_and_ports_are_checked(flags: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(reversed(flags)).replace("_", "-")):
        FrontendConfig(**flags)


def test_a_port_is_shared_only_between_those_that_both_ask_for_it() -> None:
    with bind("127.0.0.1", 0, "--http-port", shared=True) as one:
        port = one.getsockname()[1]
        bind("127.0.0.1", port, "--http-port", shared=True).close()
        with pytest.raises(ConfigError, match="--http-port"):
            bind("127.0.0.1", port, "--http-port")
