"""From an answer's text to thoughts, content and tool calls. A worker's card names the parsers of its model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynserve.config import REASONING_PARSERS, TOOL_PARSERS
from dynserve.dialects import reasoning
from dynserve.dialects.base import CallArguments, CallStart, Content, Parser, Piece, ReasoningText
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

# What a chat template writes tells how its model answers; the first that is found counts.
_TOOLS_BY_TEMPLATE = {
    "<tool_call>": "hermes",
    "[TOOL_CALLS]": "mistral",
    "<｜tool▁calls▁begin｜>": "deepseek_v3",
    "<|python_tag|>": "llama3_json",
    "<|python_start|>": "pythonic",
}
# Forms that no parser here reads although their marks are those of another: XML within, of Qwen3-Coder and GLM.
_UNKNOWN = ("<function=", "<arg_key>")
_TOOLS_BY_TYPE = {
    "qwen2": "hermes",
    "qwen3": "hermes",
    "llama": "llama3_json",
    "mistral": "mistral",
    "llama4": "pythonic",
}


def chain(tools: ToolParsing | None, thoughts: ReasoningParsing | None) -> Parser | None:
    """None for an answer that is nothing but content.

    Raises:
        InternalError: a parser of another version.
    """
    if thoughts is not None and thoughts.parser not in REASONING_PARSERS:
        raise InternalError(f"this worker has no reasoning parser {thoughts.parser!r}")
    if tools is not None and tools.parser not in TOOL_PARSERS:
        raise InternalError(f"this worker has no tool parser {tools.parser!r}")
    call_parser = None if tools is None else _calls(tools)
    think_parser = None if thoughts is None else ThinkTags(open=thoughts.open)
    if call_parser is None or think_parser is None:
        return call_parser or think_parser
    return _ReasoningThenCalls(think_parser, call_parser)


def markers(tools: ToolParsing | None, thoughts: ReasoningParsing | None) -> tuple[str, ...]:
    """Texts that must be seen although a tokenizer may take them for special."""
    found: tuple[str, ...] = () if thoughts is None else (reasoning.BEGIN, reasoning.END)
    if tools is not None and tools.parser in STYLES:
        style = STYLES[tools.parser]
        found += (*style.markers, *style.after, "[ARGS]", "<｜tool▁sep｜>")
    return found


def detect_tools(template: str, config: Mapping[str, Any]) -> str:
    """The tool parser for a model, by its template or else its type; empty when its template knows no tools."""
    if "tools" not in template or any(mark in template for mark in _UNKNOWN):
        return ""
    for mark, parser in _TOOLS_BY_TEMPLATE.items():
        if mark in template:
            if parser == "deepseek_v3" and "```json" not in template:
                return "deepseek_v31"
            return "mistral_v11" if parser == "mistral" and "[ARGS]" in template else parser
    return _TOOLS_BY_TYPE.get(str(config.get("model_type")), "")


def detect_reasoning(template: str) -> str:
    """Qwen3's templates can turn thoughts off; where a template only cuts them from history, they always come."""
    if reasoning.END not in template and reasoning.BEGIN not in template:
        return ""
    return "qwen3" if "enable_thinking" in template or reasoning.BEGIN in template else "deepseek_r1"


def _calls(tools: ToolParsing) -> Parser:
    if tools.parser == "pythonic":
        return PythonicCalls(tools.names)
    return JsonCalls(STYLES[tools.parser], tools.names, enforced=tools.enforced)


class _ReasoningThenCalls:
    """Tool calls in what is left of an answer without its thought."""

    def __init__(self, thoughts: Parser, calls: Parser) -> None:
        self._thoughts, self._calls = thoughts, calls

    @property
    def in_reasoning(self) -> bool:
        return self._thoughts.in_reasoning

    def push(self, text: str) -> list[Piece]:
        return self._through(self._thoughts.push(text))

    def finish(self) -> list[Piece]:
        return self._through(self._thoughts.finish()) + self._calls.finish()

    def _through(self, pieces: list[Piece]) -> list[Piece]:
        out: list[Piece] = []
        for piece in pieces:
            if isinstance(piece, Content):
                out += self._calls.push(piece.text)
            else:
                out.append(piece)
        return out
