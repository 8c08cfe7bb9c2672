"""Authorities and certificates for tests of TLS."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import trustme

from dynserve.plane_tls import PlaneTls


class Authority:
    """A certificate authority with one certificate for this machine, in PEM files."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        authority = trustme.CA()
        certificate = authority.issue_cert("127.0.0.1", "localhost")
        self.ca, self.certificate, self.key = (str(folder / name) for name in ("ca.crt", "tls.crt", "tls.key"))
        authority.cert_pem.write_to_path(self.ca)
        certificate.private_key_pem.write_to_path(self.key)
        for at, part in enumerate(certificate.cert_chain_pems):
            part.write_to_path(self.certificate, append=at > 0)

    @cached_property
    def tls(self) -> PlaneTls:
        return PlaneTls(self.certificate, self.key, self.ca)

    @property
    def flags(self) -> list[str]:
        return ["--plane-tls-certificate", self.certificate, "--plane-tls-key", self.key, "--plane-tls-ca", self.ca]
