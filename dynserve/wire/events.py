"""The event plane: what workers' KV caches hold, how busy they are, and what frontends have placed on them.

Messages may be lost: KV events have ids that make it noticeable, the others are whole sums that the next one replaces.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from dynserve.wire.numbers import BlockHash, Count


class Stored(msgspec.Struct, frozen=True, array_like=True, tag="s"):
    """Blocks that can be reused from now on: a chain, each the child of the one before; the first is `parent`'s child.

    Hashes are the rolling ones (each names its whole prefix); `parent` is None for a chain that begins a prompt.
    """

    parent: BlockHash | None
    hashes: list[BlockHash]


class Removed(msgspec.Struct, frozen=True, array_like=True, tag="r"):
    """Blocks that are gone, children before their parents: no block is ever there without all before it."""

    hashes: list[BlockHash]


class Cleared(msgspec.Struct, frozen=True, array_like=True, tag="c"):
    """Nothing is cached any more."""


KvEvent = Stored | Removed | Cleared


class KvEvents(msgspec.Struct, frozen=True, array_like=True):
    """A batch. `events[i]` has the id `first_id + i`; ids of one epoch are consecutive."""

    instance_id: str
    epoch: Count
    first_id: Count
    events: list[KvEvent]


class Load(msgspec.Struct, frozen=True, array_like=True):
    """A worker's own word on how busy it is."""

    running: Count = 0
    waiting: Count = 0
    free_blocks: Count = 0
    total_blocks: Count = 0
    open_handoffs: Count = 0
    begun_tokens: Count = 0  # computed already, of prompts that are not done; those found in the cache are not counted


class LoadReport(msgspec.Struct, frozen=True, array_like=True):
    """`event_id` is the last KV event that was published before: a frontend that lacks it has missed some."""

    instance_id: str
    load: Load
    epoch: Count = 0
    event_id: Annotated[int, msgspec.Meta(ge=-1)] = 0


class Share(msgspec.Struct, frozen=True, array_like=True):
    """What one frontend has placed on one worker and not seen ended."""

    worker: str
    prefill_tokens: Count
    decode_tokens: Count
    requests: Count


class Shares(msgspec.Struct, frozen=True, array_like=True):
    """A frontend's own charges, as sums: those that changed, or (`whole`) all that it has."""

    frontend_id: str
    whole: bool
    shares: list[Share]


encode = msgspec.msgpack.Encoder().encode
decode_kv = msgspec.msgpack.Decoder(KvEvents).decode
decode_load = msgspec.msgpack.Decoder(LoadReport).decode
decode_shares = msgspec.msgpack.Decoder(Shares).decode


def kv_subject(namespace: str, role: str, instance_id: str) -> str:
    return f"dyn.{namespace}.{role}.{instance_id}.kv"


def load_subject(namespace: str, role: str, instance_id: str) -> str:
    return f"dyn.{namespace}.{role}.{instance_id}.load"


def placed_subject(namespace: str, frontend_id: str) -> str:
    return f"dyn.{namespace}.frontend.{frontend_id}.placed"


def generate_subject(namespace: str, role: str, instance_id: str) -> str:
    return f"dyn.{namespace}.{role}.{instance_id}.generate"
