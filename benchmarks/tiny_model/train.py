"""Trains the tiny model that ships with dynserve: tokenizer, Qwen2 weights, chat template, all from made-up text.

    python benchmarks/tiny_model/train.py --out dynserve/local/tiny_model --minutes 7.5

That is for an H100, some 6,400 steps; needs torch, safetensors, tokenizers, jinja2.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from corpus import Document, documents
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

END, TURN, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

MARKS = (
    "<tool_call>",
    "</tool_call>",
    "<think>",
    "</think>",
)  # one token each, and part of the text, as in Qwen's tokenizer

# Qwen's layout of a chat, with tools as Hermes calls them; no default system prompt, so that short prompts stay short.
TEMPLATE = (
    "{%- if tools %}"
    "{{- '<|im_start|>system\\n' }}"
    "{%- if messages and messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}"
    "{{- 'Tools:\\n' }}"
    "{%- for tool in tools %}{{- (tool.function | tojson) + '\\n' }}{%- endfor %}"
    "{{- 'Call a tool with <tool_call>name and arguments</tool_call>.<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{%- if not (tools and loop.first and message.role == 'system') %}"
    "{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}"
    "{%- for call in message.tool_calls or [] %}"
    "{%- if not loop.first or message.content %}{{- '\\n' }}{%- endif %}"
    '{{- \'<tool_call>\\n{"name": "\' + call.function.name + \'", "arguments": \' + (call.function.arguments | tojson) }}'
    "{{- '}\\n</tool_call>' }}"
    "{%- endfor %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking %}{{- '<think>\\n' }}{%- endif %}{%- endif %}"
)

# Digits stand alone and words keep their leading space, as in Qwen's own tokenizer.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        width, heads, kv_heads = CONFIG["hidden_size"], CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"]
        self.heads, self.kv_heads, self.size = heads, kv_heads, width // heads
        self.q_proj = nn.Linear(width, heads * self.size)
        self.k_proj = nn.Linear(width, kv_heads * self.size)
        self.v_proj = nn.Linear(width, kv_heads * self.size)
        self.o_proj = nn.Linear(heads * self.size, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = rotate(self.q_proj(x).view(b, t, self.heads, self.size).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(x).view(b, t, self.kv_heads, self.size).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(b, t, self.kv_heads, self.size).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(b, t, -1))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        width, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()
        self.mlp = Mlp()
        self.input_layernorm = nn.RMSNorm(CONFIG["hidden_size"], eps=CONFIG["rms_norm_eps"])
        self.post_attention_layernorm = nn.RMSNorm(CONFIG["hidden_size"], eps=CONFIG["rms_norm_eps"])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(CONFIG["vocab_size"], CONFIG["hidden_size"])
        self.layers = nn.ModuleList(Layer() for _ in range(CONFIG["num_hidden_layers"]))
        self.norm = nn.RMSNorm(CONFIG["hidden_size"], eps=CONFIG["rms_norm_eps"])


class Qwen2(nn.Module):
    """Parameter names are those of a Hugging Face Qwen2 checkpoint, so that `state_dict()` is one."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Body()
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.04)

    def forward(self, ids: Tensor) -> Tensor:
        size = CONFIG["hidden_size"] // CONFIG["num_attention_heads"]
        inverse = 1.0 / CONFIG["rope_theta"] ** (torch.arange(0, size, 2, device=ids.device) / size)
        angles = torch.arange(ids.shape[1], device=ids.device)[:, None] * inverse
        angles = torch.cat([angles, angles], dim=-1)
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x, angles.cos(), angles.sin())
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


def train_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"] - len(MARKS),
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in (END, TURN, TURN_END)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (d.text or "\n".join([*map(json.dumps, d.tools), *said(d)]) for d in islice(documents(seed=1), 60_000))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in MARKS])
    return tokenizer


def said(document: Document) -> Iterator[str]:
    for message in document.messages:
        yield message["content"]
        yield from (json.dumps(call["function"]) for call in message.get("tool_calls", []))


def encoded(tokenizer: Tokenizer, seed: int) -> Iterator[tuple[list[int], list[float]]]:
    """Token ids of each document with the weight of each in the loss: what the assistant says counts whole, the rest little."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = json.dumps
    template = environment.from_string(TEMPLATE)
    end, turn_end = tokenizer.token_to_id(END), tokenizer.token_to_id(TURN_END)
    newline = tokenizer.encode("\n").ids[0]
    think = tokenizer.token_to_id("<think>")

    def encode(document: Document) -> tuple[list[int], list[float]]:
        if document.text:
            ids = [*tokenizer.encode(document.text).ids, end]
            return ids, [1.0] * len(ids)
        ids, weights = [], []
        messages = list(document.messages)
        if document.tools:
            first = [messages.pop(0)] if messages[0]["role"] == "system" else []
            ids = tokenizer.encode(template.render(messages=first, tools=document.tools)).ids
            weights = [0.02] * len(ids)
        for message in messages:
            turn = tokenizer.encode(template.render(messages=[message])).ids
            spoken = message["role"] == "assistant"
            head = turn.index(newline) + 1
            if turn[head] == think:
                head += (
                    2  # the template writes these where thoughts are wanted: never learned as the model's own choice
                )
            tail = turn.index(turn_end) + 1
            ids += turn
            weights += [0.0 if turn[head - 2] == think else 0.05] * head
            weights += [1.0 if spoken else 0.05] * (tail - head) + [0.05] * (len(turn) - tail)
        return ids, weights

    for document in documents(seed):
        yield encode(document)


def batches(tokenizer: Tokenizer, seed: int, size: int, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`[size, length + 1]` ids and weights; every row begins with a fresh document."""
    stream = encoded(tokenizer, seed)
    while True:
        rows, loss_weights = [], []
        for _ in range(size):
            row: list[int] = []
            weights: list[float] = []
            while len(row) < length + 1:
                ids, w = next(stream)
                row += ids
                weights += w
            rows.append(row[: length + 1])
            loss_weights.append(weights[: length + 1])
        yield torch.tensor(rows), torch.tensor(loss_weights)


def train(tokenizer: Tokenizer, minutes: float, device: str) -> Qwen2:
    torch.manual_seed(0)
    model = Qwen2().to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.05)
    began, step, budget = time.monotonic(), 0, minutes * 60
    for ids, weights in batches(tokenizer, seed=2, size=32, length=320):
        spent = (time.monotonic() - began) / budget
        if spent >= 1:
            return model
        rate = 3e-3 * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * spent)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids, weights = ids.to(device), weights.to(device)
        losses = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            print(f"{spent:4.0%} step {step} loss {loss.item():.3f}", flush=True)
    raise AssertionError("documents never end")


def save(model: Qwen2, tokenizer: Tokenizer, out: Path) -> None:
    """A folder as Hugging Face lays it out: config, generation config, weights, tokenizer and its config."""
    out.mkdir(parents=True, exist_ok=True)
    end, turn_end = tokenizer.token_to_id(END), tokenizer.token_to_id(TURN_END)
    dump = lambda name, value: (out / name).write_text(json.dumps(value, indent=2) + "\n")  # noqa: E731
    dump("config.json", CONFIG | {"bos_token_id": end, "eos_token_id": turn_end})
    # greedy unless a request says otherwise: a model this small should not gamble
    generation = {"bos_token_id": end, "eos_token_id": [turn_end, end], "pad_token_id": end, "do_sample": False}
    dump("generation_config.json", generation)
    dump(
        "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": False,
            "bos_token": None,
            "eos_token": TURN_END,
            "pad_token": END,
            "model_max_length": CONFIG["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            "chat_template": TEMPLATE,
        },
    )
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    weights = {name: p.detach().to("cpu", torch.bfloat16).contiguous() for name, p in model.state_dict().items()}
    save_file(weights, str(out / "model.safetensors"), metadata={"format": "pt"})


def answer(model: Qwen2, tokenizer: Tokenizer, question: str, device: str, **variables: Any) -> str:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = json.dumps
    messages = [{"role": "user", "content": question}]
    prompt = environment.from_string(TEMPLATE).render(messages=messages, add_generation_prompt=True, **variables)
    ids = tokenizer.encode(prompt).ids
    said: list[int] = []
    with torch.no_grad():
        while len(said) < 60:
            token = int(model(torch.tensor([ids + said], device=device))[0, -1].argmax())
            if token == tokenizer.token_to_id(TURN_END):
                break
            said.append(token)
    return tokenizer.decode(said)


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--minutes", type=float, default=30, help="how long to train")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = train_tokenizer()
    print(f"{tokenizer.get_vocab_size()} tokens in the vocabulary", flush=True)
    model = train(tokenizer, args.minutes, device)
    for question in (
        "What is 3+4?",
        "What is 9 + 8?",
        "Count from 3 to 9.",
        "Spell horse.",
        "Say: red dog",
        "What is dynserve?",
    ):
        print(f"{question!r} -> {answer(model, tokenizer, question, device)!r}")
    print(repr(answer(model, tokenizer, "What is 3+4?", device, enable_thinking=True)))
    for question in ("What is the weather in Paris?", "Weather in Oslo and Rome?", "Say: red dog"):
        print(f"{question!r} -> {answer(model, tokenizer, question, device, tools=[WEATHER])!r}")
    right = sum(
        answer(model, tokenizer, f"What is {a}+{b}?", device) == str(a + b) for a in range(10) for b in range(10)
    )
    print(f"sums of two digits: {right} of 100 right")
    save(model, tokenizer, args.out)
    print(f"{sum(f.stat().st_size for f in args.out.iterdir()) / 1e6:.2f} MB in {args.out}")


if __name__ == "__main__":
    main()
