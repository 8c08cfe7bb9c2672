"""The parts of a request that have no meaning here: unknown fields at every depth, and entries that were left out.

Clients written for other servers send many. They do not cost the request; a response header names them.
"""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar, get_args

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
    found: list[str] = []
    _add_unknown(request, "", found)
    return list(dict.fromkeys(found))[:MAX_FOUND] if found else found


def _add_unknown(part: BaseModel, where: str, found: list[str]) -> None:
    extra = part.__pydantic_extra__
    if extra and not getattr(part, "extra_is_used", False):
        found += [where + n for n, given in extra.items() if given is not None and (not where or n not in REPEATED)]
    values = part.__dict__
    for name in _fields_with_parts(part.__class__):
        value = values[name]
        if isinstance(value, BaseModel):
            _add_unknown(value, f"{where}{name}.", found)
        elif value.__class__ is list:
            for entry in value:
                if isinstance(entry, BaseModel):
                    _add_unknown(entry, f"{where}{name}.", found)


@cache
def _fields_with_parts(kind: type[BaseModel]) -> tuple[str, ...]:
    """The fields of a class that can hold parts: on every request's path, most fields need not be looked at."""
    return tuple(name for name, field in kind.model_fields.items() if _can_hold_parts(field.annotation))


def _can_hold_parts(kind: Any) -> bool:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return True
    return any(map(_can_hold_parts, get_args(kind)))


def named(where: str, kind: Any) -> str:
    """The name of an entry that was left out."""
    return f"{where} ({str(kind)[:40]})"
