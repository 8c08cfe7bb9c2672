"""`PlaneTls`: mutual TLS between the processes of a cluster, for links, KV transfers and model files.

All processes have certificates of one private certificate authority (CA), and accept every peer that has one, whatever
its name: pods have no lasting names. The CA must sign nothing else.
"""

from __future__ import annotations

import contextlib
import ssl
from pathlib import Path
from typing import Any

from dynserve.config import PlanesConfig
from dynserve.errors import ConfigError, translate

HANDSHAKE_TIMEOUT = 3.0  # seconds
TLS_SCHEME = "tls://"  # before the addresses of listeners that take TLS only


class PlaneTls:
    """The contexts for mutual TLS, made of PEM files: a certificate, its key, and the CA of all peers.

    Raises:
        ConfigError: a file is missing or not PEM, certificate and key are not a pair, or the certificate is not of this
            CA, or not valid now: no peer would accept it.
    """

    def __init__(self, certificate: str, key: str, ca: str) -> None:
        self.certificate, self.key, self.ca = certificate, key, ca
        self.server = self._context(ssl.PROTOCOL_TLS_SERVER)  # for the side that listens
        self.server.num_tickets = 0  # sessions are not resumed, and an idle connection must stay silent
        self.client = self._context(ssl.PROTOCOL_TLS_CLIENT)

        with translate({ssl.SSLError: ConfigError}, f"--plane-tls-certificate {certificate} with --plane-tls-ca {ca}"):
            self.expires = ssl.cert_time_to_seconds(str(_handshake(self.server, self.client)["notAfter"]))  # Unix time

    def _context(self, side: int) -> ssl.SSLContext:
        context = ssl.SSLContext(side)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        load_ca(context, self.ca)
        load_pair(context, self.certificate, self.key)
        return context


def _handshake(server: ssl.SSLContext, client: ssl.SSLContext) -> dict[str, Any]:
    """Returns the server's certificate, after a handshake of both contexts in memory. Raises SSLError if it fails."""
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    asking = client.wrap_bio(back, there)
    answering = server.wrap_bio(there, back, server_side=True)
    for side in (asking, answering, asking, answering):  # two flights of TLS 1.3
        with contextlib.suppress(ssl.SSLWantReadError):
            side.do_handshake()
    return dict(asking.getpeercert() or {})


def plane_tls(config: PlanesConfig) -> PlaneTls | None:
    """Returns the contexts of a configuration, or None if it has no certificate. Raises ConfigError like `PlaneTls`."""
    if config.plane_tls_certificate and config.plane_tls_key and config.plane_tls_ca:
        return PlaneTls(config.plane_tls_certificate, config.plane_tls_key, config.plane_tls_ca)
    return None


def check_tls_of(address: str, tls: PlaneTls | None, what: str) -> None:
    """Raises ConfigError unless the address of `what` and this process both have TLS, or both have none."""
    if address.startswith(TLS_SCHEME) != (tls is not None):
        has, lacks = ("this process", what) if tls is not None else (what, "this process")
        raise ConfigError(
            f"{has} takes mutual TLS only and {lacks} has none: set --plane-tls-certificate on all or none"
        )


def server_tls(config: PlanesConfig) -> ssl.SSLContext:
    """Returns the context for NATS, which is used if its address begins with `tls://`. The server's name is checked, by
    `--plane-tls-ca` if it is set, else by the CAs of this machine. Raises ConfigError for unusable files."""
    context = ssl.create_default_context()
    if config.plane_tls_ca:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        load_ca(context, config.plane_tls_ca)
    if config.plane_tls_certificate and config.plane_tls_key:
        load_pair(context, config.plane_tls_certificate, config.plane_tls_key)
    return context


def load_ca(context: ssl.SSLContext, ca: str) -> None:
    with translate({OSError: ConfigError, ssl.SSLError: ConfigError}, f"--plane-tls-ca {ca}"):
        context.load_verify_locations(ca)


def load_pair(context: ssl.SSLContext, certificate: str, key: str, flags: str = "--plane-tls") -> None:
    """Loads a certificate and its key, which the options `flags`-certificate and `flags`-key name.

    Raises:
        ConfigError: a file is missing, not PEM, or needs a password, or they are not a pair.
    """

    def no_password() -> str:
        raise ConfigError(f"{flags}-key {key} is encrypted; use a key without a password")

    for flag, path in ((f"{flags}-certificate", certificate), (f"{flags}-key", key)):
        with translate({OSError: ConfigError}, f"{flag} {path}"):
            Path(path).read_bytes()
    with translate({OSError: ConfigError}, f"{flags}-certificate {certificate} and {flags}-key {key} are not a pair"):
        context.load_cert_chain(certificate, key, no_password)
