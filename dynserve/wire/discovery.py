"""The discovery plane: what a process says about itself in etcd, as JSON under

dynserve/v1/{namespace}/instances/{role}/{instance_id}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from dynserve.config import Role
from dynserve.wire import decoded
from dynserve.wire import log as limited
from dynserve.wire.numbers import Count, Size, TokenId


class Card(msgspec.Struct, frozen=True, kw_only=True):
    """A model as one worker serves it: everything that a frontend needs and cannot guess."""

    model: str
    block_size: Size
    max_seq_len: Size
    num_blocks: Count
    max_batch_size: Size
    eos_token_ids: list[TokenId]
    files: dict[str, str] = {}  # tokenizer and template: name -> SHA-256 of the content
    kv_events: bool = True  # it tells what its cache holds
    parity: dict[str, str] = {}  # how it understands text: stage -> digest (text/parity.py)
    tool_parser: str = ""  # how the model writes tool calls (dialects); empty: not at all
    reasoning_parser: str = ""  # how it marks its thoughts
    grammars: bool = False  # its answers can be made to follow a grammar
    pooling: Literal["", "mean", "last"] = ""  # how it makes embeddings; empty: it makes none
    embedding_size: Count = 0
    adapters: list[str] = []  # LoRA adapters: models by these names
    pairing: dict[str, str] = {}  # what prefill and decode workers must have in common to hand over KV caches
    single_use_handoffs: bool = (
        False  # a hand-off that one worker may have begun to take cannot be given to a second one
    )

    def serves(self, name: str) -> bool:
        """Whether that is the model, or one of its adapters."""
        return name == self.model or name in self.adapters


class WorkerInstance(msgspec.Struct, frozen=True, kw_only=True, tag="worker"):
    id: str
    role: Role
    epoch: Count
    host: str
    pid: Count
    system_url: str
    card: Card


class FrontendInstance(msgspec.Struct, frozen=True, kw_only=True, tag="frontend"):
    id: str
    host: str
    pid: Count
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
    """None, with a warning, for what no version of ours has written, and for an entry under another one's key."""
    instance = decoded(decode, value, f"{key[:200]!r} in discovery")
    if instance is not None and not key.endswith(f"/{_role(instance)}/{instance.id}"):
        limited.warning("misplaced", key, "ignoring %r in discovery: its value names %r", key[:200], instance.id[:100])
        return None
    return instance


def _role(instance: Instance) -> str:
    return instance.role if isinstance(instance, WorkerInstance) else FRONTEND


def prefix(namespace: str) -> str:
    return f"dynserve/v1/{namespace}/instances/"


def frontends(namespace: str) -> str:
    """Prefix of the frontends among them."""
    return f"{prefix(namespace)}{FRONTEND}/"


def key(namespace: str, instance: Instance) -> str:
    return f"{prefix(namespace)}{_role(instance)}/{instance.id}"
