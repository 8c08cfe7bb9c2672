"""The renderer, which makes the bytes that a client reads: chunks during the answer, or one JSON body at its end.

It runs in the worker, once per token: the constant parts of a chunk are rendered once per request, the rest is one JSON
string. `replay` restores the state at any point of an answer, so that another worker continues it to the exact byte.

    tokens ──detokenizer──▶ text ──stop strings──▶ text ──parsers──▶ pieces ──format──▶ bytes
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dynserve.dialects import chain, markers
from dynserve.dialects.base import Content, Piece, ReasoningText, held_back
from dynserve.render.formats import make_format
from dynserve.render.formats.base import AnswerEnd, Transcript
from dynserve.text.detokenize import CONTEXT, Vocabulary
from dynserve.wire.link import Usage
from dynserve.wire.requests import (
    EventId,
    PriorOutput,
    RenderOptions,
    StopConditions,
    TokenLogprob,
    answer_tag,
    num_tokens,
    unpack_tokens,
)

REPLAYED = 128  # tokens of a step of `replay_in_steps`


class Renderer:
    """The renderer of one answer. `push` and `finish` return the bytes to send, maybe none. `prompt`: u32 token ids."""

    def __init__(self, render: RenderOptions, stop: StopConditions, prompt: bytes, vocabulary: Vocabulary) -> None:
        self._render, self._prompt, self._vocabulary = render, prompt, vocabulary
        keep = markers(render.tools, render.reasoning)
        self._detokenizer = vocabulary.detokenizer(
            skip_special=render.skip_special_tokens, keep=keep, after=unpack_tokens(prompt[-4 * CONTEXT :])
        )
        # the special tokens that the client has given as stop strings: the engine stops at them, and their text is hidden
        self._stop_texts = vocabulary.special_ids(stop.strings) if stop.strings else {}
        self._stops = StopStrings(stop.strings, keep=stop.include_string) if stop.strings else None
        self._parser = chain(render.tools, render.reasoning)
        self._format = make_format(render)
        self._transcript = Transcript(render)  # of an answer that is not streamed
        self._logprobs: list[dict[str, Any]] = []  # not sent yet
        self._opened = not render.stream
        self._echo = render.echo
        self._has_reasoning = False  # some reasoning was emitted
        self._reasoning_tokens = 0
        self.tokens = 0
        self.cached_tokens = 0
        self.stopped = False  # a stop string was found: no more output follows, and the engine can stop
        # where nothing inspects the text, the bytes around a token's text are constant
        plain = render.stream and self._stops is None and self._parser is None
        self._around = self._format.around() if plain and not render.event_ids else None
        self._last_id, self._tag = (0, -1), answer_tag(render.response_id).encode()  # of events that have ids
        self._after: EventId | None = None  # events up to this one are not sent again
        self._head = self._tail = b""  # of a chunk, while the detokenizer holds back no bytes
        self._note_usage()

    def replay(self, prior: PriorOutput, after: EventId | None = None) -> bytes:
        """Repeats the tokens that an earlier worker has rendered, one at a time as it did, so that the same text is held
        back. Returns the events after the one with the id `after`, if that is given."""
        return b"".join(self.replay_in_steps(prior, after))

    def replay_in_steps(self, prior: PriorOutput, after: EventId | None = None) -> Iterator[bytes]:
        """Like `replay`, for callers that have other work: each step takes about a millisecond. All must be taken."""
        self.cached_tokens, self._after = prior.cached_tokens, after
        events: list[bytes] = []
        for i, (token, entries) in enumerate(_one_by_one(prior.token_ids, prior.logprobs)):
            data = self.push(token, entries)
            if after is not None:
                events.append(data)
            if i % REPLAYED == REPLAYED - 1:
                yield b"".join(events)
                events.clear()
        yield b"".join(events)

    def push(self, token_ids: list[int], logprobs: list[TokenLogprob] | None) -> bytes:
        if self._head and len(token_ids) == 1 and (json := self._vocabulary.token_json(token_ids[0])):
            self.tokens += 1
            return self._head + json + self._tail
        if self._render.event_ids:
            return self._push_numbered(token_ids, logprobs)
        data = self._push(token_ids, logprobs)
        if self._around is not None:
            self._head, self._tail = self._around if self._opened and self._detokenizer.whole else (b"", b"")
        return data

    def _push_numbered(self, token_ids: list[int], logprobs: list[TokenLogprob] | None) -> bytes:
        """Pushes tokens one at a time, so that the ids of events do not depend on how many came together."""
        if len(token_ids) < 2:
            return self._numbered(self._push(token_ids, logprobs))
        pieces = _one_by_one(token_ids, logprobs or [])
        return b"".join([self._numbered(self._push(token, entries)) for token, entries in pieces])

    def _numbered(self, data: bytes) -> bytes:
        """Gives each event an id, and drops those that the client has."""
        if not self._render.stream:
            return data
        numbered = b""
        for event in data.split(b"\n\n")[:-1]:
            tokens, number = self._last_id
            self._last_id = (tokens, number + 1) if tokens == self.tokens else (self.tokens, 0)
            if self._after is None or self._last_id > self._after:
                numbered += b"id: %d.%d.%b\n%b\n\n" % (*self._last_id, self._tag, event)
        return numbered

    def _push(self, token_ids: list[int], logprobs: list[TokenLogprob] | None) -> bytes:
        if self.stopped:
            return b""
        data = b""
        if self._echo:
            data, logprobs = self._echo_prompt(logprobs)
        self._count(len(token_ids))
        text = self._detokenizer.push(token_ids)
        if self._stops is not None:
            text = self._stops.push(text)
            self.stopped = self._stops.matched is not None
        if logprobs is not None and self._render.logprobs is not None:
            self._logprobs += [self._format.logprob(entry, self._vocabulary) for entry in logprobs]
        return data + self._emit(text)

    def finish(self, reason: str, stop_token: int | None = None) -> tuple[bytes, Usage]:
        """Returns the last bytes (held text, finish reason, usage) and the usage. A `stop_token` counts as generated."""
        data, usage = self._finish(reason, stop_token)
        return self._numbered(data) if self._render.event_ids else data, usage

    def _finish(self, reason: str, stop_token: int | None) -> tuple[bytes, Usage]:
        if stop_token is not None:
            self._count(1)
        data = b"" if self.stopped else self._emit(self._held_text(stop_token))
        if self._parser is not None:
            data += self._emit_pieces(self._parser.finish())
        usage = self._note_usage()
        end = AnswerEnd(reason, usage, self._stops.matched if self._stops is not None else None)
        if not self._render.stream:
            self._transcript.rest = self._pop_logprobs()
            return self._format.body(self._transcript, end), usage
        if not self._opened:
            data += self._open()
        return data + self._format.last(end, self._pop_logprobs()), usage

    def _held_text(self, stop_token: int | None) -> str:
        """The text held back until the end of the answer."""
        text = self._detokenizer.flush()
        if self._stops is None:
            return text
        text = self._stops.push(text)
        ended_by = None if stop_token is None else self._stop_texts.get(stop_token)
        return text + self._stops.flush() + ("" if ended_by is None else self._stops.end_with(ended_by))

    def _echo_prompt(self, logprobs: list[TokenLogprob] | None) -> tuple[bytes, list[TokenLogprob] | None]:
        """Returns the prompt rendered with its log-probabilities, if any, and the log-probabilities of the answer."""
        self._echo = False
        ids = unpack_tokens(self._prompt)
        if logprobs is not None and self._render.logprobs is not None and len(logprobs) >= len(ids):
            self._logprobs += [self._format.logprob(entry, self._vocabulary) for entry in logprobs[: len(ids)]]
            logprobs = logprobs[len(ids) :]
        detokenizer = self._vocabulary.detokenizer(skip_special=self._render.skip_special_tokens)
        return self._emit_content(detokenizer.push(ids) + detokenizer.flush()), logprobs

    def _count(self, tokens: int) -> None:
        self.tokens += tokens
        if self._parser is not None and self._parser.in_reasoning:
            self._reasoning_tokens += tokens
        if self._render.continuous_usage:
            self._note_usage()

    def _note_usage(self) -> Usage:
        prompt = num_tokens(self._prompt)
        reasoning = self._reasoning_tokens if self._has_reasoning else 0
        self._format.usage = Usage(prompt, self.tokens, self.cached_tokens, reasoning_tokens=reasoning)
        return self._format.usage

    def _emit(self, text: str) -> bytes:
        if self._parser is not None:
            return self._emit_pieces(self._parser.push(text)) if text else self._opening()
        return self._emit_content(text)

    def _emit_content(self, text: str) -> bytes:
        if not self._render.stream:
            if text:
                self._transcript.add((Content(text),), self._pop_logprobs())
            return b""
        opening = self._opening()
        return opening + self._format.content(text, self._pop_logprobs()) if text else opening

    def _emit_pieces(self, pieces: list[Piece]) -> bytes:
        if not self._has_reasoning and self._render.reasoning is not None:
            self._has_reasoning = any(isinstance(piece, ReasoningText) for piece in pieces)
        if not self._render.stream:
            if pieces:
                self._transcript.add(pieces, self._pop_logprobs())
            return b""
        data = self._opening()
        for piece in pieces:
            data += self._format.piece(piece, self._pop_logprobs())
        return data

    def _opening(self) -> bytes:
        return b"" if self._opened else self._open()

    def _open(self) -> bytes:
        self._opened = True
        return self._format.first()

    def _pop_logprobs(self) -> list[dict[str, Any]] | None:
        if self._render.logprobs is None:
            return None
        logprobs, self._logprobs = self._logprobs, []
        return logprobs


def _one_by_one(
    token_ids: list[int], logprobs: list[TokenLogprob]
) -> Iterator[tuple[list[int], list[TokenLogprob] | None]]:
    """Splits an output into its tokens. Log-probabilities of the prompt, if any, come with the first of them."""
    ahead = max(0, len(logprobs) - len(token_ids))
    for i, token_id in enumerate(token_ids):
        yield [token_id], logprobs[ahead + i if i else 0 : ahead + i + 1] or None


class StopStrings:
    """Cuts the text at the first stop string, and holds back text that may be the beginning of one."""

    def __init__(self, strings: tuple[str, ...], *, keep: bool = False) -> None:
        self._strings, self._keep = strings, keep
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        if self.matched is not None:
            return ""
        text = self._held + text
        found = [(at, string) for string in self._strings if (at := text.find(string)) >= 0]
        if found:
            # the first one in the text; of two at one position, the longer
            at, string = min(found, key=lambda f: (f[0], -len(f[1])))
            self.matched, self._held = string, ""
            return text[: at + len(string)] if self._keep else text[:at]
        held = held_back(text, self._strings)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def end_with(self, string: str) -> str:
        """Notes that the engine has stopped at the token of a stop string. Returns the text to show for it."""
        if self.matched is not None:
            return ""
        self.matched = string
        return string if self._keep else ""

    def flush(self) -> str:
        """Returns the held text at the end of the answer, where it cannot become a stop string any more."""
        held, self._held = self._held, ""
        return held
