"""The checkpoints that `dynserve make-model` writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from dynserve.errors import ConfigError
from dynserve.executors.base import generate, open_executor
from dynserve.local import make_model as module
from dynserve.local.make_model import SHAPES, make_model, tensors
from tests.conftest import make_request

SMALL = {
    "vocab_size": 30_000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.fixture(params=SHAPES)
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A shape's family, with sizes that are quickly written."""
    shape = SHAPES[request.param] | SMALL | {"num_key_value_heads": 2}
    if "head_dim" in shape:
        shape["head_dim"] = 32
    monkeypatch.setitem(module.SHAPES, request.param, shape)
    monkeypatch.setattr(module, "LEARNED", 2000)
    monkeypatch.setattr(module, "SHARD_BYTES", 2 << 20)  # so that there are several files
    return str(request.param)


async def test_an_executor_answers_from_a_made_model(small: str, tmp_path: Path) -> None:
    make_model(small, tmp_path / "model")
    config: Any = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["model_type"] in small.replace("qwen2.5", "qwen2")
    from dynserve.config import WorkerConfig

    async with open_executor(WorkerConfig(model_path=str(tmp_path / "model"))) as executor:
        tokens = [t async for output in generate(executor, make_request([5, 6, 7])) for t in output.token_ids]
    assert len(tokens) == 8


def test_the_tokenizer_of_a_made_model_encodes_and_decodes_text(small: str, tmp_path: Path) -> None:
    make_model(small, tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    text = "Hello, how are you? Größe 你好"
    encoded = tokenizer.encode(text)
    assert tokenizer.decode(encoded.ids) == text and len(encoded.ids) < len(text.encode())
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert tokenizer.get_vocab_size() == config["vocab_size"] == 30_000
    assert tokenizer.token_to_id("<|im_end|>") == config["eos_token_id"]


def test_the_same_seed_makes_the_same_weights_and_another_seed_others(tmp_path: Path, small: str) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_model(small, tmp_path / name, seed=seed)
    first, second, other = (
        [file.read_bytes() for file in sorted((tmp_path / name).glob("*.safetensors"))] for name in "abc"
    )
    assert first == second != other and len(first) > 1


def test_shapes_have_the_parameter_counts_of_the_real_models() -> None:
    def parameters(name: str) -> float:
        total = 0
        for _, sizes in tensors(SHAPES[name]):
            size = 1
            for length in sizes:
                size *= length
            total += size
        return total / 1e9

    assert parameters("qwen2.5-0.5b") == pytest.approx(0.494, abs=0.001)
    assert parameters("llama-3.1-8b") == pytest.approx(8.030, abs=0.001)
    assert parameters("qwen3-8b") == pytest.approx(8.191, abs=0.001)


def test_an_unknown_shape_or_a_used_folder_is_a_one_line_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean qwen3-8b\?"):
        make_model("qwen3-80b", tmp_path / "model")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        make_model("qwen3-8b", tmp_path / "model")
    command = [sys.executable, "-m", "dynserve", "make-model", "--like", "gpt-2", str(tmp_path / "other")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "there are qwen2.5-0.5b" in done.stderr and "Traceback" not in done.stderr
