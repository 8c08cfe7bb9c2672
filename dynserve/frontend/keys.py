"""API keys: the keys file, and the limits of each key.

A keys file has one line per key, written by `dynserve key`, with the SHA-256 of the key instead of the key itself:

    alice sha256:9f86…0a08 rpm=600 tpm=200000 concurrency=32 priority=5 group=research

`concurrency` counts answers, of which one request can have many; `tpm` counts the tokens of prompts and answers. Keys of
one group reuse each other's cached prompts; a key without a group reuses only its own.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import msgspec

from dynserve.config import nearest
from dynserve.errors import ConfigError

PREFIX = "sk-dyn-"
LIMITS = ("rpm", "tpm", "concurrency", "priority")
MAX_LIMIT = 2**31 - 1

_NAME = re.compile(r"[\w.@-]{1,64}")
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """One API key with its limits; None is no limit. `priority` is the upper bound and the default of its requests'
    priority. Keys of one `group` share cached prompts."""

    name: str
    digest: bytes
    rpm: int | None = None
    tpm: int | None = None
    concurrency: int | None = None
    priority: int | None = None
    group: str = ""


def parse_keys(text: str, where: str) -> list[Key]:
    """Parses the text of a keys file. Raises ConfigError that names the invalid line."""
    keys: list[Key] = []
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.split("#", 1)[0].strip()
        if not line:
            continue
        key = _parse_line(line, f"{where}, line {number}")
        if any(other.name == key.name for other in keys):
            raise ConfigError(f"{where}, line {number}: {key.name} is listed twice")
        if any(other.digest == key.digest for other in keys):
            raise ConfigError(f"{where}, line {number}: this key is listed twice, under another name")
        keys.append(key)
    return keys


def read_keys(path: Path) -> list[Key]:
    """Reads a keys file. Raises ConfigError if it cannot be read or has an invalid line."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-keys-file {path}: {getattr(error, 'strerror', None) or error}") from error
    return parse_keys(text, f"--api-keys-file {path}")


def check_keys(keys_file: str | None) -> None:
    """Raises ConfigError for a keys file that cannot be used. Runs before anything is connected."""
    if keys_file is not None:
        read_keys(Path(keys_file))


def _parse_line(line: str, where: str) -> Key:
    name, *rest = line.split()
    digest = _DIGEST.fullmatch(rest[0]) if rest else None
    if digest is None or not _NAME.fullmatch(name):
        raise ConfigError(f"{where}: expected `name sha256:<64 hex digits> …`; `dynserve key` writes such lines")
    limits: dict[str, int] = {}
    group = ""
    for word in rest[1:]:
        limit, _, value = word.partition("=")
        if limit == "group":
            if not _NAME.fullmatch(value):
                raise ConfigError(f"{where}: group={value[:40]!r}: a name consists of letters, digits and . @ _ -")
            group = value
            continue
        if limit not in LIMITS:
            raise ConfigError(f"{where}: unknown limit {limit!r}{nearest(limit, (*LIMITS, 'group'))}")
        try:
            limits[limit] = int(value)
        except ValueError:
            raise ConfigError(f"{where}: {word[:40]!r} is not a whole number") from None
        least = -MAX_LIMIT if limit == "priority" else 1
        if not least <= limits[limit] <= MAX_LIMIT:
            raise ConfigError(f"{where}: {limit} must be between {least} and {MAX_LIMIT}")
    return Key(name=name, digest=bytes.fromhex(digest[1]), group=group, **limits)


def digest_of(secret: str) -> bytes:
    """The SHA-256 of a key. Keys have 256 random bits, so a plain hash cannot be reversed by search."""
    return hashlib.sha256(secret.encode()).digest()
