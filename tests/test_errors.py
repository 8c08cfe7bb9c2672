"""The tree of errors, its codes and its translations."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from dynserve import errors
from dynserve.errors import DynserveError, InternalError, TimedOut, Unavailable, from_wire, translate


def every_error(root: type[DynserveError] = DynserveError) -> list[type[DynserveError]]:
    return [
        root,
        *(e for child in root.__subclasses__() if child.__module__ == errors.__name__ for e in every_error(child)),
    ]


def test_every_error_is_recreated_from_its_own_code() -> None:
    for cls in every_error():
        assert from_wire(cls.code, "why").code == cls.code
        assert str(from_wire(cls.code, "why")) == "why"


def test_an_unknown_code_becomes_an_internal_error_that_names_it() -> None:
    error = from_wire("from_the_future", "why")
    assert isinstance(error, InternalError)
    assert "from_the_future" in str(error)


def test_translate_uses_the_first_matching_class_and_chains_the_cause() -> None:
    with (
        pytest.raises(TimedOut, match="asking: late") as caught,
        translate({TimeoutError: TimedOut, OSError: Unavailable}, "asking"),
    ):
        raise TimeoutError("late")
    assert isinstance(caught.value.__cause__, TimeoutError)


def test_translate_lets_other_errors_through() -> None:
    with pytest.raises(KeyError), translate({OSError: Unavailable}, "asking"):
        raise KeyError("x")


def test_every_error_class_of_the_package_is_defined_in_errors_py() -> None:
    """A class that is defined elsewhere may be imported too late for the table of codes."""
    names = {cls.__name__ for cls in every_error()}
    for path in Path(errors.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and path.name != "errors.py":
                bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
                assert not bases & names, f"{node.name} in {path}"
