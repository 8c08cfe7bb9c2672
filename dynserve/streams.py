"""`Channel`: the bounded hand-over between a producer that must not wait and a consumer that may."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Statistics(NamedTuple):
    waiting: int  # items put and not yet taken
    size: int  # their summed size, in the unit of `put`
    bound: int


class Channel(Generic[T]):
    """Many synchronous `put`s on one side, one consumer on the other.

    The producer (a link's read callback) cannot wait, so a full channel refuses: `put` returns False, and the caller
    decides whom to cut. `receive` returns everything that waits, so that a consumer wakes once per burst, not per item.
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
        """False when closed or when `size` more would pass the bound; the item is then dropped."""
        if self._closed or self._size + size > self._bound:
            return False
        self._items.append(item)
        self._size += size
        self._wake()
        return True

    def close(self, error: Exception | None = None) -> None:
        """No more items. The consumer gets what waits, then `error` or the end. Closing twice keeps the first word."""
        if not self._closed:
            self._closed, self._error = True, error
            self._wake()

    def drop(self) -> None:
        """The consumer has gone: what it has not taken is nobody's."""
        self.close()
        self._items.clear()
        self._size, self._error = 0, None

    @property
    def empty(self) -> bool:
        """The consumer has taken everything."""
        return not self._items

    async def receive(self) -> list[T]:
        """All waiting items, at least one; `[]` when the channel has ended.

        Raises:
            the error that it was closed with, once the items before it were taken, and once only.
        """
        while not self._items:
            if self._closed:
                error, self._error = self._error, None
                if error is None:
                    return []
                try:
                    raise error
                finally:
                    del error  # its traceback knows this frame: a ring
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
