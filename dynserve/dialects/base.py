"""The pieces into which parsers split an answer's text, each emitted as soon as it is certain."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any, NamedTuple, Protocol


class Content(NamedTuple):
    text: str


class ReasoningText(NamedTuple):
    text: str


class CallStart(NamedTuple):
    """The start of a tool call. The arguments of a `custom` tool are a text, not JSON."""

    name: str
    custom: bool = False
    namespace: str = ""


class CallArguments(NamedTuple):
    """A further part of the arguments (JSON text) of the last call that was started."""

    text: str


Piece = Content | ReasoningText | CallStart | CallArguments


class Parser(Protocol):
    @property
    def in_reasoning(self) -> bool:
        """Whether the next token counts as reasoning rather than as the answer."""
        ...

    def push(self, text: str) -> list[Piece]:
        """Returns the pieces that have become certain with this text."""
        ...

    def finish(self) -> list[Piece]:
        """Returns the pieces held back so far; the answer has ended."""
        ...


def json_text(value: Any) -> str:
    """Returns JSON that can be encoded as UTF-8. Raises ValueError for numbers that JSON does not have."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair can only be written as an escape
        return json.dumps(value, allow_nan=False)
    return text


def held_back(text: str, strings: Collection[str]) -> int:
    """The number of characters at the end of `text` that may be the beginning of one of `strings`."""
    # the longest end first: while the text continues one of the strings, the first comparison matches
    for length in range(min(len(text), max(map(len, strings), default=0)), 0, -1):
        end = text[-length:]
        for string in strings:
            if len(string) > length and string.startswith(end):
                return length
    return 0
