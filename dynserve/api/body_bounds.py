"""Bounds of a request's body that are checked before anything is built from it.

Building Python objects from JSON takes up to 200 ns for each value and holds the interpreter's lock meanwhile, so the time
that a body costs is bounded by counting its values, not its bytes. Counting goes through the raw text, in calls that take
a few milliseconds at most, and stops at the first bound that is passed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from dynserve.errors import BodyTooLarge

MAX_ESCAPES = 1_000_000  # backslashes; a text in another script than Latin may be sent as UTF-8 instead of as escapes
STEP = 1 << 18  # bytes that one call looks at

# bytes of the JSON text of one field, at the top of the body
MAX_FIELD = 64 << 10
MAX_GRAMMAR_FIELD = 1 << 20
MAX_TOOLS_FIELD = 4 << 20
TEXTS = frozenset({"messages", "prompt", "input", "instructions", "system", "tokens"})  # bounded by the body alone
IDS = ("prompt", "input", "tokens")  # may be lists of token ids
_LARGER = dict.fromkeys(
    ("response_format", "guided_json", "guided_regex", "guided_grammar", "guided_choice", "text", "output_config",
     "output_format"), MAX_GRAMMAR_FIELD,
) | {"tools": MAX_TOOLS_FIELD}  # fmt: skip

_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class BodyBounds(NamedTuple):
    """`values` are those of the whole body: each number, text, object or list is one. Token ids are counted apart, and
    may be in as many lists as a request may have prompts."""

    values: int = 32_000
    ids: int = 300_000
    prompts: int = 2048

    def check(self, body: bytes | bytearray) -> None:
        """Returns for a body that takes less than about 50 ms to parse, or that is not JSON.

        Raises:
            BodyTooLarge: it would take longer, or one of its fields is too large; names the field where there is one.
        """
        if _count(body, b"\\", 0, len(body), MAX_ESCAPES) > MAX_ESCAPES:
            raise BodyTooLarge(f"the body has over {MAX_ESCAPES:,} escape sequences; send its text as UTF-8")
        values = self._count_values(body)
        try:
            fields = _fields(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            if values > self.values:
                raise BodyTooLarge(f"the body is not a JSON object, and has over {self.values:,} values") from None
            return  # whoever parses it says what is wrong
        for name, raw in fields.items():
            if name in IDS and (counted := _count_ids(raw)) is not None:
                ids, lists = counted
                if ids > self.ids:
                    raise BodyTooLarge(f"{name}: {ids:,} token ids; a request may have {self.ids:,}", param=name)
                if lists > self.prompts + 1:
                    raise BodyTooLarge(f"{name}: {lists - 1:,} lists; a request may have {self.prompts:,}", param=name)
                values -= ids
            size, most = len(memoryview(raw)), _LARGER.get(name, MAX_FIELD)
            if size > most and name not in TEXTS:
                shown = name[:64]
                raise BodyTooLarge(f"{shown}: {size:,} bytes of JSON; this field may have {most:,}", param=shown)
        if values > self.values:
            raise BodyTooLarge(f"the body has {values:,} values beside token ids; it may have {self.values:,}")

    def _count_values(self, body: bytes | bytearray) -> int:
        return count_values(body, self.values + self.ids, self.values)


def count_values(text: bytes | bytearray, most: int, most_texts: int) -> int:
    """At least as many as the values of a JSON text, and not many more: separators and brackets outside of its texts.

    Raises:
        BodyTooLarge: there are over `most` values, or over twice `most_texts` names and texts.
    """
    # quotes that are not escaped begin and end texts: far too many are seen without looking at each of them
    escapes = _count(text, b"\\", 0, len(text), len(text))
    if _count(text, b'"', 0, len(text), 4 * most_texts + escapes) > 4 * most_texts + escapes:
        raise BodyTooLarge(f"the body has over {2 * most_texts:,} names and texts")
    values, at, texts = 1, 0, 0
    while at < len(text):
        quote = text.find(b'"', at)
        end = quote if quote >= 0 else len(text)
        for separator in (b",", b"[", b"{"):
            values += _count(text, separator, at, end, most)
        if values > most:
            raise BodyTooLarge(f"the body has over {most:,} values")
        if quote < 0:
            break
        texts += 1
        if texts > 2 * most_texts:  # of which half may be names
            raise BodyTooLarge(f"the body has over {2 * most_texts:,} names and texts")
        at = _end_of_text(text, quote + 1)
    return values


def check_json_texts(texts: Iterable[str], most: int, param: str) -> None:
    """For texts that are JSON themselves, which the body's own bounds count as one value each. Raises BodyTooLarge when all
    of them together have over `most` values."""
    held = list(texts)
    if sum(text.count(",") + text.count("[") + text.count("{") for text in held) <= most:
        return  # even if all of these separate values
    left = most
    for text in held:
        try:
            left -= count_values(text.encode("utf-8", "replace"), left, left)
        except BodyTooLarge:
            left = -1
        if left < 0:
            raise BodyTooLarge(f"{param}: over {most:,} values in JSON texts", param=param)


def _count(body: bytes | bytearray, what: bytes, start: int, end: int, most: int) -> int:
    """How often `what` is between the two places; some number over `most` where that is more."""
    if end - start <= STEP:
        return body.count(what, start, end)
    found = 0
    for at in range(start, end, STEP):
        found += body.count(what, at, min(end, at + STEP))
        if found > most:
            break
    return found


def _end_of_text(body: bytes | bytearray, at: int) -> int:
    """The place behind the quote that ends the text which begins at `at`."""
    while True:
        quote = body.find(b'"', at)
        if quote < 0:
            return len(body)
        first = quote
        while first > at and body[first - 1] == 0x5C:
            first -= 1
        if (quote - first) % 2 == 0:  # backslashes in front of it escape each other
            return quote + 1
        at = quote + 1


def _count_ids(raw: msgspec.Raw) -> tuple[int, int] | None:
    """The numbers and the lists of a field that holds nothing else; None for any other field."""
    text = bytes(raw)
    if not text.startswith(b"[") or b'"' in text or b"{" in text:
        return None
    lists = _count(text, b"[", 0, len(text), len(text))
    return _count(text, b",", 0, len(text), len(text)) + lists, lists
