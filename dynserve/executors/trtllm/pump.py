"""The thread that reads KV events and statistics, with an event loop of its own: rows are many dicts, and hashing them must
not delay the answers.

It starts after a first request, since the engine's getters are not enabled before.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from dynserve.executors.trtllm.kv_events import KvStreams
from dynserve.wire.events import KvEvent

log = logging.getLogger(__name__)

EVERY = 0.01  # seconds between polls of the events
STATS_EVERY = 5  # polls of the events per poll of the statistics
MAX_AT_ONCE = 512  # events that are translated in one call
MAX_AHEAD = 8  # batches that may wait for the event loop
REPORT_EVERY = 30.0  # seconds between warnings

OnStats = Callable[[dict[int, list[KvEvent]], list[Mapping[str, Any]]], None]


class Pump:
    """`on_stats` is called on the loop, with translated events by rank, and unchanged rows of statistics."""

    def __init__(self, llm: Any, streams: KvStreams | None, on_stats: OnStats) -> None:
        self._llm, self.streams, self._on_stats = llm, streams, on_stats
        self._loop = asyncio.get_running_loop()
        self._ahead = threading.Semaphore(MAX_AHEAD)
        self._stopping = threading.Event()
        self._last_warning = float("-inf")
        self._thread = threading.Thread(target=self._run, name="trtllm-pump", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Signals the thread to end, without waiting for it: it may hang in a dead engine."""
        self._stopping.set()

    def _run(self) -> None:
        asyncio.run(self._rounds())

    async def _rounds(self) -> None:
        count = 0
        while not self._stopping.is_set():
            streams = self.streams
            if streams is not None:
                while len(events := await self._read("get_kv_cache_events_async")) == MAX_AT_ONCE:
                    self._call_in_loop(streams.translate(events), [])
                if events and (found := streams.translate(events)):
                    self._call_in_loop(found, [])
            if count % STATS_EVERY == 0 and (rows := await self._read("get_stats_async")):
                self._call_in_loop({}, rows)
            count += 1
            await asyncio.sleep(EVERY)

    async def _read(self, getter: str) -> list[Mapping[str, Any]]:
        """Returns the rows that are available now. Versions differ in the exception of an empty queue."""
        rows: list[Mapping[str, Any]] = []
        try:
            async for row in getattr(self._llm, getter)(0):
                rows.append(row)
                if len(rows) == MAX_AT_ONCE:
                    break
        except (asyncio.QueueEmpty, TimeoutError, IndexError):
            pass
        except Exception as error:  # `Watch` detects a dead engine
            if time.monotonic() - self._last_warning > REPORT_EVERY:
                self._last_warning = time.monotonic()
                log.warning("%s: %s: %s", getter, type(error).__name__, error)
            await asyncio.sleep(0.2)
        return rows

    def _call_in_loop(self, events: dict[int, list[KvEvent]], rows: list[Mapping[str, Any]]) -> None:
        while not self._ahead.acquire(timeout=0.1):
            if self._stopping.is_set():
                return
        try:
            self._loop.call_soon_threadsafe(self._deliver, events, rows)
        except RuntimeError:  # the loop is closed
            self._stopping.set()

    def _deliver(self, events: dict[int, list[KvEvent]], rows: list[Mapping[str, Any]]) -> None:
        self._ahead.release()
        if not self._stopping.is_set():
            self._on_stats(events, rows)
