"""`dynserve key`: makes an API key, and the line that lets it in."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from secrets import token_urlsafe

from dynserve.config import exit_with, load, option
from dynserve.errors import ConfigError
from dynserve.frontend.access import LIMITS, PREFIX, digest_of, parse_keys


@dataclass(frozen=True, kw_only=True)
class KeyConfig:
    name: str = option("client", "who the key is for; letters, digits and . @ _ -")
    rpm: int | None = option(None, "requests a minute")
    tpm: int | None = option(None, "tokens a minute, of prompts and answers")
    concurrency: int | None = option(None, "requests at once")
    priority: int | None = option(None, "the highest that its requests can have; higher ones leave the queue first")
    file: str | None = option(None, "append the line to this keys file", "DYN_API_KEYS_FILE")


def main(argv: Sequence[str] | None = None) -> None:
    """The key goes to standard output, once; nobody can read it from the file."""
    try:
        config = load(KeyConfig, "python -m dynserve key", sys.argv[1:] if argv is None else argv)
        secret = PREFIX + token_urlsafe(32)
        limits = [f"{name}={value}" for name in LIMITS if (value := getattr(config, name)) is not None]
        line = " ".join([config.name, f"sha256:{digest_of(secret).hex()}", *limits])
        if config.file is None:
            parse_keys(line, "the new key")
            print(f"{secret}\n\nfor --api-keys-file:\n{line}")
        else:
            _append(Path(config.file), line)
            print(secret)
    except ConfigError as error:
        exit_with(error)


def _append(path: Path, line: str) -> None:
    """Only the owner may read a new file. Raises ConfigError when the file would not be right afterwards."""
    try:
        before = path.read_text() if path.exists() else ""
        text = before + ("" if not before or before.endswith("\n") else "\n") + line + "\n"
        parse_keys(text, str(path))
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(f"--file {path}: {error.strerror}") from error
