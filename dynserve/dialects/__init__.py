"""Parsers that split an answer's text into reasoning, content and tool calls. A worker's card names those of its model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynserve.config import REASONING_PARSERS, TOOL_PARSERS
from dynserve.dialects import reasoning
from dynserve.dialects.base import CallArguments, CallStart, Content, Parser, Piece, ReasoningText
from dynserve.dialects.client_names import ClientNames
from dynserve.dialects.pythonic import PythonicCalls
from dynserve.dialects.reasoning import ThinkTags
from dynserve.dialects.tools import STYLES, JsonCalls
from dynserve.errors import InternalError
from dynserve.wire.requests import ReasoningParsing, ToolParsing

__all__ = [
    "TOOL_PARSERS",
    "CallArguments",
    "CallStart",
    "Content",
    "Parser",
    "Piece",
    "ReasoningText",
    "chain",
    "markers",
]

# Marks in a chat template, and the parser for a model that has them; the first match counts.
_TOOLS_BY_TEMPLATE = {
    "<tool_call>": "hermes",
    "[TOOL_CALLS]": "mistral",
    "<｜tool▁calls▁begin｜>": "deepseek_v3",
    "<|python_tag|>": "llama3_json",
    "<|python_start|>": "pythonic",
}
# Unsupported formats that share a mark with a supported one: the XML calls of Qwen3-Coder and GLM.
_UNKNOWN = ("<function=", "<arg_key>")
_TOOLS_BY_TYPE = {
    "qwen2": "hermes",
    "qwen3": "hermes",
    "llama": "llama3_json",
    "mistral": "mistral",
    "llama4": "pythonic",
}


def chain(tools: ToolParsing | None, reasoning_parsing: ReasoningParsing | None) -> Parser | None:
    """Returns the parser of an answer; None for an answer that is only content.

    Raises:
        InternalError: a parser that this version does not have.
    """
    if reasoning_parsing is not None and reasoning_parsing.parser not in REASONING_PARSERS:
        raise InternalError(f"this worker has no reasoning parser {reasoning_parsing.parser!r}")
    if tools is not None and tools.parser not in TOOL_PARSERS:
        raise InternalError(f"this worker has no tool parser {tools.parser!r}")
    call_parser = None if tools is None else _calls(tools)
    reasoning_parser = None if reasoning_parsing is None else ThinkTags(open=reasoning_parsing.open)
    if call_parser is None or reasoning_parser is None:
        return call_parser or reasoning_parser
    return _ReasoningThenCalls(reasoning_parser, call_parser)


def markers(tools: ToolParsing | None, reasoning_parsing: ReasoningParsing | None) -> tuple[str, ...]:
    """Texts that the parsers need to see, and that must not be skipped as special tokens."""
    found: tuple[str, ...] = () if reasoning_parsing is None else (reasoning.BEGIN, reasoning.END)
    if tools is not None and tools.parser in STYLES:
        style = STYLES[tools.parser]
        found += (*style.markers, *style.inner, *style.after)
    return found


def detect_tools(template: str, config: Mapping[str, Any]) -> str:
    """The tool parser for a model, by its template or else its type; empty when the template does not support tools."""
    if "tools" not in template or any(mark in template for mark in _UNKNOWN):
        return ""
    for mark, parser in _TOOLS_BY_TEMPLATE.items():
        if mark in template:
            if parser == "deepseek_v3" and "```json" not in template:
                return "deepseek_v31"
            return "mistral_v11" if parser == "mistral" and "[ARGS]" in template else parser
    return _TOOLS_BY_TYPE.get(str(config.get("model_type")), "")


def detect_reasoning(template: str) -> str:
    """The reasoning parser for a model, by its template; empty for none. It is never one that takes an answer without tags
    for reasoning: a template that only removes reasoning from history does not say that every answer begins with it."""
    return "qwen3" if reasoning.END in template or reasoning.BEGIN in template else ""


def _calls(tools: ToolParsing) -> Parser:
    parser: Parser
    if tools.parser == "pythonic":
        parser = PythonicCalls(tools.names)
    else:
        parser = JsonCalls(STYLES[tools.parser], tools.names, enforced=tools.enforced)
    return ClientNames(parser, tools.client_names) if tools.client_names else parser


class _ReasoningThenCalls:
    """Parses reasoning first, then tool calls in the remaining content."""

    def __init__(self, reasoning_parser: Parser, calls: Parser) -> None:
        self._reasoning, self._calls = reasoning_parser, calls

    @property
    def in_reasoning(self) -> bool:
        return self._reasoning.in_reasoning

    def push(self, text: str) -> list[Piece]:
        return self._through(self._reasoning.push(text))

    def finish(self) -> list[Piece]:
        return self._through(self._reasoning.finish()) + self._calls.finish()

    def _through(self, pieces: list[Piece]) -> list[Piece]:
        out: list[Piece] = []
        for piece in pieces:
            if isinstance(piece, Content):
                out += self._calls.push(piece.text)
            else:
                out.append(piece)
        return out
