"""Translates TensorRT-LLM's KV events into ours: its block names become rolling hashes of the tokens in each block.

Each attention-DP rank has one `KvStream`. It skips windows other than the largest (sliding-window layers), partial
blocks and the blocks after them, and blocks of images. Blocks of some versions name neither salt nor adapter, and look
like those of the plain prompt: then the blocks of prompts that had one are skipped, too.

A gap in `event_id` means that events were lost: then all blocks count as removed until they are reported again. The
blocks from before a gap are kept by name, because a stored child proves that its whole prefix is still in the cache.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec

from dynserve.wire.events import Cleared, KvEvent, Removed, Stored
from dynserve.wire.hashing import adapter_salt, next_hash, seed_for

log = logging.getLogger(__name__)

MAX_UNKNOWN = 4096  # names of skipped blocks, kept to distinguish them from lost ones
PROBE_SALT = "dynserve-probe"  # begins the salts of the worker's own requests, whose blocks nobody can use
MAX_LENGTHS = 256  # blocks whose children are awaited, to know the block size


class _Block(msgspec.Struct, gc=False):
    hash: int  # ours
    parent: int | None  # TensorRT-LLM's name of its parent
    seed: int
    depth: int
    children: int = 0


class _Apart(NamedTuple):
    """The open requests whose prompt begins with the same block and has a salt or an adapter."""

    requests: int = 0
    adapters: int = 0  # those of them that have an adapter


class KvStream:
    """The translation of one rank's KV events. It stores at most twice as many blocks as the cache has."""

    def __init__(self, block_size: int, apart: Mapping[int, _Apart] = MappingProxyType({})) -> None:
        self._size = block_size
        self._apart = apart  # by the hash of the first block
        self._names_adapters = False
        self._window = 0
        self._next: int | None = None
        self._present: dict[int | str, _Block] = {}
        self._before_gap: dict[int | str, _Block] = {}
        self._skipped: dict[int | str, None] = {}
        # number of names per hash of ours: versions that do not report salts have one name for each salt
        self._names: dict[int, int] = {}
        self.gaps = self.orphans = 0
        self.told = 0  # blocks that were reported as stored, partial ones included
        self.full_size = 0  # tokens of a block that was seen to be full; 0: none was seen
        self._lengths: dict[int | str | None, int] = {}  # of single blocks, until then
        self.names_salts = True  # until a block is reported that does not

    def set_block_size(self, tokens: int) -> None:
        self._size = tokens

    @property
    def blocks(self) -> int:
        return len(self._present)

    def translate(self, events: Iterable[Mapping[str, Any]]) -> list[KvEvent]:
        """Returns our events for a batch. Never raises: an invalid event counts as lost."""
        found: list[KvEvent] = []
        for event in events:
            try:
                self._one(event, found)
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                log.warning("invalid KV event (%s: %s); dropping all known blocks", type(error).__name__, error)
                self.gaps += 1
                self._forget(found)
        return found

    def _one(self, event: Mapping[str, Any], found: list[KvEvent]) -> None:
        number, window, data = event["event_id"], event.get("window_size", 0), event["data"]
        if self._next is not None and number != self._next:  # before any filtering: each event counts
            log.warning("KV events %d to %d were lost; dropping all known blocks", self._next, number - 1)
            self.gaps += 1
            self._forget(found)
        self._next = number + 1
        if window > self._window:
            if self._present:
                self._forget(found)
                self._before_gap = {}  # names are not valid across windows
            self._window = window
        elif window < self._window:
            return
        match data["type"]:
            case "stored":
                self._stored(data, found)
            case "removed":
                self._removed(data["block_hashes"], found)
            case _:
                pass  # `created`; `updated`: another level of memory, still cached

    def _stored(self, data: Mapping[str, Any], found: list[KvEvent]) -> None:
        parent = data.get("parent_hash")
        self._note_form(parent, data)
        above = self._parent(parent, found) if parent is not None else None
        if parent is not None and above is None:
            if parent not in self._skipped:
                self.orphans += 1
            self._skip(data["blocks"])
            return
        stored: list[int] = []
        first = above.hash if above is not None else None
        for at, block in enumerate(data["blocks"]):
            name, tokens = block["block_hash"], block["tokens"]
            if (
                len(tokens) != self._size
                or block.get("mm_keys")
                or any(t["token_extra_id"] or isinstance(t["token_id"], str) for t in tokens)  # text: of an image
                or (above is None and self._is_apart(data, block))
            ):
                self._skip(data["blocks"][at:])
                break
            known = self._present.get(name)
            if known is None:
                known = self._add(name, parent, above, tokens, _seed(data, block))
                if self._names[known.hash] == 1:
                    stored.append(known.hash)
                elif stored:
                    found.append(Stored(first, stored))
                    stored = []
            elif stored:  # the chain continues from a block that was stored before
                found.append(Stored(first, stored))
                stored = []
            if not stored:
                first = known.hash
            parent, above = name, known
        if stored:
            found.append(Stored(first, stored))

    def _note_form(self, parent: int | None, data: Mapping[str, Any]) -> None:
        """Notes what the events name, and how long a block is that has a child, and so is full."""
        if not data["blocks"]:
            return
        first, *others = data["blocks"]
        self.told += 1 + len(others)
        self.names_salts = "cache_salt" in first
        self._names_adapters = self._names_adapters or "lora_name" in data
        if self.full_size:
            return
        self.full_size = len(first["tokens"]) if others else self._lengths.get(parent, 0)
        if self.full_size or len(self._lengths) == MAX_LENGTHS:
            self._lengths.clear()
        self._lengths[first["block_hash"]] = len(first["tokens"])

    def _is_apart(self, data: Mapping[str, Any], block: Mapping[str, Any]) -> bool:
        """Whether a block that begins a prompt is of the worker's own, or may be of one with a salt or an adapter that the
        event does not name."""
        if (block.get("cache_salt") or "").startswith(PROBE_SALT):
            return True
        if not self._apart or data.get("lora_name"):
            return False
        noted = self._apart.get(_first_hash(array("I", [token["token_id"] for token in block["tokens"]]).tobytes()))
        if noted is None:
            return False
        return "cache_salt" not in block or (noted.adapters > 0 and not self._names_adapters)

    def _add(self, name: int | str, parent: int | None, above: _Block | None, tokens: list[Any], seed: int) -> _Block:
        seed = above.seed if above is not None else seed
        packed = array("I", [token["token_id"] for token in tokens]).tobytes()
        made = _Block(
            next_hash(above.hash if above else None, packed, seed), parent, seed, above.depth + 1 if above else 0
        )
        self._put(name, made)
        return made

    def _put(self, name: int | str, block: _Block) -> None:
        self._present[name] = block
        self._before_gap.pop(name, None)
        self._skipped.pop(name, None)
        self._names[block.hash] = self._names.get(block.hash, 0) + 1
        if block.parent is not None:
            self._present[block.parent].children += 1

    def _parent(self, name: int, found: list[KvEvent]) -> _Block | None:
        """Returns the block of that name, or None. One from before a gap is reported again, with its whole prefix."""
        if (block := self._present.get(name)) is not None:
            return block
        chain: list[tuple[int | str, _Block]] = []
        at: int | None = name
        while at is not None and at not in self._present:
            old = self._before_gap.get(at)
            if old is None:
                return None
            chain.append((at, old))
            at = old.parent
        chain.reverse()
        first = self._present[at].hash if at is not None else None
        for key, old in chain:
            old.children = 0
            self._put(key, old)
        stored: list[int] = []
        for _, old in chain:
            if self._names[old.hash] == 1:
                stored.append(old.hash)
                continue
            if stored:
                found.append(Stored(first, stored))
            first, stored = old.hash, []
        if stored:
            found.append(Stored(first, stored))
        return chain[-1][1]

    def _removed(self, names: list[int | str], found: list[KvEvent]) -> None:
        blocks = [(name, self._present[name]) for name in dict.fromkeys(names) if name in self._present]
        for name in names:
            self._skipped.pop(name, None)
            self._before_gap.pop(name, None)
        removed: list[int] = []
        for name, block in sorted(blocks, key=lambda pair: -pair[1].depth):  # children before their parents
            if name not in self._present:
                continue  # removed with its parent
            if block.children:
                removed += self._drop_below(name)
            removed += self._drop(name)
        if removed:
            found.append(Removed(removed))

    def _drop(self, name: int | str) -> list[int]:
        """Removes a block. Returns its hash, unless the block still has another name."""
        block = self._present.pop(name)
        if block.parent is not None and (above := self._present.get(block.parent)) is not None:
            above.children -= 1
        self._names[block.hash] -= 1
        if self._names[block.hash]:
            return []
        del self._names[block.hash]
        return [block.hash]

    def _drop_below(self, name: int | str) -> list[int]:
        """Removes all blocks below a removed one: they cannot be reached any more."""
        below: set[int | str] = {name}
        ordered = sorted(self._present.items(), key=lambda pair: pair[1].depth)
        for key, block in ordered:
            if block.parent in below:
                below.add(key)
        below.discard(name)
        return [hash_ for key, _ in reversed(ordered) if key in below for hash_ in self._drop(key)]

    def _forget(self, found: list[KvEvent]) -> None:
        self._before_gap, self._present, self._names = self._present, {}, {}
        found[:] = [Cleared()]

    def _skip(self, blocks: list[Mapping[str, Any]]) -> None:
        for block in blocks:
            self._skipped[block["block_hash"]] = None
        while len(self._skipped) > MAX_UNKNOWN:
            del self._skipped[next(iter(self._skipped))]


class KvStreams:
    """The streams of all ranks of one engine."""

    def __init__(self, block_size: int, ranks: int) -> None:
        self._size = block_size
        self._apart: dict[int, _Apart] = {}  # the pump's thread only looks them up
        self.ranks = [KvStream(block_size, self._apart) for _ in range(ranks)]

    @property
    def names_salts(self) -> bool:
        """Whether blocks name their salt; True until one was reported."""
        return all(stream.names_salts for stream in self.ranks)

    def set_block_size(self, tokens: int) -> None:
        """Corrects the block size, before the first block is stored."""
        self._size = tokens
        for stream in self.ranks:
            stream.set_block_size(tokens)

    def note_apart(self, prompt: bytes, *, adapter: bool = False) -> tuple[int, bool] | None:
        """Notes that a prompt (u32 little-endian) is about to be computed with a salt or an adapter, so that its blocks are
        not mistaken for those of the plain prompt. Returns what `forget_apart` takes; None if the prompt fills no block."""
        first = prompt[: self._size * 4]
        if len(first) < self._size * 4:
            return None
        name = _first_hash(first)
        before = self._apart.get(name, _Apart())
        self._apart[name] = _Apart(before.requests + 1, before.adapters + adapter)
        return name, adapter

    def forget_apart(self, noted: tuple[int, bool]) -> None:
        """Ends one `note_apart`, when no more events of that request are expected."""
        name, adapter = noted
        before = self._apart.get(name, _Apart())
        if before.requests <= 1:
            self._apart.pop(name, None)
        else:
            self._apart[name] = _Apart(before.requests - 1, before.adapters - adapter)

    def translate(self, events: list[Mapping[str, Any]]) -> dict[int, list[KvEvent]]:
        """Returns our events by rank."""
        if len(self.ranks) == 1:
            found = self.ranks[0].translate(events)
            return {0: found} if found else {}
        apart: dict[int, list[Mapping[str, Any]]] = {}
        for event in events:
            apart.setdefault(event.get("attention_dp_rank") or 0, []).append(event)
        found_by = {
            rank: self.ranks[rank].translate(theirs) for rank, theirs in apart.items() if rank < len(self.ranks)
        }
        return {rank: found for rank, found in found_by.items() if found}


def _first_hash(block: bytes) -> int:
    return next_hash(None, block, seed_for(""))


def _seed(data: Mapping[str, Any], block: Mapping[str, Any]) -> int:
    return seed_for(adapter_salt(data.get("lora_name") or "", block.get("cache_salt") or ""))
