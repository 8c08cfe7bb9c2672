"""Grammars as rules in EBNF, built as a tree, simplified and written in the notation that xgrammar reads."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Text:
    """A fixed text."""

    text: str


@dataclass(frozen=True, slots=True)
class Chars:
    """One of the characters of a set, in the notation of a bracket expression."""

    notation: str


@dataclass(frozen=True, slots=True)
class Rule:
    """A use of another rule."""

    name: str


@dataclass(frozen=True, slots=True)
class Sequence:
    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """One of several nodes; without any, nothing matches."""

    options: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """A node `least` to `most` times; None: without an upper bound."""

    node: Node
    least: int
    most: int | None


Node: TypeAlias = Text | Chars | Rule | Sequence | Choice | Repeat
NOTHING = Text("")
IMPOSSIBLE = Choice(())


def sequence(*parts: Node) -> Node:
    return Sequence(tuple(parts))


def choice(options: Iterable[Node]) -> Node:
    found = tuple(dict.fromkeys(options))
    return found[0] if len(found) == 1 else Choice(found)


def optional(node: Node) -> Node:
    return Repeat(node, 0, 1)


MAX_RULES = 4_000
MAX_CHARACTERS = 1 << 20  # of all rules, written


class TooManyRules(Exception):
    """The rules of a grammar are over a bound."""


@dataclass
class Rules:
    """The rules of one grammar by name. Raises TooManyRules beyond the bounds."""

    bodies: dict[str, Node] = field(default_factory=dict)

    def add(self, name: str, body: Node) -> Rule:
        if len(self.bodies) > MAX_RULES:
            raise TooManyRules
        self.bodies[name] = body
        return Rule(name)

    def new(self, body: Node) -> Rule:
        """Adds a rule under a name of its own."""
        return self.add(f"r{len(self.bodies)}", body)

    def reserve(self) -> str:
        """Returns the name of a rule that is added later, so that it can use itself."""
        name = f"r{len(self.bodies)}"
        self.add(name, IMPOSSIBLE)
        return name

    def text(self, root: Node) -> str | None:
        """Returns the rules that `root` uses, in EBNF; None if no finite text matches it.

        Parts that no finite text matches are removed, such as an object that needs another one of its own kind without
        end: an answer that took such a way could never be completed.
        """
        finite = self._finite()
        pruned = _pruned(root, finite)
        if pruned is None:
            return None
        bodies = {"root": pruned}
        waiting = list(_used(pruned))
        while waiting:
            name = waiting.pop()
            if name not in bodies:
                body = _pruned(self.bodies[name], finite)
                assert body is not None
                bodies[name] = body
                waiting += _used(body)
        lines, size = [], 0
        for name, body in bodies.items():
            lines.append(f"{name} ::= {_written(body)}")
            size += len(lines[-1])
            if size > MAX_CHARACTERS:
                raise TooManyRules
        return "\n".join(lines)

    def _finite(self) -> set[str]:
        """The rules that some finite text matches."""
        users: dict[str, list[str]] = {}
        for name, body in self.bodies.items():
            for used in _used(body):
                users.setdefault(used, []).append(name)
        found: set[str] = set()
        waiting = list(self.bodies)
        while waiting:
            name = waiting.pop()
            if name not in found and _is_finite(self.bodies[name], found):
                found.add(name)
                waiting += users.get(name, ())  # which may be finite now
        return found


def _is_finite(node: Node, known: set[str]) -> bool:
    match node:
        case Rule(name):
            return name in known
        case Sequence(parts):
            return all(_is_finite(part, known) for part in parts)
        case Choice(options):
            return any(_is_finite(option, known) for option in options)
        case Repeat(inner, least, _):
            return least == 0 or _is_finite(inner, known)
        case _:
            return True


def _pruned(node: Node, finite: set[str]) -> Node | None:
    match node:
        case Rule(name):
            return node if name in finite else None
        case Sequence(parts):
            kept = [_pruned(part, finite) for part in parts]
            return None if None in kept else Sequence(tuple(part for part in kept if part is not None))
        case Choice(options):
            left = [option for one in options if (option := _pruned(one, finite)) is not None]
            return choice(left) if left else None
        case Repeat(inner, least, most):
            body = _pruned(inner, finite)
            if body is None:
                return NOTHING if least == 0 else None
            return Repeat(body, least, most)
        case _:
            return node


def _used(node: Node) -> set[str]:
    match node:
        case Rule(name):
            return {name}
        case Sequence(nodes) | Choice(nodes):
            return {name for part in nodes for name in _used(part)}
        case Repeat(inner, _, _):
            return _used(inner)
        case _:
            return set()


def _written(node: Node) -> str:
    match node:
        case Text(text):
            return json.dumps(text, ensure_ascii=False)
        case Chars(notation):
            return f"[{notation}]"
        case Rule(name):
            return name
        case Sequence(parts):
            return " ".join(f"({_written(p)})" if isinstance(p, Choice) else _written(p) for p in parts) or '""'
        case Choice(options):
            return " | ".join(f"({_written(o)})" if isinstance(o, Choice) else _written(o) for o in options)
        case Repeat(inner, least, most):
            simple = isinstance(inner, Chars | Rule | Text)
            body = _written(inner) if simple else f"({_written(inner)})"
            return body + _bounds(least, most)


def _bounds(least: int, most: int | None) -> str:
    match least, most:
        case 0, None:
            return "*"
        case 1, None:
            return "+"
        case 0, 1:
            return "?"
        case _, None:
            return f"{{{least},}}"
        case _:
            return f"{{{least},{most}}}"
