from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dynserve.config import TINY_MODEL
from dynserve.errors import ConfigError
from dynserve.model_files import eos_token_ids, model_limits


def folder(path: Path, **files: dict[str, Any]) -> Path:
    (path / "tokenizer.json").write_bytes((TINY_MODEL / "tokenizer.json").read_bytes())
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def test_the_end_of_a_turn_is_the_union_of_what_the_files_say(tmp_path: Path) -> None:
    end = json.loads((TINY_MODEL / "tokenizer.json").read_text())["added_tokens"][1]
    model = folder(
        tmp_path,
        generation_config={"eos_token_id": [7, 5]},
        config={"eos_token_id": 7, "text_config": {"eos_token_id": 9}},
        tokenizer_config={"eos_token": {"content": end["content"], "special": True}},
    )
    assert eos_token_ids(model) == [7, 5, 9, end["id"]]
    folder(tmp_path, tokenizer_config={"eos_token": "<end>", "added_tokens_decoder": {"99": {"content": "<end>"}}})
    assert eos_token_ids(model) == [7, 5, 9, 99]
    folder(tmp_path, generation_config={}, config={}, tokenizer_config={"eos_token": None})
    assert eos_token_ids(model) == []


def test_an_end_of_turn_that_is_no_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id is '</s>', not a token id"):
        eos_token_ids(folder(tmp_path, generation_config={"eos_token_id": "</s>"}))


def test_the_sizes_of_a_model_of_several_parts_are_those_of_its_language_model(tmp_path: Path) -> None:
    parts = {"model_type": "gemma3", "text_config": {"vocab_size": 99, "max_position_embeddings": 64}}
    assert model_limits(folder(tmp_path, config=parts)) == (99, 64)
