"""The parts of a request that have no meaning here: unknown fields at every depth, and entries that were left out.

Clients written for other servers send many. They do not cost the request; a response header names them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from pydantic import BaseModel

MAX_FOUND = 64  # names of one request

# fields that clients repeat from answers, and hints for caches of other servers: without a meaning, and not worth a line
REPEATED = frozenset({
    "annotations", "audio", "cache_control", "citations", "encrypted_content", "eager_input_streaming", "id", "index",
    "internal_chat_message_metadata_passthrough", "is_error", "logprobs", "phase", "provider_specific_fields", "refusal",
    "signature", "status", "strict",
})  # fmt: skip


class Part(BaseModel):
    """A part of a request's body, whose unknown fields are kept apart."""

    model_config = {"extra": "allow"}
    # the unknown fields have a meaning: a chat template may read them
    extra_is_used: ClassVar[bool] = False


def unknown_fields(request: BaseModel) -> list[str]:
    """The dotted names of the unknown fields of a request and its parts, without the numbers of list entries. A field that
    is null counts as absent."""
    return list(dict.fromkeys(_unknown(request, "")))[:MAX_FOUND]


def _unknown(part: BaseModel, where: str) -> Iterator[str]:
    extra = part.model_extra
    if extra and not getattr(part, "extra_is_used", False):
        for name, value in extra.items():
            if value is not None and (not where or name not in REPEATED):
                yield where + name
    for name, value in part.__dict__.items():
        if isinstance(value, BaseModel):
            yield from _unknown(value, f"{where}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], BaseModel):
            for entry in value:
                if isinstance(entry, BaseModel):
                    yield from _unknown(entry, f"{where}{name}.")


def named(where: str, kind: Any) -> str:
    """The name of an entry that was left out."""
    return f"{where} ({str(kind)[:40]})"
