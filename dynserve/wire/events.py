"""The event plane: the contents of workers' KV caches, their load, and the requests that frontends placed.

Messages may be lost. KV events have ids that reveal a gap; the other messages hold totals, which the next one replaces.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from dynserve.wire.numbers import BlockHash, Count


class Stored(msgspec.Struct, frozen=True, array_like=True, tag="s"):
    """The event that blocks were cached: a chain, where each block is the child of the one before, the first of `parent`.

    Hashes are rolling hashes (each identifies its whole prefix); `parent` is None for a chain that begins a prompt.
    """

    parent: BlockHash | None
    hashes: list[BlockHash]


class Removed(msgspec.Struct, frozen=True, array_like=True, tag="r"):
    """The event that blocks were evicted, children before parents: a cached block always has its whole prefix cached."""

    hashes: list[BlockHash]


class Cleared(msgspec.Struct, frozen=True, array_like=True, tag="c"):
    """The event that the whole cache was cleared."""


KvEvent = Stored | Removed | Cleared


class KvEvents(msgspec.Struct, frozen=True, array_like=True):
    """A batch of events. `events[i]` has the id `first_id + i`; ids of one epoch are consecutive."""

    instance_id: str
    epoch: Count
    first_id: Count
    events: list[KvEvent]


class Load(msgspec.Struct, frozen=True, array_like=True):
    """The load of a worker, as the worker measures it."""

    running: Count = 0
    waiting: Count = 0
    free_blocks: Count = 0
    total_blocks: Count = 0
    open_handoffs: Count = 0
    begun_tokens: Count = 0  # tokens already computed in unfinished prefills, without those found in the cache


class LoadReport(msgspec.Struct, frozen=True, array_like=True):
    """A worker's load. `event_id`: the last KV event published before it; a frontend without that event has a gap."""

    instance_id: str
    load: Load
    epoch: Count = 0
    event_id: Annotated[int, msgspec.Meta(ge=-1)] = 0


class Share(msgspec.Struct, frozen=True, array_like=True):
    """The load of one frontend's unfinished requests on one worker."""

    worker: str
    prefill_tokens: Count
    decode_tokens: Count
    requests: Count


class Shares(msgspec.Struct, frozen=True, array_like=True):
    """The shares of one frontend, as totals: those that have changed, or (`whole`) all of them."""

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


def probe_subject(namespace: str, frontend_id: str) -> str:
    return f"dyn.{namespace}.frontend.{frontend_id}.probe"


def generate_subject(namespace: str, role: str, instance_id: str) -> str:
    return f"dyn.{namespace}.{role}.{instance_id}.generate"
