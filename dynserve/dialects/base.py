"""What parsers make of an answer's text: pieces, as they become certain."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any, NamedTuple, Protocol


class Content(NamedTuple):
    text: str


class ReasoningText(NamedTuple):
    text: str


class CallStart(NamedTuple):
    """A tool call begins."""

    name: str


class CallArguments(NamedTuple):
    """More of the JSON text of the arguments of the call that began last."""

    text: str


Piece = Content | ReasoningText | CallStart | CallArguments


class Parser(Protocol):
    @property
    def in_reasoning(self) -> bool:
        """The next token is not one of the answer yet."""
        ...

    def push(self, text: str) -> list[Piece]:
        """The pieces that are certain with this text."""
        ...

    def finish(self) -> list[Piece]:
        """The answer has ended: what was held back."""
        ...


def json_text(value: Any) -> str:
    """JSON that is UTF-8, too. Raises ValueError for numbers that JSON does not have."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair can be written as an escape only
        return json.dumps(value, allow_nan=False)
    return text


def held_back(text: str, strings: Collection[str]) -> int:
    """How many characters at the end of `text` may be the beginning of one of `strings`."""
    # the longest end first: as long as the text goes on like one of them, the first look finds it
    for length in range(min(len(text), max(map(len, strings), default=0)), 0, -1):
        end = text[-length:]
        for string in strings:
            if len(string) > length and string.startswith(end):
                return length
    return 0
