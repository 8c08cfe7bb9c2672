"""Tokenising ASCII text by its words, each of them once.

A byte-level BPE tokenizer cuts a text into words with a regular expression and then looks at each word alone, so a word
that was seen before has known ids. The library does it all again, with offsets that nobody asks for here: for a short
prompt that was the largest part of all that a request needs of a frontend. On ASCII the expressions of these models
mean the same to Python's `re`, once their letter and number classes are spelled out; other text, and tokenizers of another
kind, are the library's.
"""

from __future__ import annotations

import re
import string
import time
from itertools import chain, islice
from typing import Any

from tokenizers import Tokenizer

from dynserve.openai.detokenize import BYTE_ALPHABET, tokenizer_parts

MOST_WORDS = 200_000
LONGEST_WORD = 64  # characters of one that is remembered
AT_ONCE = 1_000  # words between two looks at who else wants the interpreter
MOST_NEW = 100  # different ones of those, in a long text: with more the library is faster
SHORT_TEXT, LONGEST_TEXT = 4_000, 64_000  # characters; a short one is tokenised on the event loop

# what Unicode's classes have of ASCII, as it is written within brackets
_CLASSES = {"L": "a-zA-Z", "Lu": "A-Z", "Ll": "a-z", "Lt": "", "Lm": "", "Lo": "", "M": "", "N": "0-9", "Nd": "0-9"}
_PROBE = f"{string.printable}It's we'LL they'd  2024 \t\n\n  x=1;\r\n// done...\n    a_b(c)[d] 12345 Camel"
_PROBE += "Case HTTPServer  'tis \n "


class Words:
    """Use `words_of`. Used from several threads: what two of them add at once is the same."""

    def __init__(self, tokenizer: Tokenizer, pattern: re.Pattern[str]) -> None:
        self._model, self._pattern = tokenizer.model, pattern
        self._known: dict[str, tuple[int, ...]] = {}

    def encode(self, text: str) -> list[int] | None:
        """The ids of a text without special tokens; None for one that is the library's."""
        if len(text) > LONGEST_TEXT or not text.isascii():
            return None
        if len(text) < SHORT_TEXT:
            words = self._pattern.findall(text)
            return self._ids(words) if "".join(words) == text else None
        return self._encode_long(text)

    def _encode_long(self, text: str) -> list[int] | None:
        matches = self._pattern.finditer(text)
        ids: list[int] = []
        size = 0
        while words := [match[0] for match in islice(matches, AT_ONCE)]:
            size += sum(map(len, words))
            if len(set(words).difference(self._known)) > MOST_NEW:
                return None
            ids += self._ids(words)
            time.sleep(0)  # in a thread of its own: the event loop goes first
        return ids if size == len(text) else None

    def _ids(self, words: list[str]) -> list[int]:
        known = self._known
        try:
            return list(chain.from_iterable([known[word] for word in words]))
        except KeyError:
            return list(chain.from_iterable([self._find(word) for word in words]))

    def _find(self, word: str) -> tuple[int, ...]:
        ids = self._known.get(word)
        if ids is None:
            ids = tuple(
                token.id for token in self._model.tokenize("".join([BYTE_ALPHABET[ord(char)] for char in word]))
            )
            if len(word) <= LONGEST_WORD:
                if len(self._known) >= MOST_WORDS:
                    self._known.clear()
                self._known[word] = ids
        return ids


def words_of(tokenizer: Tokenizer) -> Words | None:
    """None for a tokenizer of another kind, or where a trial shows a difference."""
    parts = tokenizer_parts(tokenizer)
    added = tokenizer.get_added_tokens_decoder().values()
    source = _expression(parts["pre_tokenizer"])
    normalizer = parts["normalizer"]
    plain = normalizer is None or normalizer["type"] in ("NFC", "NFKC", "NFD", "NFKD")  # which leave ASCII alone
    if source is None or not plain or type(tokenizer.model).__name__ != "BPE" or any(t.normalized for t in added):
        return None
    if tokenizer.model.dropout:
        return None  # drawn anew each time
    try:
        words = Words(tokenizer, re.compile(source, re.ASCII))
    except re.error:
        return None
    return words if words.encode(_PROBE) == tokenizer.encode(_PROBE, add_special_tokens=False).ids else None


def _expression(pre_tokenizer: Any) -> str | None:
    """The splitting expression, in `re`'s words for ASCII; None where there is none of this kind."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [])
    if [step["type"] for step in steps] != ["Split", "ByteLevel"]:
        return None
    split, bytes_ = steps
    pattern = split["pattern"].get("Regex")
    if pattern is None or split["behavior"] != "Isolated" or split["invert"]:
        return None
    if bytes_["use_regex"] or bytes_["add_prefix_space"]:
        return None
    return _in_ascii(pattern)


def _in_ascii(pattern: str) -> str | None:
    """None for what `re` would read differently: sets within sets, and classes that are not known here."""
    out: list[str] = []
    at, inside = 0, False
    while at < len(pattern):
        char = pattern[at]
        if char == "\\":
            if pattern[at + 1] not in "pP":
                out.append(pattern[at : at + 2])
                at += 2
                continue
            name = re.match(r"\\p\{(\w+)\}", pattern[at:])
            if name is None or (found := _CLASSES.get(name[1])) is None or not (inside or found):
                return None
            out.append(found if inside else f"[{found}]")
            at += name.end()
            continue
        if inside and (char == "[" or pattern.startswith("&&", at)):
            return None
        inside = char == "[" or (inside and char != "]")
        out.append(char)
        at += 1
    return "".join(out)
