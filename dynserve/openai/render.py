"""The bytes that a client reads: SSE chunks while an answer grows, or one JSON body at its end.

Runs in the worker, once per token: the constant parts of a chunk are rendered once per request, the rest is one JSON
string. `replay` brings a renderer to any point of an answer, so that another worker continues it to the byte.
"""

from __future__ import annotations

from typing import Any

import msgspec

from dynserve.openai.detokenize import Vocabulary
from dynserve.wire.link import Usage
from dynserve.wire.requests import Prior, Render, Stop, TokenLogprob

_json = msgspec.json.Encoder().encode

DONE = b"data: [DONE]\n\n"


class Renderer:
    """One answer. `push` and `finish` return what to send now (maybe nothing)."""

    def __init__(self, render: Render, stop: Stop, prompt_tokens: int, vocabulary: Vocabulary) -> None:
        self._render, self._prompt_tokens, self._vocabulary = render, prompt_tokens, vocabulary
        self._detokenizer = vocabulary.detokenizer(skip_special=render.skip_special_tokens)
        self._stops = StopStrings(stop.strings, keep=stop.include_string) if stop.strings else None
        self._format: _Chat | _Completion = (_Chat if render.kind == "chat" else _Completion)(render)
        self._text: list[str] = []  # of a unary answer
        self._logprobs: list[dict[str, Any]] = []  # not sent yet
        self._opened = False
        self.tokens = 0
        self.cached_tokens = 0

    @property
    def stopped(self) -> bool:
        """A stop string has been seen: nothing more comes out, and the engine need not go on."""
        return self._stops is not None and self._stops.matched

    def replay(self, prior: Prior) -> None:
        """Goes through what an earlier worker already rendered, one token at a time as it did: what was held back then
        is held back now."""
        self.cached_tokens = prior.cached_tokens
        for i, token_id in enumerate(prior.token_ids):
            self.push([token_id], prior.logprobs[i : i + 1] or None)

    def push(self, token_ids: list[int], logprobs: list[TokenLogprob] | None) -> bytes:
        if self.stopped:
            return b""
        self.tokens += len(token_ids)
        text = self._detokenizer.push(token_ids)
        if self._stops is not None:
            text = self._stops.push(text)
        if logprobs is not None and self._render.logprobs is not None:
            self._logprobs += [self._format.logprob(entry, self._vocabulary) for entry in logprobs]
        return self._emit(text)

    def finish(self, reason: str, stop_token: int | None = None) -> tuple[bytes, Usage]:
        """The end: what was held back, the finish reason, the usage. A `stop_token` counts as generated."""
        if stop_token is not None:
            self.tokens += 1
        data = b""
        if not self.stopped:
            text = self._detokenizer.flush()
            if self._stops is not None:
                text = self._stops.push(text) + self._stops.flush()
            data = self._emit(text)
        usage = Usage(self._prompt_tokens, self.tokens, self.cached_tokens)
        if not self._render.stream:
            return self._format.body("".join(self._text), self._take_logprobs(), reason, usage), usage
        if not self._opened:
            data += self._open()
        data += self._format.last(reason, self._take_logprobs())
        if self._render.usage:
            data += self._format.usage(usage)
        return data + DONE, usage

    def _emit(self, text: str) -> bytes:
        if not self._render.stream:
            if text:
                self._text.append(text)
            return b""
        if not text:
            return b"" if self._opened else self._open()
        if self._opened:
            return self._format.chunk(text, self._take_logprobs())
        return self._open() + self._format.chunk(text, self._take_logprobs())

    def _open(self) -> bytes:
        self._opened = True
        return self._format.first

    def _take_logprobs(self) -> list[dict[str, Any]] | None:
        if self._render.logprobs is None:
            return None
        taken, self._logprobs = self._logprobs, []
        return taken


class StopStrings:
    """Holds back text that may be the beginning of a stop string, across tokens, and cuts at the first whole one."""

    def __init__(self, strings: tuple[str, ...], *, keep: bool = False) -> None:
        self._strings, self._keep = strings, keep
        self._longest = max(map(len, strings))
        self._held = ""
        self.matched = False

    def push(self, text: str) -> str:
        if self.matched:
            return ""
        text = self._held + text
        found = [(at, string) for string in self._strings if (at := text.find(string)) >= 0]
        if found:
            # the one that a reader would meet first; of two at one place, the longer
            at, string = min(found, key=lambda f: (f[0], -len(f[1])))
            self.matched, self._held = True, ""
            return text[: at + len(string)] if self._keep else text[:at]
        held = self._possible_start(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """At the end of the answer a beginning is just text."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self, text: str) -> int:
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[-length:]
            if any(string.startswith(tail) for string in self._strings):
                return length
        return 0


class _Format:
    """What chat and completion answers share: everything that is constant for a request is made here, once."""

    kind = ""

    def __init__(self, render: Render, kind_of_chunk: str) -> None:
        head = f'{{"id":{_quoted(render.response_id)},"object":"{kind_of_chunk}","created":{render.created},'
        head += f'"model":{_quoted(render.model)},"choices":['
        self._render = render
        self._head = b"data: " + head.encode()
        null_usage = b',"usage":null' if render.usage else b""
        self._end = b"}]" + null_usage + b"}\n\n"
        self._open_end = b',"finish_reason":null' + self._end

    def usage(self, usage: Usage) -> bytes:
        return self._head + b'],"usage":' + _json(usage_object(usage)) + b"}\n\n"

    def _body(self, choice: dict[str, Any], usage: Usage) -> bytes:
        return _json(
            {
                "id": self._render.response_id,
                "object": self.kind,
                "created": self._render.created,
                "model": self._render.model,
                "choices": [choice],
                "usage": usage_object(usage),
            }
        )


class _Chat(_Format):
    kind = "chat.completion"

    def __init__(self, render: Render) -> None:
        super().__init__(render, "chat.completion.chunk")
        self._content = self._head + b'{"index":0,"delta":{"content":'
        self._plain_end = b'},"logprobs":null' + self._open_end
        role = b'{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null'
        self.first = self._head + role + self._open_end

    def chunk(self, text: str, logprobs: list[dict[str, Any]] | None) -> bytes:
        if logprobs is None:
            return self._content + _json(text) + self._plain_end
        return self._content + _json(text) + b'},"logprobs":' + _json({"content": logprobs}) + self._open_end

    def last(self, reason: str, logprobs: list[dict[str, Any]] | None) -> bytes:
        entries = _json({"content": logprobs}) if logprobs else b"null"
        end = b',"finish_reason":' + _json(reason) + self._end
        return self._head + b'{"index":0,"delta":{},"logprobs":' + entries + end

    def body(self, text: str, logprobs: list[dict[str, Any]] | None, reason: str, usage: Usage) -> bytes:
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None if logprobs is None else {"content": logprobs, "refusal": None},
            "finish_reason": reason,
        }
        return self._body(choice, usage)

    def logprob(self, entry: TokenLogprob, vocabulary: Vocabulary) -> dict[str, Any]:
        top = [self._one(id_, logprob, vocabulary) for id_, logprob in entry.top[: self._render.logprobs or 0]]
        return self._one(entry.token_id, entry.logprob, vocabulary) | {"top_logprobs": top}

    @staticmethod
    def _one(token_id: int, logprob: float, vocabulary: Vocabulary) -> dict[str, Any]:
        raw = vocabulary.token_bytes(token_id)
        return {"token": raw.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": list(raw)}


class _Completion(_Format):
    kind = "text_completion"
    first = b""

    def __init__(self, render: Render) -> None:
        super().__init__(render, "text_completion")
        self._text = self._head + b'{"index":0,"text":'
        self._offset = 0

    def chunk(self, text: str, logprobs: list[dict[str, Any]] | None) -> bytes:
        entries = b"null" if logprobs is None else _json(self._columns(logprobs))
        return self._text + _json(text) + b',"logprobs":' + entries + self._open_end

    def last(self, reason: str, logprobs: list[dict[str, Any]] | None) -> bytes:
        entries = _json(self._columns(logprobs)) if logprobs else b"null"
        end = b',"finish_reason":' + _json(reason) + self._end
        return self._text + b'"","logprobs":' + entries + end

    def body(self, text: str, logprobs: list[dict[str, Any]] | None, reason: str, usage: Usage) -> bytes:
        columns = None if logprobs is None else self._columns(logprobs)
        choice = {"index": 0, "text": text, "logprobs": columns, "finish_reason": reason}
        return self._body(choice, usage)

    def logprob(self, entry: TokenLogprob, vocabulary: Vocabulary) -> dict[str, Any]:
        top = {vocabulary.token_text(id_): max(lp, -9999.0) for id_, lp in entry.top[: self._render.logprobs or 0]}
        text = vocabulary.token_text(entry.token_id)
        offset, self._offset = self._offset, self._offset + len(text)
        return {"token": text, "logprob": max(entry.logprob, -9999.0), "top": top, "offset": offset}

    @staticmethod
    def _columns(entries: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [entry["top"] for entry in entries],
            "text_offset": [entry["offset"] for entry in entries],
        }


def usage_object(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def _quoted(text: str) -> str:
    return _json(text).decode()
