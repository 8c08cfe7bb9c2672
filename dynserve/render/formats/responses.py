"""The format of OpenAI's `/v1/responses`: output items, and a stream of numbered events for each item."""

from __future__ import annotations

from typing import Any

import msgspec

from dynserve.dialects.base import CallArguments, CallStart, Content, Piece, ReasoningText
from dynserve.render.formats.base import AnswerEnd, Logprobs, Transcript, call_id, logprob_object
from dynserve.sse import event, to_json
from dynserve.text.detokenize import Vocabulary
from dynserve.wire.link import Usage
from dynserve.wire.requests import RenderOptions, TokenLogprob

_ARGUMENTS = {"function_call": "function_call_arguments", "custom_tool_call": "custom_tool_call_input"}


class ResponsesFormat:
    def __init__(self, render: RenderOptions) -> None:
        self._render = render
        self.usage = Usage(0, 0, 0)
        self._frame: dict[str, Any] = msgspec.json.decode(render.frame) if render.frame else {}
        self._number = 0
        self._output: list[dict[str, Any]] = []  # items that are done
        # type of the open item: message, reasoning, function_call, custom_tool_call; empty: no item is open
        self._kind = ""
        self._text: list[str] = []  # text of the open item
        self._call = ("", CallStart(""))  # id and start of the open call
        self._calls = 0
        self._logprobs: list[dict[str, Any]] = []

    def first(self) -> bytes:
        response = self._response("in_progress", [], None)
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def content(self, text: str, logprobs: Logprobs) -> bytes:
        begin = b"" if self._kind == "message" else self._open("message")
        self._text.append(text)
        self._logprobs += logprobs or []
        return begin + self._event(
            "response.output_text.delta", **self._place(), content_index=0, delta=text, logprobs=logprobs or []
        )

    def around(self) -> None:
        return None  # every event has a number

    def piece(self, piece: Piece, logprobs: Logprobs) -> bytes:
        match piece:
            case Content(text):
                return self.content(text, logprobs)
            case ReasoningText(text):
                begin = b"" if self._kind == "reasoning" else self._open("reasoning")
                self._text.append(text)
                return begin + self._event(
                    "response.reasoning_text.delta", **self._place(), content_index=0, delta=text
                )
            case CallStart():
                closed = self._close("completed")
                self._call = (call_id(self._render, self._calls), piece)
                self._calls += 1
                return closed + self._open("custom_tool_call" if piece.custom else "function_call")
            case CallArguments(text):
                self._text.append(text)
                return self._event(f"response.{_ARGUMENTS[self._kind]}.delta", **self._place(), delta=text)

    def last(self, end: AnswerEnd, logprobs: Logprobs) -> bytes:
        status, closed = self._end(end)
        return closed + self._event(f"response.{status}", response=self._response(status, self._output, end.usage))

    def body(self, transcript: Transcript, end: AnswerEnd) -> bytes:
        for piece, logprobs in transcript.parts:
            self.piece(piece, logprobs)
        return to_json(self._response(self._end(end)[0], self._output, end.usage))

    def logprob(self, entry: TokenLogprob, vocabulary: Vocabulary) -> dict[str, Any]:
        return logprob_object(entry, vocabulary, self._render.logprobs or 0)

    def _end(self, end: AnswerEnd) -> tuple[str, bytes]:
        """Returns the answer's status, and the events that close its last item."""
        status = "incomplete" if end.reason == "length" else "completed"
        closed = self._close(status)
        if not self._output:  # an empty answer still has a message
            closed = self._open("message") + self._close(status)
        return status, closed

    def _response(self, status: str, output: list[Any], usage: Usage | None) -> dict[str, Any]:
        return self._frame | {
            "id": self._render.response_id,
            "object": "response",
            "created_at": self._render.created,
            "model": self._render.model,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": output,
            "usage": None if usage is None else _usage(usage),
        }

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item_id(), "output_index": len(self._output)}

    def _item_id(self) -> str:
        head = {"message": "msg", "reasoning": "rs", "function_call": "fc", "custom_tool_call": "ctc"}[self._kind]
        return f"{head}_{self._render.response_id.removeprefix('resp_')}_{len(self._output)}"

    def _item(self, status: str) -> dict[str, Any]:
        """The open item with its text so far."""
        text = "".join(self._text)
        item: dict[str, Any] = {"id": self._item_id(), "type": self._kind, "status": status}
        match self._kind:
            case "message":
                return item | {"role": "assistant", "content": [self._text_part(text)]}
            case "reasoning":
                return item | {"summary": [], "content": [{"type": "reasoning_text", "text": text}]}
            case _:
                id_, start = self._call
                space = {"namespace": start.namespace} if start.namespace else {}
                shown = {"input": text} if start.custom else {"arguments": text}
                return item | {"call_id": id_, "name": start.name} | space | shown

    def _text_part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self._logprobs}

    def _open(self, kind: str) -> bytes:
        closed = self._close("completed")
        self._kind, self._text, self._logprobs = kind, [], []
        item = self._item("in_progress")
        if kind == "message":
            item["content"] = []
        added = self._event("response.output_item.added", output_index=len(self._output), item=item)
        if kind == "message":
            part = self._text_part("")
            added += self._event("response.content_part.added", **self._place(), content_index=0, part=part)
        return closed + added

    def _close(self, status: str) -> bytes:
        if not self._kind:
            return b""
        text, place = "".join(self._text), self._place()
        match self._kind:
            case "message":
                done = self._event(
                    "response.output_text.done", **place, content_index=0, text=text, logprobs=self._logprobs
                )
                part = self._text_part(text)
                done += self._event("response.content_part.done", **place, content_index=0, part=part)
            case "reasoning":
                done = self._event("response.reasoning_text.done", **place, content_index=0, text=text)
            case "custom_tool_call":
                done = self._event("response.custom_tool_call_input.done", **place, input=text)
            case _:
                name = self._call[1].name
                done = self._event("response.function_call_arguments.done", **place, name=name, arguments=text)
        item = self._item(status)
        done += self._event("response.output_item.done", output_index=len(self._output), item=item)
        self._output.append(item)
        self._kind = ""
        return done

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = to_json({"type": kind, "sequence_number": self._number, **fields})
        self._number += 1
        return event(kind, data)


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
