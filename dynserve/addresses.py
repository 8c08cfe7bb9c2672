"""Network addresses: parsing, formatting, and the address that other processes are told."""

from __future__ import annotations

import re
import socket
from contextlib import suppress
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from dynserve.errors import ConfigError

WILDCARDS = frozenset({"0.0.0.0", "::", ""})
_LOOPBACK = re.compile(r"127(\.\d{1,3}){3}|::1|localhost")
_CREDENTIALS = re.compile(r"(^|,)[^,]*@")  # of addresses without a scheme
_URLS = re.compile(r",(?=\s*[A-Za-z+]+://)")  # the commas between addresses with one; a password may have commas, too
_CREDENTIALS_OF_URL = re.compile(r"(://).*@")  # a password may have slashes


class Server(NamedTuple):
    """The address of a server, with the name and password of its user if the address has them."""

    host: str
    port: int
    user: str | None = None
    password: str | None = None
    scheme: str = ""


def redacted(url: str) -> str:
    """Removes user names and passwords from an address, or several with commas, for logs, errors and reports."""
    parts = [
        _CREDENTIALS_OF_URL.sub(r"\1***@", part) if "://" in part else _CREDENTIALS.sub(r"\1***@", part)
        for part in _URLS.split(url)
    ]
    return ",".join(parts)


def several(urls: str) -> list[str]:
    """The addresses of a list with commas. Passwords of addresses with a scheme may have commas, too."""
    found = []
    for part in _URLS.split(urls):
        user, at, hosts = part.rpartition("@") if "://" in part else ("", "", part)
        first, *others = hosts.split(",")
        found += [f"{user}{at}{first}", *others]
    return [address.strip() for address in found if address.strip()]


def host_port(url: str, what: str, default_port: int) -> tuple[str, int]:
    """Returns host and port of `http://host:port`, `nats://host:port` or `host:port`. IPv6 addresses have brackets.

    Raises:
        ConfigError: this is not an address; the message begins with `what`.
    """
    host, port, netloc = "", None, ""
    with suppress(ValueError):
        parts = urlsplit(url if "//" in url else f"//{url}")
        host, netloc = parts.hostname or "", parts.netloc
        port = parts.port
    if not host or (port is None and netloc.rpartition("@")[2].strip("[]").lower() != host):
        raise ConfigError(
            f"{what} {redacted(url)!r} is not an address; expected something like 127.0.0.1:{default_port}"
        )
    return host, port or default_port


def servers(urls: str, what: str, default_port: int) -> list[Server]:
    """Returns the servers of one address, or of several with commas. Raises ConfigError like `host_port`."""
    found = []
    for url in several(urls):
        host, port = host_port(url, what, default_port)
        parts = urlsplit(url if "//" in url else f"//{url}")
        user, password = parts.username, parts.password
        found.append(Server(host, port, user and unquote(user), password and unquote(password), parts.scheme))
    if not found:
        raise ConfigError(f"{what} is empty; expected something like 127.0.0.1:{default_port}")
    return found


def join_host_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def advertised(bound: str, configured: str | None) -> str:
    """Returns the host at which other processes reach a listener that is bound to `bound`.

    It is `configured`, if set; otherwise the bound address itself, or for a wildcard this machine's own address. A listener
    on loopback keeps its address: no other one reaches it.
    """
    if _LOOPBACK.fullmatch(bound.lower()):
        return bound
    if configured is not None:
        return configured
    return own_address(socket.AF_INET6 if ":" in bound else socket.AF_INET) if bound in WILDCARDS else bound


def own_address(family: socket.AddressFamily = socket.AF_INET) -> str:
    """Returns the address of this machine's interface for other networks; without one, loopback. Sends nothing."""
    elsewhere, loopback = ("2001:db8::1", "::1") if family == socket.AF_INET6 else ("192.0.2.1", "127.0.0.1")
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect((elsewhere, 9))  # selects the interface; a datagram socket sends nothing for this
        return str(sock.getsockname()[0])
    with suppress(
        OSError
    ):  # no route to other networks: the address of the host's own name, as in an isolated container
        found = socket.getaddrinfo(socket.gethostname(), None, family, socket.SOCK_STREAM)
        return str(found[0][4][0])
    return loopback
