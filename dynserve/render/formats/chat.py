"""The formats of `/v1/chat/completions` and `/v1/completions`: choices in chunks, or one body with all choices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dynserve.dialects.base import CallArguments, CallStart, Content, Piece, ReasoningText
from dynserve.render.formats.base import (
    MIN_LOGPROB,
    AnswerEnd,
    Logprobs,
    Transcript,
    call_id,
    logprob_object,
    usage_object,
)
from dynserve.sse import one_line, to_json
from dynserve.text.detokenize import Detokenizer, Vocabulary
from dynserve.wire.link import Usage
from dynserve.wire.requests import RenderOptions, TokenLogprob

DONE = b"data: [DONE]\n\n"
OBJECTS = {
    "chat": ("chat.completion", "chat.completion.chunk"),
    "completion": ("text_completion", "text_completion"),
    "embedding": ("list", "list"),  # never streamed; its items have no tokens
}


def chunk_head(render: RenderOptions) -> bytes:
    """The beginning of every chunk, up to its choices."""
    return (
        b'data: {"id":%b,"object":"%b","created":%d,"model":%b,"choices":['
        % (to_json(render.response_id), OBJECTS[render.kind][1].encode(), render.created, to_json(render.model))
    )  # fmt: skip


def usage_chunk(render: RenderOptions, usage: Usage) -> bytes:
    return chunk_head(render) + b'],"usage":' + to_json(usage_object(usage)) + b"}\n\n"


def body_of(render: RenderOptions, choices: Sequence[bytes], usage: Usage) -> bytes:
    """The body of an unstreamed answer, from choices that are already JSON."""
    return b'{"id":%b,"object":"%b","created":%d,"model":%b,"choices":[%b],"usage":%b}' % (
        to_json(render.response_id), OBJECTS[render.kind][0].encode(), render.created, to_json(render.model),
        b",".join(choices), to_json(usage_object(usage)),
    )  # fmt: skip


def reindexed(choice: bytes, old: int, new: int) -> bytes:
    """Returns a choice (JSON that begins with its index) with another index."""
    return b'{"index":%d%b' % (new, choice[len(b'{"index":%d' % old) :])


class _Choices:
    """The parts that chat and completion answers share."""

    def __init__(self, render: RenderOptions) -> None:
        self._render = render
        self.usage = Usage(0, 0, 0)
        self._choice = chunk_head(render) + b'{"index":%d,' % render.index
        self._null_usage = b',"usage":null' if render.usage else b""

    def _end(self, finish: bytes = b"null") -> bytes:
        usage = self._null_usage
        if self._render.continuous_usage:
            usage = b',"usage":' + to_json(usage_object(self.usage))
        return b',"finish_reason":' + finish + b"}]" + usage + b"}\n\n"

    def _after(self, end: AnswerEnd) -> bytes:
        """The bytes after the last chunk: usage and `[DONE]`. Empty for one of several choices."""
        if self._render.part:
            return b""
        return (usage_chunk(self._render, end.usage) if self._render.usage else b"") + DONE

    def _whole(self, choice: dict[str, Any], end: AnswerEnd) -> bytes:
        return to_json(choice) if self._render.part else body_of(self._render, [to_json(choice)], end.usage)


class ChatFormat(_Choices):
    def __init__(self, render: RenderOptions) -> None:
        super().__init__(render)
        self._calls = -1
        self._custom = False  # the last call is one of a custom tool

    def first(self) -> bytes:
        return self._choice + b'"delta":{"role":"assistant","content":""},"logprobs":null' + self._end()

    def content(self, text: str, logprobs: Logprobs) -> bytes:
        return self._delta(b'"content":' + to_json(text), logprobs)

    def around(self) -> tuple[bytes, bytes] | None:
        if self._render.continuous_usage or self._render.logprobs is not None:
            return None
        return self._choice + b'"delta":{"content":', b'},"logprobs":null' + self._end()

    def piece(self, piece: Piece, logprobs: Logprobs) -> bytes:
        match piece:
            case Content(text):
                return self.content(text, logprobs)
            case ReasoningText(text):
                return self._delta(b'"reasoning_content":' + to_json(text), logprobs)
            case CallStart(name, custom):
                self._calls += 1
                self._custom = custom
                call: dict[str, Any] = {"index": self._calls} | _call(
                    call_id(self._render, self._calls), name, "", custom
                )
            case CallArguments(text):
                part = {"custom": {"input": text}} if self._custom else {"function": {"arguments": text}}
                call = {"index": self._calls} | part
        return self._delta(b'"tool_calls":[' + to_json(call) + b"]", logprobs)

    def last(self, end: AnswerEnd, logprobs: Logprobs) -> bytes:
        reason = to_json(self._reason(end, self._calls >= 0))
        entries = one_line(to_json({"content": logprobs})) if logprobs else b"null"
        return self._choice + b'"delta":{},"logprobs":' + entries + self._end(reason) + self._after(end)

    def body(self, transcript: Transcript, end: AnswerEnd) -> bytes:
        calls, logprobs = transcript.calls, transcript.logprobs
        message: dict[str, Any] = {"role": "assistant", "content": transcript.content, "refusal": None}
        if transcript.reasoning:
            message["reasoning_content"] = transcript.reasoning
        if calls:
            message["content"] = transcript.content or None
            message["tool_calls"] = [_call(call.id, call.name, call.arguments, call.custom) for call in calls]
        choice = {
            "index": self._render.index,
            "message": message,
            "logprobs": None if logprobs is None else {"content": logprobs, "refusal": None},
            "finish_reason": self._reason(end, bool(calls)),
        }
        return self._whole(choice, end)

    def logprob(self, entry: TokenLogprob, vocabulary: Vocabulary) -> dict[str, Any]:
        return logprob_object(entry, vocabulary, self._render.logprobs or 0)

    def _delta(self, delta: bytes, logprobs: Logprobs) -> bytes:
        entries = b"null" if logprobs is None else one_line(to_json({"content": logprobs}))
        return self._choice + b'"delta":{' + one_line(delta) + b'},"logprobs":' + entries + self._end()

    def _reason(self, end: AnswerEnd, called: bool) -> str:
        """The finish reason. OpenAI's API ends a call with `stop` where the client chose the tool by name."""
        tools = self._render.tools
        return "tool_calls" if called and end.reason == "stop" and tools and not tools.named else end.reason


def _call(id_: str, name: str, arguments: str, custom: bool) -> dict[str, Any]:
    if custom:
        return {"id": id_, "type": "custom", "custom": {"name": name, "input": arguments}}
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}


class CompletionFormat(_Choices):
    def __init__(self, render: RenderOptions) -> None:
        super().__init__(render)
        self._text = self._choice + b'"text":'
        self._position: Detokenizer | None = None  # decodes the text before the next token
        self._offset = 0  # characters of that text
        self._first_of_prompt = render.echo

    def first(self) -> bytes:
        return b""

    def content(self, text: str, logprobs: Logprobs) -> bytes:
        entries = b"null" if logprobs is None else one_line(to_json(self._columns(logprobs)))
        return self._text + one_line(to_json(text)) + b',"logprobs":' + entries + self._end()

    def around(self) -> tuple[bytes, bytes] | None:
        if self._render.continuous_usage or self._render.logprobs is not None:
            return None
        return self._text, b',"logprobs":null' + self._end()

    def piece(self, piece: Piece, logprobs: Logprobs) -> bytes:
        return self.content(piece[0], logprobs)  # always content: completions have no parsers

    def last(self, end: AnswerEnd, logprobs: Logprobs) -> bytes:
        entries = one_line(to_json(self._columns(logprobs))) if logprobs else b"null"
        return self._text + b'"","logprobs":' + entries + self._end(to_json(end.reason)) + self._after(end)

    def body(self, transcript: Transcript, end: AnswerEnd) -> bytes:
        logprobs = transcript.logprobs
        columns = None if logprobs is None else self._columns(logprobs)
        choice = {
            "index": self._render.index, "text": transcript.content, "logprobs": columns, "finish_reason": end.reason,
        }  # fmt: skip
        return self._whole(choice, end)

    def logprob(self, entry: TokenLogprob, vocabulary: Vocabulary) -> dict[str, Any]:
        text = vocabulary.token_text(entry.token_id)
        if self._position is None:
            skip = self._render.skip_special_tokens
            self._position = vocabulary.detokenizer(skip_special=skip, after=None if self._render.echo else ())
        offset = self._offset
        self._offset += len(self._position.push([entry.token_id]))
        if self._first_of_prompt:  # without a token before it, it has no log-probability
            self._first_of_prompt = False
            return {"token": text, "logprob": None, "top": None, "offset": offset}
        top = {vocabulary.token_text(id_): max(lp, MIN_LOGPROB) for id_, lp in entry.top[: self._render.logprobs or 0]}
        if top:  # the sampled token is always included, likely or not
            top.setdefault(text, max(entry.logprob, MIN_LOGPROB))
        return {"token": text, "logprob": max(entry.logprob, MIN_LOGPROB), "top": top, "offset": offset}

    @staticmethod
    def _columns(entries: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [entry["top"] for entry in entries],
            "text_offset": [entry["offset"] for entry in entries],
        }
