"""Several frontends on one port, each in its own process; the kernel spreads connections over them (SO_REUSEPORT).

Each is a complete frontend with its own links, and shares its load with the others like a frontend on another machine. The
parent serves no requests: it holds the port, starts the children, restarts those that die, and stops them.
"""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Sequence

from dynserve.child import ChildSpec, Group, Supervisor
from dynserve.config import FrontendConfig
from dynserve.process import StopSignal
from dynserve.server.serving import bind, url_of
from dynserve.tasks import task_group

log = logging.getLogger(__name__)


async def run_group(config: FrontendConfig, argv: Sequence[str], stop: StopSignal) -> None:
    """Runs the group until `stop`. `argv` are the parent's flags, which are passed to the children.

    Raises:
        ConfigError: the port is in use, or a child reports that its configuration is invalid.
    """
    with _hold(config) as held:
        port = held.getsockname()[1]
        planes = {"NATS_URL": config.nats_url, "ETCD_URL": config.etcd_url}
        specs = [ChildSpec(f"frontend-{n + 1}", _command(config, argv, port, n), planes) for n in range(config.workers)]
        async with task_group() as tasks:
            supervisor = Supervisor([Group(specs)], tasks)
            try:
                await supervisor.start()
                log.info(
                    "%d frontends start at %s",
                    len(specs),
                    url_of(held, "https" if config.tls_key else "http", config.advertise_host),
                )
                await stop.wait(supervisor.broken)
                log.info("stopping")
            finally:
                await supervisor.stop()


def _hold(config: FrontendConfig) -> socket.socket:
    """Binds the port for the children. No other process can bind it, unless `reuse_port` is set."""
    if not config.reuse_port:  # sharing it with another cluster of the same user would go unnoticed
        bind(config.http_host, config.http_port, "--http-port").close()
    held = bind(config.http_host, config.http_port, "--http-port", shared=True)
    # from here on no second group can bind it, even before a child listens; the children need only SO_REUSEPORT for it
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    return held


def _command(config: FrontendConfig, argv: Sequence[str], port: int, number: int) -> list[str]:
    """The command line of a child. Its own flags are the last ones, which count. Addresses of planes may contain passwords:
    they are passed in the environment."""
    own = {"workers": 1, "reuse-port": "true", "http-port": port}
    for name, first in (("link-port", config.link_port), ("system-port", config.system_port)):
        if first:
            own[name] = first + number
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
