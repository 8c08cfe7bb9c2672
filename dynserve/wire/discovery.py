"""The discovery plane: what a process says about itself in etcd, as JSON under

dynserve/v1/{namespace}/instances/{role}/{instance_id}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from dynserve.wire import decoded


class Card(msgspec.Struct, frozen=True, kw_only=True):
    """A model as one worker serves it: everything that a frontend needs and cannot guess."""

    model: str
    block_size: int
    max_seq_len: int
    num_blocks: int
    max_batch_size: int
    eos_token_ids: list[int]
    files: dict[str, str] = {}  # tokenizer and template: name -> SHA-256 of the content
    kv_events: bool = True  # it tells what its cache holds
    parity: dict[str, str] = {}  # how it understands text: stage -> digest (openai/parity.py)
    tool_parser: str = ""  # how the model writes tool calls (openai/parsers); empty: not at all
    reasoning_parser: str = ""  # how it marks its thoughts
    guides: bool = False  # its answers can be made to follow a grammar
    pooling: Literal["", "mean", "last"] = ""  # how it makes embeddings; empty: it makes none
    embedding_size: int = 0
    adapters: list[str] = []  # LoRA adapters: models by these names
    pairing: dict[str, str] = {}  # what prefill and decode workers must have in common to hand over KV caches

    def serves(self, name: str) -> bool:
        """Whether that is the model, or one of its adapters."""
        return name == self.model or name in self.adapters


class WorkerInstance(msgspec.Struct, frozen=True, kw_only=True, tag="worker"):
    id: str
    role: str  # prefill_and_decode, prefill, decode
    epoch: int
    host: str
    pid: int
    system_url: str
    card: Card


class FrontendInstance(msgspec.Struct, frozen=True, kw_only=True, tag="frontend"):
    id: str
    host: str
    pid: int
    link_address: str  # host:port that workers dial
    http_url: str


Instance = WorkerInstance | FrontendInstance

encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder(Instance).decode

FRONTEND = "frontend"


def unlike(theirs: Mapping[str, str], ours: Mapping[str, str], they: str, we: str) -> str:
    """What two workers' `pairing` does not have in common, in words; empty when they can hand over KV caches."""
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            return f"{name} is {theirs.get(name, 'not said')} on {they} and {ours.get(name, 'not said')} on {we}"
    return ""


def parse(key: str, value: bytes) -> Instance | None:
    """None, with a warning, for what no version of ours has written."""
    return decoded(decode, value, f"{key} in discovery")


def prefix(namespace: str) -> str:
    return f"dynserve/v1/{namespace}/instances/"


def frontends(namespace: str) -> str:
    """Prefix of the frontends among them."""
    return f"{prefix(namespace)}{FRONTEND}/"


def key(namespace: str, instance: Instance) -> str:
    role = instance.role if isinstance(instance, WorkerInstance) else FRONTEND
    return f"{prefix(namespace)}{role}/{instance.id}"
