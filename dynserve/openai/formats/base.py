"""What the formats of answers share. A format is made per answer; what is constant in it is rendered then, once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, Protocol

import msgspec

from dynserve.openai.detokenize import Vocabulary
from dynserve.openai.parsers.base import Arguments, Call, Content, Piece, Thinking
from dynserve.wire.link import Usage
from dynserve.wire.requests import Render, TokenLogprob

to_json = msgspec.json.Encoder().encode

Logprobs = list[dict[str, Any]] | None
LEAST_LOGPROB = -9999.0  # JSON has no infinity


class End:
    """How an answer ended. `reason` is `stop` or `length`; `stop_string` is the one that ended it."""

    __slots__ = ("reason", "stop_string", "usage")

    def __init__(self, reason: str, usage: Usage, stop_string: str | None = None) -> None:
        self.reason, self.usage, self.stop_string = reason, usage, stop_string


class Format(Protocol):
    """Makes the bytes of one answer. Streamed: `first`, then `content` and `piece` as they come, then `last`. Otherwise
    `body`, of all that was said."""

    usage: Usage  # so far

    def first(self) -> bytes: ...

    def content(self, text: str, logprobs: Logprobs) -> bytes: ...

    def piece(self, piece: Piece, logprobs: Logprobs) -> bytes: ...

    def last(self, end: End, logprobs: Logprobs) -> bytes: ...

    def body(self, said: Said, end: End, logprobs: Logprobs) -> bytes: ...

    def logprob(self, entry: TokenLogprob, vocabulary: Vocabulary) -> dict[str, Any]: ...


class Said:
    """All of an answer so far."""

    def __init__(self, render: Render) -> None:
        self._render = render
        self._content: list[str] = []
        self._thoughts: list[str] = []
        self.calls: list[SaidCall] = []

    @property
    def content(self) -> str:
        return "".join(self._content)

    @property
    def thoughts(self) -> str:
        return "".join(self._thoughts)

    def add(self, pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            match piece:
                case Content(text):
                    self._content.append(text)
                case Thinking(text):
                    self._thoughts.append(text)
                case Call(name):
                    self.calls.append(SaidCall(call_id(self._render, len(self.calls)), name))
                case Arguments(text):
                    self.calls[-1].parts.append(text)


class SaidCall:
    def __init__(self, id_: str, name: str) -> None:
        self.id, self.name = id_, name
        self.parts: list[str] = []

    @property
    def arguments(self) -> str:
        return "".join(self.parts)


def call_id(render: Render, number: int) -> str:
    """The same on every worker that renders this answer. Mistral's templates take ids of nine characters only."""
    name = hashlib.sha256(f"{render.response_id}/{render.index}/{number}".encode()).hexdigest()
    if render.tools is not None and render.tools.parser == "mistral":
        return name[:9]
    return f"call_{name[:24]}"


def usage_object(usage: Usage) -> dict[str, Any]:
    """OpenAI's, of chat and completions."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def event(kind: str, data: bytes) -> bytes:
    """A named server-sent event."""
    return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"


def quoted(text: str) -> bytes:
    return to_json(text)
