"""`dynserve key`: generates an API key, and its line for the keys file."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from secrets import token_urlsafe

from dynserve.config import exit_with, load, option
from dynserve.errors import ConfigError
from dynserve.frontend.keys import LIMITS, PREFIX, digest_of, parse_keys


@dataclass(frozen=True, kw_only=True)
class KeyConfig:
    name: str = option("client", "name of the client; letters, digits and . @ _ -")
    rpm: int | None = option(None, "requests a minute")
    tpm: int | None = option(None, "tokens a minute, of prompts and answers")
    concurrency: int | None = option(None, "concurrent answers")
    priority: int | None = option(None, "highest priority of its requests; higher priorities are admitted first")
    group: str | None = option(None, "keys of the same group reuse each other's cached prompts")
    file: str | None = option(None, "append the line to this keys file", "DYN_API_KEYS_FILE")


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the key to standard output. This is the only copy: it cannot be recovered from the file."""
    try:
        config = load(KeyConfig, "python -m dynserve key", sys.argv[1:] if argv is None else argv)
        secret = PREFIX + token_urlsafe(32)
        limits = [f"{name}={value}" for name in (*LIMITS, "group") if (value := getattr(config, name)) is not None]
        line = " ".join([config.name, f"sha256:{digest_of(secret).hex()}", *limits])
        if [key.name for key in parse_keys(line, "the new key")] != [config.name]:
            raise ConfigError(f"--name {config.name!r}: a name consists of letters, digits and . @ _ -")
        if config.file is None:
            print(f"{secret}\n\nfor --api-keys-file:\n{line}")
        else:
            _append(Path(config.file), line)
            print(secret)
    except ConfigError as error:
        exit_with(error)


def _append(path: Path, line: str) -> None:
    """Appends a line in one step, so that a server never reads half of it. Only its owner can read a new file.

    Raises:
        ConfigError: the file cannot be read or written, or would be invalid with the line.
    """
    try:
        before = path.read_text() if path.exists() else ""
        text = before + ("" if not before or before.endswith("\n") else "\n") + line + "\n"
        parse_keys(text, str(path))
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o600
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
            file.write(text)
        fresh.replace(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--file {path}: {getattr(error, 'strerror', None) or error}") from error
