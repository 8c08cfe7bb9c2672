"""Incremental conversion of token ids to text, which never emits half a character.

Most models use byte-level BPE: a token is a run of bytes, and the text is their UTF-8. For these models a table and
Python's incremental decoder suffice. Others (SentencePiece) need the tokenizer, over a short window.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from itertools import count
from typing import Any, Protocol

from tokenizers import Tokenizer

from dynserve.sse import one_line, to_json

# A run of tokens that still ends in an incomplete character after this many stays incomplete.
MAX_CHARACTER_TOKENS = 8


class Detokenizer(Protocol):
    @property
    def whole(self) -> bool:
        """Whether no bytes are held back, so that the next token's text is that of the token alone."""
        ...

    def push(self, token_ids: list[int]) -> str:
        """Returns the text that is certain now; the bytes of an incomplete character are held back."""
        ...

    def flush(self) -> str:
        """Returns the text held back, with incomplete characters as U+FFFD."""
        ...


class Vocabulary:
    """The token tables that all detokenizers of one model share."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.special = frozenset(id_ for id_, token in added.items() if token.special)
        self._bytes: dict[int, bytes] = {}
        self._json: dict[int, bytes] = {}
        self._byte_level = _is_byte_level(tokenizer)

    def detokenizer(self, *, skip_special: bool = True, keep: Sequence[str] = ()) -> Detokenizer:
        """Returns a detokenizer for one answer. `keep`: tokens that are shown even when special tokens are skipped."""
        skipped: frozenset[int] = self.special if skip_special else frozenset()
        if keep and skipped:
            skipped = skipped.difference(self.tokenizer.token_to_id(token) for token in keep)
        return ByteLevel(self, skipped) if self._byte_level else Windowed(self.tokenizer, skipped)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token; the UTF-8 of its decoded text where the tokenizer is not byte-level."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._lookup(token_id)
        return found

    def token_json(self, token_id: int) -> bytes:
        """The token's text as a JSON string. Empty for a token that only a detokenizer can decode: a part of a character,
        a special token, any token of a tokenizer that is not byte-level."""
        found = self._json.get(token_id)
        if found is None:
            found = self._json[token_id] = self._as_json(token_id)
        return found

    def _as_json(self, token_id: int) -> bytes:
        if not self._byte_level or token_id in self.special:
            return b""
        try:
            text = self.token_bytes(token_id).decode()
        except UnicodeDecodeError:
            return b""
        return one_line(to_json(text)) if text else b""

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def _lookup(self, token_id: int) -> bytes:
        token = self.tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if not self._byte_level:
            decoded: str = self.tokenizer.decode([token_id], skip_special_tokens=False)
            return decoded.encode()
        # a token with a character outside the byte alphabet (an added one) stands for itself
        try:
            return bytes(_BYTE_OF[char] for char in token)
        except KeyError:
            return token.encode()


class ByteLevel:
    def __init__(self, vocabulary: Vocabulary, skipped: frozenset[int]) -> None:
        self._vocabulary, self._skipped = vocabulary, skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def whole(self) -> bool:
        return not self._decoder.getstate()[0]

    def push(self, token_ids: list[int]) -> str:
        token_bytes = self._vocabulary.token_bytes
        return self._decoder.decode(b"".join([token_bytes(id_) for id_ in token_ids if id_ not in self._skipped]))

    def flush(self) -> str:
        return self._decoder.decode(b"", True)


class Windowed:
    """Decodes a window twice, without and with the new tokens: the difference is the new text."""

    whole = False  # a token's text depends on the token before it

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int]) -> None:
        self._tokenizer, self._skipped = tokenizer, skipped
        self._ids: list[int] = []
        self._shown = 0  # tokens of the window whose text was emitted

    def push(self, token_ids: list[int]) -> str:
        self._ids += [id_ for id_ in token_ids if id_ not in self._skipped]
        text = self._decode(self._ids)
        if text.endswith("\ufffd") and len(self._ids) - self._shown < MAX_CHARACTER_TOKENS:
            return ""
        new = text[len(self._decode(self._ids[: self._shown])) :]
        # the tokens just shown stay as context: a token's text depends on the token before it
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        return new

    def flush(self) -> str:
        new = self._decode(self._ids)[len(self._decode(self._ids[: self._shown])) :]
        self._shown = len(self._ids)
        return new

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text


def tokenizer_parts(tokenizer: Tokenizer) -> dict[str, Any]:
    """The normalizer, pre-tokenizer and decoder of `tokenizer.json`, without the vocabulary, which is slow to serialise."""
    parts = {name: getattr(tokenizer, name) for name in ("normalizer", "pre_tokenizer", "decoder")}
    return {name: None if part is None else json.loads(part.__getstate__()) for name, part in parts.items()}


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    decoder = tokenizer_parts(tokenizer)["decoder"] or {}
    steps = decoder.get("decoders", [decoder])
    return [step.get("type") for step in steps] == ["ByteLevel"]


def _byte_alphabet() -> list[str]:
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = count(0x100)
    return [chr(byte) if byte in visible else chr(next(hidden)) for byte in range(256)]


# GPT-2's printable stand-ins for bytes: visible Latin-1 characters are themselves, the others follow from U+0100 on
BYTE_ALPHABET = _byte_alphabet()
_BYTE_OF = {char: byte for byte, char in enumerate(BYTE_ALPHABET)}
