"""Rules for numbers within bounds, digit by digit."""

from __future__ import annotations

from decimal import Decimal
from typing import NamedTuple

from dynserve.api.rules import IMPOSSIBLE, NOTHING, Chars, Node, Repeat, Text, choice, optional, sequence

DIGIT = Chars("0-9")
ANY_DIGITS = Repeat(DIGIT, 0, None)
FRACTION = sequence(Text("."), Repeat(DIGIT, 1, None))
NATURAL = choice([Text("0"), sequence(Chars("1-9"), ANY_DIGITS)])
INTEGER = sequence(optional(Text("-")), NATURAL)
EXPONENT = sequence(Chars("eE"), optional(Chars("+\\-")), Repeat(DIGIT, 1, None))
NUMBER = sequence(INTEGER, optional(FRACTION), optional(EXPONENT))


class Bounds(NamedTuple):
    """The bounds of a number; None: no bound. The `open` ones are not in the range."""

    low: Decimal | None = None
    high: Decimal | None = None
    low_open: bool = False
    high_open: bool = False

    @property
    def empty(self) -> bool:
        if self.low is None or self.high is None:
            return False
        return self.low > self.high or (self.low == self.high and (self.low_open or self.high_open))

    def mirrored(self) -> Bounds:
        """The bounds of the numbers with the other sign."""
        low = None if self.high is None else -self.high
        high = None if self.low is None else -self.low
        return Bounds(low, high, self.high_open, self.low_open)

    def not_negative(self) -> Bounds:
        """The part of the range from 0 on."""
        if self.low is None or self.low < 0:
            return Bounds(Decimal(0), self.high, False, self.high_open)
        return self


def integer(bounds: Bounds) -> Node:
    """The integers within bounds, without a fraction or an exponent."""
    low = None if bounds.low is None else int(bounds.low.to_integral_value("ROUND_CEILING"))
    high = None if bounds.high is None else int(bounds.high.to_integral_value("ROUND_FLOOR"))
    if low is not None and bounds.low_open and low == bounds.low:
        low += 1
    if high is not None and bounds.high_open and high == bounds.high:
        high -= 1
    if low is not None and high is not None and low > high:
        return IMPOSSIBLE
    options = []
    if high is None or high >= 0:
        options.append(_naturals(max(low or 0, 0), high))
    if low is None or low < 0:
        least = 1 if high is None or high >= 0 else -high
        options.append(sequence(Text("-"), _naturals(least, None if low is None else -low)))
    return choice(options)


def number(bounds: Bounds) -> Node:
    """The numbers within bounds; with a bound, in plain decimal notation."""
    if bounds.low is None and bounds.high is None:
        return NUMBER
    if bounds.empty:
        return IMPOSSIBLE
    options = []
    if bounds.high is None or bounds.high > 0 or (bounds.high == 0 and not bounds.high_open):
        options.append(_decimals(bounds.not_negative()))
    if bounds.low is None or bounds.low < 0:
        options.append(sequence(Text("-"), _decimals(_below_zero(bounds))))
    return choice(options)


def _below_zero(bounds: Bounds) -> Bounds:
    """The bounds of the absolute values of the negative numbers in a range. `-0` is 0, so it needs 0 in the range."""
    mirrored = bounds.mirrored()
    if mirrored.low is None or mirrored.low < 0:
        return Bounds(Decimal(0), mirrored.high, False, mirrored.high_open)
    return mirrored


def _naturals(low: int, high: int | None) -> Node:
    """The integers from `low` (not negative) to `high`."""
    options: list[Node] = []
    length = len(str(low))
    longest = length if high is None else len(str(high))
    for digits in range(length, longest + 1):
        first = low if digits == length else 10 ** (digits - 1)
        last = 10**digits - 1 if high is None or digits < longest else high
        if first <= last:
            options.append(_same_length(str(first), str(last)))
    if high is None:
        options.append(sequence(Chars("1-9"), Repeat(DIGIT, length, None)))
    return choice(options)


def _same_length(low: str, high: str) -> Node:
    """The digit strings from `low` to `high`, all of one length."""
    if not low:
        return NOTHING
    rest = len(low) - 1
    if low[0] == high[0]:
        return sequence(Text(low[0]), _same_length(low[1:], high[1:]))
    if set(low[1:]) <= {"0"} and set(high[1:]) <= {"9"}:
        return sequence(_digits(low[0], high[0]), Repeat(DIGIT, rest, rest))
    options = [
        sequence(Text(low[0]), _same_length(low[1:], "9" * rest)),
        sequence(Text(high[0]), _same_length("0" * rest, high[1:])),
    ]
    if int(high[0]) - int(low[0]) > 1:
        middle = _digits(str(int(low[0]) + 1), str(int(high[0]) - 1))
        options.append(sequence(middle, Repeat(DIGIT, rest, rest)))
    return choice(options)


def _digits(low: str, high: str) -> Node:
    return Text(low) if low == high else Chars(f"{low}-{high}")


def _decimals(bounds: Bounds) -> Node:
    """The numbers within bounds that are not negative."""
    low = bounds.low if bounds.low is not None else Decimal(0)
    whole, fraction = _split(low)
    if bounds.high is None:
        least = sequence(_naturals(whole, whole), _fractions(fraction, None, bounds.low_open, False))
        return choice([least, sequence(_naturals(whole + 1, None), optional(FRACTION))])
    last, last_fraction = _split(bounds.high)
    if whole == last:
        return sequence(_naturals(whole, whole), _fractions(fraction, last_fraction, bounds.low_open, bounds.high_open))
    options = [
        sequence(_naturals(whole, whole), _fractions(fraction, None, bounds.low_open, False)),
        sequence(_naturals(last, last), _fractions(None, last_fraction, False, bounds.high_open)),
    ]
    if last - whole > 1:
        options.append(sequence(_naturals(whole + 1, last - 1), optional(FRACTION)))
    return choice(options)


def _split(value: Decimal) -> tuple[int, str]:
    """The integer part, and the digits after the point without trailing zeros."""
    whole, _, fraction = f"{value:f}".partition(".")
    return int(whole), fraction.rstrip("0")


def _fractions(low: str | None, high: str | None, low_open: bool, high_open: bool) -> Node:
    """The optional fractions from `low` to `high`, which are digits after the point; None: no bound."""
    digits = _Fractions(low_open, high_open)
    low = None if low == "" and not low_open else low
    options: list[Node] = [NOTHING] if digits.ends(low, high) else []
    first = digits.more(low, high)
    if first is not None:
        options.append(sequence(Text("."), first))
    return choice(options)


class _Fractions:
    """Digit strings after the point within bounds. The bounds that still hold are those whose digits were met so far."""

    def __init__(self, low_open: bool, high_open: bool) -> None:
        self._low_open, self._high_open = low_open, high_open

    def ends(self, low: str | None, high: str | None) -> bool:
        """Whether the number may end here: whether zeros alone are within the bounds that still hold."""
        if low is not None and (low.strip("0") or self._low_open):
            return False
        return high is None or bool(high.strip("0")) or not self._high_open

    def more(self, low: str | None, high: str | None) -> Node | None:
        """One digit or more; None if there are none within the bounds."""
        if low is None and high is None:
            return Repeat(DIGIT, 1, None)
        if low == "" and high is None:  # an open bound: some digit must not be 0
            return sequence(Repeat(Text("0"), 0, None), Chars("1-9"), ANY_DIGITS)
        if high == "":  # nothing but zeros may follow
            return Repeat(Text("0"), 1, None) if low is None and not self._high_open else None
        options = []
        for digit in "0123456789":
            rest = self._after(digit, low, high)
            if rest is not None:
                options.append(rest)
        return choice(options) if options else None

    def _after(self, digit: str, low: str | None, high: str | None) -> Node | None:
        least, most = (low[:1] or "0") if low is not None else "0", (high[:1] or "0") if high is not None else "9"
        if not least <= digit <= most:
            return None
        left = low[1:] if low is not None and digit == least else None
        if left == "" and not self._low_open:
            left = None
        right = high[1:] if high is not None and digit == most else None
        further = self.more(left, right)
        if self.ends(left, right):
            return Text(digit) if further is None else sequence(Text(digit), optional(further))
        return None if further is None else sequence(Text(digit), further)
