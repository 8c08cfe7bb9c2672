"""`python -m dynserve.frontend`: the OpenAI server."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from functools import partial

from dynserve.config import FrontendConfig, exit_with, load
from dynserve.errors import ConfigError
from dynserve.frontend.frontend import Frontend
from dynserve.http import bind, serving, url_of
from dynserve.process import Stop, run_process
from dynserve.transport.planes import open_planes

log = logging.getLogger("dynserve.frontend")


async def run(config: FrontendConfig, stop: Stop) -> None:
    sock = bind(config.http_host, config.http_port, "--http-port")
    url = url_of(sock)
    async with (
        open_planes(config, "frontend") as planes,
        Frontend.open(config, planes, url) as frontend,
        serving(frontend.app, sock),
    ):
        log.info("%s serves at %s, router mode %s", frontend.id, url, config.router_mode)
        await stop.wait()
        log.info("stopping")


def main(argv: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else argv
    try:
        config = load(FrontendConfig, "python -m dynserve.frontend", arguments)
        run_process(partial(run, config), config.log_level)
    except ConfigError as error:
        exit_with(error)


if __name__ == "__main__":
    main()
