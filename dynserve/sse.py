"""Server-sent events, with JSON that every client reads as one line."""

from __future__ import annotations

import msgspec

to_json = msgspec.json.Encoder().encode


def one_line(data: bytes) -> bytes:
    """Escapes the characters in JSON that some clients treat as the end of a line, although the SSE standard does not."""
    if data.isascii():
        return data
    for char in ("\u0085", "\u2028", "\u2029"):
        data = data.replace(char.encode(), b"\\u%04x" % ord(char))
    return data


def event(kind: str, data: bytes) -> bytes:
    """Returns an event with a name."""
    return b"event: " + kind.encode() + b"\ndata: " + one_line(data) + b"\n\n"
