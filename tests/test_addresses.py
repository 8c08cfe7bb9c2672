from __future__ import annotations

import socket

import pytest

from dynserve import addresses
from dynserve.addresses import Server, advertised, host_port, join_host_port, own_address, servers
from dynserve.errors import ConfigError


def test_addresses_are_parsed_with_and_without_a_scheme() -> None:
    assert host_port("http://a:1", "x", 9) == host_port("a:1", "x", 9) == ("a", 1)
    assert host_port("nats://a", "x", 9) == ("a", 9)
    with pytest.raises(ConfigError, match="ETCD_URL"):
        host_port("http://a:port", "ETCD_URL", 9)


@pytest.mark.parametrize(
    ("host", "text"), [("::1", "[::1]:7"), ("10.0.0.1", "10.0.0.1:7"), ("worker-0.pod", "worker-0.pod:7")]
)
def test_a_joined_address_is_parsed_to_the_same_parts(host: str, text: str) -> None:
    assert join_host_port(host, 7) == text
    assert host_port(text, "x", 9) == (host, 7)


def test_several_servers_stand_with_commas_and_may_have_users() -> None:
    assert servers("etcd-0:1, http://u:p%40%2C@[::1]:2,", "x", 9) == [
        Server("etcd-0", 1),
        Server("::1", 2, "u", "p@,", "http"),
    ]
    assert servers("nats://u:p,q@a:1,b", "x", 9) == [Server("a", 1, "u", "p,q", "nats"), Server("b", 9)]
    for invalid in ("", " , ", "a:1,b:port"):
        with pytest.raises(ConfigError, match="NATS_URL"):
            servers(invalid, "NATS_URL", 4222)


def test_a_wildcard_is_advertised_as_the_machines_own_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "own_address", lambda family: f"own-{family.name}")
    assert advertised("0.0.0.0", None) == "own-AF_INET"
    assert advertised("::", None) == "own-AF_INET6"
    assert advertised("0.0.0.0", "worker-0.example") == "worker-0.example"


def test_a_specific_address_is_advertised_unless_another_is_configured() -> None:
    assert advertised("10.0.0.1", None) == "10.0.0.1"
    assert advertised("10.0.0.1", "203.0.113.9") == "203.0.113.9"  # behind an address translation
    for loopback in ("127.0.0.1", "127.0.1.1", "::1", "localhost"):
        assert advertised(loopback, "203.0.113.9") == loopback


def test_the_own_address_is_one_that_this_machine_can_bind() -> None:
    with socket.create_server((own_address(), 0)):
        pass
