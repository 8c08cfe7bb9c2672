"""One expectation of the self-test, the value that was found, and their line in the table."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Literal, NamedTuple

from dynserve.doctor.selftest.engines import Engines

RowState = Literal["ok", "DIFFERS", "FAILED", "note", "skip"]
_WIDTHS = (8, 40, 50)


class Row(NamedTuple):
    """One line of the table. `note`: the sources do not say what to expect. `skip`: it cannot be checked here."""

    state: RowState
    name: str
    expected: str
    found: str

    @property
    def line(self) -> str:
        cells = (self.state, self.name, self.expected)
        return " ".join(f"{cell:<{width}}" for cell, width in zip(cells, _WIDTHS, strict=True)) + f" {self.found}"


# the value that was found; or the expected and the found one, where the first depends on the version or the model
Found = str | tuple[str, str]


class Fact(NamedTuple):
    """One fact about an engine. Without an `expected` value its row is a note. `needs` returns the reason why the fact
    cannot be checked, or an empty string."""

    group: str
    name: str
    expected: str
    check: Callable[[Engines], Awaitable[Found]]
    needs: Callable[[Engines], str] = lambda _: ""


def judged(name: str, expected: str, found: Found) -> Row:
    """Returns the row of a fact that could be checked."""
    if isinstance(found, tuple):
        expected, found = found
    state: RowState = "note" if not expected else "ok" if found == expected else "DIFFERS"
    return Row(state, name, expected or "(not known)", found)


def without_grammars(engines: Engines) -> str:
    return engines.main.limits.no_grammars
