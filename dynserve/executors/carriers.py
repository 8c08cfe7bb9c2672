"""Carriers move the blocks of a hand-off by other transports than the transceiver's TCP connection.

A transceiver always checks over TCP that a hand-off is open and of the right request. When both sides have a carrier in
common that can reach the other side, the carrier moves the bytes, and the connection carries its messages:

    decode                                          prefill
    Fetch{..., carriers: name -> hello} ──────────▶ can a common carrier reach it?
                       ◀──────────────────────────  Reply{carrier: name}
    receive  ◀────────── the carrier's own ───────▶ send
    one byte: received ───────────────────────────▶ delivered, if not cancelled meanwhile
                       ◀──────────────────────────  one byte: delivered

The last byte is needed: a carrier reads the other side's memory without the owner, so only the owner can confirm that the
memory still held the hand-off's blocks when the reading ended.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Protocol

SPIN = 0.002  # seconds for which the end of a transfer is polled without a pause; later every millisecond


class CarrierFailed(Exception):
    """This carrier does not work between these two workers; another one, or TCP, may."""


class CarrierChannel(Protocol):
    """The connection between the two sides of a transfer, in messages."""

    @property
    def peer(self) -> str:
        """The address of the worker that sends; the same for all transfers from it."""
        ...

    async def send(self, message: bytes) -> None: ...

    async def receive(self) -> bytes: ...


class Carrier(Protocol):
    @property
    def name(self) -> str: ...

    def hello(self) -> bytes:
        """Returns the data by which the other side can reach this one."""
        ...

    def reaches(self, hello: bytes) -> bool:
        """Whether blocks can be moved to the worker that sent this hello."""
        ...

    async def send(self, blocks: Sequence[int], channel: CarrierChannel) -> None:
        """Sends these blocks. They do not change until the other side has confirmed that it has received them."""
        ...

    async def receive(self, blocks: Sequence[int], channel: CarrierChannel) -> None:
        """Fills these blocks with those that the other side sends.

        Raises:
            CarrierFailed: the transfer is not possible with this carrier.
        """
        ...

    def lost(self, peer: str) -> None:
        """Closes all resources of the worker at this address: no connection to it is open any more."""
        ...


async def finished(done: Callable[[], bool]) -> None:
    """Polls until `done` returns True: there is no descriptor that a loop could wait for. The caller has a deadline."""
    began = time.monotonic()
    while not done():
        await asyncio.sleep(0 if time.monotonic() - began < SPIN else 0.001)
