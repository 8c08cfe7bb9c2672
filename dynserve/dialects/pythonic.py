"""Tool calls as a Python list of calls, `[f(a=1), g(b="x")]`: the format of Llama 4 and of small Llama 3.2 models."""

from __future__ import annotations

import ast
from typing import Any

from dynserve.dialects.base import CallArguments, CallStart, Content, Piece, json_text

MAX_CALLS_TEXT = 100_000  # characters; a longer list is content


class PythonicCalls:
    """Parses a Python list of calls. An answer that begins with `[` is held until its end, when it can be parsed."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names
        self._held = ""
        self._plain = False

    @property
    def in_reasoning(self) -> bool:
        return False

    def push(self, text: str) -> list[Piece]:
        if self._plain:
            return [Content(text)] if text else []
        self._held += text
        begin = self._held.lstrip()
        if not begin or (begin[0] == "[" and len(begin) < MAX_CALLS_TEXT):
            return []
        self._plain = True
        return [Content(self._release())]

    def finish(self) -> list[Piece]:
        held = self._release()
        calls = _calls(held.strip(), self._names)
        if calls is not None:
            return calls
        return [Content(held)] if held else []

    def _release(self) -> str:
        held, self._held = self._held, ""
        return held


def _calls(text: str, names: tuple[str, ...]) -> list[Piece] | None:
    """Returns the calls; None unless `text` is a list of calls of known tools with literal arguments."""
    try:
        body = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    if not isinstance(body, ast.List) or not body.elts:
        return None
    pieces: list[Piece] = []
    for call in body.elts:
        if not isinstance(call, ast.Call) or call.args or any(k.arg is None for k in call.keywords):
            return None
        name = ast.unparse(call.func)
        if name not in names:
            return None
        try:
            text = json_text({str(k.arg): _literal(k.value) for k in call.keywords})
        except (ValueError, TypeError, RecursionError):
            return None
        pieces += [CallStart(name), CallArguments(text)]
    return pieces


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id in ("true", "false", "null"):  # JSON's constants in a Python literal
        return {"true": True, "false": False, "null": None}[node.id]
    return ast.literal_eval(node)
