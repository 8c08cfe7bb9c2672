"""What parsers make of an answer's text: pieces, as they become certain."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol


class Content(NamedTuple):
    text: str


class Thinking(NamedTuple):
    text: str


class Call(NamedTuple):
    """A tool call begins."""

    name: str


class Arguments(NamedTuple):
    """More of the JSON text of the arguments of the call that began last."""

    text: str


Piece = Content | Thinking | Call | Arguments


class Parser(Protocol):
    def push(self, text: str) -> list[Piece]:
        """The pieces that are certain with this text."""
        ...

    def finish(self) -> list[Piece]:
        """The answer has ended: what was held back."""
        ...


def held_back(text: str, strings: Iterable[str]) -> int:
    """How many characters at the end of `text` may be the beginning of one of `strings`."""
    longest = 0
    for string in strings:
        for length in range(min(len(string) - 1, len(text)), longest, -1):
            if text.endswith(string[:length]):
                longest = length
                break
    return longest
