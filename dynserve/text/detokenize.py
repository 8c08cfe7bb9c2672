"""Incremental conversion of token ids to text, which never emits half a character.

In most vocabularies a token is a run of bytes, and the text is their UTF-8: byte-level BPE spells bytes as printable
characters, SentencePiece spells a space as `▁` and a single byte as `<0xNN>`. For these a table and Python's incremental
decoder suffice. Others (WordPiece) need the tokenizer, over a short window.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, Protocol

from tokenizers import Tokenizer

from dynserve.sse import one_line, to_json

CONTEXT = 8  # tokens of a prompt that a window begins with
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
        self._spelling, self._strips_first_space = _spelling(tokenizer)

    def detokenizer(
        self, *, skip_special: bool = True, keep: Sequence[str] = (), after: Sequence[int] | None = None
    ) -> Detokenizer:
        """Returns a detokenizer for one text. `keep`: tokens that are shown even when special tokens are skipped. `after`:
        the end of the text that this one continues; None for a text of its own, whose first space SentencePiece hides."""
        skipped: frozenset[int] = self.special if skip_special else frozenset()
        if keep and skipped:
            skipped = skipped.difference(self.tokenizer.token_to_id(token) for token in keep)
        if self._spelling is None:
            return Windowed(self.tokenizer, skipped, () if after is None else after[-CONTEXT:])
        return Bytewise(self, skipped, strip=after is None and self._strips_first_space)

    def special_ids(self, texts: Sequence[str]) -> dict[int, str]:
        """The special tokens among some texts, by id."""
        ids = {self.tokenizer.token_to_id(text): text for text in texts}
        return {id_: text for id_, text in ids.items() if id_ in self.special}

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token; the UTF-8 of its decoded text where the tokenizer's rules are of another kind."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._lookup(token_id)
        return found

    def token_json(self, token_id: int) -> bytes:
        """The token's text as a JSON string. Empty for a token that only a detokenizer can decode: a part of a character,
        a special token, any token of a tokenizer of another kind."""
        found = self._json.get(token_id)
        if found is None:
            found = self._json[token_id] = self._as_json(token_id)
        return found

    def _as_json(self, token_id: int) -> bytes:
        if self._spelling is None or token_id in self.special:
            return b""
        try:
            text = self.token_bytes(token_id).decode()
        except UnicodeDecodeError:
            return b""
        return one_line(to_json(text)) if text else b""

    def token_text(self, token_id: int) -> str:
        """A text that only this token has. As in OpenAI's completions, a part of a character is spelled by its bytes."""
        raw = self.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _lookup(self, token_id: int) -> bytes:
        token = self.tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._spelling is None:
            decoded: str = self.tokenizer.decode([token_id], skip_special_tokens=False)
            return decoded.encode()
        return self._spelling(token)


def byte_level(token: str) -> bytes:
    """The bytes of a token of byte-level BPE."""
    try:
        return bytes(_BYTE_OF[char] for char in token)
    except KeyError:  # a token with a character outside the byte alphabet (an added one) stands for itself
        return token.encode()


def sentence_piece(token: str) -> bytes:
    """The bytes of a token of a SentencePiece vocabulary."""
    single = _SINGLE_BYTE.fullmatch(token)
    return bytes((int(single[1], 16),)) if single is not None else token.replace(SPACE, " ").encode()


class Bytewise:
    """Decodes tokens by their bytes. `strip`: without the space that the text begins with."""

    def __init__(self, vocabulary: Vocabulary, skipped: frozenset[int], *, strip: bool = False) -> None:
        self._vocabulary, self._skipped, self._strip = vocabulary, skipped, strip
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def whole(self) -> bool:
        return not self._decoder.getstate()[0]

    def push(self, token_ids: list[int]) -> str:
        token_bytes = self._vocabulary.token_bytes
        text = self._decoder.decode(b"".join([token_bytes(id_) for id_ in token_ids if id_ not in self._skipped]))
        if self._strip and text:
            self._strip, text = False, text.removeprefix(" ")
        return text

    def flush(self) -> str:
        return self._decoder.decode(b"", True)


class Windowed:
    """Decodes a window twice, without and with the new tokens: the difference is the new text."""

    whole = False  # a token's text depends on the token before it

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int], after: Sequence[int] = ()) -> None:
        self._tokenizer, self._skipped = tokenizer, skipped
        self._ids = [id_ for id_ in after if id_ not in skipped]
        self._shown = len(self._ids)  # tokens of the window whose text was emitted

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


def _spelling(tokenizer: Tokenizer) -> tuple[Callable[[str], bytes] | None, bool]:
    """Returns the function from a token to its bytes, None where the decoder has other rules; and whether the decoder drops
    the first space of a text, which the normalizer has added."""
    decoder = tokenizer_parts(tokenizer)["decoder"] or {}
    steps: list[dict[str, Any]] = decoder.get("decoders", [decoder])
    if [step.get("type") for step in steps] == ["ByteLevel"]:
        return byte_level, False
    kinds = {step.get("type") for step in steps}
    strips = False
    for step in steps:
        match step:
            case {"type": "ByteFallback" | "Fuse"} | {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}:
                pass
            case {"type": "Strip", "content": " ", "start": 0 | 1 as start, "stop": 0}:
                strips = strips or start == 1
            case {"type": "Metaspace", "replacement": "▁"}:
                strips = strips or step.get("prepend_scheme", "always") != "never"
            case _:
                return None, False
    return (sentence_piece, strips) if kinds & {"Replace", "Metaspace"} else (None, False)


def _byte_alphabet() -> list[str]:
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = count(0x100)
    return [chr(byte) if byte in visible else chr(next(hidden)) for byte in range(256)]


# GPT-2's printable stand-ins for bytes: visible Latin-1 characters are themselves, the others follow from U+0100 on
BYTE_ALPHABET = _byte_alphabet()
_BYTE_OF = {char: byte for byte, char in enumerate(BYTE_ALPHABET)}
SPACE = "▁"  # U+2581, SentencePiece's stand-in for a space
_SINGLE_BYTE = re.compile("<0x([0-9A-F]{2})>")
