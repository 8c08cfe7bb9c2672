"""Session affinity: the requests of one session go to the same worker, as long as the session is in use."""

from __future__ import annotations

from collections import OrderedDict

MAX_SESSIONS = 100_000  # the least recently used are dropped first


class Sessions:
    """The worker of each `(session, pool)`, with a time to live in seconds that each use renews."""

    def __init__(self, ttl_s: float, max_sessions: int = MAX_SESSIONS) -> None:
        self._ttl_s, self._max_sessions = ttl_s, max_sessions
        self._workers: OrderedDict[tuple[str, str], tuple[str, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._workers)

    def worker(self, session: str, pool: str, now: float) -> str | None:
        found = self._workers.get((session, pool))
        return found[0] if found is not None and found[1] > now else None

    def note(self, session: str, pool: str, worker: str, now: float) -> None:
        key = (session, pool)
        self._workers[key] = (worker, now + self._ttl_s)
        self._workers.move_to_end(key)
        while self._workers and (
            len(self._workers) > self._max_sessions or next(iter(self._workers.values()))[1] <= now
        ):
            self._workers.popitem(last=False)
