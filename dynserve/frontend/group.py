"""Several frontends on one port, each in its own process; the kernel spreads connections over them (SO_REUSEPORT).

Each is a complete frontend with its own links, and shares its load with the others like a frontend on another machine. The
parent serves no requests: it holds the sockets, starts the children, restarts those that die, and stops them. SIGHUP
replaces the children one by one. A new child inherits the socket of the old one, so that no connection is refused, and the
old one answers its open requests to the end.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Sequence
from typing import Any

from dynserve.child import Child, ChildSpec, Group, Supervisor
from dynserve.config import FrontendConfig
from dynserve.errors import DynserveError
from dynserve.process import StopSignal
from dynserve.server.serving import bind, url_of
from dynserve.tasks import task_group

log = logging.getLogger(__name__)

READY_TIMEOUT = 60.0  # seconds for a new child to serve
GRACE = 15.0  # seconds beyond its drain time for a child to end


async def run_group(config: FrontendConfig, argv: Sequence[str], stop: StopSignal) -> None:
    """Runs the group until `stop`. `argv` are the parent's flags, which are passed to the children.

    Raises:
        ConfigError: the port is in use, or a child reports that its configuration is invalid.
    """
    with _hold(config) as held:
        slots = _Slots(config, argv, held.getsockname()[1])
        url = url_of(held, "https" if config.tls_key else "http", config.advertise_host)
        async with task_group() as tasks:
            supervisor = Supervisor(
                [Group([slots.spec(name) for name in slots.names])], tasks, on_death=slots.close, renewed=slots.spec
            )
            rolling = asyncio.Event()
            stop.on_hangup(rolling.set)
            roll = tasks.create_task(_roll(supervisor, slots, rolling))
            try:
                await supervisor.start()
                log.info("%d frontends start at %s", len(slots.names), url)
                await stop.wait(supervisor.broken)
                log.info("stopping")
            finally:
                roll.cancel()
                await supervisor.stop()
                for name in slots.names:
                    slots.close(name)


class _Slots:
    """The sockets and the commands of the children, by their names. A socket outlives a child that is replaced."""

    def __init__(self, config: FrontendConfig, argv: Sequence[str], port: int) -> None:
        self._config, self._argv, self._port = config, argv, port
        self.names = [f"frontend-{number + 1}" for number in range(config.workers)]
        self._sockets: dict[str, socket.socket] = {}

    def spec(self, name: str, ready_fd: int | None = None) -> ChildSpec:
        """Returns how to start a child. Addresses of planes may contain passwords: they are passed in the environment."""
        config, sock = self._config, self._sockets.get(name)
        if sock is None:
            # it does not listen yet: the kernel must assign no connections to it before the child accepts them
            sock = self._sockets[name] = bind(config.http_host, self._port, "--http-port", shared=True)
        fds = (sock.fileno(),) if ready_fd is None else (sock.fileno(), ready_fd)
        command = _command(config, self._argv, self._port, self.names.index(name), *fds)
        planes = {"NATS_URL": config.nats_url, "ETCD_URL": config.etcd_url}
        return ChildSpec(name, command, planes, fds=fds, grace_s=config.drain_timeout_s + GRACE)

    def close(self, name: str) -> None:
        """Closes a socket, so that the kernel assigns no connections to a child that has died."""
        if (sock := self._sockets.pop(name, None)) is not None:
            sock.close()


async def _roll(supervisor: Supervisor, slots: _Slots, rolling: asyncio.Event) -> None:
    """Replaces all children, one by one, whenever `rolling` is set. Stops at one whose successor does not serve."""
    (children,) = supervisor.groups
    while True:
        await rolling.wait()
        rolling.clear()
        log.info("SIGHUP: %d frontends are replaced, one by one", len(children))
        try:
            for child in list(children):
                await _replace(supervisor, child, children, slots)
        except (DynserveError, OSError) as error:
            log.error("the frontends are not replaced: %s", error)
        else:
            log.info("all frontends are replaced; the old ones answer their open requests")


async def _replace(supervisor: Supervisor, child: Child, children: list[Child], slots: _Slots) -> None:
    """Replaces one child. Raises InternalError if its successor does not serve."""
    reading, writing = map(os.fdopen, os.pipe(), ("rb", "wb"))

    async def ready() -> bool:
        writing.close()  # the child has it; the end of the pipe is then the end of the child
        return await _has_line(reading.fileno())

    with reading, writing:
        await supervisor.replace(child, children, slots.spec(child.name, writing.fileno()), ready)


async def _has_line(reading: int) -> bool:
    """Returns True once a line has arrived through a pipe; False at its end, or when none came in time."""
    loop, arrived = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(reading, arrived.set)
    try:
        async with asyncio.timeout(READY_TIMEOUT):
            await arrived.wait()
        return bool(os.read(reading, 64))
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(reading)


def _hold(config: FrontendConfig) -> socket.socket:
    """Binds the port for the children. No other process can bind it, unless `reuse_port` is set."""
    if not config.reuse_port:  # sharing it with another cluster of the same user would go unnoticed
        bind(config.http_host, config.http_port, "--http-port").close()
    held = bind(config.http_host, config.http_port, "--http-port", shared=True)
    # from here on no second group can bind it, even before a child listens; the children need only SO_REUSEPORT for it
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    return held


def _command(
    config: FrontendConfig, argv: Sequence[str], port: int, number: int, http_fd: int, ready_fd: int | None = None
) -> list[str]:
    """The command line of a child. Its own flags are the last ones, which count."""
    own: dict[str, Any] = {"workers": 1, "reuse-port": "true", "http-port": port, "http-fd": http_fd}
    for name, first in (("link-port", config.link_port), ("system-port", config.system_port)):
        if first:
            own[name] = first + number
    if ready_fd is not None:
        own["ready-fd"] = ready_fd
    flags = [f"--{name}={value}" for name, value in own.items()]
    return [sys.executable, "-m", "dynserve.frontend", *_without_planes(argv), *flags]


def _without_planes(argv: Sequence[str]) -> list[str]:
    kept: list[str] = []
    words = iter(argv)
    for word in words:
        if word in ("--nats-url", "--etcd-url"):
            next(words, None)
        elif not word.startswith(("--nats-url=", "--etcd-url=")):
            kept.append(word)
    return kept
