"""Serving an ASGI app from inside a running program: uvicorn without its signal handlers and its exit."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import uvicorn

from dynserve.errors import ConfigError, translate

log = logging.getLogger(__name__)

GOODBYE = 5  # seconds that open connections get when the server stops


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # the program has its own idea of SIGTERM


def bind(host: str, port: int, flag: str) -> socket.socket:
    """A bound socket. Raises ConfigError that names the flag when the port is taken."""
    with translate({OSError: ConfigError}, f"{flag}: cannot listen on {host}:{port}"):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, port))
        except OSError:
            sock.close()
            raise
    return sock


def url_of(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@asynccontextmanager
async def serving(app: Any, sock: socket.socket) -> AsyncIterator[None]:
    """Serves `app` on `sock` as long as the block lives; open connections get a few seconds at the end."""
    config = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=GOODBYE, server_header=False
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve([sock]))
    try:
        while not server.started:
            if task.done():
                task.result()
                raise ConfigError("the HTTP server did not start")
            await asyncio.sleep(0.005)
        yield
    finally:
        server.should_exit = True
        await task
        sock.close()
