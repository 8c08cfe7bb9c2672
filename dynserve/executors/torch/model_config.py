"""`ModelConfig`: a checkpoint's `config.json`, of which every field is obeyed, checked, or known to change nothing.

A field that changes the mathematics and is not read would give other tokens than the model's own, without a word. So each
field of the three families' configuration classes in transformers is in one of the tables below.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynserve.config import nearest
from dynserve.errors import ConfigError
from dynserve.executors.torch.rope import RopeConfig

log = logging.getLogger(__name__)

FAMILIES = ("qwen2", "qwen3", "llama")
ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")

_READ = frozenset({
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
    "rope_parameters", "rope_scaling", "rope_theta", "quantization_config",
})  # fmt: skip
# fields that only some families have; transformers ignores them in the others
_READ_BY_FAMILY = {
    "llama": frozenset({"attention_bias", "mlp_bias"}),
    "qwen2": frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}),
    "qwen3": frozenset({"attention_bias", "use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}),
}
# name -> the only value that the model's code assumes
_ASSUMED: dict[str, Any] = {
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "partial_rotary_factor": 1.0,
    "compression_config": None,
}
# training, the form of the outputs, token ids that other files repeat, and the checkpoint's origin
WITHOUT_EFFECT = frozenset({
    "_name_or_path", "architectures", "attention_dropout", "auto_map", "bos_token_id", "chunk_size_feed_forward", "dtype",
    "eos_token_id", "id2label", "initializer_range", "is_decoder", "label2id", "model_name", "num_labels",
    "output_attentions", "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type", "return_dict",
    "sep_token_id", "torch_dtype", "transformers_version", "unsloth_fixed", "unsloth_version", "use_cache",
})  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    """The fields of `config.json`, under names of our own. Sizes are in elements."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    norm_eps: float
    rope: RopeConfig
    activation: str
    tied_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    window: int  # tokens that a layer of `windowed` attends to, the current one included
    windowed: frozenset[int]  # layers with sliding-window attention

    @staticmethod
    def read(folder: Path) -> ModelConfig:
        """Raises ConfigError for a folder without a config, another family, and a field that is not supported."""
        fields = _Fields(folder / "config.json")
        family = fields.raw.get("model_type", "")
        if family not in FAMILIES:
            raise ConfigError(f"{folder}: model_type {family!r} is not supported; one of {', '.join(FAMILIES)} is")
        fields.check(family)
        heads, hidden = fields.size("num_attention_heads"), fields.size("hidden_size")
        head_dim = fields.size("head_dim", 128 if family == "qwen3" else hidden // heads)
        kv_heads = fields.size("num_key_value_heads", heads if family == "llama" else 32, null=heads)
        if heads % kv_heads or head_dim % 2:
            raise ConfigError(
                f"{fields.path}: {heads} query heads cannot share {kv_heads} key-value heads of {head_dim} elements"
            )
        layers = fields.size("num_hidden_layers")
        biased = family != "qwen2" and fields.flag("attention_bias")
        window, windowed = (0, frozenset[int]()) if family == "llama" else _windows(fields, layers)
        rope = RopeConfig.read(fields.raw, head_dim, fields.size("max_position_embeddings"), str(fields.path))
        return ModelConfig(
            family=family,
            vocab_size=fields.size("vocab_size"),
            hidden_size=hidden,
            intermediate_size=fields.size("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            max_position=rope.max_position,
            norm_eps=fields.number("rms_norm_eps"),
            rope=rope,
            activation=fields.one_of("hidden_act", ACTIVATIONS),
            tied_embeddings=fields.flag("tie_word_embeddings"),
            qkv_bias=family == "qwen2" or biased,
            o_bias=biased,
            mlp_bias=family == "llama" and fields.flag("mlp_bias"),
            qk_norm=family == "qwen3",
            window=window,
            windowed=windowed,
        )


class _Fields:
    """The fields of `config.json`, with checks of their types."""

    def __init__(self, path: Path) -> None:
        self.path, self.raw = path, read_json(path)

    def check(self, family: str) -> None:
        """Raises ConfigError for a field with a value that the model's code does not assume."""
        if self.raw.get("quantization_config"):
            raise ConfigError(f"{self.path.parent}: quantised checkpoints are not supported by the torch executor")
        for name, assumed in _ASSUMED.items():
            if self.raw.get(name) not in (assumed, None):
                raise ConfigError(f"{self.path}: {name} is {self.raw[name]!r}, which is not supported")
        known = _READ | _READ_BY_FAMILY[family] | _ASSUMED.keys() | WITHOUT_EFFECT
        if unknown := sorted(self.raw.keys() - known):
            log.info("%s: these fields mean nothing to a model of type %s: %s", self.path, family, ", ".join(unknown))

    def size(self, name: str, default: int | None = None, *, null: int | None = None) -> int:
        """Returns a positive integer. `default`: for a missing field; `null`: for one that is null, if that differs."""
        found = self.raw.get(name, default)
        if found is None:
            found = default if null is None else null
        if name not in self.raw and default is None:
            raise ConfigError(f"{self.path} lacks {name!r}")
        if not isinstance(found, int) or isinstance(found, bool) or found < 1:
            raise ConfigError(f"{self.path}: {name} is {found!r}, not a positive integer")
        return found

    def number(self, name: str) -> float:
        if name not in self.raw:
            raise ConfigError(f"{self.path} lacks {name!r}")
        found = self.raw[name]
        if not isinstance(found, int | float) or isinstance(found, bool):
            raise ConfigError(f"{self.path}: {name} is {found!r}, not a number")
        return float(found)

    def flag(self, name: str) -> bool:
        found = self.raw.get(name)
        if not isinstance(found, bool | None):
            raise ConfigError(f"{self.path}: {name} is {found!r}, not true or false")
        return bool(found)

    def one_of(self, name: str, names: tuple[str, ...]) -> str:
        """Returns the value of a field, which is the first of `names` if it is missing."""
        found = self.raw.get(name, names[0])
        if found not in names:
            hint = nearest(str(found), names)
            raise ConfigError(f"{self.path}: {name} {found!r} is not supported{hint}; one of {', '.join(names)} is")
        return str(found)


def _windows(fields: _Fields, layers: int) -> tuple[int, frozenset[int]]:
    """The size of the sliding windows, and the layers that have one."""
    if not fields.flag("use_sliding_window") or fields.raw.get("sliding_window", 4096) is None:
        return 0, frozenset()
    kinds = fields.raw.get("layer_types")
    if kinds is None:
        first = fields.raw.get("max_window_layers", 28)
        kinds = ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)]
    if len(kinds) < layers or not set(kinds) <= {"sliding_attention", "full_attention"}:
        raise ConfigError(f"{fields.path}: layer_types is not a list of {layers} times full_ or sliding_attention")
    windowed = frozenset(at for at, kind in enumerate(kinds[:layers]) if kind == "sliding_attention")
    return (fields.size("sliding_window", 4096) if windowed else 0), windowed


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; --model-path must be a folder with a model in it") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds no JSON object")
    return found
