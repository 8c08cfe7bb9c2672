"""`python -m dynserve.frontend`: the OpenAI server."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import partial
from ipaddress import ip_address

from dynserve.config import FrontendConfig
from dynserve.frontend.app import make_apps
from dynserve.frontend.frontend import Frontend, check_policy
from dynserve.frontend.group import run_group
from dynserve.frontend.keys import check_keys
from dynserve.process import StopSignal, run_role, settle_memory
from dynserve.server.heads import HttpLimits, allowed_hosts
from dynserve.server.serving import allowed_connections, bind, inherited, serving, tls_of, url_of
from dynserve.transport.planes import open_planes

SETTLE = 5.0  # seconds that a new frontend waits for links to the workers in discovery, some of which may be dead
SWITCH_INTERVAL = 0.001  # seconds

log = logging.getLogger("dynserve.frontend")


async def run(argv: Sequence[str], config: FrontendConfig, stop: StopSignal) -> None:
    check_policy(config)
    check_keys(config.api_keys_file)
    tls = tls_of(config.tls_certificate, config.tls_key)
    limits = HttpLimits(config.max_header_bytes, config.receive_timeout_s)
    ours = limits._replace(hosts=allowed_hosts(config.allowed_hosts, config.http_host))
    if config.workers > 1:
        await run_group(config, argv, stop)
        return
    async with AsyncExitStack() as stack:
        if config.http_fd is None:
            sock = bind(config.http_host, config.http_port, "--http-port", shared=config.reuse_port)
        else:
            sock = inherited(config.http_fd, "--http-fd")
        url = url_of(sock, "https" if tls else "http", config.advertise_host)
        own = None
        if config.system_port:
            own = bind(config.system_host, config.system_port, "--system-port", shared=config.reuse_port)
        _check_link_port(config)
        planes = await stack.enter_async_context(open_planes(config, "frontend", shared=config.reuse_port))
        frontend = await stack.enter_async_context(Frontend.open(config, planes, url))
        apps = make_apps(frontend)
        await frontend.settled(SETTLE)  # the first request must find the workers that are there
        served = serving(apps.served, sock, ours, tls, keep_alive_s=config.keep_alive_s, drain_s=config.drain_timeout_s)
        await stack.enter_async_context(served)
        if own is not None:
            system = limits._replace(hosts=allowed_hosts(config.allowed_hosts, config.system_host))
            await stack.enter_async_context(serving(apps.system, own, system))
        settle_memory()
        # threads that prepare large bodies release the interpreter to the event loop sooner than after 5 ms each
        sys.setswitchinterval(SWITCH_INTERVAL)
        log.info("%s serves at %s, router mode %s", frontend.id, url, config.router_mode)
        _compare_limits(config, allowed_connections(tls is not None))
        if config.ready_fd is not None:
            with contextlib.suppress(OSError):
                os.write(config.ready_fd, b"ready\n")
                os.close(config.ready_fd)
        await stop.wait()
        log.info("stopping")


def _compare_limits(config: FrontendConfig, connections: int) -> None:
    """Says how many connections the limit of open files allows, and warns if requests could need more."""
    if connections < config.max_requests:
        log.warning(
            "the limit of open files (ulimit -n) allows %d connections, fewer than --max-requests %d; more get a 503",
            connections, config.max_requests,
        )  # fmt: skip
    else:
        log.info("up to %d connections", connections)


def _check_link_port(config: FrontendConfig) -> None:
    """Raises ConfigError, before the wait for NATS, if the port of links is in use. Names are left to the listener, which
    finds all their addresses."""
    if not config.link_port:
        return
    with contextlib.suppress(ValueError):
        ip_address(config.link_host)
        bind(config.link_host, config.link_port, "--link-port", shared=config.reuse_port).close()


def main(argv: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else argv
    run_role(FrontendConfig, "python -m dynserve.frontend", partial(run, arguments), arguments)


if __name__ == "__main__":
    main()
