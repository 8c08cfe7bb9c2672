"""Serving an ASGI app from inside a running program: sockets, TLS, and uvicorn without its signal handlers and its exit."""

from __future__ import annotations

import asyncio
import math
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, nullcontext
from typing import Any, NamedTuple, cast

import uvicorn

from dynserve.addresses import advertised, join_host_port
from dynserve.errors import ConfigError, translate
from dynserve.open_files import file_limit
from dynserve.plane_tls import load_pair
from dynserve.server.heads import HttpLimits, allowed_hosts
from dynserve.server.protocol import BoundedProtocol
from dynserve.tls_listener import tls_listener

OWN_FILES = 256  # of a process, at most: links, planes, libraries, pipes
TLS_TIMEOUT = 10.0  # seconds of a handshake
MAX_HANDSHAKES = 512  # that are not done; with more, the oldest is closed
KEEP_ALIVE = 75.0  # seconds; load balancers keep idle connections for 60, and must be the ones that close them
GOODBYE = 5.0  # seconds that open requests get when the server stops, unless it is told otherwise


def allowed_connections(tls: bool) -> int:
    """The number of connections that the limit of open files allows, besides the process's own files."""
    handshakes = MAX_HANDSHAKES if tls else 0
    limit = file_limit()
    return max(1, limit - handshakes - min(OWN_FILES, limit // 4))


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the program handles SIGTERM itself."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(host: str, port: int, flag: str, *, shared: bool = False) -> socket.socket:
    """Returns a bound socket. Other processes of this user may bind the port of a `shared` one, too; the kernel spreads
    connections over those that listen. Raises ConfigError that names the flag if the port is in use."""
    with translate({OSError: ConfigError}, f"{flag}: cannot listen on {host}:{port}"):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            # connections that have just ended must not keep the port from being bound again
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if shared:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind((host, port))
        except OSError:
            sock.close()
            raise
    return sock


def inherited(fd: int, flag: str) -> socket.socket:
    """Returns a listening socket that this process has inherited. Raises ConfigError that names the flag if it has not."""
    with translate({OSError: ConfigError}, f"{flag}: {fd} is not a socket of this process"):
        return socket.socket(fileno=fd)


def url_of(sock: socket.socket, scheme: str = "http", advertise_host: str | None = None) -> str:
    """Returns the URL at which other processes reach the socket. `advertise_host`: see `addresses.advertised`."""
    host, port = sock.getsockname()[:2]
    return f"{scheme}://{join_host_port(advertised(host, advertise_host), port)}"


class Tls(NamedTuple):
    """The paths of the PEM files of a certificate and its key. With `client_ca`, clients need a certificate of that CA."""

    certificate: str
    key: str
    client_ca: str | None = None


def tls_of(certificate: str | None, key: str | None) -> Tls | None:
    """Returns the checked files, or None if one is not given. Raises the errors of `check_tls`."""
    if certificate is None or key is None:
        return None
    check_tls(tls := Tls(certificate, key))
    return tls


def check_tls(tls: Tls) -> None:
    """Raises ConfigError for files that are missing, not PEM, not a pair, or need a password."""
    load_pair(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), tls.certificate, tls.key, "--tls")


def _listening_with_tls(server: _Server, sock: socket.socket) -> AbstractAsyncContextManager[None]:
    """Accepts connections for uvicorn, which would not bound their handshakes."""
    config = server.config
    assert config.ssl is not None

    def protocol() -> BoundedProtocol:
        made = config.http_protocol_class(  # type: ignore[call-arg]
            config=config, server_state=server.server_state, app_state=server.lifespan.state
        )
        return cast(BoundedProtocol, made)

    sock.listen(config.backlog)
    return tls_listener(sock, protocol, config.ssl, lambda *_: None, timeout=TLS_TIMEOUT, max_pending=MAX_HANDSHAKES)


@asynccontextmanager
async def serving(
    app: Any,
    sock: socket.socket,
    limits: HttpLimits | None = None,
    tls: Tls | None = None,
    *,
    keep_alive_s: float = KEEP_ALIVE,
    drain_s: float = GOODBYE,
) -> AsyncIterator[None]:
    """Serves `app` on `sock` while the block is open. At its end open requests get `drain_s` seconds. A connection without
    requests is closed after `keep_alive_s` seconds.

    Raises:
        ConfigError: the certificate or its key cannot be used.
    """
    bounds = limits or HttpLimits(hosts=allowed_hosts(None, sock.getsockname()[0]))
    bounds = bounds._replace(connections=min(bounds.connections, allowed_connections(tls is not None)))
    config = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="off", server_header=False,
        timeout_graceful_shutdown=math.ceil(drain_s),
        proxy_headers=False, timeout_keep_alive=cast(int, keep_alive_s),  # which uvicorn only passes to `call_later`
        http=type("_Bounded", (BoundedProtocol,), {"limits": bounds}), ws="none",
        ssl_certfile=tls.certificate if tls else None, ssl_keyfile=tls.key if tls else None,
        ssl_ca_certs=tls.client_ca if tls else None,
        ssl_cert_reqs=ssl.CERT_REQUIRED if tls and tls.client_ca else ssl.CERT_NONE,
    )  # fmt: skip
    if tls is not None:
        check_tls(tls)
    server = _Server(config)
    task = asyncio.create_task(server.serve([sock] if tls is None else []))
    try:
        while not server.started:
            if task.done():
                task.result()
                raise ConfigError("the HTTP server did not start")
            await asyncio.sleep(0.005)
        async with _listening_with_tls(server, sock) if tls is not None else nullcontext():
            yield
    finally:
        server.should_exit = True
        await task
        sock.close()
