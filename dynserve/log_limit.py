"""Warnings that others can cause: one a second for each cause and twenty a second of a kind, with the number of those that
were left out.

Whoever can write a line to the log with every packet can fill a disk with it, and hides what else is in the log.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

EVERY = 1.0  # seconds between two lines of one cause
MAX_LINES = 20  # of all causes of one kind, in so many seconds
MAX_CAUSES = 1024  # that are remembered
MAX_CAUSE = 200  # characters of one


@dataclass(slots=True)
class _Kind:
    """The lines of one kind in the second that began at `since`."""

    since: float = float("-inf")
    lines: int = 0
    left_out: int = 0


@dataclass(slots=True)
class _Cause:
    said: float = float("-inf")
    left_out: int = 0


class LimitedLog:
    """Writes to `log`. A kind is a constant of the calling code, a cause is whom or what the line is about."""

    def __init__(self, log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._log, self._clock = log, clock
        self._kinds: dict[str, _Kind] = {}
        self._causes: OrderedDict[tuple[str, str], _Cause] = OrderedDict()

    def warning(self, kind: str, cause: str, message: str, *args: object) -> None:
        """Text of others' making belongs into `args`, for `%r`."""
        left_out = self._left_out(kind, cause)
        if left_out is not None:
            self._log.warning(message + left_out, *args)

    def exception(self, kind: str, cause: str, message: str, *args: object) -> None:
        """With the traceback of the exception that is being handled."""
        left_out = self._left_out(kind, cause)
        if left_out is not None:
            self._log.exception(message + left_out, *args)

    def _left_out(self, kind_name: str, cause_name: str) -> str | None:
        """The words about lines that were left out before this one; None when this one is left out, too."""
        now = self._clock()
        kind = self._kinds.setdefault(kind_name, _Kind())
        cause = self._cause(kind_name, cause_name[:MAX_CAUSE])
        if now - cause.said < EVERY:
            cause.left_out += 1
            return None
        if now - kind.since >= EVERY:
            kind.since, kind.lines = now, 0
        if kind.lines >= MAX_LINES:
            kind.left_out += 1
            return None
        kind.lines += 1
        cause.said = now
        own, cause.left_out = cause.left_out, 0
        others, kind.left_out = kind.left_out, 0
        count = own + others
        return f" ({count:,} more like this were left out)" if count else ""

    def _cause(self, kind: str, name: str) -> _Cause:
        found = self._causes.get((kind, name))
        if found is None:
            found = self._causes[kind, name] = _Cause()
            if len(self._causes) > MAX_CAUSES:
                self._causes.popitem(last=False)
        else:
            self._causes.move_to_end((kind, name))
        return found
