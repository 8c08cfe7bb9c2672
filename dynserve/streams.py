"""`Channel`: a bounded queue between a producer that must not wait and a consumer that may."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Statistics(NamedTuple):
    waiting: int  # items put and not yet received
    size: int  # their summed size, in the unit of `put`
    bound: int


class Channel(Generic[T]):
    """A bounded queue with a synchronous `put` and one consumer.

    The producer (a link's read callback) cannot wait, so `put` on a full channel returns False, and the caller
    decides which request to abort. `receive` returns all waiting items, so that a consumer wakes once per burst.
    """

    __slots__ = ("_bound", "_closed", "_error", "_items", "_size", "_waiter")

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._items: deque[T] = deque()
        self._size = 0
        self._closed = False
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: T, size: int = 1) -> bool:
        """Adds an item. Drops it and returns False when the channel is closed or `size` more would exceed the bound."""
        if self._closed or self._size + size > self._bound:
            return False
        self._items.append(item)
        self._size += size
        self._wake()
        return True

    def close(self, error: Exception | None = None) -> None:
        """Ends the channel. The consumer gets the waiting items, then `error` or the end. A second call has no effect."""
        if not self._closed:
            self._closed, self._error = True, error
            self._wake()

    def drop(self) -> None:
        """Ends the channel for a consumer that has stopped, and discards the waiting items."""
        self.close()
        self._items.clear()
        self._size, self._error = 0, None

    @property
    def closed(self) -> bool:
        """Whether no more items are accepted; some may still wait."""
        return self._closed

    @property
    def empty(self) -> bool:
        """Whether no item waits."""
        return not self._items

    async def receive(self) -> list[T]:
        """Returns all waiting items, at least one; `[]` when the channel has ended.

        Raises:
            the error that the channel was closed with, after the items before it, and only once.
        """
        while not self._items:
            if self._closed:
                error, self._error = self._error, None
                if error is None:
                    return []
                try:
                    raise error
                finally:
                    del error  # its traceback refers to this frame: a reference cycle
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        items = list(self._items)
        self._items.clear()
        self._size = 0
        return items

    def statistics(self) -> Statistics:
        return Statistics(len(self._items), self._size, self._bound)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
