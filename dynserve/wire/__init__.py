"""The messages of the planes: frozen msgspec structs, one closed union per plane, with decoders built once."""

import logging
from collections.abc import Callable
from typing import TypeVar

import msgspec

from dynserve.log_limit import LimitedLog

log = LimitedLog(logging.getLogger(__name__))
T = TypeVar("T")

# The errors of a decoder for a malformed message: for invalid UTF-8, msgspec raises Python's own error.
MALFORMED = (msgspec.DecodeError, UnicodeDecodeError)


def decoded(decode: Callable[[bytes], T], payload: bytes, what: str) -> T | None:
    """Decodes a message. Returns None, with a warning, for a malformed one. `what` names it in the warning."""
    try:
        return decode(payload)
    except MALFORMED as error:
        log.warning("malformed", what, "ignoring %s that cannot be read: %r", what, str(error)[:200])
        return None
