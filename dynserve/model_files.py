"""The small files of a model folder that a frontend needs: tokenizer, template and generation defaults."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from dynserve.errors import ConfigError, Unavailable

# The files that a frontend needs; the first is required.
NAMES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def read_model_files(folder: Path) -> dict[str, bytes]:
    """Returns name to content of the files that exist.

    Raises:
        ConfigError: the folder is not a model folder, or has no tokenizer.json.
    """
    check_model_folder(folder)
    return {name: (folder / name).read_bytes() for name in NAMES if (folder / name).is_file()}


def check_model_folder(folder: Path) -> None:
    """Raises ConfigError with the reason why a path is not a model folder."""
    if not folder.exists():
        raise ConfigError(f"--model-path {folder} does not exist")
    if not folder.is_dir():
        raise ConfigError(f"--model-path {folder} is not a folder; give the folder that holds config.json")
    for name in ("config.json", NAMES[0]):
        if not (folder / name).is_file():
            raise ConfigError(f"--model-path {folder} has no {name} in it")


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def verified(content: bytes, expected: str, source: str) -> bytes:
    """Returns the content if its SHA-256 is `expected`: no other content may reach a tokenizer or a template engine.

    Raises:
        Unavailable: the file is another one, or damaged.
    """
    if digest(content) != expected:
        raise Unavailable(f"the model file from {source} does not have the expected SHA-256 {expected[:12]}…")
    return content


def eos_token_ids(folder: Path) -> list[int]:
    """The end-of-turn tokens of the generation config, or else of the model config."""
    for name in ("generation_config.json", "config.json"):
        found = _json(folder / name).get("eos_token_id")
        if found is not None:
            return [found] if isinstance(found, int) else list(found)
    return []


def model_config(folder: Path) -> dict[str, Any]:
    """The fields of `config.json`. Models of several parts keep those of their language model in an object of its own."""
    found = _json(folder / "config.json")
    for name in ("text_config", "llm_config", "language_config"):
        if isinstance(found.get(name), dict):
            return found | found[name]
    return found


def model_limits(folder: Path) -> tuple[int, int]:
    """Returns the vocabulary size and the maximum sequence length, in tokens."""
    config = model_config(folder)
    try:
        return config["vocab_size"], config["max_position_embeddings"]
    except KeyError as error:
        raise ConfigError(f"{folder}/config.json lacks {error}") from error


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    return found if isinstance(found, dict) else {}
