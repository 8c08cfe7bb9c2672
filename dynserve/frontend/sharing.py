"""Sharing: frontends publish the load that they have placed, so that two of them do not fill the same worker.

Messages carry sums per worker, not changes: the next message makes up for a lost one, at the latest the message with all
sums that is sent every second. A frontend that sends nothing for `SILENCE` seconds counts as having no requests.
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

EVERY = 0.002  # seconds between messages, at least; the first change after a pause is sent at once
WHOLE_EVERY = 1.0  # seconds
SILENCE = 3.5  # seconds


class Sharing:
    """One frontend's side of the sharing. Publishes nothing while there is no other frontend."""

    def __init__(self, frontend_id: str, namespace: str, bus: Bus, ledger: Ledger) -> None:
        self._id, self._bus, self._ledger = frontend_id, bus, ledger
        self._subject = events.placed_subject(namespace, frontend_id)
        self._others: set[str] = set()  # keys in discovery
        self._last_received: dict[str, float] = {}  # by frontend: when its last message arrived
        self._changed: set[str] = set()
        self._wake = asyncio.Event()
        ledger.listeners.append(self._charged)

    @property
    def others(self) -> int:
        """The number of other frontends whose messages arrive."""
        return len(self._last_received)

    def discovered(self, change: Change) -> None:
        """Handles a change of a frontend's discovery entry."""
        if isinstance(change, Put):
            if not change.key.endswith(f"/{self._id}"):
                self._others.add(change.key)
                self._wake.set()
        else:
            self._others.discard(change.key)

    def received(self, payload: bytes) -> None:
        message = decoded(events.decode_shares, payload, "placements")
        if message is not None and message.frontend_id != self._id:
            self._last_received[message.frontend_id] = asyncio.get_running_loop().time()
            self._ledger.shared(message.frontend_id, message.shares, all_of_them=message.whole)

    async def publish(self) -> None:
        """Publishes changed sums as they occur, and all sums once a second."""
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
                    log.debug("%s", error)  # a later message carries these sums again
                await asyncio.sleep(EVERY)

    def _charged(self, worker: str) -> None:
        if self._others:
            self._changed.add(worker)
            self._wake.set()

    def _expire(self, now: float) -> None:
        for frontend in [id_ for id_, at in self._last_received.items() if now - at > SILENCE]:
            del self._last_received[frontend]
            self._ledger.forget(frontend)
