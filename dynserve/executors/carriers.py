"""Carriers: other ways for the blocks of a hand-off than through the transceiver's TCP connection.

A transceiver always asks over TCP whether a hand-off is open and whose it is. When both sides have a carrier in common, and
it can reach from one to the other, that one moves the bytes, and the connection is used to talk about them:

    decode                                          prefill
    Fetch{..., carriers: name -> hello} ──────────▶ can one of mine reach it?
                       ◀──────────────────────────  Reply{carrier: name}
    receive  ◀────────── the carrier's own ───────▶ send
    one byte: all there ──────────────────────────▶ delivered, if nobody has cancelled it meanwhile
                       ◀──────────────────────────  one byte: it was so

The last byte matters: a carrier reads the other side's memory by itself, so only the owner knows that the memory still held
the hand-off's blocks when the reading ended.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Protocol

SPIN = 0.002  # seconds that a carrier looks again and again for the end of a transfer; later it looks every millisecond


class CarrierFailed(Exception):
    """This carrier does not work between these two workers; another one, or TCP, may."""


class CarrierChannel(Protocol):
    """The connection between the two sides of a transfer, in messages."""

    @property
    def peer(self) -> str:
        """The address of the worker that is asked; the same for all transfers from it."""
        ...

    async def send(self, message: bytes) -> None: ...

    async def receive(self) -> bytes: ...


class Carrier(Protocol):
    @property
    def name(self) -> str: ...

    def hello(self) -> bytes:
        """What the other side has to know of this one."""
        ...

    def reaches(self, hello: bytes) -> bool:
        """Whether the blocks could be moved to a worker that says this."""
        ...

    async def send(self, blocks: Sequence[int], channel: CarrierChannel) -> None:
        """Lets the other side have these blocks, which stay as they are until it has confirmed that it has them."""
        ...

    async def receive(self, blocks: Sequence[int], channel: CarrierChannel) -> None:
        """Fills these blocks with those that the other side sends.

        Raises:
            CarrierFailed: the transfer could not be done in this way.
        """
        ...

    def lost(self, peer: str) -> None:
        """The worker at this address has gone, or was not asked for long: what is kept open of it can be closed."""
        ...


async def finished(done: Callable[[], bool]) -> None:
    """Returns when `done` says so. There is no descriptor that a loop could wait for; the caller has a deadline."""
    began = time.monotonic()
    while not done():
        await asyncio.sleep(0 if time.monotonic() - began < SPIN else 0.001)
