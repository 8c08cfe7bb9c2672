"""Tool calls with JSON arguments in an answer's text. A `CallStyle` describes the format of one model family.

    content ──marker──▶ OPEN ──header──▶ JSON ──value ends──▶ AFTER ──marker or next object──▶ OPEN
       ▲                 │ not a call: content                   │
       └─────────────────┴───────────────────────────────────────┘ other text

A call that a grammar enforces is streamed while it is generated. Any other is held until it is complete and its arguments
are valid JSON; if that never happens, it is emitted as content.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from dynserve.dialects.base import CallArguments, CallStart, Content, Piece, held_back, json_text

MAX_HEADER = 512  # characters between a marker and the JSON


@dataclass(frozen=True, kw_only=True)
class CallStyle:
    """The format in which one model family writes calls.

    `header` matches the text between a marker and the JSON object. It has a group `name` where the name is outside of the
    object; otherwise the object has the keys `name` and `arguments` (or `parameters`).
    """

    markers: tuple[str, ...]
    header: re.Pattern[str]
    after: tuple[str, ...]  # closing strings and separators
    leading: bool = False  # an answer that begins with a JSON object is a call, without a marker
    inner: tuple[str, ...] = ()  # special tokens between a marker and the arguments
    begin: str  # for grammars: the text before the arguments, in which `{}` stands for the name
    end: str  # for grammars: the text after the arguments
    opening: str = ""  # this and the next two: the text around and between all calls
    separator: str = ""
    closing: str = ""


_OBJECT = re.compile(r"\s*(?=\{)")
_WRAPPED = re.compile(r'\{\s*"name"\s*:\s*"(?P<name>[^"\\]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')

_MISTRAL = re.compile(r"\s*(?:\[\s*(?=\{)|(?=\{)|(?P<name>[\w.-]+)\s*(?:\[ARGS\])?\s*(?=\{))")

STYLES = {
    "hermes": CallStyle(
        markers=("<tool_call>",),
        header=_OBJECT,
        after=("</tool_call>",),
        begin='<tool_call>\n{"name": "{}", "arguments": ',
        end="}\n</tool_call>",
        separator="\n",
    ),
    "llama3_json": CallStyle(
        markers=("<|python_tag|>",),
        header=_OBJECT,
        after=(";", ","),
        leading=True,
        begin='{"name": "{}", "parameters": ',
        end="}",
        separator="; ",
    ),
    "mistral": CallStyle(
        markers=("[TOOL_CALLS]",),
        header=_MISTRAL,
        inner=("[ARGS]",),
        after=(",", "]"),
        begin='{"name": "{}", "arguments": ',
        end="}",
        opening="[TOOL_CALLS][",
        separator=", ",
        closing="]",
    ),
    "mistral_v11": CallStyle(
        markers=("[TOOL_CALLS]",),
        header=_MISTRAL,
        inner=("[ARGS]",),
        after=(",", "]"),
        begin="[TOOL_CALLS]{}[ARGS]",
        end="",
    ),
    "deepseek_v3": CallStyle(
        markers=("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"),
        header=re.compile(
            r"\s*(?:<｜tool▁call▁begin｜>)?\s*(?:function<｜tool▁sep｜>)?(?P<name>[\w.-]+)(?:<｜tool▁sep｜>)?\s*(?:```json)?\s*(?=\{)"
        ),
        inner=("<｜tool▁sep｜>",),
        after=("```", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
        begin="<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n",
        end="\n```<｜tool▁call▁end｜>",
        opening="<｜tool▁calls▁begin｜>",
        separator="\n",
        closing="<｜tool▁calls▁end｜>",
    ),
    "deepseek_v31": CallStyle(
        markers=("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"),
        header=re.compile(r"\s*(?:<｜tool▁call▁begin｜>)?(?P<name>[\w.-]+)<｜tool▁sep｜>\s*(?=\{)"),
        inner=("<｜tool▁sep｜>",),
        after=("<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
        begin="<｜tool▁call▁begin｜>{}<｜tool▁sep｜>",
        end="<｜tool▁call▁end｜>",
        opening="<｜tool▁calls▁begin｜>",
        closing="<｜tool▁calls▁end｜>",
    ),
}


class _CallState(Enum):
    START = auto()
    CONTENT = auto()
    OPEN = auto()
    JSON = auto()
    AFTER = auto()


class JsonCalls:
    """Parses calls with JSON arguments in any `CallStyle`."""

    def __init__(self, style: CallStyle, names: tuple[str, ...], *, enforced: bool) -> None:
        self._style, self._names, self._enforced = style, names, enforced
        self._state = _CallState.START if style.leading else _CallState.CONTENT
        self._held = ""  # not parsed yet
        self._raw = ""  # the text of the call that is being parsed, from its marker on
        self._name: str | None = None
        self._value = JsonEnd()
        self._wrapped = False  # the call needs one more closing brace
        self._called = self._has_content = False
        self._space = ""  # white space after a call

    @property
    def in_reasoning(self) -> bool:
        return False

    def push(self, text: str) -> list[Piece]:
        self._held += text
        pieces: list[Piece] = []
        while self._step(pieces):
            pass
        return pieces

    def finish(self) -> list[Piece]:
        """Returns the held text as content: an incomplete call is content, unless a part of it was already sent."""
        state, rest = self._state, self._raw + self._held
        self._raw = self._held = ""
        if state is _CallState.JSON and self._enforced:
            return []  # the answer ended within a call that was already sent
        if state is _CallState.AFTER and any(string.startswith(rest) for string in ("}", *self._style.after)):
            return []  # the beginning of a closing string, or empty
        if state is _CallState.CONTENT and self._called:
            rest = rest.rstrip()
        return [Content(rest)] if rest else []

    def _step(self, pieces: list[Piece]) -> bool:
        """Makes one transition. Returns False when it needs more text."""
        match self._state:
            case _CallState.START:
                return self._start()
            case _CallState.CONTENT:
                return self._content(pieces)
            case _CallState.OPEN:
                return self._open(pieces)
            case _CallState.JSON:
                return self._json(pieces)
            case _CallState.AFTER:
                return self._after()

    def _start(self) -> bool:
        """Treats a leading JSON object as a call, for styles with `leading`."""
        begin = self._held.lstrip()
        if not begin:
            return False
        self._state = _CallState.CONTENT
        if begin.startswith("{"):
            self._state, self._raw, self._held = _CallState.OPEN, self._held[: -len(begin)], begin
        return True

    def _content(self, pieces: list[Piece]) -> bool:
        held = self._held
        found = [(at, m) for m in self._style.markers if (at := held.find(m)) >= 0]
        if found:
            at, marker = min(found)
            # white space before a call belongs to the call
            content = held[:at].rstrip()
            self._emit(pieces, content)
            self._state, self._raw, self._held = (
                _CallState.OPEN,
                held[len(content) : at + len(marker)],
                held[at + len(marker) :],
            )
            return True
        certain = held[: len(held) - held_back(held, self._style.markers)].rstrip()
        self._emit(pieces, certain)
        self._held = held[len(certain) :]
        return False

    def _open(self, pieces: list[Piece]) -> bool:
        header = self._style.header.match(self._held)
        if header is None:
            if len(self._held) > MAX_HEADER or self._is_over():
                return self._give_up(pieces)
            return False
        self._name = header.groupdict().get("name")
        wrapped = self._name is None
        end = header.end()
        if wrapped and self._enforced:
            inner = _WRAPPED.match(self._held, end)
            if inner is None:
                return self._give_up(pieces) if len(self._held) > MAX_HEADER else False
            self._name, end = inner["name"], inner.end()
        self._wrapped = wrapped and self._enforced
        if self._enforced and self._name is not None:
            pieces.append(CallStart(self._name))
            self._called = True
        self._raw += self._held[:end]
        self._held = self._held[end:]
        self._state, self._value = _CallState.JSON, JsonEnd()
        return True

    def _json(self, pieces: list[Piece]) -> bool:
        if not self._held:
            return False
        end = self._value.feed(self._held)
        value, self._held = self._held[:end], self._held[end:]
        self._raw += value
        if self._enforced:
            pieces.append(CallArguments(value))
        if not self._value.ended:
            return False
        if not self._enforced:
            calls = self._whole()
            if calls is None:
                return self._give_up(pieces)
            pieces += calls
            self._called = True
        self._state, self._raw = _CallState.AFTER, ""
        return True

    def _after(self) -> bool:
        """Drops the closing strings of a call, and finds whether another call follows."""
        style = self._style
        rest = self._held.lstrip()
        self._space += self._held[: len(self._held) - len(rest)]
        self._held = rest
        if not self._held:
            return False
        if self._wrapped and self._held.startswith("}"):
            self._wrapped, self._held = False, self._held[1:]
            return True
        for string in style.after:
            if self._held.startswith(string):
                self._held, self._space = self._held[len(string) :], ""
                return True
        for marker in style.markers:
            if self._held.startswith(marker):
                self._state, self._space, self._raw, self._held = _CallState.OPEN, "", marker, self._held[len(marker) :]
                return True
        if self._held.startswith("{") and (style.leading or style.opening):
            self._state = _CallState.OPEN
            return True
        if any(string.startswith(self._held) for string in (*style.after, *style.markers)):
            return False
        # content follows the call: keep the white space between it and the content before the call
        self._state, self._held = _CallState.CONTENT, (self._space if self._has_content else "") + self._held
        self._space = ""
        return True

    def _whole(self) -> list[Piece] | None:
        """Returns the call that has been read; None when the text is not a valid call."""
        text = self._raw[len(self._raw) - self._value.size :]
        value = _object(text)
        if value is None:
            return None
        if self._name is not None:
            return [CallStart(self._name), CallArguments(text if _is_strict(text) else json_text(value))]
        name = value.get("name")
        arguments = value.get("arguments", value.get("parameters"))
        if arguments is None:
            arguments = {}
        if isinstance(arguments, str):  # some models write JSON within a string, like OpenAI's API
            arguments = _object(arguments)
        if not isinstance(name, str) or not _NAME.fullmatch(name) or not isinstance(arguments, dict):
            return None
        if self._style.leading and name not in self._names:
            return None  # a JSON answer, not a call
        return [CallStart(name), CallArguments(json_text(arguments))]

    def _is_over(self) -> bool:
        """Whether a closing tag came before any JSON object. A code fence does not count: it may open the JSON."""
        return any(string in self._held for string in self._style.after if string[0] == "<")

    def _give_up(self, pieces: list[Piece]) -> bool:
        """Emits the held text as content: it is not a call."""
        self._state = _CallState.CONTENT
        self._emit(pieces, self._raw)
        self._raw = ""
        return True

    def _emit(self, pieces: list[Piece], text: str) -> None:
        if text:
            self._has_content = True
            pieces.append(Content(text))


class JsonEnd:
    """Finds the end of a JSON object while its text arrives."""

    def __init__(self) -> None:
        self._depth = 0
        self._string = self._escaped = False
        self.size = 0
        self.ended = False

    def feed(self, text: str) -> int:
        """Returns the number of characters of `text` that belong to the object."""
        for at, char in enumerate(text):
            if self._string:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._string = False
            elif char == '"':
                self._string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    self.ended = True
                    self.size += at + 1
                    return at + 1
        self.size += len(text)
        return len(text)


def _object(text: str) -> dict[str, Any] | None:
    """Parses a JSON object; None for anything else. Line breaks within strings are accepted, because models write them."""
    try:
        found = json.loads(text, strict=False, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _is_strict(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not valid JSON")


_NAME = re.compile(r"[^\s\ud800-\udfff]{1,256}")
