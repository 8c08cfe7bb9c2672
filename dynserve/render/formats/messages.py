"""The format of Anthropic's `/v1/messages`: content blocks, each with a start, deltas and a stop."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from dynserve.dialects.base import CallArguments, CallStart, Content, Piece, ReasoningText
from dynserve.render.formats.base import AnswerEnd, Logprobs, Transcript, call_id
from dynserve.sse import event, to_json
from dynserve.text.detokenize import Vocabulary
from dynserve.wire.link import Usage
from dynserve.wire.requests import RenderOptions, TokenLogprob


class MessageFormat:
    def __init__(self, render: RenderOptions) -> None:
        self._render = render
        self.usage = Usage(0, 0, 0)
        self._block = -1  # index of the open block
        self._kind = ""  # type of the open block; empty: no block is open
        self._calls = 0

    def first(self) -> bytes:
        message = self._message([], None, None) | {"usage": _usage(self.usage)}
        return event("message_start", to_json({"type": "message_start", "message": message}))

    def content(self, text: str, logprobs: Logprobs) -> bytes:
        begin = b"" if self._kind == "text" else self._open("text", {"type": "text", "text": ""})
        return begin + self._delta({"type": "text_delta", "text": text})

    def around(self) -> None:
        return None

    def piece(self, piece: Piece, logprobs: Logprobs) -> bytes:
        match piece:
            case Content(text):
                return self.content(text, logprobs)
            case ReasoningText(text):
                block = {"type": "thinking", "thinking": "", "signature": ""}
                begin = b"" if self._kind == "thinking" else self._open("thinking", block)
                return begin + self._delta({"type": "thinking_delta", "thinking": text})
            case CallStart(name):
                id_ = call_id(self._render, self._calls)
                self._calls += 1
                return self._open("tool_use", {"type": "tool_use", "id": id_, "name": name, "input": {}})
            case CallArguments(text):
                return self._delta({"type": "input_json_delta", "partial_json": text})

    def last(self, end: AnswerEnd, logprobs: Logprobs) -> bytes:
        reason, string = _stop(end, bool(self._calls))
        delta = {"stop_reason": reason, "stop_sequence": string}
        data = to_json({"type": "message_delta", "delta": delta, "usage": _usage(end.usage)})
        return self._close() + event("message_delta", data) + event("message_stop", b'{"type":"message_stop"}')

    def body(self, transcript: Transcript, end: AnswerEnd) -> bytes:
        blocks: list[dict[str, Any]] = []
        for piece, _ in transcript.parts:
            match piece:
                case Content(text):
                    _last(blocks, {"type": "text", "text": []})["text"].append(text)
                case ReasoningText(text):
                    _last(blocks, {"type": "thinking", "thinking": [], "signature": ""})["thinking"].append(text)
                case CallStart(name):
                    blocks.append(
                        {"type": "tool_use", "id": call_id(self._render, self._calls), "name": name, "input": []}
                    )
                    self._calls += 1
                case CallArguments(text):
                    blocks[-1]["input"].append(text)
        content = [whole for block in blocks if (whole := _whole(block)) is not None]
        return to_json(self._message(content, *_stop(end, bool(self._calls))) | {"usage": _usage(end.usage)})

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


def _stop(end: AnswerEnd, called: bool) -> tuple[str, str | None]:
    if end.reason == "length":
        return "max_tokens", None
    if end.stop_string is not None:
        return "stop_sequence", end.stop_string
    return ("tool_use" if called else "end_turn"), None


def _usage(usage: Usage) -> dict[str, int]:
    """The usage object. Anthropic counts cached tokens separately from `input_tokens`."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


def _last(blocks: list[dict[str, Any]], empty: dict[str, Any]) -> dict[str, Any]:
    """Returns the last block; appends `empty` first where the last block is of another type."""
    if not blocks or blocks[-1]["type"] != empty["type"]:
        blocks.append(empty)
    return blocks[-1]


def _whole(block: dict[str, Any]) -> dict[str, Any] | None:
    """Returns a block with its parts joined; None for a call whose arguments are incomplete because the answer ended. The
    API cannot express an incomplete object; `stop_reason` reports the end."""
    match block["type"]:
        case "text":
            return block | {"text": "".join(block["text"])}
        case "thinking":
            return block | {"thinking": "".join(block["thinking"])}
    arguments = "".join(block["input"])
    try:
        json.loads(arguments)
    except ValueError:
        return None
    return block | {"input": msgspec.Raw(arguments.encode())}
