"""Parity: a check that a worker and a frontend compute the same block hashes for the same conversation.

Both sides render and tokenise a few probe conversations and hash the result. There is one digest per stage, so that a
difference names its cause: the template, the tokenizer, or the size, seed or salt of the block hashes. Without this check,
a worker that differs would be routed to with a cache hit rate of 0 %, for no visible reason.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import datetime
from itertools import chain
from typing import Any

import msgspec

from dynserve.text.preprocess import Conversation, Preprocessor
from dynserve.wire.hashing import rolling_hashes
from dynserve.wire.requests import pack_tokens

SALT = "parity"
NOON = datetime(2000, 1, 1, 12)  # templates that print the date must print the same one on both sides
TEXTS = (
    "The quick brown fox jumps over the lazy dog. 0123456789 \t\n  def f(x):\n    return {'a': [1, 2.5e-3]}\n",
    "Grüße aus Köln, привет, 你好，世界。 こんにちは 👩‍👩‍👧 e\u0301 \u200d\u00a0 <|im_start|><s>[INST]",
)
CONVERSATIONS: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": TEXTS[0]}],
    [
        {"role": "user", "content": TEXTS[1]},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": TEXTS[0] * 20},
    ],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "One, two?"}],
)
CAUSES = {
    "template": "its chat template renders a probe conversation differently",
    "tokenizer": "its tokenizer cuts a probe text differently",
    "hashes": "its block hashes of a probe differ: another hash seed or scheme",
    "salt": "its salted block hashes of a probe differ: another salt scheme",
}


def parity(preprocessor: Preprocessor, block_size: int) -> dict[str, str]:
    """Returns stage to digest, in the order in which a request passes the stages."""
    ids = [preprocessor.tokenize(text) for text in TEXTS]
    # several times the block size, so that every size has full blocks to hash
    packed = pack_tokens(list(chain.from_iterable(ids)) * (1 + 4 * block_size // max(1, sum(map(len, ids)))))
    return {
        "template": _digest([_rendered(preprocessor, conversation) for conversation in CONVERSATIONS]),
        "tokenizer": _digest(ids),
        "block_size": str(block_size),
        "hashes": _digest(rolling_hashes(packed, block_size)),
        "salt": _digest(rolling_hashes(packed, block_size, SALT)),
    }


def difference(theirs: Mapping[str, str], ours: Mapping[str, str]) -> str | None:
    """Returns a sentence about the first stage that differs; None when all agree."""
    for stage, digest in ours.items():
        if theirs.get(stage) != digest:
            if stage == "block_size":
                return f"its block size is {theirs.get(stage)}, the model's is {digest}"
            return CAUSES[stage]
    return None


def _rendered(preprocessor: Preprocessor, conversation: list[dict[str, Any]]) -> str:
    """Renders a conversation. A template may refuse it (a system turn, say); both sides must then refuse it alike."""
    try:
        return preprocessor.render(Conversation(conversation), now=NOON)
    except Exception as refusal:  # a template may raise anything; both sides must raise the same
        return type(refusal).__name__


def _digest(value: Any) -> str:
    return hashlib.sha256(msgspec.msgpack.encode(value)).hexdigest()[:16]
