"""API keys: the keys file, and what each key may do.

A keys file has one key per line, made by `dynserve key`; the key itself is not in it, only its SHA-256:

    alice sha256:9f86…0a08 rpm=600 tpm=200000 concurrency=32 priority=5 group=research

`concurrency` counts answers, of which one request can ask for many; `tpm` counts the tokens of prompts and answers. Keys of
one group may find each other's prompts in the caches; a key without a group finds its own.
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
        least = -MAX_LIMIT if limit == "priority" else 1
        if not least <= limits[limit] <= MAX_LIMIT:
            raise ConfigError(f"{where}: {limit} must be between {least} and {MAX_LIMIT}")
    return Key(name=name, digest=bytes.fromhex(digest[1]), group=group, **limits)


def digest_of(secret: str) -> bytes:
    """Keys are drawn from 256 random bits, so a plain hash cannot be searched."""
    return hashlib.sha256(secret.encode()).digest()
