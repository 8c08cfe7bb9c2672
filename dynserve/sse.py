"""Server-sent events: JSON that is one line to every client."""

from __future__ import annotations

import msgspec

to_json = msgspec.json.Encoder().encode


def one_line(data: bytes) -> bytes:
    """JSON without the characters that some clients take for the end of a line, although they are none in a stream."""
    if data.isascii():
        return data
    for char in ("\u0085", "\u2028", "\u2029"):
        data = data.replace(char.encode(), b"\\u%04x" % ord(char))
    return data


def event(kind: str, data: bytes) -> bytes:
    """A named one."""
    return b"event: " + kind.encode() + b"\ndata: " + one_line(data) + b"\n\n"
