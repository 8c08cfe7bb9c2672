"""The torch executor beside transformers' own `generate`, for random checkpoints of many shapes; and checkpoints that it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config, Qwen3Config
from transformers.models.auto import AutoModelForCausalLM

from dynserve.config import TINY_MODEL, WorkerConfig
from dynserve.errors import ConfigError
from dynserve.executors.base import generate, open_executor
from dynserve.executors.torch import model_config
from dynserve.executors.torch.model import Transformer
from dynserve.executors.torch.model_config import ModelConfig
from tests.conftest import make_request

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers' own

CLASSES: dict[str, type[PreTrainedConfig]] = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "eos_token_id": None, "bos_token_id": None,
    "pad_token_id": None,
}  # fmt: skip
PROMPT = [(i * 37) % 299 for i in range(45)]
ANSWER = 30  # tokens
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
WINDOW = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
# name -> family and the fields in which it differs
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_biases": ("llama", {"attention_bias": True}),
    "llama_mlp_biases": ("llama", {"mlp_bias": True, "attention_bias": True}),
    "llama_gelu": ("llama", {"hidden_act": "gelu"}),
    "llama_gelu_new": ("llama", {"hidden_act": "gelu_new", "mlp_bias": True}),
    "llama_gelu_tanh": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "llama_relu": ("llama", {"hidden_act": "relu"}),
    "llama_heads": ("llama", {"head_dim": 16, "num_key_value_heads": 4, "rms_norm_eps": 1e-3}),
    "llama_no_kv_heads": ("llama", {"num_key_value_heads": None}),
    "llama_one_kv_head": ("llama", {"num_key_value_heads": 1, "head_dim": 6}),
    "llama_linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}}),
    "llama_dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}),
    "llama_llama3": ("llama", {"rope_parameters": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5000.0,
        "original_max_position_embeddings": 32}}),
    "llama_yarn": ("llama", {"rope_parameters": YARN}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2_yarn": ("qwen2", {"rope_parameters": YARN | {
        "beta_fast": 8.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 0.4}}),
    "qwen2_yarn_untruncated": ("qwen2", {"rope_parameters": YARN | {"truncate": False, "attention_factor": 1.3}}),
    "qwen2_windows": ("qwen2", WINDOW),
    "qwen2_windows_of_no_layer": ("qwen2", WINDOW | {"max_window_layers": 3}),
    "qwen2_windows_by_layer": ("qwen2", WINDOW | {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "qwen3_biases": ("qwen3", {"head_dim": 12, "attention_bias": True, "tie_word_embeddings": True}),
    "qwen3_windows": ("qwen3", WINDOW | {"head_dim": 8}),
    "qwen3_gelu": ("qwen3", {"hidden_act": "gelu", "num_hidden_layers": 1}),
}  # fmt: skip


def make_model(folder: Path, family: str, changes: dict[str, Any], **saving: Any) -> PreTrainedModel:
    """Saves a model of random weights, large enough for every difference to change its tokens."""
    torch.manual_seed(1)
    config = CLASSES[family](**(SIZES | changes))  # type: ignore[arg-type]
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        # biases and norms too, which transformers begins with zeros and ones
        parameter.data = torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 0.3) + ("norm" in name)
    model.tie_weights()
    model.save_pretrained(folder, **saving)
    (folder / "tokenizer.json").write_bytes((TINY_MODEL / "tokenizer.json").read_bytes())
    return model


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = str(folder / "model.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


async def greedy(folder: Path) -> list[int]:
    """The executor's answer, on the GPU if there is one: the prompt in chunks, the rest one token at a time."""
    options = json.dumps({"num_blocks": 40, "max_num_tokens": 20})
    async with open_executor(
        WorkerConfig(model_path=str(folder), override_engine_args=options, dtype="float32"), "w1"
    ) as executor:
        stop = make_request(PROMPT).stop
        request = make_request(PROMPT, stop=type(stop)(max_tokens=ANSWER, ignore_eos=True))
        return [token async for output in generate(executor, request) for token in output.token_ids]


def expected(model: PreTrainedModel) -> list[int]:
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        found = model.generate(ids, max_new_tokens=ANSWER, do_sample=False, attention_mask=torch.ones_like(ids))  # type: ignore[operator]
    answer: list[int] = found[0, len(PROMPT) :].tolist()
    return answer


@pytest.mark.parametrize("name", SHAPES)
async def test_a_checkpoint_of_any_shape_gives_the_tokens_of_transformers(tmp_path: Path, name: str) -> None:
    model = make_model(tmp_path, *SHAPES[name])
    answer = expected(model)
    assert len(set(answer)) > 3, "a model that repeats itself shows no difference"
    assert await greedy(tmp_path) == answer


@pytest.mark.parametrize("kind", ["sharded", "bfloat16", "old names", "tables", "untied in the file"])
async def test_a_checkpoint_in_any_form_gives_the_tokens_of_transformers(tmp_path: Path, kind: str) -> None:
    saving = {"max_shard_size": "20KB"} if kind == "sharded" else {}
    tied = {"tie_word_embeddings": kind == "untied in the file"}
    model = make_model(tmp_path, "llama", tied, **saving)
    if kind == "sharded":
        assert not (tmp_path / "model.safetensors").exists()
    elif kind == "bfloat16":
        model.bfloat16().save_pretrained(tmp_path)
    elif kind == "old names":  # of rotary embeddings, as transformers 4 wrote them
        change_config(tmp_path, rope_parameters=None, rope_theta=700.0, rope_scaling={"type": "linear", "factor": 2.0})
    elif kind == "tables":
        change_tensors(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    else:
        change_tensors(tmp_path, lambda t: t.update({"lm_head.weight": torch.randn(300, 32)}))
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32)
    assert await greedy(tmp_path) == expected(again)


async def test_names_without_the_prefix_of_the_whole_model_are_found(tmp_path: Path) -> None:
    """Embedding models, such as Qwen3-Embedding, are saved without their head."""
    model = make_model(tmp_path, "qwen3", {"head_dim": 8, "tie_word_embeddings": True})
    answer = expected(model)
    model.base_model.save_pretrained(tmp_path)
    assert "embed_tokens.weight" in load_file(str(tmp_path / "model.safetensors"))
    assert await greedy(tmp_path) == answer


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "activation": ({"hidden_act": "silo"}, r"hidden_act 'silo' is not supported \(did you mean silu\?\)"),
    "rope": ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_type 'longrope' is not supported"),
    "rope without its factor": ({"rope_scaling": {"type": "linear"}}, "type linear need a number for factor, not None"),
    "rope by layers": ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "differ between layers"),
    "half a rope": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, which is not supported"),
    "encoder": ({"is_encoder_decoder": True}, "is_encoder_decoder is True"),
    "quantised": ({"quantization_config": {"quant_method": "awq"}}, "quantised checkpoints"),
    "heads": ({"num_key_value_heads": 3}, "4 query heads cannot share 3 key-value heads"),
    "size": ({"hidden_size": "32"}, "hidden_size is '32', not a positive integer"),
    "flag": ({"mlp_bias": "yes"}, "mlp_bias is 'yes', not true or false"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_field_that_would_change_the_answers_is_refused_by_name(tmp_path: Path, name: str) -> None:
    make_model(tmp_path, "llama", {})
    changes, words = REFUSED[name]
    change_config(tmp_path, **changes)
    with pytest.raises(ConfigError, match=words):
        ModelConfig.read(tmp_path)


def load(folder: Path) -> Transformer:
    return Transformer(ModelConfig.read(folder), folder, torch.device("cpu"), torch.float32)


def test_a_checkpoint_with_other_tensors_than_its_config_says_is_refused_by_their_names(tmp_path: Path) -> None:
    make_model(tmp_path, "llama", {"mlp_bias": True, "attention_bias": True})
    change_config(tmp_path, mlp_bias=False)
    with pytest.raises(
        ConfigError, match=r"no use for these tensors: model\.layers\.0\.mlp\.down_proj\.bias, .* and 4 more"
    ):
        load(tmp_path)
    change_config(tmp_path, mlp_bias=True, num_hidden_layers=4)
    with pytest.raises(ConfigError, match=r"has no tensor model\.layers\.3\.input_layernorm\.weight"):
        load(tmp_path)
    change_config(tmp_path, num_hidden_layers=3, vocab_size=299)
    with pytest.raises(
        ConfigError, match=r"embed_tokens\.weight has the shape \[300, 32\]; config\.json implies \[299, 32\]"
    ):
        load(tmp_path)
    change_config(tmp_path, vocab_size=300)
    change_tensors(tmp_path, lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}))
    with pytest.raises(ConfigError, match=r"model\.norm\.weight has the data type int8"):
        load(tmp_path)


def test_every_field_of_the_families_configurations_has_a_place() -> None:
    for family, kind in CLASSES.items():
        names = {field.name for field in fields(kind)} | kind().to_dict().keys()  # type: ignore[arg-type]
        known = model_config._READ | model_config._READ_BY_FAMILY[family] | model_config.WITHOUT_EFFECT
        assert names - known - model_config._ASSUMED.keys() == set(), family
