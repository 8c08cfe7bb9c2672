"""A cache of token ids for the pieces of a text between special tokens, so that only new pieces are tokenised.

A tokenizer first cuts a text at its special tokens, and the ids of a piece do not depend on the text around it. So the
turns of a conversation, which special tokens separate, can be tokenised one by one, and known turns come from the cache.
Where that would not be exact (`Segments.exact`), the whole text is tokenised.
"""

from __future__ import annotations

import json
import re
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer

from dynserve.text.detokenize import tokenizer_parts
from dynserve.text.words import words_of

ENTRY = 300  # bytes of an entry besides its text and ids


class Segments:
    """A tokenizer with a cache, safe for several threads. `budget`: bytes of the cache, texts and ids together."""

    def __init__(self, tokenizer: Tokenizer, budget: int = 64 << 20) -> None:
        self._tokenizer, self._budget = tokenizer, budget
        # the added tokens that match the raw text; the others match after normalisation, within a piece
        self._ids = {t.content: id_ for id_, t in tokenizer.get_added_tokens_decoder().items() if not t.normalized}
        self._cut = re.compile(f"({any_of(self._ids)})") if self._ids else None
        self._known: OrderedDict[tuple[str, str], array[int]] = OrderedDict()  # by owner and text
        self._bytes = 0
        self._lock = threading.Lock()
        self.exact = self._is_exact()
        self._words = words_of(tokenizer) if self.exact else None  # only for pieces, which hold no special tokens
        self.hits = self.misses = 0  # characters

    def encode(self, text: str, owner: str = "") -> list[int]:
        """Returns exactly the ids that the tokenizer gives for the whole text, without special tokens around it. Entries of
        another `owner` are not used: the time saved would reveal the texts that the other owner has sent."""
        if not self.exact or self._cut is None:
            return self._tokenise([text])[0]
        pieces = self._cut.split(text)
        if len(pieces) == 1:
            return self._tokenise(pieces)[0]  # not a conversation: unlikely to be sent again
        found = [self._find(piece, owner) for piece in pieces]
        missing = [piece for piece, ids in zip(pieces, found, strict=True) if ids is None]
        fresh = iter(self._tokenise(missing))
        out: list[int] = []
        for piece, known in zip(pieces, found, strict=True):
            ids: list[int] | array[int] = known if known is not None else next(fresh)
            if known is None:
                self._keep(piece, owner, array("I", ids))
            out += ids
        return out

    def _find(self, piece: str, owner: str) -> array[int] | None:
        if not piece:
            return _NOTHING
        if (special := self._ids.get(piece)) is not None:
            return array("I", (special,))
        with self._lock:
            ids = self._known.get((owner, piece))
            if ids is None:
                self.misses += len(piece)
            else:
                self.hits += len(piece)
                self._known.move_to_end((owner, piece))
            return ids

    def _keep(self, piece: str, owner: str, ids: array[int]) -> None:
        size = _size(piece, ids)
        if size > self._budget // 4:
            return
        with self._lock:
            if (owner, piece) not in self._known:
                self._known[owner, piece] = ids
                self._bytes += size
            while self._bytes > self._budget:
                (_, oldest), oldest_ids = self._known.popitem(last=False)
                self._bytes -= _size(oldest, oldest_ids)

    def _tokenise(self, texts: list[str]) -> list[list[int]]:
        found = [self._words.encode(text) if self._words is not None else None for text in texts]
        rest = [text for text, ids in zip(texts, found, strict=True) if ids is None]
        # a batch, even of one text: only a batch releases the interpreter's lock, so that the event loop can run
        encoded = iter(self._tokenizer.encode_batch_fast(rest, add_special_tokens=False) if rest else ())
        return [next(encoded).ids if ids is None else ids for ids in found]

    def _is_exact(self) -> bool:
        tokens = self._tokenizer.get_added_tokens_decoder().values()
        if any(t.lstrip or t.rstrip or t.single_word for t in tokens if not t.normalized):
            return False  # such tokens depend on the text around them
        # Metaspace's scheme `first` depends on whether a piece begins the text
        return '"prepend_scheme": "first"' not in json.dumps(tokenizer_parts(self._tokenizer)["pre_tokenizer"])


def any_of(words: Iterable[str]) -> str:
    """Returns an expression for the longest of the words that begin at a position. Common prefixes are matched once: some
    models have thousands of reserved tokens with one prefix, and a text of such prefixes would be compared with each."""
    tree: dict[str, Any] = {}
    for word in words:
        node = tree
        for char in word:
            node = node.setdefault(char, {})
        node[""] = {}
    return _branches(tree)


def _branches(node: dict[str, Any]) -> str:
    branches = [re.escape(char) + _branches(below) for char, below in node.items() if char]
    if not branches:
        return ""
    if len(branches) == 1 and "" not in node:
        return branches[0]
    return f"(?:{'|'.join(branches)}){'?' if '' in node else ''}"


def _size(piece: str, ids: array[int]) -> int:
    return 4 * len(piece) + 4 * len(ids) + ENTRY


_NOTHING: array[int] = array("I")
