"""Rules for numbers within bounds, digit by digit."""

from __future__ import annotations

from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal, localcontext
from typing import NamedTuple

from dynserve.api.rules import IMPOSSIBLE, NOTHING, Chars, Node, Repeat, Text, choice, optional, sequence

EXACT = 2**53  # from here on, floats are further apart than integers
CLIP = 10**9  # numbers with a fraction are smaller, where a bound is not exact
MAX_FRACTION = 12  # digits of a number with a bound
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

    def with_digits(self, digits: int) -> Bounds:
        """The range of the numbers with at most some digits after the point."""
        step = Decimal(1).scaleb(-digits)
        low, high, low_open, high_open = self
        with localcontext(prec=100):
            if low is not None and (rounded := low.quantize(step, ROUND_CEILING)) != low:
                low, low_open = rounded, False
            if high is not None and (rounded := high.quantize(step, ROUND_FLOOR)) != high:
                high, high_open = rounded, False
        return Bounds(low, high, low_open, high_open)

    def clipped(self, most: Decimal) -> Bounds | None:
        """The range without numbers beyond `most`, on the sides that have a bound; None if the range is beyond it."""
        if (self.low is not None and self.low > most) or (self.high is not None and self.high < -most):
            return None
        made = self
        if self.low is not None and self.low < -most:
            made = made._replace(low=-most, low_open=False)
        if self.high is not None and self.high > most:
            made = made._replace(high=most, high_open=False)
        return made

    def mirrored(self) -> Bounds:
        """The bounds of the numbers with the other sign."""
        low = None if self.high is None else self.high.copy_negate()
        high = None if self.low is None else self.low.copy_negate()
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
    """The numbers within bounds; with a bound, in plain decimal notation, with so few digits that a number does not become
    its bound when it is read as a float."""
    if bounds.low is None and bounds.high is None:
        return NUMBER
    largest = max(abs(bound) for bound in (bounds.low, bounds.high) if bound is not None)
    if largest >= EXACT:  # floats have no fractions there, and texts with one would be rounded
        smaller = bounds.clipped(Decimal(CLIP))
        return integer(bounds) if smaller is None else choice([integer(bounds), number(smaller)])
    digits = max(0, min(MAX_FRACTION, 15 - len(str(int(largest)))))
    bounds = bounds.with_digits(digits)
    if bounds.empty:
        return IMPOSSIBLE
    decimals = _Decimals(digits)
    options = []
    if bounds.high is None or bounds.high > 0 or (bounds.high == 0 and not bounds.high_open):
        options.append(decimals.within(bounds.not_negative()))
    if bounds.low is None or bounds.low < 0:
        options.append(sequence(Text("-"), decimals.within(_below_zero(bounds))))
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


def _split(value: Decimal) -> tuple[int, str]:
    """The integer part, and the digits after the point without trailing zeros."""
    whole, _, fraction = f"{value:f}".partition(".")
    return int(whole), fraction.rstrip("0")


class _Decimals:
    """Numbers that are not negative, with up to some digits after the point."""

    def __init__(self, digits: int) -> None:
        self._digits = digits
        self._any = optional(sequence(Text("."), Repeat(DIGIT, 1, digits))) if digits else NOTHING

    def within(self, bounds: Bounds) -> Node:
        low = bounds.low if bounds.low is not None else Decimal(0)
        whole, fraction = _split(low)
        if bounds.high is None:
            least = sequence(_naturals(whole, whole), self._fractions(fraction, None, bounds.low_open, False))
            return choice([least, sequence(_naturals(whole + 1, None), self._any)])
        last, last_fraction = _split(bounds.high)
        if whole == last:
            inner = self._fractions(fraction, last_fraction, bounds.low_open, bounds.high_open)
            return sequence(_naturals(whole, whole), inner)
        options = [
            sequence(_naturals(whole, whole), self._fractions(fraction, None, bounds.low_open, False)),
            sequence(_naturals(last, last), self._fractions(None, last_fraction, False, bounds.high_open)),
        ]
        if last - whole > 1:
            options.append(sequence(_naturals(whole + 1, last - 1), self._any))
        return choice(options)

    def _fractions(self, low: str | None, high: str | None, low_open: bool, high_open: bool) -> Node:
        """The optional fractions from `low` to `high`, which are digits after the point; None: no bound."""
        digits = _Fractions(low_open, high_open)
        low = None if low == "" and not low_open else low
        options: list[Node] = [NOTHING] if digits.ends(low, high) else []
        first = digits.more(low, high, self._digits)
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

    def more(self, low: str | None, high: str | None, left: int) -> Node | None:
        """One digit or more, up to `left`; None if there are none within the bounds."""
        if left == 0:
            return None
        if low is None and high is None:
            return Repeat(DIGIT, 1, left)
        if high == "":  # nothing but zeros may follow
            return Repeat(Text("0"), 1, left) if low is None and not self._high_open else None
        options = [rest for digit in "0123456789" if (rest := self._after(digit, low, high, left)) is not None]
        return choice(options) if options else None

    def _after(self, digit: str, low: str | None, high: str | None, left: int) -> Node | None:
        least, most = (low[:1] or "0") if low is not None else "0", (high[:1] or "0") if high is not None else "9"
        if not least <= digit <= most:
            return None
        lower = low[1:] if low is not None and digit == least else None
        if lower == "" and not self._low_open:
            lower = None
        upper = high[1:] if high is not None and digit == most else None
        further = self.more(lower, upper, left - 1)
        if self.ends(lower, upper):
            return Text(digit) if further is None else sequence(Text(digit), optional(further))
        return None if further is None else sequence(Text(digit), further)
