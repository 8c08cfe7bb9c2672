"""Rules for JSON strings: of bounded length, and that match a regular expression.

A repetition of alternatives is written as a rule that uses itself: compilers of grammars find the tokens that may follow
such a rule ahead of time, but those within a repetition anew for each token, which takes tens of milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from functools import lru_cache
from typing import NamedTuple

from dynserve.api.rules import IMPOSSIBLE, NOTHING, Chars, Node, Repeat, Rule, Rules, Text, choice, sequence

MAX_CHARACTER = 0x10FFFF
MAX_REPEATS = 1_000  # of a character, with a bound: a state of the grammar each
_SURROGATES = (0xD800, 0xDFFF)
_ESCAPES = {'"': '"', "\\": "\\", "\b": "b", "\f": "f", "\n": "n", "\r": "r", "\t": "t"}
_HEX = Chars("0-9a-fA-F")
QUOTE = Text('"')
Range = tuple[int, int]  # of code points, both inclusive


class CharSet(NamedTuple):
    """A set of characters as sorted ranges of code points, without surrogates."""

    ranges: tuple[Range, ...]

    @staticmethod
    def of(ranges: SequenceOf[Range]) -> CharSet:
        merged: list[Range] = []
        for first, last in sorted(ranges):
            if merged and first <= merged[-1][1] + 1:
                merged[-1] = (merged[-1][0], max(merged[-1][1], last))
            else:
                merged.append((first, last))
        return CharSet(tuple(merged))

    def complement(self) -> CharSet:
        out: list[Range] = []
        at = 0
        for first, last in CharSet.of([*self.ranges, _SURROGATES]).ranges:
            if first > at:
                out.append((at, first - 1))
            at = last + 1
        return CharSet(tuple(out) if at > MAX_CHARACTER else (*out, (at, MAX_CHARACTER)))

    def without(self, other: CharSet) -> CharSet:
        return CharSet.of([*self.complement().ranges, *other.ranges]).complement()

    def __contains__(self, char: object) -> bool:
        return isinstance(char, str) and any(first <= ord(char) <= last for first, last in self.ranges)


_SPECIAL = CharSet.of([(0, 0x1F), (0x22, 0x22), (0x5C, 0x5C)])
ANY = CharSet(((0, MAX_CHARACTER),)).without(CharSet(()))


def _notation(ranges: SequenceOf[Range]) -> str:
    """The ranges in a bracket expression."""
    return "".join(_point(first) if first == last else f"{_point(first)}-{_point(last)}" for first, last in ranges)


def _point(code: int) -> str:
    char = chr(code)
    if char.isascii() and char.isalnum():
        return char
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


@lru_cache(1024)
def options_of(chars: CharSet) -> tuple[Node, ...]:
    """The ways to write one of these characters within a JSON string: as it is, or as an escape where it needs one."""
    plain = chars.without(_SPECIAL)
    options: list[Node] = [Chars(_notation(plain.ranges))] if plain.ranges else []
    codes = [code for first, last in chars.without(plain).ranges for code in range(first, last + 1)]
    short = [_ESCAPES[chr(code)] for code in codes if chr(code) in _ESCAPES]
    if short:
        options.append(sequence(Text("\\"), Chars("".join(_point(ord(char)) for char in short))))
    for high in (0, 1):
        digits = [f"{code:04x}"[3] for code in codes if code >> 4 == high and chr(code) not in _ESCAPES]
        if digits:
            options.append(sequence(Text(f"\\u00{high}"), Chars("".join(digits))))
    return tuple(options)


class Strings:
    """The rules about strings of one grammar."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._made: dict[object, Rule] = {}

    def any(self, least: int = 0, most: int | None = None) -> Node:
        """A string of `least` to `most` characters, in any notation that JSON has."""
        if most is not None and least > most:
            return IMPOSSIBLE
        return sequence(QUOTE, self._characters(least, most), QUOTE)

    def repeated(self, options: SequenceOf[Node], least: int, most: int | None) -> Node:
        """One of some nodes, each of which is not empty, `least` to `most` times."""
        if len(options) == 1 and isinstance(options[0], Chars):
            return Repeat(options[0], least, most)
        return self._chain(tuple(options), least, most)

    def exactly(self, text: str) -> Node:
        """One text, in its canonical notation."""
        return sequence(QUOTE, Text("".join(map(canonical, text))), QUOTE)

    def other_than(self, names: SequenceOf[str]) -> Node:
        """Any string but some names. Only canonical notation, in which no other text is one of them."""
        key = ("other than", *sorted(names))
        if key not in self._made:
            self._made[key] = self._rules.new(sequence(QUOTE, self._not(sorted(set(names))), QUOTE))
        return self._made[key]

    def _not(self, names: SequenceOf[str]) -> Node:
        """The rest of a string whose beginning is that of `names`, which are their remaining characters: one rule for each
        beginning."""
        heads: dict[str, list[str]] = {}
        for name in names:
            if name:
                heads.setdefault(name[0], []).append(name[1:])
        options: list[Node] = [] if "" in names else [NOTHING]
        options += [sequence(Text(canonical(head)), self._not(rest)) for head, rest in heads.items()]
        others = ANY.without(CharSet.of([(ord(head), ord(head)) for head in heads]))
        rest = self.repeated(options_of(ANY), 0, None)
        options += [sequence(option, rest) for option in options_of(others)]
        return self._rules.new(choice(options))

    def _characters(self, least: int, most: int | None) -> Node:
        return self._chain((Chars('^"\\\\\\u0000-\\u001f'), sequence(Text("\\"), self._escape())), least, most)

    def _chain(self, options: tuple[Node, ...], least: int, most: int | None) -> Node:
        """One rule for each count of repetitions that are still possible; all chains of the same options share them."""
        if most == 0:
            return NOTHING
        key = (options, least, most)
        found = self._made.get(key)
        if found is not None:
            return found
        # from the last one on, so that no chain is too long for recursive calls
        if most is not None:
            rest: Node = NOTHING
            for count in range(1, most + 1):
                rest = self._link(options, max(0, least - (most - count)), count, rest)
            return rest
        rest = self._endless(options)
        for count in range(1, least + 1):
            rest = self._link(options, count, None, rest)
        return rest

    def _link(self, options: tuple[Node, ...], least: int, most: int | None, rest: Node) -> Rule:
        key = (options, least, most)
        if key not in self._made:
            end = [NOTHING] if least == 0 else []
            self._made[key] = self._rules.new(choice([*end, *(sequence(option, rest) for option in options)]))
        return self._made[key]

    def _endless(self, options: tuple[Node, ...]) -> Rule:
        key = (options, 0, None)
        if key not in self._made:
            name = self._rules.reserve()
            self._made[key] = Rule(name)
            self._rules.add(name, choice([NOTHING, *(sequence(option, Rule(name)) for option in options)]))
        return self._made[key]

    def _escape(self) -> Rule:
        if "escape" not in self._made:
            low, high = sequence(Chars("dD"), Chars("0-7")), sequence(Chars("dD"), Chars("89abAB"))
            one = choice([sequence(Chars("0-9a-cA-CefEF"), _HEX), low])
            pair = sequence(high, _HEX, _HEX, Text("\\u"), Chars("dD"), Chars("c-fC-F"), _HEX, _HEX)
            code = choice([sequence(one, _HEX, _HEX), pair])
            self._made["escape"] = self._rules.new(choice([Chars('"\\\\/bfnrt'), sequence(Text("u"), code)]))
        return self._made["escape"]


def canonical(char: str) -> str:
    """A character as JSON writes it: with an escape only where it needs one."""
    if char in _ESCAPES:
        return "\\" + _ESCAPES[char]
    return f"\\u{ord(char):04x}" if ord(char) < 0x20 or 0xD800 <= ord(char) <= 0xDFFF else char
