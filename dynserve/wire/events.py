"""The event plane: what a worker's KV cache holds, and how busy it is. Events may be lost; ids make that noticeable."""

from __future__ import annotations

import msgspec


class Stored(msgspec.Struct, frozen=True, array_like=True, tag="s"):
    """Blocks that can be reused from now on: a chain, each the child of the one before; the first is `parent`'s child.

    Hashes are the rolling ones (each names its whole prefix); `parent` is None for a chain that begins a prompt.
    """

    parent: int | None
    hashes: list[int]


class Removed(msgspec.Struct, frozen=True, array_like=True, tag="r"):
    hashes: list[int]


class Cleared(msgspec.Struct, frozen=True, array_like=True, tag="c"):
    """Nothing is cached any more."""


KvEvent = Stored | Removed | Cleared


class KvEvents(msgspec.Struct, frozen=True, array_like=True):
    """A batch. `events[i]` has the id `first_id + i`; ids of one epoch are consecutive."""

    instance_id: str
    epoch: int
    first_id: int
    events: list[KvEvent]


class Load(msgspec.Struct, frozen=True, array_like=True):
    """A worker's own word on how busy it is."""

    running: int = 0
    waiting: int = 0
    free_blocks: int = 0
    total_blocks: int = 0
    open_handoffs: int = 0


class LoadReport(msgspec.Struct, frozen=True, array_like=True):
    instance_id: str
    load: Load


encode = msgspec.msgpack.Encoder().encode
decode_kv = msgspec.msgpack.Decoder(KvEvents).decode
decode_load = msgspec.msgpack.Decoder(LoadReport).decode


def kv_subject(namespace: str, role: str, instance_id: str) -> str:
    return f"dyn.{namespace}.{role}.{instance_id}.kv"


def load_subject(namespace: str, role: str, instance_id: str) -> str:
    return f"dyn.{namespace}.{role}.{instance_id}.load"


def generate_subject(namespace: str, role: str, instance_id: str) -> str:
    return f"dyn.{namespace}.{role}.{instance_id}.generate"
