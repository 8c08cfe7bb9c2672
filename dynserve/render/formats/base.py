"""The parts that all formats share. There is one format object per answer, which renders constant parts only once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, Protocol

from dynserve.dialects.base import CallArguments, CallStart, Content, Piece, ReasoningText
from dynserve.text.detokenize import Vocabulary
from dynserve.wire.link import Usage
from dynserve.wire.requests import RenderOptions, TokenLogprob

Logprobs = list[dict[str, Any]] | None
MIN_LOGPROB = -9999.0  # JSON has no infinity


class AnswerEnd:
    """The end of an answer. `reason`: `stop` or `length`. `stop_string`: the stop string that ended it, if any."""

    __slots__ = ("reason", "stop_string", "usage")

    def __init__(self, reason: str, usage: Usage, stop_string: str | None = None) -> None:
        self.reason, self.usage, self.stop_string = reason, usage, stop_string


class Format(Protocol):
    """Makes the bytes of one answer. Streamed: `first`, then `content` and `piece` for each piece, then `last`. Otherwise
    only `body`, of the whole transcript."""

    usage: Usage  # so far

    def first(self) -> bytes: ...

    def content(self, text: str, logprobs: Logprobs) -> bytes: ...

    def around(self) -> tuple[bytes, bytes] | None:
        """The bytes that `content` puts before and after a text's JSON, where they are constant; otherwise None."""
        ...

    def piece(self, piece: Piece, logprobs: Logprobs) -> bytes: ...

    def last(self, end: AnswerEnd, logprobs: Logprobs) -> bytes: ...

    def body(self, transcript: Transcript, end: AnswerEnd) -> bytes: ...

    def logprob(self, entry: TokenLogprob, vocabulary: Vocabulary) -> dict[str, Any]: ...


class Transcript:
    """The whole answer so far. `parts`: its pieces in order, with the log-probabilities of their tokens."""

    def __init__(self, render: RenderOptions) -> None:
        self._render = render
        self.parts: list[tuple[Piece, Logprobs]] = []
        self.rest: Logprobs = None  # log-probabilities of tokens after the last piece

    @property
    def content(self) -> str:
        return "".join([piece.text for piece, _ in self.parts if isinstance(piece, Content)])

    @property
    def reasoning(self) -> str:
        return "".join([piece.text for piece, _ in self.parts if isinstance(piece, ReasoningText)])

    @property
    def calls(self) -> list[TranscriptCall]:
        found: list[TranscriptCall] = []
        for piece, _ in self.parts:
            if isinstance(piece, CallStart):
                found.append(TranscriptCall(call_id(self._render, len(found)), piece))
            elif isinstance(piece, CallArguments):
                found[-1].parts.append(piece.text)
        return found

    @property
    def logprobs(self) -> Logprobs:
        if self._render.logprobs is None:
            return None
        return [entry for _, entries in self.parts for entry in entries or ()] + (self.rest or [])

    def add(self, pieces: Iterable[Piece], logprobs: Logprobs) -> None:
        """Appends pieces. `logprobs`: those of the tokens since the last piece."""
        for piece in pieces:
            self.parts.append((piece, logprobs))
            logprobs = None


class TranscriptCall:
    def __init__(self, id_: str, start: CallStart) -> None:
        self.id, self.name, self.custom = id_, start.name, start.custom
        self.parts: list[str] = []

    @property
    def arguments(self) -> str:
        return "".join(self.parts)


def call_id(render: RenderOptions, number: int) -> str:
    """An id that is the same on every worker. Mistral's templates accept only ids of nine characters."""
    name = hashlib.sha256(f"{render.response_id}/{render.index}/{number}".encode()).hexdigest()
    if render.tools is not None and render.tools.parser.startswith("mistral"):
        return name[:9]
    return f"call_{name[:24]}"


def usage_object(usage: Usage) -> dict[str, Any]:
    """The usage object of OpenAI's chats and completions."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def logprob_object(entry: TokenLogprob, vocabulary: Vocabulary, top: int) -> dict[str, Any]:
    """The log-probability object of OpenAI's chats and Responses, with the `top` likeliest tokens."""

    def one(token_id: int, logprob: float) -> dict[str, Any]:
        raw = vocabulary.token_bytes(token_id)
        return {"token": raw.decode("utf-8", "replace"), "logprob": max(logprob, MIN_LOGPROB), "bytes": list(raw)}

    likeliest = [one(id_, logprob) for id_, logprob in entry.top[:top]]
    return one(entry.token_id, entry.logprob) | {"top_logprobs": likeliest}
