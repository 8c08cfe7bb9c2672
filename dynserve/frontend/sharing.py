"""Sharing: frontends tell each other what they have placed, so that two of them do not fill the same worker.

What travels are sums per worker, not changes: a lost message is made good by the next one, and at the latest by the whole
of the books, which go out every second. A frontend that is silent for `SILENCE` seconds has no requests any more.
"""

from __future__ import annotations

import asyncio
import logging

from dynserve.errors import DynserveError
from dynserve.routing.ledger import Ledger
from dynserve.transport.base import Bus, Change, Put
from dynserve.wire import decoded, events
from dynserve.wire.events import Shares

log = logging.getLogger(__name__)

EVERY = 0.002  # seconds between messages at the least; the first change after a pause goes out at once
WHOLE_EVERY = 1.0  # seconds
SILENCE = 3.5  # seconds


class Sharing:
    """One frontend's side. Says nothing while there is nobody to hear it."""

    def __init__(self, frontend_id: str, namespace: str, bus: Bus, ledger: Ledger) -> None:
        self._id, self._bus, self._ledger = frontend_id, bus, ledger
        self._subject = events.placed_subject(namespace, frontend_id)
        self._others: set[str] = set()  # keys in discovery
        self._heard: dict[str, float] = {}
        self._changed: set[str] = set()
        self._wake = asyncio.Event()
        ledger.listeners.append(self._charged)

    @property
    def others(self) -> int:
        """Frontends that are heard of."""
        return len(self._heard)

    def discovered(self, change: Change) -> None:
        """Frontends by their entries in discovery."""
        if isinstance(change, Put):
            if not change.key.endswith(f"/{self._id}"):
                self._others.add(change.key)
                self._wake.set()
        else:
            self._others.discard(change.key)

    def received(self, payload: bytes) -> None:
        message = decoded(events.decode_shares, payload, "placements")
        if message is not None and message.frontend_id != self._id:
            self._heard[message.frontend_id] = asyncio.get_running_loop().time()
            self._ledger.shared(message.frontend_id, message.shares, all_of_them=message.whole)

    async def publish(self) -> None:
        """Changes as they come, everything once a second."""
        loop = asyncio.get_running_loop()
        whole_due = 0.0
        while True:
            try:
                async with asyncio.timeout_at(max(whole_due, loop.time())):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            self._expire(loop.time())
            changed, self._changed = self._changed, set()
            whole = loop.time() >= whole_due
            if whole:
                whole_due = loop.time() + WHOLE_EVERY
            if self._others and (whole or changed):
                shares = self._ledger.shares(None if whole else changed)
                try:
                    await self._bus.publish(self._subject, events.encode(Shares(self._id, whole, shares)))
                except DynserveError as error:
                    log.debug("%s", error)  # the next message says it all again
                await asyncio.sleep(EVERY)

    def _charged(self, worker: str) -> None:
        if self._others:
            self._changed.add(worker)
            self._wake.set()

    def _expire(self, now: float) -> None:
        for frontend in [id_ for id_, heard in self._heard.items() if now - heard > SILENCE]:
            del self._heard[frontend]
            self._ledger.forget(frontend)
