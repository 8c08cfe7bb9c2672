"""Regular expressions of JSON schemas (ECMA-262) as rules for the JSON strings that they match.

A schema's expression matches anywhere in a string unless it has anchors. What a grammar cannot express is refused: looking
ahead or behind, references to groups, word boundaries, anchors elsewhere than at the ends. Many validators use the
expressions of their own language, so a class has only those characters that are in it for ECMA-262 and for Python, which
knows more digits, letters and spaces.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple, TypeAlias

from dynserve.api.rules import NOTHING, Node, Repeat, choice, sequence
from dynserve.api.string_rules import ANY, MAX_CHARACTER, MAX_REPEATS, QUOTE, CharSet, Strings, options_of

_SPACES = CharSet.of([(9, 13), (32, 32), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029),
                      (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000)])  # fmt: skip
_DIGITS = CharSet.of([(48, 57)])
_WORD = CharSet.of([(48, 57), (65, 90), (95, 95), (97, 122)])
_CLASSES: dict[str, tuple[CharSet, Callable[[str], bool]]] = {
    "d": (_DIGITS, str.isdecimal), "w": (_WORD, lambda char: char.isalnum() or char == "_"),
    "s": (_SPACES, lambda char: char.isspace() or char == "\ufeff"),
}  # fmt: skip
_DOT = ANY.without(CharSet.of([(10, 10), (13, 13), (0x2028, 0x2029)]))
_CONTROLS = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "0": "\0"}


class UnsupportedPattern(Exception):
    """The expression is invalid, or has something that a grammar cannot express."""


class Group(NamedTuple):
    """Alternatives, each of which is a list of parts."""

    options: list[list[Part]]


class Repeated(NamedTuple):
    part: Part
    least: int
    most: int | None


class Anchor(NamedTuple):
    char: str


Part: TypeAlias = CharSet | Group | Repeated | Anchor


@lru_cache
def _class(name: str, *, wide: bool) -> CharSet:
    """The characters of a class such as `d` or `D`: those that are in it for all languages, or `wide`, for any."""
    narrow, belongs = _CLASSES[name.lower()]
    if name.islower():
        return _where(belongs) if wide else narrow
    return narrow.complement() if wide else _where(belongs).complement()


def _where(belongs: Callable[[str], bool]) -> CharSet:
    codes = [code for code in range(MAX_CHARACTER + 1) if belongs(chr(code))]
    return CharSet.of([(code, code) for code in codes])


def string_of(pattern: str, strings: Strings, least: int = 0, most: int | None = None) -> Node:
    """Returns the rule for a string that an expression matches, of `least` to `most` characters.

    Raises:
        UnsupportedPattern: with the reason, for a client.
    """
    options = _unwrapped(_Parser(pattern).parsed())
    if (least, most) != (0, None):
        return _of_length(options, strings, least, most)
    anything = strings.repeated(options_of(ANY), 0, None)
    made: list[Node] = []
    for parts in options:
        from_start, to_end = parts[:1] == [Anchor("^")], parts[-1:] == [Anchor("$")]
        inner = parts[1 if from_start else 0 : len(parts) - (1 if to_end else 0)]
        body = [_node(part, strings) for part in inner]
        made.append(sequence(*([] if from_start else [anything]), *body, *([] if to_end else [anything])))
    return sequence(QUOTE, choice(made), QUOTE)


def _unwrapped(group: Group) -> list[list[Part]]:
    """The alternatives, without parentheses around all of them."""
    options = group.options
    while len(options) == 1 and len(options[0]) == 1 and isinstance(options[0][0], Group):
        options = options[0][0].options
    return options


def _of_length(options: list[list[Part]], strings: Strings, least: int, most: int | None) -> Node:
    """The rule for an expression beside bounds of the length, which are joined where it repeats one set of characters."""
    if len(options) == 1 and options[0][:1] == [Anchor("^")] and options[0][-1:] == [Anchor("$")]:
        inner = options[0][1:-1]
        shortest, longest = _length(inner)
        if least <= shortest and (most is None or (longest is not None and longest <= most)):
            return sequence(QUOTE, *(_node(part, strings) for part in inner), QUOTE)
        if len(inner) == 1 and isinstance(inner[0], Repeated) and isinstance(inner[0].part, CharSet):
            part = inner[0]
            ends = [end for end in (most, part.most) if end is not None]
            joined = Repeated(part.part, max(least, part.least), min(ends) if ends else None)
            if joined.most is None or joined.least <= joined.most:
                return sequence(QUOTE, _node(joined, strings), QUOTE)
    raise UnsupportedPattern("it cannot be combined with minLength or maxLength; write the length into the pattern")


def _length(parts: list[Part]) -> tuple[int, int | None]:
    """The shortest and the longest text that some parts match; None: without a bound."""
    least, most = 0, 0
    endless = False
    for part in parts:
        low, high = _length_of(part)
        least += low
        endless = endless or high is None
        most += high or 0
    return least, None if endless else most


def _length_of(part: Part) -> tuple[int, int | None]:
    match part:
        case CharSet():
            return 1, 1
        case Repeated(inner, low, high):
            least, most = _length_of(inner)
            return least * low, None if high is None or most is None else most * high
        case Group(options):
            lengths = [_length(option) for option in options]
            ends = [most for _, most in lengths]
            return min(least for least, _ in lengths), None if None in ends else max(end or 0 for end in ends)
        case _:
            return 0, 0


def _node(part: Part, strings: Strings) -> Node:
    match part:
        case CharSet():
            options = options_of(part)
            if not options:
                raise UnsupportedPattern("it has an empty set of characters")
            return choice(options)
        case Group(options):
            return choice(sequence(*(_node(one, strings) for one in parts)) if parts else NOTHING for parts in options)
        case Repeated(inner, least, most):
            if isinstance(inner, CharSet):
                return strings.repeated(options_of(inner), least, most)
            return Repeat(_node(inner, strings), least, most)
        case Anchor(char):
            raise UnsupportedPattern(f"{char} is supported at the ends only")


class _Parser:
    """A recursive parser of one expression."""

    def __init__(self, text: str) -> None:
        self._text, self._at, self._depth = text, 0, 0

    def parsed(self) -> Group:
        found = self._group()
        if self._at < len(self._text):
            raise UnsupportedPattern("it has a ) without a (")
        return found

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _next(self) -> str:
        char = self._peek()
        if not char:
            raise UnsupportedPattern("it is incomplete")
        self._at += 1
        return char

    def _group(self) -> Group:
        self._depth += 1
        if self._depth > 32:
            raise UnsupportedPattern("its groups are nested too deeply")
        options: list[list[Part]] = [[]]
        while (char := self._peek()) and char != ")":
            if char == "|":
                self._at += 1
                options.append([])
            else:
                options[-1].append(self._quantified(self._part()))
        self._depth -= 1
        return Group(options)

    def _part(self) -> Part:
        char = self._next()
        match char:
            case "^" | "$":
                return Anchor(char)
            case ".":
                return _DOT
            case "[":
                return self._set()
            case "\\":
                return self._escape()
            case "(":
                return self._parenthesis()
            case "*" | "+" | "?":
                raise UnsupportedPattern(f"{char} repeats nothing")
            case _:
                return _one(char)

    def _parenthesis(self) -> Group:
        if self._peek() == "?":
            self._at += 1
            kind = self._next()
            if kind == "<" and self._peek() not in ("=", "!"):  # a name
                while self._next() != ">":
                    pass
            elif kind != ":":
                raise UnsupportedPattern("looking ahead or behind and flags are not supported")
        found = self._group()
        if self._next() != ")":
            raise UnsupportedPattern("it is incomplete")
        return found

    def _quantified(self, part: Part) -> Part:
        bounds = self._bounds()
        if bounds is None:
            return part
        if isinstance(part, Anchor):
            raise UnsupportedPattern("an anchor cannot be repeated")
        if self._peek() == "?":  # lazy: the same texts match
            self._at += 1
        least, most = bounds
        if (most is not None and (most < least or most > MAX_REPEATS)) or least > MAX_REPEATS:
            raise UnsupportedPattern(f"a repetition may have at most {MAX_REPEATS:,} times")
        if self._bounds() is not None:
            raise UnsupportedPattern("a repetition cannot be repeated without parentheses")
        return Repeated(part, least, most)

    def _bounds(self) -> tuple[int, int | None] | None:
        char = self._peek()
        if char in ("*", "+", "?") and char:
            self._at += 1
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[char]
        if char != "{":
            return None
        inner, end, _ = self._text[self._at + 1 :].partition("}")
        low, comma, high = inner.partition(",")
        if not end or not (inner.isascii() and inner.replace(",", "0").isdecimal()) or inner.count(",") > 1:
            return None  # an ordinary brace
        if not low or len(inner) > 12:  # some languages take {,3} for a repetition
            raise UnsupportedPattern(f"{{{inner[:20]}}} is not supported; write a lower bound of few digits")
        self._at += len(inner) + 2
        return int(low), (int(high) if high else None) if comma else int(low)

    def _set(self) -> CharSet:
        negated = self._peek() == "^"
        self._at += negated
        ranges: list[tuple[int, int]] = []
        while (char := self._next()) != "]":
            first = self._member(char, wide=negated)
            if self._peek() == "-" and self._text[self._at + 1 : self._at + 2] not in ("]", ""):
                if len(first.ranges) != 1 or first.ranges[0][0] != first.ranges[0][1]:
                    raise UnsupportedPattern("a class cannot begin a range")
                self._at += 1
                last = self._member(self._next(), wide=negated)
                if len(last.ranges) != 1 or last.ranges[0][0] != last.ranges[0][1]:
                    raise UnsupportedPattern("a class cannot end a range")
                if last.ranges[0][0] < first.ranges[0][0]:
                    raise UnsupportedPattern("a range of characters is in the wrong order")
                ranges.append((first.ranges[0][0], last.ranges[0][1]))
            else:
                ranges += first.ranges
        found = CharSet.of(ranges)
        return found.complement() if negated else found

    def _member(self, char: str, *, wide: bool) -> CharSet:
        if char != "\\":
            return _one(char)
        if self._peek() == "b":
            self._at += 1
            return _one("\b")
        return self._escape(wide=wide)

    def _escape(self, *, wide: bool = False) -> CharSet:
        char = self._next()
        if char.lower() in _CLASSES:
            return _class(char, wide=wide)
        if char in _CONTROLS and not (char == "0" and self._peek().isdecimal()):  # which would be octal
            return _one(_CONTROLS[char])
        if char in ("x", "u"):
            digits = self._text[self._at : self._at + (2 if char == "x" else 4)]
            if len(digits) != (2 if char == "x" else 4) or not set(digits) <= set(string.hexdigits):
                raise UnsupportedPattern(f"\\{char} needs hexadecimal digits")
            code = int(digits, 16)
            self._at += len(digits)
            if 0xD800 <= code <= 0xDFFF:
                raise UnsupportedPattern("halves of surrogate pairs are not supported")
            return _one(chr(code))
        if char.isalnum():
            raise UnsupportedPattern(f"\\{char} is not supported")
        return _one(char)


def _one(char: str) -> CharSet:
    if 0xD800 <= ord(char) <= 0xDFFF:
        raise UnsupportedPattern("halves of surrogate pairs are not supported")
    return CharSet(((ord(char), ord(char)),))
