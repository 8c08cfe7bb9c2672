"""`--workers`: several frontends on one port."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest

from dynserve.config import FrontendConfig
from dynserve.errors import ConfigError
from dynserve.frontend.group import _hold as hold
from dynserve.server.serving import bind
from tests.conftest import MODEL, free_ports


def pids(base: str, count: int, seconds: float = 30.0) -> set[int]:
    """Returns the pids of the answering processes, once there are `count`; each request is a new connection."""
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
    """Returns two consecutive free ports."""
    while True:
        (first,) = free_ports(1)
        with contextlib.suppress(ConfigError), bind("127.0.0.1", first + 1, "--system-port"):
            return first, first + 1


def completion(base: str) -> int:
    body = {"model": MODEL, "prompt": "hi", "max_tokens": 3, "ignore_eos": True}
    response = httpx.post(f"{base}/v1/completions", json=body, timeout=10, trust_env=False)
    return int(response.json()["usage"]["completion_tokens"])


def test_two_processes_serve_one_port_and_a_dead_one_is_restarted(deploy: Any) -> None:
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
    assert "dynserve_frontends 2.0" in metrics  # they receive each other's placements
    assert httpx.post(f"http://127.0.0.1:{first}/v1/completions", json={}, trust_env=False).status_code == 404

    os.kill(own[0], signal.SIGKILL)
    with squatting(first):  # so that it cannot restart at first: this error does not end the group
        deadline = time.monotonic() + 30
        while "died with exit code 2" not in group.output():
            assert time.monotonic() < deadline, group.output()
            assert group.alive()
        assert completion(deployment.base) == 3
    answers = {httpx.get(f"{deployment.base}/v1/models/{MODEL}", trust_env=False).status_code for _ in range(100)}
    assert answers == {200}  # the restarted process receives no request before it knows the worker
    again = pids(deployment.base, 2)
    assert own[1] in again and own[0] not in again

    late = deployment.frontend("--workers", "2")  # the port is in use, although it could be shared
    assert late.wait() == 2 and "--http-port" in late.output()
    group.kill(signal.SIGTERM)
    assert group.wait() == 0, group.output()
    for pid in again:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_hangup_replaces_the_processes_without_a_refused_connection_or_a_cut_stream(deploy: Any) -> None:
    deployment = deploy()
    first, _ = two_ports()
    group = deployment.frontend("--workers", "2", "--system-port", str(first))
    deployment.worker("prefill_and_decode", "--executor", "simulated", engine={"step_ms": 20})
    deployment.wait_for(1)
    old = pids(deployment.base, 2)
    body = {"model": MODEL, "prompt": "hi", "max_tokens": 400, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{deployment.base}/v1/completions", json=body, timeout=60, trust_env=False) as stream:
        lines = stream.iter_lines()
        next(lines)
        group.kill(signal.SIGHUP)
        deadline = time.monotonic() + 60
        while "all frontends are replaced" not in group.output():
            assert time.monotonic() < deadline and group.alive(), group.output()
            assert completion(deployment.base) == 3  # each is a new connection
        assert list(lines)[-2:] == ["data: [DONE]", ""]
    new = pids(deployment.base, 2)
    assert not new & old
    while any(alive(pid) for pid in old):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    group.kill(signal.SIGTERM)
    assert group.wait() == 0, group.output()
    assert not any(alive(pid) for pid in new)


@pytest.mark.parametrize("wait", [0.0, 0.7, 2.0])
def test_a_group_that_is_stopped_while_it_replaces_its_processes_leaves_none(deploy: Any, wait: float) -> None:
    deployment = deploy()
    group = deployment.frontend("--workers", "2")
    deployment.worker("prefill_and_decode", "--executor", "simulated")
    deployment.wait_for(1)
    pids(deployment.base, 2)
    seen = {child.pid for child in psutil.Process(group.pid).children()}
    group.kill(signal.SIGHUP)
    time.sleep(wait)  # the start of a process takes about a second
    seen |= {child.pid for child in psutil.Process(group.pid).children()}
    group.kill(signal.SIGTERM)
    assert group.wait() == 0, group.output()
    assert not any(alive(pid) for pid in seen)


def test_a_process_that_cannot_replace_another_leaves_that_one_serving(deploy: Any) -> None:
    deployment = deploy()
    group = deployment.frontend("--workers", "2")
    deployment.worker("prefill_and_decode", "--executor", "simulated")
    deployment.wait_for(1)
    old = pids(deployment.base, 2)
    group.kill(signal.SIGHUP)
    deadline = time.monotonic() + 30
    while not (new := {child.pid for child in psutil.Process(group.pid).children()} - old):
        assert time.monotonic() < deadline
    for pid in new:
        os.kill(pid, signal.SIGKILL)
    while "the frontends are not replaced" not in group.output():
        assert time.monotonic() < deadline, group.output()
        assert completion(deployment.base) == 3
    assert pids(deployment.base, 2) == old
    group.kill(signal.SIGTERM)
    assert group.wait() == 0, group.output()


def alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def test_a_group_ends_with_the_error_of_its_processes(deploy: Any) -> None:
    deployment = deploy()
    with bind("127.0.0.1", 0, "--system-port") as occupied:
        occupied.listen()
        group = deployment.frontend("--workers", "2", "--system-port", str(occupied.getsockname()[1]))
        assert group.wait() == 2
    assert "--system-port" in group.output()


@pytest.mark.parametrize(
    "flags",
    [
        {"workers": 0},
        {"workers": 3, "link_port": 65534},
        {"system_port": 70000},
        {"link_port": 8000},
        {"http_host": "0.0.0.0", "http_port": 9002, "workers": 3, "link_port": 9000},
        {"workers": 4, "link_port": 9000, "system_port": 9003},
        {"workers": 4, "link_port": 9003, "system_port": 9000},
    ],
)
def test_numbers_of_processes_and_ports_are_checked(flags: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(reversed(flags)).replace("_", "-")):
        FrontendConfig(**flags)


def test_a_port_is_shared_only_if_both_sockets_request_it() -> None:
    with bind("127.0.0.1", 0, "--http-port", shared=True) as one:
        port = one.getsockname()[1]
        one.listen()
        bind("127.0.0.1", port, "--http-port", shared=True).close()
        with pytest.raises(ConfigError, match="--http-port"):
            bind("127.0.0.1", port, "--http-port")


def test_adjacent_ports_and_ports_of_other_addresses_do_not_conflict() -> None:
    FrontendConfig(workers=4, link_port=9000, system_port=9004)
    FrontendConfig(http_port=9000, workers=4, system_port=9000, system_host="127.0.0.2")
    FrontendConfig(http_port=0, link_port=0, system_port=0, workers=4)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_a_closed_port_can_be_bound_again_at_once(before: bool, after: bool) -> None:
    """The kernel remembers the connections that the last owner closed for a minute."""
    with bind("127.0.0.1", 0, "--http-port", shared=before) as one:
        one.listen()
        address = one.getsockname()
        with socket.create_connection(address) as client:
            accepted, _ = one.accept()
            accepted.close()
            assert client.recv(1) == b""
    with bind("127.0.0.1", address[1], "--http-port", shared=after) as again:
        again.listen()


def test_a_second_group_is_refused_the_port_before_the_first_one_listens() -> None:
    (port,) = free_ports(1)
    with hold(FrontendConfig(http_port=port)):
        with pytest.raises(ConfigError, match="--http-port"):
            hold(FrontendConfig(http_port=port))
        with bind("127.0.0.1", port, "--http-port", shared=True) as child:
            child.listen()
            bind("127.0.0.1", port, "--http-port", shared=True).close()
        hold(FrontendConfig(http_port=port, reuse_port=True)).close()  # the flag states that sharing is intended


@contextlib.contextmanager
def squatting(port: int) -> Iterator[None]:
    """Binds the port as soon as it is free, as another process would."""
    deadline = time.monotonic() + 10
    while True:
        try:
            sock = bind("127.0.0.1", port, "--system-port")
            sock.listen()
            break
        except (ConfigError, OSError):
            assert time.monotonic() < deadline
    with sock:
        yield
