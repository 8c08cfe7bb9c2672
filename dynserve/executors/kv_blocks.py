"""The paged KV cache's book-keeping: the content of each block, its holders, its reuse, and the order of eviction.

A block is in exactly one of three places:

    held     ref > 0: one or more sequences (or an open hand-off) use it
    cached   ref = 0 and sealed: its content can be reused; the least recently released is evicted first
    blank    ref = 0 and without content to reuse

`free` counts cached and blank together: both can be allocated. A block is *sealed* when it is full and computed: from then
on it is found by its rolling hash. Two sequences may compute the same block at once; the first to seal it names it, the
other continues with that block and releases its own copy.

So a holder of a named block also holds the named blocks before it, and releases it before them. Eviction starts with the
earliest release, hence children before parents: a prefix outlives the blocks after it, and each block that can be found by
its hash can be reached from the first block on. Routers rely on that.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from dynserve.wire.events import Cleared, KvEvent, Removed, Stored


class BlockManager:
    """`num_blocks` blocks of `block_size` tokens. Used only by the thread that steps the engine."""

    def __init__(self, num_blocks: int, block_size: int, *, reuse: bool = True) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"need at least one block of one token, not {num_blocks} of {block_size}")
        self.num_blocks, self.block_size, self._reuse = num_blocks, block_size, reuse
        self._refs = [0] * num_blocks
        self._hash: list[int | None] = [None] * num_blocks
        self._parent: list[int | None] = [None] * num_blocks  # hash of the block before, for named blocks
        self._by_hash: dict[int, int] = {}
        self._blank = list(range(num_blocks - 1, -1, -1))  # allocated from the end: low numbers first
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest release first
        self._events: list[KvEvent] = []

    @property
    def free(self) -> int:
        return len(self._blank) + len(self._cached)

    @property
    def cached(self) -> int:
        """The number of blocks that can be found by hash, held or not."""
        return len(self._by_hash)

    def overlap(self, hashes: Sequence[int]) -> int:
        """Returns how many leading blocks of a prompt are in the cache. Changes nothing."""
        count = 0
        for hash_ in hashes:
            if hash_ not in self._by_hash:
                break
            count += 1
        return count

    def can_allocate(self, count: int, reusing: Sequence[int] = ()) -> bool:
        """Whether `count` blocks can be allocated beside those that `acquire(reusing)` would hold. Changes nothing."""
        woken = sum(1 for block in self._leading(reusing) if self._refs[block] == 0)
        return self.free - woken >= count

    def acquire(self, hashes: Sequence[int]) -> list[int]:
        """Holds and returns the leading blocks that are in the cache, in order."""
        blocks = self._leading(hashes)
        for block in blocks:
            self._hold(block)
        return blocks

    def allocate(self, count: int) -> list[int]:
        """Holds and returns `count` blank blocks, evicting cached ones if necessary. Call `can_allocate` first."""
        if count > self.free:
            raise RuntimeError(f"{count} blocks requested, {self.free} free: call can_allocate first")
        blocks = [self._blank.pop() if self._blank else self._evict() for _ in range(count)]
        for block in blocks:
            self._refs[block] = 1
        return blocks

    def seal(self, blocks: list[int], first: int, hashes: Sequence[int]) -> None:
        """Names full, computed blocks of a sequence, from its block `first` on, and makes them reusable. A block that
        another sequence named meanwhile replaces the copy in `blocks`: their contents are the same."""
        if not self._reuse:
            return
        parent = self._hash[blocks[first - 1]] if first else None
        if first and parent is None:
            return  # the cache was cleared since: the blocks after it cannot be reached either
        stored: list[int] = []
        begins = parent
        for at, hash_ in enumerate(hashes, first):
            named = self._by_hash.get(hash_)
            if named is None:
                self._by_hash[hash_] = blocks[at]
                self._hash[blocks[at]], self._parent[blocks[at]] = hash_, parent
                stored.append(hash_)
            else:
                if stored:
                    self._events.append(Stored(begins, stored))
                stored, begins = [], hash_
                self._hold(named)
                self.release([blocks[at]])
                blocks[at] = named
            parent = hash_
        if stored:
            self._events.append(Stored(begins, stored))

    def release(self, blocks: Sequence[int]) -> None:
        """Releases the blocks. The tail is evicted first: a prefix outlives the blocks after it."""
        for block in reversed(blocks):
            self._refs[block] -= 1
            if self._refs[block] < 0:
                raise RuntimeError(f"block {block} was released more often than held")
            if self._refs[block] == 0:
                if self._hash[block] is None:
                    self._blank.append(block)
                else:
                    self._cached[block] = None

    def clear(self) -> None:
        """Clears the cache. Held blocks stay held, but can no longer be found."""
        for block in self._by_hash.values():
            self._hash[block] = None
        self._by_hash.clear()
        self._blank.extend(self._cached)
        self._cached.clear()
        self._events.append(Cleared())

    def drain_events(self) -> list[KvEvent]:
        """Returns the changes since the last call, in order."""
        events, self._events = self._events, []
        return events

    def check(self) -> None:
        """Raises AssertionError when the book-keeping is inconsistent."""
        held = {block for block in range(self.num_blocks) if self._refs[block] > 0}
        blank, cached = set(self._blank), set(self._cached)
        assert len(blank) == len(self._blank), "a block is blank twice"
        assert not (held & blank or held & cached or blank & cached), "a block is in two places"
        assert len(held) + len(blank) + len(cached) == self.num_blocks, "a block is lost"
        assert {b for b in range(self.num_blocks) if self._hash[b] is not None} == set(self._by_hash.values())
        assert all(self._hash[block] == hash_ for hash_, block in self._by_hash.items()), "a hash names the wrong block"
        assert all(self._hash[block] is not None for block in cached), "a cached block has no name"
        assert all(self._hash[block] is None for block in blank), "a blank block has a name"
        parents = {self._parent[block] for block in self._by_hash.values()} - {None}
        assert parents <= self._by_hash.keys(), "a block can be found whose parent cannot"

    def _hold(self, block: int) -> None:
        if self._refs[block] == 0:
            del self._cached[block]
        self._refs[block] += 1

    def _leading(self, hashes: Iterable[int]) -> list[int]:
        blocks = []
        for hash_ in hashes:
            block = self._by_hash.get(hash_)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        hash_ = self._hash[block]
        assert hash_ is not None
        del self._by_hash[hash_]
        self._hash[block] = None
        if self._events and isinstance(self._events[-1], Removed):
            self._events[-1].hashes.append(hash_)
        else:
            self._events.append(Removed([hash_]))
        return block
