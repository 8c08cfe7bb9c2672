"""Heads of requests: the bounds that a server sets, and the checks that refuse a head.

A header that frames or addresses a request must not be ambiguous: a proxy in front of this server could read it
differently (request smuggling). So an ambiguous head is refused.
"""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Sequence
from ipaddress import ip_address
from typing import NamedTuple

from dynserve.errors import ConfigError

Fault = tuple[int, str]  # the status and the sentence of a refusal


class HttpLimits(NamedTuple):
    """The bounds of a connection, while its request's head arrives and while its client reads nothing.

    `hosts` are the names that a request's Host header may have, in lower case; an IP address is always accepted, because
    DNS rebinding needs a name. None accepts every name.
    """

    header_bytes: int = 64 << 10
    header_s: float = 60.0
    write_s: float = 60.0  # while the client reads nothing
    connections: int = sys.maxsize  # of one server; further ones get a 503
    hosts: frozenset[str] | None = None


def allowed_hosts(wanted: str | None, bound_to: str) -> frozenset[str] | None:
    """The names of `HttpLimits.hosts`, from a comma-separated list or `*`.

    Without a list, a server on a loopback address accepts only names of this machine: a web page whose own name points
    at 127.0.0.1 (DNS rebinding) is refused. A server on another address accepts any name.

    Raises:
        ConfigError: the list is empty.
    """
    if wanted is None:
        if not is_loopback(bound_to):
            return None
        own = socket.gethostname().lower()
        return frozenset({"localhost", own, f"{own.partition('.')[0]}.local", "host.docker.internal"})
    names = frozenset(name.strip().strip("[]").lower() for name in wanted.split(",") if name.strip())
    if not names:
        raise ConfigError("--allowed-hosts names no host; write `*` for any")
    return None if "*" in names else names


def is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def fault_of(
    method: bytes,
    target: bytes,
    version: str,
    headers: Sequence[tuple[bytes, bytes]],
    *,
    limits: HttpLimits,
    accepted: bytes | None,
) -> tuple[Fault | None, bytes | None]:
    """Returns the fault of a head, or None, and the Host header that is accepted from now on. `accepted` is the one that
    was accepted last on the same connection; it is not checked again. Names of `headers` are in lower case."""
    size = len(target)
    host: bytes | None = None
    coded = 0
    for name, value in headers:
        size += len(name) + len(value)
        if name == b"host":
            if host is not None:
                return (400, "the request has more than one Host header"), accepted
            host = value.rstrip(b" \t")  # the parser keeps these where a packet ended there
        elif name == b"transfer-encoding":
            coded += 1
            if value.strip(b" \t").lower() != b"chunked":
                repeated = b"chunked" in value.lower()
                sentence = "the only Transfer-Encoding that is supported is `chunked`, once"
                return ((400 if repeated else 501), sentence), accepted
    if size > limits.header_bytes:
        return (431, "the request's headers are too large"), accepted
    if version not in ("1.0", "1.1"):
        return (505, "only HTTP/1.0 and HTTP/1.1 are supported"), accepted
    if coded > 1 or (coded and version == "1.0"):
        return (400, "Transfer-Encoding is allowed once, in HTTP/1.1"), accepted
    if method == b"CONNECT":
        return (405, "this server is not a proxy: CONNECT is not supported"), accepted
    if host is None:
        return (None if version == "1.0" else (400, "the request has no Host header")), accepted
    if b"://" in target and (named := _AUTHORITY.match(target)) is not None:
        host = named[1]  # RFC 9112, section 3.2.2: it replaces the header
    if host == accepted:
        return None, accepted
    fault = _host_fault(host, limits.hosts)
    return fault, (host if fault is None else accepted)


def _host_fault(host: bytes, hosts: frozenset[str] | None) -> Fault | None:
    found = HOST.fullmatch(host)
    if found is None:
        return 400, "the Host header is not a host name with an optional port"
    name = found[1].decode("ascii").strip("[]").lower()
    if hosts is not None and name not in hosts and not name.endswith(".localhost") and not _is_address(name):
        return 421, f"this server does not accept the host {name[:100]!r}; --allowed-hosts lists the accepted ones"
    return None


# a name, an IPv4 address, or an IPv6 one in brackets; and a port
HOST = re.compile(rb"([A-Za-z0-9._~-]{1,255}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?")
_AUTHORITY = re.compile(rb"[A-Za-z][A-Za-z0-9+.-]*://(?:[^/?#@]*@)?([^/?#]*)")


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
