"""What grammar an answer must follow: from `response_format`, `guided_*` and `tool_choice` to a `Guide`."""

from __future__ import annotations

import json
from typing import Any

from dynserve.errors import BadRequest
from dynserve.openai.chat import ChatRequest, NamedTool, Tool
from dynserve.openai.completions import CompletionRequest
from dynserve.openai.parsers.tools import STYLES, Style
from dynserve.wire.discovery import Card
from dynserve.wire.requests import Guide

MAX_GRAMMAR = 256 << 10  # characters
ANY_OBJECT: dict[str, Any] = {"type": "object"}
Format = dict[str, Any]  # of a structural tag


def guide_of(asked: ChatRequest | CompletionRequest, card: Card) -> Guide | None:
    """Raises BadRequest for what this model's workers cannot enforce, and for grammars beyond the bound."""
    chat = asked if isinstance(asked, ChatRequest) else None
    guide = _with_tools(chat, card) if chat is not None and chat.callable_tools() else _plain(asked)
    if guide is None:
        return None
    if not card.guides:
        raise BadRequest(
            "this model's workers cannot hold an answer to a grammar: no response_format, guided_*, or tool_choice other "
            "than auto and none",
            param="response_format",
        )
    if len(guide.text) > MAX_GRAMMAR:
        size = f"{len(guide.text):,}"
        raise BadRequest(f"the schemas and grammars of a request may have {MAX_GRAMMAR:,} characters, not {size}")
    return guide


def enforces_calls(card: Card) -> bool:
    """Whether calls of tools are held to their schemas even when the model may choose to call none."""
    return card.guides and card.tool_parser in STYLES and not STYLES[card.tool_parser].leading


def _plain(asked: ChatRequest | CompletionRequest) -> Guide | None:
    form = asked.response_format if isinstance(asked, ChatRequest) else None
    if form is not None and form.type == "json_object":
        return Guide(kind="json", text=_text(ANY_OBJECT))
    if form is not None and form.type == "json_schema" and form.json_schema is not None:
        return Guide(kind="json", text=_text(form.json_schema.schema_))
    if asked.guided_json is not None:
        given = asked.guided_json
        return Guide(kind="json", text=given if isinstance(given, str) else _text(given))
    if asked.guided_regex is not None:
        return Guide(kind="regex", text=asked.guided_regex)
    if asked.guided_grammar is not None:
        return Guide(kind="grammar", text=asked.guided_grammar)
    if asked.guided_choice is not None:
        return Guide(kind="grammar", text="root ::= " + " | ".join(map(_text, asked.guided_choice)))
    return None


def _with_tools(asked: ChatRequest, card: Card) -> Guide | None:
    tools, choice = asked.callable_tools(), asked.tool_choice
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
    forced = choice == "required" or isinstance(choice, NamedTool)
    single = asked.parallel_tool_calls is False or isinstance(choice, NamedTool)
    if card.tool_parser == "pythonic":
        return Guide(kind="grammar", text=_pythonic(tools, single)) if forced else _plain(asked)
    style = STYLES.get(card.tool_parser)
    if style is None:
        raise BadRequest("this model does not call tools: its chat template knows none", param="tools")
    if forced:
        return _tag(_calls(style, tools, single))
    plain = _plain(asked)
    if plain is not None:
        return _tag({"type": "or", "elements": [_calls(style, tools, single), _as_format(plain)]})
    return _tag(_free(style, tools, single)) if enforces_calls(card) else None


def _calls(style: Style, tools: list[Tool], single: bool) -> Format:
    """Nothing but calls, at least one."""
    around = [_list(style, tools, single)]
    if style.opening:
        around.insert(0, {"type": "const_string", "value": style.opening})
    if style.closing:
        around.append({"type": "const_string", "value": style.closing})
    return around[0] if len(around) == 1 else {"type": "sequence", "elements": around}


def _free(style: Style, tools: list[Tool], single: bool) -> Format:
    """Any text, and from a marker on calls that are well-formed."""
    if style.opening:
        tags = [{"type": "tag", "begin": style.opening, "content": _list(style, tools, single), "end": style.closing}]
        single = True
    else:
        tags = [_call(style, tool) for tool in tools]
    return {"type": "triggered_tags", "triggers": [style.markers[0]], "tags": tags, "stop_after_first": single}


def _list(style: Style, tools: list[Tool], single: bool) -> Format:
    return {
        "type": "tags_with_separator",
        "tags": [_call(style, tool) for tool in tools],
        "separator": style.separator,
        "at_least_one": True,
        "stop_after_first": single,
    }


def _call(style: Style, tool: Tool) -> Format:
    schema = tool.function.parameters or ANY_OBJECT
    content = {"type": "json_schema", "json_schema": schema}
    return {"type": "tag", "begin": style.begin.replace("{}", tool.function.name), "content": content, "end": style.end}


def _as_format(guide: Guide) -> Format:
    match guide.kind:
        case "json":
            return {"type": "json_schema", "json_schema": _schema(guide.text)}
        case "regex":
            return {"type": "regex", "pattern": guide.text}
        case _:
            return {"type": "grammar", "grammar": guide.text}


def _schema(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"guided_json is not JSON: {error}", param="guided_json") from error


def _tag(form: Format) -> Guide:
    return Guide(kind="structural_tag", text=_text({"type": "structural_tag", "format": form}))


def _pythonic(tools: list[Tool], single: bool) -> str:
    """A list of calls with keyword arguments by the names of the schema; the values are any literals."""
    calls, rules = [], []
    for at, tool in enumerate(tools):
        parameters = tool.function.parameters or {}
        named = [name for name in parameters.get("properties", {}) if isinstance(name, str) and name.isidentifier()]
        required = [name for name in named if name in parameters.get("required", [])]
        optional = [name for name in named if name not in required]
        one = " | ".join(f"{_text(name + '=')} value" for name in optional)
        first = ' ", " '.join(f"{_text(name + '=')} value" for name in required)
        more = f'(", " ({one}))*' if one else ""
        body = f"{first} {more}" if first else (f"(({one}) {more})?" if one else "")
        rules.append(f'call{at} ::= {_text(tool.function.name + "(")} {body} ")"')
        calls.append(f"call{at}")
    call = f"({' | '.join(calls)})"
    root = f'root ::= "[" {call} {"" if single else f"""(", " {call})*"""} "]"'
    return "\n".join([root, *rules, _LITERALS])


_LITERALS = r"""value ::= string | number | "True" | "False" | "None" | list | dict
list ::= "[" (value (", " value)*)? "]"
dict ::= "{" (string ": " value (", " string ": " value)*)? "}"
string ::= "\"" ([^"\\\r\n] | "\\" ["\\/bfnrt'])* "\""
number ::= "-"? ("0" | [1-9] [0-9]*) ("." [0-9]+)? ([eE] [+-]? [0-9]+)?"""


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
