"""The planes' messages: frozen msgspec structs, one closed union per plane, decoders built once."""

import logging
from collections.abc import Callable
from typing import TypeVar

import msgspec

from dynserve.log_limit import LimitedLog

log = LimitedLog(logging.getLogger(__name__))
T = TypeVar("T")

# What a decoder raises for bytes that are no message: msgspec leaves text that is no UTF-8 to Python's own error.
MALFORMED = (msgspec.DecodeError, UnicodeDecodeError)


def decoded(decode: Callable[[bytes], T], payload: bytes, what: str) -> T | None:
    """None, with a warning, for what no version of ours has written."""
    try:
        return decode(payload)
    except MALFORMED as error:
        log.warning("malformed", what, "ignoring %s that cannot be read: %r", what, str(error)[:200])
        return None
