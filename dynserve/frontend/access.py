"""Who may ask, and how much: API keys with limits of their own, and a bound on all requests together.

A keys file has one key per line, made by `dynserve key`; the key itself is not in it, only its SHA-256:

    alice sha256:9f86…0a08 rpm=600 tpm=200000 concurrency=32 priority=5 group=research

`concurrency` counts answers, of which one request can ask for many; `tpm` counts the tokens of prompts and answers. Keys of
one group may find each other's prompts in the caches; a key without a group finds its own. The limits are those of one
frontend: several do not add up what they count.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from dynserve.config import nearest
from dynserve.errors import ConfigError, Overloaded, RateLimited, Unauthorized

log = logging.getLogger(__name__)

PREFIX = "sk-dyn-"
_NAME = re.compile(r"[\w.@-]{1,64}")
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
MOST = 2**31 - 1  # of any limit
LIMITS = ("rpm", "tpm", "concurrency", "priority")


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """None: no limit. `priority` is the highest that its requests can have, and what they have without a wish. `group`
    names those that share cached prompts."""

    name: str
    digest: bytes
    rpm: int | None = None
    tpm: int | None = None
    concurrency: int | None = None
    priority: int | None = None
    group: str = ""


def parse_keys(text: str, where: str) -> list[Key]:
    """Raises ConfigError that names the line."""
    keys: list[Key] = []
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.split("#", 1)[0].strip()
        if not line:
            continue
        key = _parse_line(line, f"{where}, line {number}")
        if any(other.name == key.name for other in keys):
            raise ConfigError(f"{where}, line {number}: {key.name} is there twice")
        if any(other.digest == key.digest for other in keys):
            raise ConfigError(f"{where}, line {number}: this key is there twice, under another name")
        keys.append(key)
    return keys


def read_keys(path: Path) -> list[Key]:
    """Raises ConfigError for a file that cannot be read, or has a line that is none."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-keys-file {path}: {getattr(error, 'strerror', None) or error}") from error
    return parse_keys(text, f"--api-keys-file {path}")


def check_keys(keys_file: str | None) -> None:
    """Raises ConfigError for a keys file that cannot be used, before anything is waited for."""
    if keys_file is not None:
        read_keys(Path(keys_file))


def _parse_line(line: str, where: str) -> Key:
    name, *rest = line.split()
    digest = _DIGEST.fullmatch(rest[0]) if rest else None
    if digest is None or not _NAME.fullmatch(name):
        raise ConfigError(f"{where}: expected `name sha256:<64 hex digits> …`; `dynserve key` makes such lines")
    limits: dict[str, int] = {}
    group = ""
    for word in rest[1:]:
        limit, _, value = word.partition("=")
        if limit == "group":
            if not _NAME.fullmatch(value):
                raise ConfigError(f"{where}: group={value[:40]!r}: letters, digits and . @ _ - make a name")
            group = value
            continue
        if limit not in LIMITS:
            raise ConfigError(f"{where}: unknown limit {limit!r}{nearest(limit, (*LIMITS, 'group'))}")
        try:
            limits[limit] = int(value)
        except ValueError:
            raise ConfigError(f"{where}: {word[:40]!r} is not a whole number") from None
        least = -MOST if limit == "priority" else 1
        if not least <= limits[limit] <= MOST:
            raise ConfigError(f"{where}: {limit} must be between {least} and {MOST}")
    return Key(name=name, digest=bytes.fromhex(digest[1]), group=group, **limits)


def digest_of(secret: str) -> bytes:
    """Keys are drawn from 256 random bits, so a plain hash cannot be searched."""
    return hashlib.sha256(secret.encode()).digest()


class Bucket:
    """Tokens that come back steadily, a minute's worth at most. May be overdrawn by what was not known before."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.most = per_minute
        self._left, self._at = float(per_minute), now

    def left(self, now: float) -> float:
        self._left = min(self.most, self._left + (now - self._at) * self.most / 60)
        self._at = now
        return self._left

    def take(self, amount: float, now: float) -> None:
        self._left = self.left(now) - amount

    def wait(self, amount: float, now: float) -> float:
        """Seconds until so much is there; more than a minute's worth never is, and waits for a full bucket."""
        return max(0.0, (min(amount, self.most) - self.left(now)) * 60 / self.most)


class _Usage:
    """What one key has used lately."""

    def __init__(self, key: Key, now: float) -> None:
        self.key = key
        self.requests = Bucket(key.rpm, now) if key.rpm else None
        self.tokens = Bucket(key.tpm, now) if key.tpm else None
        self.open = 0  # answers


class Visit:
    """One request between its headers and the last byte of its answer. Close it; closing twice is safe.

    It holds one of its key's answers that may be made at once, and more of them with `take_slots`. All tokens that it may
    come to are charged before any of them is computed; `settle` gives back what was not.
    """

    def __init__(self, gate: Gate, usage: _Usage | None) -> None:
        self._gate, self._usage = gate, usage
        self._closed = False
        self._charged = 0
        self._slots = 1
        gate.open += 1
        if usage is not None:
            usage.open += 1

    @property
    def name(self) -> str:
        return self._usage.key.name if self._usage else ""

    @property
    def cache_owner(self) -> str:
        """Requests with the same owner may find each other's prompts in the caches; empty where there are no keys."""
        if self._usage is None:
            return ""
        key = self._usage.key
        return f"group:{key.group}" if key.group else f"key:{key.name}"

    def priority(self, wished: int | None) -> int:
        """A key's priority is a ceiling; without keys everyone may wish."""
        if self._usage is None:
            return wished or 0
        most = self._usage.key.priority or 0
        return most if wished is None else min(wished, most)

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def take_slots(self, wanted: int) -> int:
        """How many answers this request may make at once, at most `wanted`: as many as its key has free."""
        usage = self._usage
        if usage is not None and usage.key.concurrency is not None:
            wanted = min(wanted, self._slots + max(0, usage.key.concurrency - usage.open))
        if wanted > self._slots and usage is not None:
            usage.open += wanted - self._slots
            self._slots = wanted
        return wanted

    @property
    def tokens_a_minute(self) -> int | None:
        usage = self._usage
        return None if usage is None or usage.tokens is None else usage.tokens.most

    def charge(self, tokens: int) -> None:
        """Charges what the request may come to, before it is computed. Raises RateLimited."""
        usage, now = self._usage, self._gate.clock()
        if usage is None or usage.tokens is None:
            return
        limit = usage.tokens.most
        if tokens > limit:
            message = f"key {usage.key.name}: the request may take {tokens} tokens, and its limit is {limit} a minute"
            error = _limited(f"{message}; ask for shorter or fewer answers, or with a shorter text", 60, usage, now)
            error.headers += (("x-should-retry", "false"),)  # OpenAI's clients would, and it would never be let in
            raise error
        if (wait := usage.tokens.wait(tokens, now)) > 0:
            message = f"key {usage.key.name}: {tokens} tokens are over its limit of {limit} a minute"
            raise _limited(message, wait, usage, now)
        usage.tokens.take(tokens, now)
        self._charged += tokens

    def settle(self, computed: int) -> None:
        """The request came to `computed` tokens, prompts and answers together: the rest is given back."""
        if self._usage is not None and self._usage.tokens is not None:
            self._usage.tokens.take(computed - self._charged, self._gate.clock())
        self._charged = 0

    def keep_charge(self) -> None:
        """Keeps the charge although the request failed: that much was computed."""
        self._charged = 0

    def headers(self) -> list[tuple[str, str]]:
        """OpenAI's `x-ratelimit-*`, for keys with limits."""
        return [] if self._usage is None else _told(self._usage, self._gate.clock())

    def close(self) -> None:
        """Ends the request, and gives back what is still charged."""
        if not self._closed:
            self._closed = True
            if self._charged:
                self.settle(0)
            self._gate.open -= 1
            if self._usage is not None:
                self._usage.open -= self._slots


class Gate:
    """Lets requests in. Without a keys file everyone is nobody in particular."""

    def __init__(self, keys_file: str | None, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises ConfigError for a keys file that cannot be read, or has a line that is none."""
        self._path = Path(keys_file) if keys_file else None
        self._most, self.clock = most, clock
        self._stamp: tuple[int, int] | None = None
        self._by_digest: dict[bytes, list[_Usage]] = {}  # by the first bytes: the rest is compared in constant time
        self.open = 0
        if self._path is not None:
            self._stamp = _stamp(self._path)
            self._read(self._path)

    def enter(self, headers: Mapping[str, str]) -> Visit:
        """Who asks.

        Raises:
            Unauthorized: no key, or none that is in the file.
            RateLimited: the key has asked too often, or has too many requests open.
            Overloaded: all clients together have.
        """
        usage = None if self._path is None else self._known(_presented(headers))
        if self.open >= self._most:
            raise Overloaded(f"{self.open} requests are being answered; try again soon")
        if usage is not None:
            self._limit(usage)
        return Visit(self, usage)

    def look(self) -> None:
        """Reads the file again when it has changed. One that is wrong changes nothing, and is said to be, once."""
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
            log.info("%d API keys read anew", sum(map(len, self._by_digest.values())))

    def _read(self, path: Path) -> None:
        keys = read_keys(path)
        before = {usage.key: usage for usages in self._by_digest.values() for usage in usages}
        found: dict[bytes, list[_Usage]] = {}
        for key in keys:
            usage = before.get(key) or _Usage(key, self.clock())
            found.setdefault(key.digest[:4], []).append(usage)
        self._by_digest = found

    def _known(self, secret: str) -> _Usage:
        digest = digest_of(secret)
        for usage in self._by_digest.get(digest[:4], ()):
            if hmac.compare_digest(usage.key.digest, digest):
                return usage
        if not secret:
            raise Unauthorized("You didn't provide an API key: send it as Authorization: Bearer KEY, or as x-api-key")
        raise Unauthorized("Incorrect API key provided")

    def _limit(self, usage: _Usage) -> None:
        key, now = usage.key, self.clock()
        if key.concurrency is not None and usage.open >= key.concurrency:
            raise _limited(f"key {key.name} has {usage.open} answers being made, as many as it may", 1, usage, now)
        if usage.requests is not None:
            if (wait := usage.requests.wait(1, now)) > 0:
                raise _limited(f"key {key.name} is over its limit of {key.rpm} requests a minute", wait, usage, now)
            usage.requests.take(1, now)


def _presented(headers: Mapping[str, str]) -> str:
    scheme, _, secret = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and secret.strip():
        return secret.strip()
    return headers.get("x-api-key", "").strip()  # how Anthropic's clients send it


def _limited(message: str, wait: float, usage: _Usage, now: float) -> RateLimited:
    error = RateLimited(message)
    error.retry_after = max(1, math.ceil(wait))
    error.headers = tuple(_told(usage, now))
    return error


def _told(usage: _Usage, now: float) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for what, bucket in (("requests", usage.requests), ("tokens", usage.tokens)):
        if bucket is not None:
            left = bucket.left(now)
            found += [
                (f"x-ratelimit-limit-{what}", str(bucket.most)),
                (f"x-ratelimit-remaining-{what}", str(max(0, int(left)))),
                (f"x-ratelimit-reset-{what}", f"{(bucket.most - left) * 60 / bucket.most:.3f}s"),
            ]
    return found


def _stamp(path: Path) -> tuple[int, int] | None:
    """Changes with every writing of the file; None where it cannot be seen."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino
