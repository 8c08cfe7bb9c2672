"""Rate limits for warnings that clients or peers can cause: one a second per cause and twenty a second per kind. The next
line has the number of omitted ones.

A peer that can write a log line with every packet could fill the disk, and hide the other lines.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

EVERY = 1.0  # seconds between two lines of one cause
MAX_LINES = 20  # of all causes of one kind, in `EVERY` seconds
MAX_CAUSES = 1024  # that are remembered
MAX_CAUSE = 200  # characters of one


@dataclass(slots=True)
class _Kind:
    """The lines of one kind in the second that began at `since`."""

    since: float = float("-inf")
    lines: int = 0
    omitted: int = 0


@dataclass(slots=True)
class _Cause:
    logged: float = float("-inf")
    omitted: int = 0


class LimitedLog:
    """Writes to `log`. A kind is a constant of the calling code, a cause names the peer or thing that the line is about."""

    def __init__(self, log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._log, self._clock = log, clock
        self._kinds: dict[str, _Kind] = {}
        self._causes: OrderedDict[tuple[str, str], _Cause] = OrderedDict()

    def warning(self, kind: str, cause: str, message: str, *args: object) -> None:
        """Logs a warning. Text from clients and peers belongs in `args`, with `%r`."""
        suffix = self._suffix(kind, cause)
        if suffix is not None:
            self._log.warning(message + suffix, *args)

    def exception(self, kind: str, cause: str, message: str, *args: object) -> None:
        """Logs an error with the traceback of the exception that is being handled."""
        suffix = self._suffix(kind, cause)
        if suffix is not None:
            self._log.exception(message + suffix, *args)

    def _suffix(self, kind_name: str, cause_name: str) -> str | None:
        """Returns the text about the lines omitted before this one; None when this one is omitted, too."""
        now = self._clock()
        kind = self._kinds.setdefault(kind_name, _Kind())
        cause = self._cause(kind_name, cause_name[:MAX_CAUSE])
        if now - cause.logged < EVERY:
            cause.omitted += 1
            return None
        if now - kind.since >= EVERY:
            kind.since, kind.lines = now, 0
        if kind.lines >= MAX_LINES:
            kind.omitted += 1
            return None
        kind.lines += 1
        cause.logged = now
        own, cause.omitted = cause.omitted, 0
        others, kind.omitted = kind.omitted, 0
        count = own + others
        return f" ({count:,} more like this were suppressed)" if count else ""

    def _cause(self, kind: str, name: str) -> _Cause:
        found = self._causes.get((kind, name))
        if found is None:
            found = self._causes[kind, name] = _Cause()
            if len(self._causes) > MAX_CAUSES:
                self._causes.popitem(last=False)
        else:
            self._causes.move_to_end((kind, name))
        return found
