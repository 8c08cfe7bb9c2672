"""Anthropic's `/v1/messages`: content blocks, each with a start, deltas and a stop."""

from __future__ import annotations

import json
from typing import Any

from dynserve.openai.detokenize import Vocabulary
from dynserve.openai.formats.base import End, Logprobs, Said, call_id, event, to_json
from dynserve.openai.parsers.base import Arguments, Call, Content, Piece, Thinking
from dynserve.wire.link import Usage
from dynserve.wire.requests import Render, TokenLogprob


class MessageFormat:
    def __init__(self, render: Render) -> None:
        self._render = render
        self.usage = Usage(0, 0, 0)
        self._block = -1  # the one that is open
        self._kind = ""  # of it
        self._calls = 0

    def first(self) -> bytes:
        message = self._message([], None, None) | {"usage": _usage(self.usage)}
        return event("message_start", to_json({"type": "message_start", "message": message}))

    def content(self, text: str, logprobs: Logprobs) -> bytes:
        begin = b"" if self._kind == "text" else self._open("text", {"type": "text", "text": ""})
        return begin + self._delta({"type": "text_delta", "text": text})

    def piece(self, piece: Piece, logprobs: Logprobs) -> bytes:
        match piece:
            case Content(text):
                return self.content(text, logprobs)
            case Thinking(text):
                block = {"type": "thinking", "thinking": "", "signature": ""}
                begin = b"" if self._kind == "thinking" else self._open("thinking", block)
                return begin + self._delta({"type": "thinking_delta", "thinking": text})
            case Call(name):
                id_ = call_id(self._render, self._calls)
                self._calls += 1
                return self._open("tool_use", {"type": "tool_use", "id": id_, "name": name, "input": {}})
            case Arguments(text):
                return self._delta({"type": "input_json_delta", "partial_json": text})

    def last(self, end: End, logprobs: Logprobs) -> bytes:
        reason, string = _stop(end, bool(self._calls))
        delta = {"stop_reason": reason, "stop_sequence": string}
        data = to_json({"type": "message_delta", "delta": delta, "usage": _usage(end.usage)})
        return self._close() + event("message_delta", data) + event("message_stop", b'{"type":"message_stop"}')

    def body(self, said: Said, end: End, logprobs: Logprobs) -> bytes:
        blocks: list[dict[str, Any]] = []
        if said.thoughts:
            blocks.append({"type": "thinking", "thinking": said.thoughts, "signature": ""})
        if said.content or not said.calls:
            blocks.append({"type": "text", "text": said.content})
        blocks += [{"type": "tool_use", "id": c.id, "name": c.name, "input": _input(c.arguments)} for c in said.calls]
        return to_json(self._message(blocks, *_stop(end, bool(said.calls))) | {"usage": _usage(end.usage)})

    def logprob(self, entry: TokenLogprob, vocabulary: Vocabulary) -> dict[str, Any]:
        return {}

    def _message(self, blocks: list[Any], reason: str | None, string: str | None) -> dict[str, Any]:
        return {
            "id": self._render.response_id,
            "type": "message",
            "role": "assistant",
            "model": self._render.model,
            "content": blocks,
            "stop_reason": reason,
            "stop_sequence": string,
        }

    def _open(self, kind: str, block: dict[str, Any]) -> bytes:
        closed = self._close()
        self._block, self._kind = self._block + 1, kind
        data = {"type": "content_block_start", "index": self._block, "content_block": block}
        return closed + event("content_block_start", to_json(data))

    def _delta(self, delta: dict[str, Any]) -> bytes:
        data = {"type": "content_block_delta", "index": self._block, "delta": delta}
        return event("content_block_delta", to_json(data))

    def _close(self) -> bytes:
        if not self._kind:
            return b""
        self._kind = ""
        return event("content_block_stop", to_json({"type": "content_block_stop", "index": self._block}))


def _stop(end: End, called: bool) -> tuple[str, str | None]:
    if end.reason == "length":
        return "max_tokens", None
    if end.stop_string is not None:
        return "stop_sequence", end.stop_string
    return ("tool_use" if called else "end_turn"), None


def _usage(usage: Usage) -> dict[str, int]:
    """Anthropic counts tokens that were read from a cache apart."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


def _input(arguments: str) -> Any:
    """The object that a call's arguments are; what an answer's end has cut is given as it stands."""
    try:
        return json.loads(arguments)
    except ValueError:
        return {"partial_json": arguments}
