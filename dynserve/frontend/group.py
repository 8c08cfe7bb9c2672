"""Several frontends on one port: processes of their own that the kernel spreads connections over (SO_REUSEPORT).

Each is a whole frontend with its own links, and takes part in the sharing of loads as one on another machine would. The
parent serves nothing: it holds the port, starts the others, starts again those that die, and stops them.
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
    """Until `stop`. `argv` are the parent's flags, which the children get as well.

    Raises:
        ConfigError: the port is taken, or a child says that its configuration is wrong.
    """
    with _hold(config) as held:
        port = held.getsockname()[1]
        planes = {"NATS_URL": config.nats_url, "ETCD_URL": config.etcd_url}
        specs = [ChildSpec(f"frontend-{n + 1}", _command(config, argv, port, n), planes) for n in range(config.workers)]
        async with task_group() as tasks:
            supervisor = Supervisor([Group(specs)], tasks)
            try:
                await supervisor.start()
                log.info("%d frontends start at %s", len(specs), url_of(held, "https" if config.tls_key else "http"))
                await stop.wait(supervisor.broken)
                log.info("stopping")
            finally:
                await supervisor.stop()


def _hold(config: FrontendConfig) -> socket.socket:
    """The port, bound for the children and for nobody else, unless others were asked to share it."""
    if not config.reuse_port:  # sharing it with another cluster of the same user would go unnoticed
        bind(config.http_host, config.http_port, "--http-port").close()
    held = bind(config.http_host, config.http_port, "--http-port", shared=True)
    # from here on a second group finds it taken, even before a child listens; the children need only SO_REUSEPORT for it
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    return held


def _command(config: FrontendConfig, argv: Sequence[str], port: int, number: int) -> list[str]:
    """The last of two equal flags counts. Addresses of planes may have passwords in them: they go by the environment."""
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
