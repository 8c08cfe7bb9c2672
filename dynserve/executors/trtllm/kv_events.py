"""TensorRT-LLM's KV events into ours: its own block names become rolling hashes, made from the tokens that a block holds.

One `KvStream` per attention-DP rank. What is left out: other windows than the largest (sliding-window layers), partial
blocks and what follows them, blocks of images. A gap in `event_id` means that events were dropped: then nothing is
known any more, until it shows again. Blocks are remembered by name through a gap, so that a child which is stored
proves that its whole prefix is there.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from dynserve.wire.events import Cleared, KvEvent, Removed, Stored
from dynserve.wire.hashing import adapter_salt, next_hash, seed_for

log = logging.getLogger(__name__)

MAX_UNKNOWN = 4096  # names of blocks that were left out, kept to tell them from lost ones


class _Block(msgspec.Struct, gc=False):
    hash: int  # ours
    parent: int | None  # its parent's name, TensorRT-LLM's
    seed: int
    depth: int
    children: int = 0


class KvStream:
    """`translate` takes a batch of events and gives ours. At most twice as many blocks are remembered as the cache has."""

    def __init__(self, block_size: int) -> None:
        self._size = block_size
        self._window = 0
        self._next: int | None = None
        self._present: dict[int | str, _Block] = {}
        self._before_gap: dict[int | str, _Block] = {}
        self._left_out: dict[int | str, None] = {}
        # how many names there are of one block of ours: versions that do not tell salts have one for each
        self._names: dict[int, int] = {}
        self.gaps = self.orphans = 0

    @property
    def blocks(self) -> int:
        return len(self._present)

    def translate(self, events: Iterable[Mapping[str, Any]]) -> list[KvEvent]:
        """Never raises: an event that cannot be understood is like one that was lost."""
        found: list[KvEvent] = []
        for event in events:
            try:
                self._one(event, found)
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                log.warning("a KV event cannot be understood (%s: %s); starting afresh", type(error).__name__, error)
                self.gaps += 1
                self._forget(found)
        return found

    def _one(self, event: Mapping[str, Any], found: list[KvEvent]) -> None:
        number, window, data = event["event_id"], event.get("window_size", 0), event["data"]
        if self._next is not None and number != self._next:  # before any filtering: each event counts
            log.warning("KV events %d to %d were lost; starting afresh", self._next, number - 1)
            self.gaps += 1
            self._forget(found)
        self._next = number + 1
        if window > self._window:
            if self._present:
                self._forget(found)
                self._before_gap = {}  # names of another window mean nothing in this one
            self._window = window
        elif window < self._window:
            return
        match data["type"]:
            case "stored":
                self._stored(data, found)
            case "removed":
                self._removed(data["block_hashes"], found)
            case _:
                pass  # `created`; `updated`: another level of memory, still there

    def _stored(self, data: Mapping[str, Any], found: list[KvEvent]) -> None:
        parent = data.get("parent_hash")
        above = self._parent(parent, found) if parent is not None else None
        if parent is not None and above is None:
            if parent not in self._left_out:
                self.orphans += 1
            self._leave_out(data["blocks"])
            return
        stored: list[int] = []
        first = above.hash if above is not None else None
        for at, block in enumerate(data["blocks"]):
            name, tokens = block["block_hash"], block["tokens"]
            if len(tokens) != self._size or block.get("mm_keys") or any(t["token_extra_id"] for t in tokens):
                self._leave_out(data["blocks"][at:])
                break
            known = self._present.get(name)
            if known is None:
                known = self._add(name, parent, above, tokens, _seed(data, block))
                if self._names[known.hash] == 1:
                    stored.append(known.hash)
                elif stored:
                    found.append(Stored(first, stored))
                    stored = []
            elif stored:  # the chain goes on from a block that was there
                found.append(Stored(first, stored))
                stored = []
            if not stored:
                first = known.hash
            parent, above = name, known
        if stored:
            found.append(Stored(first, stored))

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
        self._left_out.pop(name, None)
        self._names[block.hash] = self._names.get(block.hash, 0) + 1
        if block.parent is not None:
            self._present[block.parent].children += 1

    def _parent(self, name: int, found: list[KvEvent]) -> _Block | None:
        """The block of that name; one that was there before a gap is told of again, with all before it."""
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
        told: list[int] = []
        for _, old in chain:
            if self._names[old.hash] == 1:
                told.append(old.hash)
                continue
            if told:
                found.append(Stored(first, told))
            first, told = old.hash, []
        if told:
            found.append(Stored(first, told))
        return chain[-1][1]

    def _removed(self, names: list[int | str], found: list[KvEvent]) -> None:
        blocks = [(name, self._present[name]) for name in dict.fromkeys(names) if name in self._present]
        for name in names:
            self._left_out.pop(name, None)
            self._before_gap.pop(name, None)
        gone: list[int] = []
        for name, block in sorted(blocks, key=lambda pair: -pair[1].depth):  # children before their parents
            if name not in self._present:
                continue  # went with its parent
            if block.children:
                gone += self._drop_below(name)
            gone += self._drop(name)
        if gone:
            found.append(Removed(gone))

    def _drop(self, name: int | str) -> list[int]:
        """Our hash of it, unless it has another name still."""
        block = self._present.pop(name)
        if block.parent is not None and (above := self._present.get(block.parent)) is not None:
            above.children -= 1
        self._names[block.hash] -= 1
        if self._names[block.hash]:
            return []
        del self._names[block.hash]
        return [block.hash]

    def _drop_below(self, name: int | str) -> list[int]:
        """Nothing can be reached beyond a block that is gone."""
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

    def _leave_out(self, blocks: list[Mapping[str, Any]]) -> None:
        for block in blocks:
            self._left_out[block["block_hash"]] = None
        while len(self._left_out) > MAX_UNKNOWN:
            del self._left_out[next(iter(self._left_out))]


class KvStreams:
    """The streams of all ranks of one engine."""

    def __init__(self, block_size: int, ranks: int) -> None:
        self.ranks = [KvStream(block_size) for _ in range(ranks)]

    def translate(self, events: list[Mapping[str, Any]]) -> dict[int, list[KvEvent]]:
        """By rank."""
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


def _seed(data: Mapping[str, Any], block: Mapping[str, Any]) -> int:
    return seed_for(adapter_salt(data.get("lora_name") or "", block.get("cache_salt") or ""))
