"""Warnings that others can cause: one a second for each kind and each cause, with the number of those that were left out.

Whoever can write a line to the log with every packet can fill a disk with it, and hides what else is in the log.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable

EVERY = 1.0  # seconds
MAX_CAUSES = 1024  # that are remembered
MAX_LINES = 20  # a second, of all causes of one kind


class LimitedLog:
    """Writes to `log`. A kind is a constant of the calling code, a cause is whom or what the line is about."""

    def __init__(self, log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._log, self._clock = log, clock
        self._said: OrderedDict[tuple[str, str], tuple[float, int]] = OrderedDict()  # when, and how many since

    def warning(self, kind: str, cause: str, message: str, *args: object) -> None:
        """Text of others' making belongs into `args`, for `%r`."""
        if self._may_say(kind, cause) and self._may_say(kind, ""):
            self._log.warning(message + self._left_out(kind, cause), *args)

    def exception(self, kind: str, cause: str, message: str, *args: object) -> None:
        """With the traceback of the exception that is being handled."""
        if self._may_say(kind, cause) and self._may_say(kind, ""):
            self._log.exception(message + self._left_out(kind, cause), *args)

    def _may_say(self, kind: str, cause: str) -> bool:
        now = self._clock()
        key = (kind, cause)
        said, since = self._said.pop(key, (float("-inf"), 0))
        every = EVERY if cause else EVERY / MAX_LINES
        if now - said < every:
            self._said[key] = (said, since + 1)
            return False
        self._said[key] = (now, since if cause else 0)
        if len(self._said) > MAX_CAUSES:
            self._said.popitem(last=False)
        return True

    def _left_out(self, kind: str, cause: str) -> str:
        said, since = self._said[kind, cause]
        self._said[kind, cause] = (said, 0)
        return f" ({since:,} more of this kind since the last line)" if since else ""
