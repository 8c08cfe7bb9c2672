"""Conversion of `response_format`, `guided_*` and `tool_choice` to the `Grammar` that an answer must follow."""

from __future__ import annotations

import json
import keyword
import re
from typing import Any, NamedTuple

from dynserve.api.body_bounds import check_json_texts
from dynserve.api.chat import ChatRequest, Function, NamedTool
from dynserve.api.completions import CompletionRequest
from dynserve.api.json_schema import children, lenient_rules_of, rules_of
from dynserve.dialects.tools import STYLES, CallStyle
from dynserve.errors import BadRequest
from dynserve.wire.discovery import Card
from dynserve.wire.requests import Grammar

MAX_GRAMMAR = 256 << 10  # characters
MAX_DEPTH, MAX_NODES = 64, 4_000  # of a JSON schema
ANY_OBJECT: dict[str, Any] = {"type": "object"}
_HALVES = re.compile("[\ud800-\udfff]")  # of surrogate pairs, which UTF-8 cannot hold
Format = dict[str, Any]  # a node of a structural tag


def grammar_of(request: ChatRequest | CompletionRequest, card: Card) -> Grammar | None:
    """Returns the grammar of an answer, if any. Raises what `enforced` raises."""
    return enforced(request, card).grammar


class Enforced(NamedTuple):
    """The grammar of an answer, if any. `dropped`: words of tools' schemas that it does not hold an answer to."""

    grammar: Grammar | None
    dropped: list[str]


def enforced(request: ChatRequest | CompletionRequest, card: Card) -> Enforced:
    """Returns the grammar of an answer.

    Raises:
        BadRequest: the model's workers cannot enforce it, or it exceeds a bound.
    """
    chat = request if isinstance(request, ChatRequest) else None
    dropped: list[str] = []
    with_tools = chat is not None and chat.callable_tools()
    grammar = _with_tools(chat, card, dropped) if chat is not None and with_tools else _plain(request)
    if grammar is None:
        return Enforced(None, dropped)
    if not card.grammars:
        because = f" ({card.no_grammars})" if card.no_grammars else ""
        raise BadRequest(
            f"this model's workers cannot hold an answer to a grammar{because}: omit response_format and guided_*, and use "
            "tool_choice auto or none",
            param="response_format",
        )
    if len(grammar.text) > MAX_GRAMMAR:
        size = f"{len(grammar.text):,}"
        raise BadRequest(f"the schemas and grammars of a request may have {MAX_GRAMMAR:,} characters, not {size}")
    if len(grammar.rules) > 4 * MAX_GRAMMAR:
        raise BadRequest("the schemas of this request stand for too many rules; simplify them")
    return Enforced(grammar, dropped)


def enforces_calls(card: Card) -> bool:
    """Whether a grammar enforces the schemas of tool calls even when the model may answer without a call."""
    return card.grammars and card.tool_parser in STYLES and not STYLES[card.tool_parser].leading


def _plain(request: ChatRequest | CompletionRequest) -> Grammar | None:
    form = request.response_format
    if form is not None and form.type == "json_object":
        return _json(ANY_OBJECT, "response_format")
    if form is not None and form.type == "json_schema" and form.json_schema is not None:
        return _json(form.json_schema.schema_, "response_format")
    if request.guided_json is not None:
        given = request.guided_json
        if isinstance(given, str):
            check_json_texts([given], 4 * MAX_NODES, "guided_json")
        schema = _schema(given) if isinstance(given, str) else given
        return _json(schema, "guided_json")
    if request.guided_regex is not None:
        return Grammar(kind="regex", text=request.guided_regex)
    if request.guided_grammar is not None:
        return Grammar(kind="grammar", text=request.guided_grammar)
    if request.guided_choice is not None:
        return Grammar(kind="grammar", text="root ::= " + " | ".join(map(_text, request.guided_choice)))
    return None


def _json(schema: Any, param: str) -> Grammar:
    return Grammar(kind="json", text=_text(schema), rules=rules_of(_checked(schema, param), param).text)


def _with_tools(request: ChatRequest, card: Card, dropped: list[str]) -> Grammar | None:
    tools, choice = request.callable_tools(), request.tool_choice
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool.name == choice.name]
    forced = request.must_call
    single = request.parallel_tool_calls is False or isinstance(choice, NamedTool)
    unheld = [f"tools.{tool.name}.strict (not enforced)" for tool in tools if tool.strict]
    if card.tool_parser == "pythonic":
        dropped += unheld
        calls = _pythonic(tools, single)  # refuses names that Python cannot spell, even if no call is required
        return Grammar(kind="grammar", text=calls) if forced else _plain(request)
    style = STYLES.get(card.tool_parser)
    if style is None:
        raise BadRequest("this model does not call tools: its chat template does not support them", param="tools")
    if forced:
        return _tag(_calls(style, tools, single), dropped)
    plain = _plain(request)
    if plain is not None:
        return _tag({"type": "or", "elements": [_calls(style, tools, single), _as_format(plain)]}, dropped)
    if not enforces_calls(card):
        dropped += unheld
        return None
    return _tag(_free(style, tools, single), dropped)


def _calls(style: CallStyle, tools: list[Function], single: bool) -> Format:
    """A format of one or more calls, without other text."""
    around = [_list(style, tools, single)]
    if style.opening:
        around.insert(0, {"type": "const_string", "value": style.opening})
    if style.closing:
        around.append({"type": "const_string", "value": style.closing})
    return around[0] if len(around) == 1 else {"type": "sequence", "elements": around}


def _free(style: CallStyle, tools: list[Function], single: bool) -> Format:
    """A format of any text, in which a marker must be followed by a well-formed call."""
    if style.opening:
        tags = [{"type": "tag", "begin": style.opening, "content": _list(style, tools, single), "end": style.closing}]
        single = True
    else:
        tags = [_call(style, tool) for tool in tools]
    return {"type": "triggered_tags", "triggers": [style.markers[0]], "tags": tags, "stop_after_first": single}


def _list(style: CallStyle, tools: list[Function], single: bool) -> Format:
    return {
        "type": "tags_with_separator",
        "tags": [_call(style, tool) for tool in tools],
        "separator": style.separator,
        "at_least_one": True,
        "stop_after_first": single,
    }


def _call(style: CallStyle, tool: Function) -> Format:
    content = _SchemaFormat(_of_object(tool), f"tools.{tool.name}", strict=bool(tool.strict))
    return {"type": "tag", "begin": style.begin.replace("{}", tool.name), "content": content, "end": style.end}


def _of_object(tool: Function) -> dict[str, Any]:
    """The schema of a tool's arguments, which are an object."""
    schema = tool.parameters or ANY_OBJECT
    kinds = schema.get("type") or "object"
    if kinds == "object" or (isinstance(kinds, list) and "object" in kinds):
        return {**schema, "type": "object"}
    if tool.strict:
        raise BadRequest(f"tools.{tool.name}: the arguments of a function are an object, not {kinds!r}", param="tools")
    return ANY_OBJECT


class _SchemaFormat(dict[str, Any]):
    """A node of a structural tag for JSON of one schema. `strict`: the client wants the whole schema enforced. `rules`:
    those of the schema, if they are made already."""

    def __init__(self, schema: Any, place: str, *, strict: bool, rules: str = "") -> None:
        super().__init__(type="json_schema", json_schema=schema)
        self._schema, self._place, self._strict, self._rules = schema, place, strict, rules

    def with_rules(self, dropped: list[str]) -> Format:
        """The same node with rules instead of the schema."""
        if self._rules:
            return {"type": "grammar", "grammar": self._rules}
        schema = _checked(self._schema, "tools")
        made = rules_of(schema, "tools") if self._strict else lenient_rules_of(schema, "tools")
        dropped += [f"{self._place}.{word} (not enforced)" for word in made.dropped]
        return {"type": "grammar", "grammar": made.text}


def _checked(schema: Any, param: str) -> Any:
    """Returns the schema. Raises BadRequest for one whose grammar would take minutes to compile."""
    nodes, level = 0, [schema]
    for _ in range(MAX_DEPTH):
        inner = [child for node in level for child in children(node)]
        nodes += len(inner)
        if nodes > MAX_NODES:
            raise BadRequest(f"a JSON schema may have at most {MAX_NODES:,} values", param=param)
        if not inner:
            return schema
        level = inner
    raise BadRequest(f"a JSON schema may be nested at most {MAX_DEPTH} levels deep", param=param)


def _as_format(grammar: Grammar) -> Format:
    match grammar.kind:
        case "json":
            return _SchemaFormat(_schema(grammar.text), "response_format", strict=True, rules=grammar.rules)
        case "regex":
            return {"type": "regex", "pattern": grammar.text}
        case _:
            return {"type": "grammar", "grammar": grammar.text}


def _schema(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"guided_json is not JSON: {error}", param="guided_json") from error


def _tag(form: Format, dropped: list[str]) -> Grammar:
    tag = {"type": "structural_tag", "format": form}
    return Grammar(kind="structural_tag", text=_text(tag), rules=_text(_with_rules(tag, dropped)))


def _with_rules(node: Any, dropped: list[str]) -> Any:
    """A copy of a structural tag with rules instead of schemas."""
    if isinstance(node, _SchemaFormat):
        return node.with_rules(dropped)
    if isinstance(node, dict):
        return {name: _with_rules(inner, dropped) for name, inner in node.items()}
    return [_with_rules(inner, dropped) for inner in node] if isinstance(node, list) else node


def _pythonic(tools: list[Function], single: bool) -> str:
    """An EBNF grammar for a list of calls with the keyword arguments of the schema; the values are any literals."""
    calls, rules = [], []
    for at, tool in enumerate(tools):
        required, optional = _arguments(tool)
        one = " | ".join(f"{_text(name + '=')} value" for name in optional)
        first = ' ", " '.join(f"{_text(name + '=')} value" for name in required)
        more = f'(", " ({one}))*' if one else ""
        body = f"{first} {more}" if first else (f"(({one}) {more})?" if one else "")
        rules.append(f'call{at} ::= {_text(tool.name + "(")} {body} ")"')
        calls.append(f"call{at}")
    call = f"({' | '.join(calls)})"
    root = f'root ::= "[" {call} {"" if single else f"""(", " {call})*"""} "]"'
    return "\n".join([root, *rules, _LITERALS])


def _arguments(tool: Function) -> tuple[list[str], list[str]]:
    """The names of the required and of the optional parameters that are valid Python names.

    Raises:
        BadRequest: the name of the tool or of a required parameter is not valid in Python.
    """
    if not all(map(_spellable, tool.name.split("."))):
        raise BadRequest(f"this model calls tools as Python functions: {tool.name!r} cannot be one", param="tools")
    parameters = tool.parameters or {}
    properties, needed = parameters.get("properties"), parameters.get("required")
    names = list(properties) if isinstance(properties, dict) else []
    wanted = {name for name in needed if isinstance(name, str)} if isinstance(needed, list) else set()
    for name in wanted:
        if not _spellable(name):
            raise BadRequest(
                f"this model calls tools as Python functions: {name!r} cannot be a parameter", param="tools"
            )
    required = [name for name in names if name in wanted]
    return required, [name for name in names if name not in wanted and _spellable(name)]


def _spellable(name: str) -> bool:
    return name.isidentifier() and not keyword.iskeyword(name)


_LITERALS = r"""value ::= string | number | "True" | "False" | "None" | list | dict
list ::= "[" (value (", " value)*)? "]"
dict ::= "{" (string ": " value (", " string ": " value)*)? "}"
string ::= "\"" ([^"\\\r\n] | "\\" ["\\bfnrt'])* "\""
number ::= "-"? ("0" | [1-9] [0-9]*) ("." [0-9]+)? ([eE] [+-]? [0-9]+)?"""


def _text(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isascii() or not _HALVES.search(text) else json.dumps(value)
