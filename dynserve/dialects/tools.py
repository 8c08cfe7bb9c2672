"""Tool calls in an answer's text. Each model family has its own way to write them; what differs is a `CallStyle`.

    content ──marker──▶ OPEN ──header──▶ JSON ──value ends──▶ AFTER ──marker or next object──▶ OPEN
       ▲                 │ no call after all: text               │
       └─────────────────┴───────────────────────────────────────┘ other text

A call whose form a grammar guarantees is shown while it grows. Any other is held until it is whole and its arguments are
valid JSON; one that never gets there is what it is: text.
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
    """How one family writes calls.

    `header` is what may stand between a marker and the JSON object, with a group `name` where the name stands outside;
    otherwise the object itself has `name` and `arguments` (or `parameters`).
    """

    markers: tuple[str, ...]
    header: re.Pattern[str]
    after: tuple[str, ...]  # closing strings and separators
    leading: bool = False  # an answer that begins with an object is a call, too
    begin: str  # for grammars: what stands before the arguments, `{}` is the name
    end: str
    opening: str = ""  # around and between all calls
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
        after=(",", "]"),
        begin="[TOOL_CALLS]{}[ARGS]",
        end="",
    ),
    "deepseek_v3": CallStyle(
        markers=("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"),
        header=re.compile(
            r"\s*(?:<｜tool▁call▁begin｜>)?\s*(?:function<｜tool▁sep｜>)?(?P<name>[\w.-]+)(?:<｜tool▁sep｜>)?\s*(?:```json)?\s*(?=\{)"
        ),
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
    """Calls with JSON arguments in any `CallStyle`."""

    def __init__(self, style: CallStyle, names: tuple[str, ...], *, enforced: bool) -> None:
        self._style, self._names, self._enforced = style, names, enforced
        self._state = _CallState.START if style.leading else _CallState.CONTENT
        self._held = ""  # not looked at yet
        self._raw = ""  # of the call that is being read, from its marker on
        self._name: str | None = None
        self._value = JsonEnd()
        self._wrapped = False  # one more brace is to come
        self._called = self._talked = False
        self._space = ""  # behind a call

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
        """What was held back; a call that is not whole is text, unless it was already shown."""
        state, rest = self._state, self._raw + self._held
        self._raw = self._held = ""
        if state is _CallState.JSON and self._enforced:
            return []  # a call that the answer's end has cut
        if state is _CallState.AFTER and any(string.startswith(rest) for string in ("}", *self._style.after)):
            return []  # the beginning of what closes a call, or nothing
        if state is _CallState.CONTENT and self._called:
            rest = rest.rstrip()
        return [Content(rest)] if rest else []

    def _step(self, pieces: list[Piece]) -> bool:
        """One transition; False when more text is needed."""
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
        """Answers of some families are a call from their first brace on."""
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
            said = held[:at].rstrip()
            self._say(pieces, said)
            self._state, self._raw, self._held = (
                _CallState.OPEN,
                held[len(said) : at + len(marker)],
                held[at + len(marker) :],
            )
            return True
        certain = held[: len(held) - held_back(held, self._style.markers)].rstrip()
        self._say(pieces, certain)
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
        """Swallows what closes a call, and finds out whether another follows."""
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
        # between two pieces of text there was a call, and the white space stays
        self._state, self._held = _CallState.CONTENT, (self._space if self._talked else "") + self._held
        self._space = ""
        return True

    def _whole(self) -> list[Piece] | None:
        """The call that has been read, or None when it is none."""
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
        if isinstance(arguments, str):  # some models write them as OpenAI does: JSON within a string
            arguments = _object(arguments)
        if not isinstance(name, str) or not _NAME.fullmatch(name) or not isinstance(arguments, dict):
            return None
        if self._style.leading and name not in self._names:
            return None  # an answer that only looks like a call
        return [CallStart(name), CallArguments(json_text(arguments))]

    def _is_over(self) -> bool:
        """The end of a call without a call; a code fence may yet be the beginning of one."""
        return any(string in self._held for string in self._style.after if string[0] == "<")

    def _give_up(self, pieces: list[Piece]) -> bool:
        """It is no call."""
        self._state = _CallState.CONTENT
        self._say(pieces, self._raw)
        self._raw = ""
        return True

    def _say(self, pieces: list[Piece], text: str) -> None:
        if text:
            self._talked = True
            pieces.append(Content(text))


class JsonEnd:
    """Finds where a JSON object ends, as its text comes."""

    def __init__(self) -> None:
        self._depth = 0
        self._string = self._escaped = False
        self.size = 0
        self.ended = False

    def feed(self, text: str) -> int:
        """How many characters of `text` belong to the object."""
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
    """Models write line breaks into strings, which JSON does not allow and everyone understands."""
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
    raise ValueError(f"{constant} is no JSON")


_NAME = re.compile(r"[^\s\ud800-\udfff]{1,256}")
