"""A tokenizer for ASCII text that caches the ids of each word.

A byte-level BPE tokenizer cuts a text into words with a regular expression and then encodes each word alone, so the ids of
a word can be cached. The `tokenizers` library encodes every word again, and computes offsets that are not needed here: for
a short prompt that was the largest part of a request's cost in a frontend. On ASCII, Python's `re` matches the expressions
of these models alike once their letter and number classes are spelled out. Other text, and other kinds of tokenizers, are
left to the library.
"""

from __future__ import annotations

import contextlib
import logging
import re
import string
import time
from itertools import chain, islice
from typing import Any

from tokenizers import Tokenizer

from dynserve.text.detokenize import BYTE_ALPHABET, tokenizer_parts

log = logging.getLogger(__name__)

MAX_WORDS = 50_000
MAX_WORD = 32  # characters of a cached word; the whole cache is 40 MB at most
TOO_LONG = 400  # characters of a word in a long text: the library encodes it without holding the interpreter's lock
AT_ONCE = 1_000  # words between two releases of the interpreter's lock
MAX_NEW = 100  # different unknown words among those, in a long text: with more the library is faster
SHORT_TEXT, MAX_TEXT = 4_000, 64_000  # characters; a short text is tokenised on the event loop

# the ASCII characters of Unicode's classes, in the notation of a bracket expression
_CLASSES = {"L": "a-zA-Z", "Lu": "A-Z", "Ll": "a-z", "Lt": "", "Lm": "", "Lo": "", "M": "", "N": "0-9", "Nd": "0-9"}
_PROBE = f"{string.printable}It's we'LL they'd  2024 \t\n\n  x=1;\r\n// done...\n    a_b(c)[d] 12345 Camel"
_PROBE += "Case HTTPServer  'tis \n ab\na ab\n1112 111222"


class _NoWord(Exception):
    """The expression has matched an empty word."""


class Words:
    """A cache of words and their ids; made by `words_of`. Safe for several threads: all add the same ids."""

    def __init__(self, tokenizer: Tokenizer, pattern: re.Pattern[str]) -> None:
        self._model, self._pattern = tokenizer.model, pattern
        self._known: dict[str, tuple[int, ...]] = {}

    def encode(self, text: str) -> list[int] | None:
        """Returns the ids of a text without special tokens; None for a text that the library has to encode."""
        if len(text) > MAX_TEXT or not text.isascii():
            return None
        try:
            if len(text) < SHORT_TEXT:
                words = self._pattern.findall(text)
                return self._ids(words) if "".join(words) == text else None
            return self._encode_long(text)
        except _NoWord:
            return None

    def _encode_long(self, text: str) -> list[int] | None:
        matches = self._pattern.finditer(text)
        ids: list[int] = []
        size = 0
        while words := [match[0] for match in islice(matches, AT_ONCE)]:
            size += sum(map(len, words))
            new = set(words).difference(self._known)
            if len(new) > MAX_NEW or any(len(word) > TOO_LONG for word in new):
                return None
            ids += self._ids(words)
            time.sleep(0)  # runs in a thread: gives the event loop a turn
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
            if not word:
                raise _NoWord  # implementations differ in where matching resumes after an empty match
            ids = tuple(
                token.id for token in self._model.tokenize("".join([BYTE_ALPHABET[ord(char)] for char in word]))
            )
            if len(word) <= MAX_WORD:
                if len(self._known) >= MAX_WORDS:
                    self._forget()
                self._known[word] = ids
        return ids

    def _forget(self) -> None:
        """Drops the oldest tenth of the cache; common words are soon added again."""
        with contextlib.suppress(RuntimeError):  # another thread has added a word meanwhile
            for word in list(islice(self._known, max(1, MAX_WORDS // 10))):
                self._known.pop(word, None)


def words_of(tokenizer: Tokenizer) -> Words | None:
    """Returns None for a tokenizer of another kind, or where a probe text gives other ids than the library."""
    parts = tokenizer_parts(tokenizer)
    added = tokenizer.get_added_tokens_decoder().values()
    source = _expression(parts["pre_tokenizer"])
    normalizer = parts["normalizer"]
    plain = normalizer is None or normalizer["type"] in ("NFC", "NFKC", "NFD", "NFKD")  # these keep ASCII unchanged
    if source is None or not plain or type(tokenizer.model).__name__ != "BPE" or any(t.normalized for t in added):
        return None
    if tokenizer.model.dropout:
        return None  # the ids are random
    try:
        pattern = re.compile(source, re.ASCII)
        words = Words(tokenizer, pattern)
        return words if words.encode(_PROBE) == tokenizer.encode(_PROBE, add_special_tokens=False).ids else None
    except Exception as error:  # a failure of this optimisation must not make a model unusable
        log.debug("the word cache is disabled for this tokenizer: %s", error)
        return None


def _expression(pre_tokenizer: Any) -> str | None:
    """Returns the splitting expression in `re`'s syntax for ASCII; None for a pre-tokenizer of another kind."""
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


# Syntax that both read alike. Much of the rest means something else to `re`, and no known tokenizer needs it.
_ESCAPES = frozenset("rntsSdDwW" + string.punctuation)
_GROUPS = ("(?:", "(?i:", "(?=", "(?!")
_CLASS = re.compile(r"\\p\{(\w+)\}")
_REPEAT = re.compile(r"[*+?][+?]?|\{\d+(?:,\d*)?\}")
_FOLDED = re.compile(r"\(\?i:[^()]*(?:\\[pP]|\()")  # within `(?i:`, the library's classes differ from `re`'s
Piece = tuple[str, int]  # a translated part of the expression, and the position after it


def _in_ascii(pattern: str) -> str | None:
    """Translates an expression; None for one that `re` might read differently."""
    out: list[str] = []
    at = 0
    if _FOLDED.search(pattern):
        return None
    while at < len(pattern):
        piece = _piece(pattern, at)
        if piece is None:
            return None
        out.append(piece[0])
        at = piece[1]
    return "".join(out)


def _piece(pattern: str, at: int) -> Piece | None:
    char = pattern[at]
    if char == "[":
        return _set(pattern, at + 1)
    if char == "\\":
        if (found := _class(pattern, at)) is not None:
            return (f"[{found[0]}]", found[1]) if found[0] else None
        return _escape(pattern, at)
    if char == "(":
        start = next((start for start in _GROUPS if pattern.startswith(start, at)), None)
        return None if start is None else (start, at + len(start))
    if (repeat := _REPEAT.match(pattern, at)) is not None:
        return None if pattern[repeat.end() : repeat.end() + 1] in ("*", "+", "?", "{") else (repeat[0], repeat.end())
    return None if char in "^$.{" or not char.isascii() else (char, at + 1)


def _set(pattern: str, at: int) -> Piece | None:
    """Translates a bracket expression, with its classes written out. None for nested sets, and where a `-` would get other
    neighbours than it had."""
    out = ["["]
    if pattern.startswith("^", at):
        out, at = ["[^"], at + 1
    while at < len(pattern) and pattern[at] != "]":
        piece = _class(pattern, at)
        if piece is not None:
            if out[-1] == "-" or (pattern.startswith("-", piece[1]) and not pattern.startswith("-]", piece[1])):
                return None
        elif pattern[at] == "\\":
            piece = _escape(pattern, at)
        elif pattern[at] == "^" and not any(out[1:]):
            piece = None  # after classes without ASCII characters it would come first and negate the set
        elif pattern[at] != "[" and pattern[at : at + 2] not in ("&&", "--", "||", "~~") and pattern[at].isascii():
            piece = pattern[at], at + 1
        if piece is None:
            return None
        out.append(piece[0])
        at = piece[1]
    return ("".join(out) + "]", at + 1) if any(out[1:]) and at < len(pattern) else None


def _class(pattern: str, at: int) -> Piece | None:
    """The ASCII characters of the class `\\p{...}` at a position; None where there is no such class."""
    name = _CLASS.match(pattern, at)
    return None if name is None or name[1] not in _CLASSES else (_CLASSES[name[1]], name.end())


def _escape(pattern: str, at: int) -> Piece | None:
    return (pattern[at : at + 2], at + 2) if pattern[at + 1 : at + 2] in _ESCAPES else None
