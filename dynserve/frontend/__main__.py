"""`python -m dynserve.frontend`: the OpenAI server."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from dynserve.config import FrontendConfig
from dynserve.frontend.access import check_keys
from dynserve.frontend.frontend import Frontend, check_policy
from dynserve.http import Limits, bind, serving, tls_of, url_of
from dynserve.process import Stop, run_role, settle_memory
from dynserve.transport.planes import open_planes

log = logging.getLogger("dynserve.frontend")


async def run(config: FrontendConfig, stop: Stop) -> None:
    check_policy(config)
    check_keys(config.api_keys_file)
    sock = bind(config.http_host, config.http_port, "--http-port")
    tls = tls_of(config.tls_certificate, config.tls_key)
    url = url_of(sock, "https" if tls else "http")
    limits = Limits(config.max_header_bytes, config.receive_timeout_s)
    async with (
        open_planes(config, "frontend") as planes,
        Frontend.open(config, planes, url) as frontend,
        serving(frontend.served, sock, limits, tls),
    ):
        settle_memory()
        log.info("%s serves at %s, router mode %s", frontend.id, url, config.router_mode)
        await stop.wait()
        log.info("stopping")


def main(argv: Sequence[str] | None = None) -> None:
    run_role(FrontendConfig, "python -m dynserve.frontend", run, argv)


if __name__ == "__main__":
    main()
