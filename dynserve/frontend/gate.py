"""The gate: identifies a request's API key, and admits or refuses the request."""

from __future__ import annotations

import hmac
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from dynserve.errors import ConfigError, Overloaded, Unauthorized
from dynserve.frontend.keys import digest_of, read_keys
from dynserve.frontend.rate_limits import ChargedCall, KeyUsage, OpenRequests

log = logging.getLogger(__name__)


class Gate:
    """Admits requests. Without a keys file all requests are anonymous."""

    def __init__(self, keys_file: str | None, max_requests: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises ConfigError if the keys file cannot be read or has an invalid line."""
        self._path = Path(keys_file) if keys_file else None
        self._max_requests, self.clock = max_requests, clock
        self._stamp: tuple[int, int] | None = None
        self._by_digest: dict[bytes, list[KeyUsage]] = {}  # by the first bytes: all are compared in constant time
        self.open_requests = OpenRequests()
        if self._path is not None:
            self._stamp = _stamp(self._path)
            self._read(self._path)

    def enter(self, headers: Mapping[str, str]) -> ChargedCall:
        """Admits a request by its headers. Returns the call that is charged to its key.

        Raises:
            Unauthorized: the key is missing, or not in the file.
            RateLimited: the key is over its limit of requests a minute, or of concurrent answers.
            Overloaded: all clients together have too many open requests.
        """
        usage = None if self._path is None else self._known(_presented(headers))
        if self.open_requests.count >= self._max_requests:
            raise Overloaded(f"{self.open_requests.count} requests are being answered; try again soon")
        if usage is not None:
            usage.admit(self.clock())
        return ChargedCall(self.open_requests, usage, self.clock)

    def refresh(self) -> None:
        """Reads the keys file again if it has changed. An invalid file is logged once, and the keys stay as they were."""
        if self._path is None:
            return
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._read(self._path)
        except ConfigError as error:
            log.error("the keys stay as they were: %s", error)
        else:
            log.info("%d API keys reloaded", sum(map(len, self._by_digest.values())))

    def _read(self, path: Path) -> None:
        keys = read_keys(path)
        before = {usage.key: usage for usages in self._by_digest.values() for usage in usages}
        found: dict[bytes, list[KeyUsage]] = {}
        for key in keys:
            usage = before.get(key) or KeyUsage(key, self.clock())
            found.setdefault(key.digest[:4], []).append(usage)
        self._by_digest = found

    def _known(self, secret: str) -> KeyUsage:
        digest = digest_of(secret)
        for usage in self._by_digest.get(digest[:4], ()):
            if hmac.compare_digest(usage.key.digest, digest):
                return usage
        if not secret:
            raise Unauthorized("You didn't provide an API key: send it as Authorization: Bearer KEY, or as x-api-key")
        raise Unauthorized("Incorrect API key provided")


def _presented(headers: Mapping[str, str]) -> str:
    scheme, _, secret = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and secret.strip():
        return secret.strip()
    return headers.get("x-api-key", "").strip()  # how Anthropic's clients send it


def _stamp(path: Path) -> tuple[int, int] | None:
    """A value that changes whenever the file is written; None if the file cannot be accessed."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino
