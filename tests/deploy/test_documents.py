from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dynserve.deploy.documents import Fields, Map, Notes, parse_documents, read_documents
from dynserve.errors import ConfigError


def content(text: str) -> Map:
    (document,) = parse_documents(text, "f.yaml")
    return document.content


def test_keys_and_items_have_the_lines_at_which_they_stand() -> None:
    found = content("# a comment\na: 1\nb:\n  c:\n    - x\n    - y\n")
    assert found == {"a": 1, "b": {"c": ["x", "y"]}}
    assert (found.lines, found["b"].lines, found["b"]["c"].lines) == ({"a": 2, "b": 3}, {"c": 4}, [5, 6])


def test_empty_documents_are_skipped() -> None:
    assert [d.kind for d in parse_documents("---\n---\nkind: A\n---\n# nothing\n---\nkind: B\n", "f")] == ["A", "B"]


def test_anchors_and_merges_are_followed_once_however_often_they_are_used() -> None:
    found = content("base: &b {x: 1, y: 2}\none:\n  <<: *b\n  y: 3\n")
    assert found["one"] == {"x": 1, "y": 3}
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 40))
    assert len(content(bomb)) == 40  # 9 ** 39 items, if each use were built


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "f.yaml:3: a stands here twice, first in line 1"),
        ("- a\n- b\n", "f.yaml:1: expected keys and values"),
        ("a: 1\n  b: 2\n", "f.yaml:2 is not YAML"),
        ("a: " + "[" * 200 + "]" * 200, "nested more than 100 levels"),
        ("a: &x [*x]\n", "not YAML|nested more than 100 levels"),
        ("a: 2026-13-41\n", "f.yaml:1: '2026-13-41' is not a valid value"),
    ],
)
def test_an_invalid_document_is_an_error_with_file_and_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        list(parse_documents(text, "f.yaml"))


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_documents(tmp_path / "x.yaml")


def fields(text: str, notes: Notes | None = None) -> Fields:
    return Fields("f.yaml", content(text), "spec", notes or Notes())


def test_a_field_of_the_wrong_type_is_an_error() -> None:
    for text, kind, default, message in (
        ("a: [1]", str, "", "f.yaml:1: spec.a must be a text"),
        ("a: yes", int, 0, "must be a whole number"),
        ("a: 1", bool, False, "must be true or false"),
    ):
        kinds: Any = kind
        with pytest.raises(ConfigError, match=message):
            fields(text).get("a", kinds, default)
    assert fields("a: 4").get("a", str, "") == "4"  # a quantity without quotes


def test_a_field_that_nothing_reads_is_an_error_with_the_nearest_name() -> None:
    found = fields("replicas: 1\nreplica: 2\n")
    found.get("replicas", int, 1)
    with pytest.raises(ConfigError, match=r"f.yaml:2: spec has no field 'replica' \(did you mean replicas\?\)"):
        found.finish()


def test_refused_and_ignored_fields_name_their_line_and_reason() -> None:
    notes = Notes()
    found = fields("a: {}\nb: {x: 1}\nc: {x: 1}\n", notes)
    found.refuse("a", "not here")  # an empty value means nothing
    found.ignore("b", "not needed")
    assert list(notes.lines) == ["f.yaml:2: spec.b is ignored: not needed"]
    with pytest.raises(ConfigError, match="f.yaml:3: spec.c: not here"):
        found.refuse("c", "not here")
