"""Random names and seeds: the operating system's bytes, fetched many at a time."""

from __future__ import annotations

import os

_POOL = 4096  # bytes


class _Pool:
    """Each byte is given out once."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self._bytes = b""
        self._at = 0

    def take(self, count: int) -> bytes:
        at, end = self._at, self._at + count
        if end > len(self._bytes):
            self._bytes, at, end = os.urandom(_POOL), 0, count
        self._at = end
        return self._bytes[at:end]


_pool = _Pool()
_take = _pool.take
os.register_at_fork(after_in_child=_pool.forget)  # a child must not draw what its parent draws


def random_hex() -> str:
    """128 bits, as 32 digits."""
    return _take(16).hex()


def random_int() -> int:
    """64 bits."""
    return int.from_bytes(_take(8), "little")
