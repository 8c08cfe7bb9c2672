"""The small files of a model folder that a frontend needs: tokenizer, template and generation defaults."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from dynserve.errors import ConfigError, Unavailable

# The files that a frontend needs; the first is required.
NAMES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
TEMPLATES, MAX_TEMPLATES = "additional_chat_templates", 16  # the folder of named templates


def read_model_files(folder: Path) -> dict[str, bytes]:
    """Returns name to content of the files that exist.

    Raises:
        ConfigError: the folder is not a model folder, or has no tokenizer.json.
    """
    check_model_folder(folder)
    named = sorted((folder / TEMPLATES).glob("*.jinja"))[:MAX_TEMPLATES]
    names = [*NAMES, *(f"{TEMPLATES}/{path.name}" for path in named)]
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


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
    """The tokens that end a turn: those of generation config, model config and tokenizer together. Each of these files
    lacks one in some published model, and an answer would run on as another turn.

    Raises:
        ConfigError: a field is not a token id, or a list of them.
    """
    ids: list[int] = []
    for name, config in (("generation_config.json", _json(folder / "generation_config.json")),
                         ("config.json", model_config(folder))):  # fmt: skip
        found = config.get("eos_token_id")
        listed = [] if found is None else found if isinstance(found, list) else [found]
        if not all(isinstance(id_, int) and id_ >= 0 for id_ in listed):
            raise ConfigError(f"{folder}/{name}: eos_token_id is {found!r}, not a token id or a list of them")
        ids += listed
    return list(dict.fromkeys([*ids, *_eos_of_tokenizer(folder)]))


def _eos_of_tokenizer(folder: Path) -> list[int]:
    config = _json(folder / "tokenizer_config.json")
    token = config.get("eos_token")
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str):
        return []
    for id_, added in (config.get("added_tokens_decoder") or {}).items():
        if added.get("content") == content:
            return [int(id_)]
    found = Tokenizer.from_file(str(folder / NAMES[0])).token_to_id(content)  # slower: the whole vocabulary is read
    return [] if found is None else [found]


def model_config(folder: Path) -> dict[str, Any]:
    """The fields of `config.json`. Models of several parts keep those of their language model in an object of its own."""
    found = _json(folder / "config.json")
    for name in ("text_config", "llm_config", "language_config"):
        part = found.get(name)
        if isinstance(part, dict):
            return {**found, **part, "model_type": found.get("model_type", part.get("model_type"))}
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
