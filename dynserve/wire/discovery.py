"""The discovery plane: each process describes itself in etcd, as JSON under the key

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
    """The description of a model as one worker serves it, with everything that a frontend needs."""

    model: str
    block_size: Size
    max_seq_len: Size
    num_blocks: Count
    max_batch_size: Size
    eos_token_ids: list[TokenId]
    files: dict[str, str] = {}  # tokenizer and template: name -> SHA-256 of the content
    kv_events: bool = True  # the worker publishes events about its KV cache
    parity: dict[str, str] = {}  # text processing: stage -> digest (text/parity.py)
    tool_parser: str = ""  # the parser of the model's tool calls (dialects); empty: no tool calls
    reasoning_parser: str = ""  # the parser of the model's reasoning; empty: no reasoning
    grammars: bool = False  # grammars are supported
    no_grammars: str = ""  # why not, where an option can change that
    pooling: Literal["", "mean", "last"] = ""  # the pooling of embeddings; empty: no embeddings
    embedding_size: Count = 0
    adapters: list[str] = []  # names of the LoRA adapters, which clients use as model names
    pairing: dict[str, str] = {}  # must be equal on prefill and decode workers that hand over KV caches
    single_use_handoffs: bool = False  # a hand-off that a decode worker may have begun to fetch cannot be used again
    draws_by_position: bool = False  # sampled tokens depend on seed and position only, on each worker of this kind
    aggregates: bool = True  # it can answer requests alone, whichever its role
    max_num_tokens: Count = 0  # tokens of one step; 0: not known

    def serves(self, name: str) -> bool:
        """Whether `name` is the model, or one of its adapters."""
        return name == self.model or name in self.adapters


class WorkerInstance(msgspec.Struct, frozen=True, kw_only=True, tag="worker"):
    id: str
    role: Role
    epoch: Count
    host: str
    pid: Count
    system_url: str
    card: Card
    files_url: str = ""  # of the server of model files, if it is not the system server


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
    """Returns the first difference between two workers' `pairing`, in words; empty when they can hand over KV caches."""
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            return f"{name} is {theirs.get(name, 'not set')} on {they} and {ours.get(name, 'not set')} on {we}"
    return ""


def parse(key: str, value: bytes) -> Instance | None:
    """Decodes an entry. Returns None, with a warning, for a malformed entry and for one whose key and value disagree."""
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
    """The key prefix of all frontends."""
    return f"{prefix(namespace)}{FRONTEND}/"


def key(namespace: str, instance: Instance) -> str:
    return f"{prefix(namespace)}{_role(instance)}/{instance.id}"
