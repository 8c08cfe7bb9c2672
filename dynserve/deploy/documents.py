"""YAML documents whose keys and items know their lines, so that every error and warning names file and line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml

from dynserve.config import nearest
from dynserve.errors import ConfigError

MAX_FILE = 16 << 20  # bytes; etcd itself refuses objects of more than 1.5 MB
MAX_DEPTH = 100  # levels of nesting
V = TypeVar("V")


class Map(dict[str, Any]):
    """A mapping. `line` is that of its first key, `lines` has those of all keys; lines count from 1."""

    def __init__(self, line: int = 0) -> None:
        super().__init__()
        self.line = line
        self.lines: dict[str, int] = {}

    def line_of(self, key: str) -> int:
        return self.lines.get(key, self.line)


class Seq(list[Any]):
    """A list. `lines` has the line of each item."""

    def __init__(self, line: int = 0) -> None:
        super().__init__()
        self.line = line
        self.lines: list[int] = []


class Place(NamedTuple):
    """A line of a file."""

    path: str
    line: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


class Notes:
    """The warnings of one run, in order, each once."""

    def __init__(self) -> None:
        self.lines: dict[str, None] = {}

    def warn(self, place: Place | None, text: str) -> None:
        self.lines[f"{place}: {text}" if place is not None else text] = None


class Document(NamedTuple):
    """One document of a file."""

    path: str
    content: Map

    @property
    def kind(self) -> str:
        return str(self.content.get("kind", ""))

    @property
    def name(self) -> str:
        return str((self.content.get("metadata") or {}).get("name", ""))


def read_documents(path: str | Path) -> list[Document]:
    """Returns the documents of a YAML file that are not empty.

    Raises:
        ConfigError: the file cannot be read, is not YAML, has a key twice, or a document is not a mapping.
    """
    shown = str(path)
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_FILE + 1)
    except OSError as error:
        raise ConfigError(f"{shown}: {error.strerror}") from error
    if len(content) > MAX_FILE:
        raise ConfigError(f"{shown} has over {MAX_FILE:,} bytes: this is not a deployment file")
    return list(parse_documents(content, shown))


def parse_documents(content: str | bytes, path: str) -> Iterator[Document]:
    """Yields the documents of a YAML text. `path` names it in errors. Raises the errors of `read_documents`."""
    try:
        for node in yaml.compose_all(content, Loader=yaml.CSafeLoader):
            if node is None or (isinstance(node, yaml.ScalarNode) and not node.value):
                continue
            found = _Reader(path).value(node, 0)
            if not isinstance(found, Map):
                raise ConfigError(f"{Place(path, _line(node))}: expected keys and values")
            yield Document(path, found)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark is not None else path
        raise ConfigError(f"{place} is not YAML: {getattr(error, 'problem', None) or error}") from error


class _Reader:
    """Builds the values of one document. An anchor's value is built once, however often it is used."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._scalars = yaml.SafeLoader("")
        self._built: dict[int, Any] = {}

    def value(self, node: yaml.Node, depth: int) -> Any:
        if id(node) not in self._built:
            self._built[id(node)] = self._value(node, depth)
        return self._built[id(node)]

    def _value(self, node: yaml.Node, depth: int) -> Any:
        if depth > MAX_DEPTH:  # or an anchor within itself
            raise ConfigError(f"{Place(self._path, _line(node))}: nested more than {MAX_DEPTH} levels deep")
        if isinstance(node, yaml.MappingNode):
            return self._map(node, depth)
        if isinstance(node, yaml.SequenceNode):
            found = Seq(_line(node))
            for item in node.value:
                found.append(self.value(item, depth + 1))
                found.lines.append(_line(item))
            return found
        try:
            return self._scalars.construct_object(node)
        except (yaml.YAMLError, ValueError) as error:  # such as a date with 40 days
            raise ConfigError(f"{Place(self._path, _line(node))}: {node.value!r} is not a valid value") from error

    def _map(self, node: yaml.MappingNode, depth: int) -> Map:
        found = Map(_line(node))
        for key_node, value_node in node.value:
            line = _line(key_node)
            if key_node.tag == "tag:yaml.org,2002:merge":
                self._merge(found, value_node, depth)
                continue
            key = str(key_node.value)
            if key in found.lines:
                raise ConfigError(
                    f"{Place(self._path, line)}: {key} stands here twice, first in line {found.lines[key]}"
                )
            found[key], found.lines[key] = self.value(value_node, depth + 1), line
        return found

    def _merge(self, into: Map, node: yaml.Node, depth: int) -> None:
        for source in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            found = self.value(source, depth + 1)
            for key, value in found.items() if isinstance(found, Map) else ():
                into.setdefault(key, value)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


class Fields:
    """Typed access to the keys of a mapping, for a reader that accounts for every key.

    A key that nothing has read is reported by `finish`, so that no setting of a user is dropped in silence.
    """

    def __init__(self, path: str, content: Map, what: str, notes: Notes) -> None:
        self._path, self._content, self._what, self._notes = path, content, what, notes
        self._read: set[str] = set()

    def place(self, key: str = "") -> Place:
        return Place(self._path, self._content.line_of(key))

    def get(self, key: str, kind: type[V], default: V) -> V:
        """Returns the value of a key; `default` if it is missing or null.

        Raises:
            ConfigError: the value is of another type.
        """
        self._read.add(key)
        value = self._content.get(key)
        if value is None:
            return default
        if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)  # type: ignore[return-value]  # quantities and ports are often not quoted
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ConfigError(f"{self.place(key)}: {self._what}.{key} must be {_NAMES.get(kind, kind.__name__)}")
        return value

    def inner(self, key: str) -> Fields:
        """Returns the fields of a mapping within this one; empty if it is missing."""
        return Fields(
            self._path, self.get(key, Map, Map(self._content.line_of(key))), f"{self._what}.{key}", self._notes
        )

    def refuse(self, key: str, reason: str) -> None:
        """Raises ConfigError if the key is set."""
        self._read.add(key)
        if self._content.get(key) not in (None, False, {}, []):
            raise ConfigError(f"{self.place(key)}: {self._what}.{key}: {reason}")

    def ignore(self, key: str, reason: str) -> None:
        """Warns if the key is set."""
        self._read.add(key)
        if self._content.get(key) not in (None, False, {}, [], ""):
            self._notes.warn(self.place(key), f"{self._what}.{key} is ignored: {reason}")

    def finish(self, known: Callable[[], list[str]] = list) -> None:
        """Raises ConfigError for the first key that nothing has read."""
        for key in self._content:
            if key not in self._read:
                hint = nearest(key, [*self._read, *known()])
                raise ConfigError(f"{self.place(key)}: {self._what} has no field {key!r}{hint}")


_NAMES: dict[Any, str] = {
    Map: "keys and values", Seq: "a list", str: "a text", int: "a whole number", bool: "true or false"
}  # fmt: skip
