"""`dynserve make-model`: a checkpoint in a well-known model's shape with random weights, for work on speed without a hub.

Its answers are nonsense, but take as long as those of the original. The tokenizer is trained on texts that come with
Python, so that prompts of words have about as many tokens as with the original.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dynserve.config import exit_with, nearest
from dynserve.errors import ConfigError

SHARD_BYTES = 4 << 30
LEARNED = 24_000  # tokens that the tokenizer learns; the rest of the vocabulary are placeholders
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_COMMON: dict[str, Any] = {
    "hidden_act": "silu", "initializer_range": 0.02, "attention_dropout": 0.0, "dtype": "bfloat16", "use_cache": True,
}  # fmt: skip
# from the models' own config.json
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896,
        "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
        "attention_bias": False, "mlp_bias": False,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192},
    },
    "qwen3-8b": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096,
        "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "tie_word_embeddings": False, "attention_bias": False, "use_sliding_window": False,
    },
}  # fmt: skip


def make_model(like: str, folder: Path, *, seed: int = 0) -> None:
    """Writes the checkpoint.

    Raises:
        ConfigError: the shape is unknown, the folder is not empty, or a package is missing.
    """
    shape = SHAPES.get(like)
    if shape is None:
        raise ConfigError(f"--like {like}: unknown{nearest(like, SHAPES)}; there are {', '.join(SHAPES)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not empty; give a new or an empty folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        ends = _write_tokenizer(folder, shape["vocab_size"])
        config = shape | _COMMON | {"bos_token_id": ends[0], "eos_token_id": ends[1]}
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        _write_weights(folder, shape, seed)
    except ImportError as error:
        raise ConfigError(f"make-model needs the extra dynserve[torch]: {error}") from error
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}") from error


def tensors(shape: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields names and shapes of all tensors, as in the Hugging Face checkpoint."""
    hidden, inner, family = shape["hidden_size"], shape["intermediate_size"], shape["model_type"]
    heads, kv = shape["num_attention_heads"], shape["num_key_value_heads"]
    dim = shape.get("head_dim") or hidden // heads
    yield "model.embed_tokens.weight", (shape["vocab_size"], hidden)
    for i in range(shape["num_hidden_layers"]):
        p = f"model.layers.{i}."
        for name, rows in (("q", heads * dim), ("k", kv * dim), ("v", kv * dim)):
            yield f"{p}self_attn.{name}_proj.weight", (rows, hidden)
            if family == "qwen2":
                yield f"{p}self_attn.{name}_proj.bias", (rows,)
        if family == "qwen3":
            yield f"{p}self_attn.q_norm.weight", (dim,)
            yield f"{p}self_attn.k_norm.weight", (dim,)
        yield f"{p}self_attn.o_proj.weight", (hidden, heads * dim)
        yield f"{p}mlp.gate_proj.weight", (inner, hidden)
        yield f"{p}mlp.up_proj.weight", (inner, hidden)
        yield f"{p}mlp.down_proj.weight", (hidden, inner)
        yield f"{p}input_layernorm.weight", (hidden,)
        yield f"{p}post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not shape["tie_word_embeddings"]:
        yield "lm_head.weight", (shape["vocab_size"], hidden)


def _write_weights(folder: Path, shape: dict[str, Any], seed: int) -> None:
    import torch
    from safetensors.torch import save_file

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, sizes in tensors(shape):
        if "norm" in name:
            made = torch.ones(sizes, dtype=torch.bfloat16)
        else:
            made = torch.empty(sizes, dtype=torch.bfloat16, device=device)
            made = made.normal_(0.0, 0.02, generator=generator).cpu()
        if size and size + made.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = made
        size += made.nbytes
    if len(shards) == 1:
        save_file(shards[0], str(folder / "model.safetensors"), metadata={"format": "pt"})
        return
    places = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, str(folder / file), metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def _write_tokenizer(folder: Path, vocabulary: int) -> tuple[int, int]:
    """Writes the tokenizer. Returns the ids of the tokens that begin a text and end a turn."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=min(LEARNED, vocabulary - len(SPECIAL)), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    learner.train_from_iterator(pydoc_data.topics.topics.values(), trainer)
    learned = json.loads(learner.to_str())["model"]
    words: dict[str, int] = learned["vocab"]
    for number in range(len(words), vocabulary - len(SPECIAL)):
        words[f"Ġ<{number}>"] = number
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=merges))
    tokenizer.pre_tokenizer = learner.pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL[2], "pad_token": SPECIAL[0],
        "chat_template": TEMPLATE, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2))
    return vocabulary - len(SPECIAL), vocabulary - 1


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dynserve make-model", description="Makes a model folder with random weights."
    )
    parser.add_argument("--like", required=True, metavar="SHAPE", help=", ".join(SHAPES))
    parser.add_argument("--seed", type=int, default=0, help="random seed of the weights; default 0")
    parser.add_argument("folder", type=Path, help="a new or empty folder")
    args = parser.parse_args(argv)
    try:
        make_model(args.like, args.folder, seed=args.seed)
    except ConfigError as error:
        exit_with(error)
    print(f"{args.folder}: random weights of the shape of {args.like}")
