"""One expectation of the self-test, what was found, and their line in the table."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Literal, NamedTuple

from dynserve.doctor.selftest.engines import Engines

RowState = Literal["ok", "DIFFERS", "FAILED", "note", "skip"]
_WIDTHS = (8, 36, 52)


class Row(NamedTuple):
    state: RowState
    name: str
    expected: str
    found: str

    @property
    def line(self) -> str:
        cells = (self.state, self.name, self.expected)
        return " ".join(f"{cell:<{width}}" for cell, width in zip(cells, _WIDTHS, strict=True)) + f" {self.found}"


# what was found; or what was expected and what was found, where the first depends on the version or the model
Found = str | tuple[str, str]


class Fact(NamedTuple):
    """`expected` is empty where the sources do not tell: then whatever is found is a note. `needs`: why it must be skipped;
    empty if it can run."""

    group: str
    name: str
    expected: str
    check: Callable[[Engines], Awaitable[Found]]
    needs: Callable[[Engines], str] = lambda _: ""


def judged(name: str, expected: str, found: Found) -> Row:
    if isinstance(found, tuple):
        expected, found = found
    state: RowState = "note" if not expected else "ok" if found == expected else "DIFFERS"
    return Row(state, name, expected or "(not known)", found)


def without_grammars(engines: Engines) -> str:
    return engines.decode.limits.no_grammars
