"""`ClientNames`: calls in the client's own form. A model calls every tool as a function with JSON arguments; a client may
have given it as a custom tool, whose input is a text, or as a member of a namespace."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from dynserve.dialects.base import CallArguments, CallStart, Content, Parser, Piece
from dynserve.wire.requests import ToolName

_BEGIN = re.compile(r'\s*\{\s*"input"\s*:\s*"')
_MAX_BEGIN = 64  # characters of white space and the name
_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{4}|[^u])")


class ClientNames:
    """Gives the calls of another parser the names of `names`, and to custom tools their input, while it is generated."""

    def __init__(self, parser: Parser, names: Mapping[str, ToolName]) -> None:
        self._parser, self._names = parser, names
        self._input: CustomInput | None = None  # of the open call, if its tool is a custom one

    @property
    def in_reasoning(self) -> bool:
        return self._parser.in_reasoning

    def push(self, text: str) -> list[Piece]:
        return self._through(self._parser.push(text))

    def finish(self) -> list[Piece]:
        return self._through(self._parser.finish()) + self._end()

    def _through(self, pieces: list[Piece]) -> list[Piece]:
        out: list[Piece] = []
        for piece in pieces:
            if isinstance(piece, CallArguments) and self._input is not None:
                text = self._input.push(piece.text)
                out += [CallArguments(text)] if text else []
                continue
            if isinstance(piece, CallStart | Content):
                out += self._end()
            if isinstance(piece, CallStart) and (name := self._names.get(piece.name)) is not None:
                self._input = CustomInput() if name.custom else None
                piece = CallStart(name.name, name.custom, name.namespace)
            out.append(piece)
        return out

    def _end(self) -> list[Piece]:
        rest = "" if self._input is None else self._input.finish()
        self._input = None
        return [CallArguments(rest)] if rest else []


class CustomInput:
    """Decodes the text in `{"input": "..."}` while it arrives. Arguments of another form are passed on as they are."""

    def __init__(self) -> None:
        self._held = ""  # not decoded yet
        self._inside = self._other = self._ended = False

    def push(self, text: str) -> str:
        self._held += text
        if self._other or self._ended:
            return ""
        if not self._inside:
            begin = _BEGIN.match(self._held)
            if begin is None:
                self._other = len(self._held) > _MAX_BEGIN
                return ""
            self._inside, self._held = True, self._held[begin.end() :]
        return self._decode()

    def finish(self) -> str:
        """Returns what is left at the end of the call."""
        rest, self._held = self._held, ""
        if self._inside:
            return ""  # an incomplete escape, or the closing brace
        try:
            found = json.loads(rest)
        except (ValueError, RecursionError):
            return rest
        text = found.get("input") if isinstance(found, dict) else None
        return _whole(text) if isinstance(text, str) else rest

    def _decode(self) -> str:
        out: list[str] = []
        at = 0
        while at < len(self._held):
            char = self._held[at]
            if char == '"':
                self._ended = True
                break
            if char != "\\":
                end = min(i for i in (self._held.find('"', at), self._held.find("\\", at), len(self._held)) if i >= 0)
                out.append(self._held[at:end])
                at = end
                continue
            escape = self._escape(at)
            if not escape:
                break  # incomplete
            out.append(json.loads(f'"{escape}"'))
            at += len(escape)
        self._held = self._held[at:]
        return _whole("".join(out))

    def _escape(self, at: int) -> str:
        """The complete escape at a position, with both halves of a surrogate pair; empty if it is incomplete."""
        found = _ESCAPE.match(self._held, at)
        if found is None:
            return ""
        if not found[0].startswith("\\u") or not 0xD800 <= int(found[0][2:], 16) < 0xDC00:
            return found[0]
        second = _ESCAPE.match(self._held, found.end())
        if second is not None:
            return found[0] + second[0] if second[0].startswith("\\u") else found[0]
        rest = self._held[found.end() :]
        return "" if not rest or (rest[0] == "\\" and len(rest) < 6) else found[0]


def _whole(text: str) -> str:
    """The text with replacement characters for halves of surrogate pairs, which JSON can hold and UTF-8 cannot."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
