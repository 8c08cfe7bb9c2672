"""Bounds of a request's body, checked before any object is built from it.

Building Python objects from JSON costs up to 200 ns per value and holds the interpreter's lock meanwhile, so the cost of a
body is bounded by the number of its values, not of its bytes. The values are counted in the raw text, in calls of a few
milliseconds at most; counting stops at the first bound that is exceeded.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from dynserve.errors import BodyTooLarge

MAX_ESCAPES = 1_000_000  # backslashes; a text in a non-Latin script can be sent as UTF-8 instead of as escapes
STEP = 1 << 18  # bytes that one call scans

# bytes of the JSON text of one field, at the top of the body
MAX_FIELD = 64 << 10
MAX_GRAMMAR_FIELD = 1 << 20
MAX_TOOLS_FIELD = 4 << 20
TEXTS = frozenset({"messages", "prompt", "input", "instructions", "system", "tokens"})  # bounded by the body's size
IDS = ("prompt", "input", "tokens")  # fields that may hold lists of token ids
_LARGER = dict.fromkeys(
    ("response_format", "guided_json", "guided_regex", "guided_grammar", "guided_choice", "text", "output_config",
     "output_format"), MAX_GRAMMAR_FIELD,
) | {"tools": MAX_TOOLS_FIELD}  # fmt: skip

_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class BodyBounds(NamedTuple):
    """The bounds of one body. `values`: numbers, strings, objects and lists in the whole body, without token ids. `ids`:
    token ids of one field. `prompts`: lists of token ids in one field."""

    values: int = 32_000
    ids: int = 300_000
    prompts: int = 2048

    def check(self, body: bytes | bytearray) -> None:
        """Accepts a body that takes less than about 50 ms to parse, and a body that is not JSON.

        Raises:
            BodyTooLarge: the body would take longer, or a field is too large, which the error then names.
        """
        if _count(body, b"\\", 0, len(body), MAX_ESCAPES) > MAX_ESCAPES:
            raise BodyTooLarge(f"the body has over {MAX_ESCAPES:,} escape sequences; send its text as UTF-8")
        values = self._count_values(body)
        try:
            fields = _fields(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            if values > self.values:
                raise BodyTooLarge(f"the body is not a JSON object, and has over {self.values:,} values") from None
            return  # the parser reports the error later
        for name, raw in fields.items():
            if name in IDS and (counted := _count_ids(raw)) is not None:
                ids, lists = counted
                if ids > self.ids:
                    raise BodyTooLarge(f"{name}: {ids:,} token ids; a request may have {self.ids:,}", param=name)
                if lists > self.prompts + 1:
                    raise BodyTooLarge(f"{name}: {lists - 1:,} lists; a request may have {self.prompts:,}", param=name)
                values -= ids
            size, max_bytes = len(memoryview(raw)), _LARGER.get(name, MAX_FIELD)
            if size > max_bytes and name not in TEXTS:
                shown = name[:64]
                raise BodyTooLarge(f"{shown}: {size:,} bytes of JSON; this field may have {max_bytes:,}", param=shown)
        if values > self.values:
            raise BodyTooLarge(f"the body has {values:,} values besides token ids; it may have {self.values:,}")

    def _count_values(self, body: bytes | bytearray) -> int:
        return count_values(body, self.values + self.ids, self.values)


def count_values(text: bytes | bytearray, max_values: int, max_texts: int) -> int:
    """Returns a tight upper bound of the number of values of a JSON text: separators and brackets outside of its strings.

    Raises:
        BodyTooLarge: there are over `max_values` values, or over twice `max_texts` names and strings.
    """
    # unescaped quotes begin and end strings: counting all quotes rejects far too many strings without scanning each
    escapes = _count(text, b"\\", 0, len(text), len(text))
    if _count(text, b'"', 0, len(text), 4 * max_texts + escapes) > 4 * max_texts + escapes:
        raise BodyTooLarge(f"the body has over {2 * max_texts:,} names and texts")
    values, at, texts = 1, 0, 0
    while at < len(text):
        quote = text.find(b'"', at)
        end = quote if quote >= 0 else len(text)
        for separator in (b",", b"[", b"{"):
            values += _count(text, separator, at, end, max_values)
        if values > max_values:
            raise BodyTooLarge(f"the body has over {max_values:,} values")
        if quote < 0:
            break
        texts += 1
        if texts > 2 * max_texts:  # half of them may be names
            raise BodyTooLarge(f"the body has over {2 * max_texts:,} names and texts")
        at = _end_of_text(text, quote + 1)
    return values


def check_json_texts(texts: Iterable[str], max_values: int, param: str) -> None:
    """Checks strings that hold JSON, each of which the bounds of the body count as one value. Raises BodyTooLarge when they
    have over `max_values` values together."""
    held = list(texts)
    if sum(text.count(",") + text.count("[") + text.count("{") for text in held) <= max_values:
        return  # few enough even if all of these separate values
    remaining = max_values
    for text in held:
        try:
            remaining -= count_values(text.encode("utf-8", "replace"), remaining, remaining)
        except BodyTooLarge:
            remaining = -1
        if remaining < 0:
            raise BodyTooLarge(f"{param}: over {max_values:,} values in JSON texts", param=param)


def _count(body: bytes | bytearray, what: bytes, start: int, end: int, max_values: int) -> int:
    """The number of occurrences of `what` between two positions; counting stops once it is over `max_values`."""
    if end - start <= STEP:
        return body.count(what, start, end)
    found = 0
    for at in range(start, end, STEP):
        found += body.count(what, at, min(end, at + STEP))
        if found > max_values:
            break
    return found


def _end_of_text(body: bytes | bytearray, at: int) -> int:
    """The position after the quote that ends the string which begins at `at`."""
    while True:
        quote = body.find(b'"', at)
        if quote < 0:
            return len(body)
        first = quote
        while first > at and body[first - 1] == 0x5C:
            first -= 1
        if (quote - first) % 2 == 0:  # an even number of backslashes escape each other, not the quote
            return quote + 1
        at = quote + 1


def _count_ids(raw: msgspec.Raw) -> tuple[int, int] | None:
    """The numbers of ids and of lists in a field that holds nothing else; None for any other field."""
    text = bytes(raw)
    if not text.startswith(b"[") or b'"' in text or b"{" in text:
        return None
    lists = _count(text, b"[", 0, len(text), len(text))
    return _count(text, b",", 0, len(text), len(text)) + lists, lists
