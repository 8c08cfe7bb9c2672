from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from dynserve.api.chat import ChatRequest
from dynserve.api.completions import CompletionRequest
from dynserve.api.fields import parsed
from dynserve.api.grammar import MAX_GRAMMAR, enforced, enforces_calls, grammar_of
from dynserve.config import TINY_MODEL
from dynserve.dialects import TOOL_PARSERS, CallArguments, CallStart, chain
from dynserve.errors import BadRequest, Overloaded
from dynserve.executors.torch.grammars import MAX_THREADS, CompiledGrammars
from dynserve.wire.discovery import Card
from dynserve.wire.requests import Grammar, ToolParsing
from tests.conftest import until

TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]}}},
    {"type": "function", "function": {"name": "now"}},
    {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {"at": {"$ref": "#/$defs/place"}, "deep": {"type": "boolean"}}, "required": ["at"], "$defs": {"place": {"enum": ["here", "there"]}}}}},
]  # fmt: skip


def card(tool_parser: str = "hermes", *, grammars: bool = True) -> Card:
    return Card(
        model="m", block_size=32, max_seq_len=8192, num_blocks=9, max_batch_size=9, eos_token_ids=[2],
        tool_parser=tool_parser, grammars=grammars,
    )  # fmt: skip


def chat(**fields: Any) -> ChatRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}]} | fields
    return parsed(ChatRequest, json.dumps(body).encode())


def grammar(tool_parser: str = "hermes", **fields: Any) -> Grammar:
    found = grammar_of(chat(**fields), card(tool_parser))
    assert found is not None
    return found


async def accepts(found: Grammar, *texts: str) -> list[bool]:
    """Returns for each text whether it is a whole sentence of the grammar, as the engine's compiler reads it."""
    grammars, out = CompiledGrammars(Path(TINY_MODEL), 2048, [2]), []
    for text in texts:
        matcher = (await grammars.matcher(found))._matcher
        out.append(matcher.accept_string(text) and matcher.is_completed())
    return out


# how each family writes a call of `add` with these arguments, and one of `now`
WRITTEN = {
    "hermes": ('<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>', '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>', "\n"),
    "llama3_json": ('{"name": "add", "parameters": {"a": 1, "b": 2}}', '{"name": "now", "parameters": {}}', "; "),
    "mistral": ('{"name": "add", "arguments": {"a": 1, "b": 2}}', '{"name": "now", "arguments": {}}', ", "),
    "mistral_v11": ('[TOOL_CALLS]add[ARGS]{"a": 1, "b": 2}', "[TOOL_CALLS]now[ARGS]{}", ""),
    "deepseek_v3": ('<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{"a": 1, "b": 2}\n```<｜tool▁call▁end｜>', "<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜>", "\n"),
    "deepseek_v31": ('<｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": 1, "b": 2}<｜tool▁call▁end｜>', "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜>", ""),
    "pythonic": ("add(a=1, b=2)", "now()", ", "),
}  # fmt: skip
AROUND = {
    "mistral": ("[TOOL_CALLS][", "]"),
    "deepseek_v3": ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    "deepseek_v31": ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    "pythonic": ("[", "]"),
}


def written(style: str, *calls: str) -> str:
    before, after = AROUND.get(style, ("", ""))
    return before + WRITTEN[style][2].join(calls) + after


@pytest.mark.parametrize("style", TOOL_PARSERS)
async def test_required_calls_have_the_form_that_the_parser_reads(style: str) -> None:
    add, now, _ = WRITTEN[style]
    found = grammar(style, tools=TOOLS, tool_choice="required")
    one, two = written(style, add), written(style, now, add)
    assert await accepts(found, one, two, "Hello!", written(style)) == [True, True, False, False]
    single = grammar(style, tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    assert await accepts(single, one, two) == [True, False]
    named = grammar(style, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "now"}})
    assert await accepts(named, written(style, now), one) == [True, False]
    parser = chain(ToolParsing(parser=style, names=("add", "now", "find"), enforced=True), None)
    assert parser is not None
    pieces = [*parser.push(two), *parser.finish()]
    assert [p for p in pieces if isinstance(p, CallStart)] == [CallStart("now"), CallStart("add")]
    assert json.loads("".join(p.text for p in pieces if isinstance(p, CallArguments)).split("}", 1)[1]) == {
        "a": 1,
        "b": 2,
    }


@pytest.mark.parametrize("style", [style for style in TOOL_PARSERS if enforces_calls(card(style))])
async def test_with_tool_choice_auto_text_is_free_but_calls_match_the_schema(style: str) -> None:
    found = grammar(style, tools=TOOLS)
    call = written(style, WRITTEN[style][0])
    wrong = call.replace('"b"', '"c"')
    assert await accepts(found, "Hello! { } [", "Let me see. " + call, wrong) == [True, True, False]


async def test_with_a_schema_and_tools_an_answer_may_be_either() -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    found = grammar(tools=TOOLS, response_format=form)
    call = WRITTEN["hermes"][0]
    assert await accepts(found, '{"n": 3}', call, "Hello") == [True, True, False]


@pytest.mark.parametrize(
    ("fields", "good", "bad"),
    [
        ({"response_format": {"type": "json_object"}}, '{"a": [1, {"b": null}]}', "[1]"),
        ({"guided_json": '{"type": "integer"}'}, "12", '"12"'),
        ({"guided_regex": "a+b"}, "aab", "b"),
        ({"guided_choice": ['say "yes"', "no\nway", "back\\slash"]}, "no\nway", "no"),
        ({"guided_grammar": "root ::= [a-c]+"}, "abc", "d"),
    ],
)
async def test_each_field_that_sets_a_grammar_is_understood(fields: dict[str, Any], good: str, bad: str) -> None:
    assert await accepts(grammar(**fields), good, bad) == [True, False]
    if "response_format" not in fields:
        request = parsed(CompletionRequest, json.dumps({"model": "m", "prompt": "x"} | fields).encode())
        assert grammar_of(request, card()) == grammar(**fields)


async def test_white_space_within_json_is_bounded() -> None:
    found = grammar(guided_json={"type": "array", "items": {"type": "integer"}})
    assert await accepts(found, "[\n    1,\n    2\n]", "[" + " " * 33 + "1]") == [True, False]


def test_requests_without_constraints_have_no_grammar() -> None:
    assert grammar_of(chat(), card()) is None
    assert grammar_of(chat(response_format={"type": "text"}, tools=[]), card()) is None
    assert grammar_of(chat(tools=TOOLS, tool_choice="none"), card()) is None
    assert grammar_of(chat(tools=TOOLS), card("llama3_json")) is None  # a brace alone is no call yet
    assert grammar_of(chat(tools=TOOLS), card(grammars=False)) is None


@pytest.mark.parametrize(
    ("fields", "its", "message"),
    [
        ({"guided_regex": "a"}, card(grammars=False), "cannot hold an answer to a grammar"),
        ({"tools": TOOLS, "tool_choice": "required"}, card(grammars=False), "cannot hold an answer to a grammar"),
        ({"tools": TOOLS}, card(""), "does not call tools"),
        ({"guided_regex": "a" * (MAX_GRAMMAR + 1)}, card(), "may have 262,144 characters, not 262,145"),
        ({"tools": TOOLS, "guided_json": "{"}, card(), "guided_json is not JSON"),
    ],
)
def test_a_constraint_that_the_worker_cannot_enforce_is_refused(
    fields: dict[str, Any], its: Card, message: str
) -> None:
    with pytest.raises(BadRequest, match=message):
        grammar_of(chat(**fields), its)


@pytest.mark.parametrize(
    "found",
    [
        Grammar(kind="json", text="{"),
        Grammar(kind="json", text='{"type": "object", "properties": 3}'),
        Grammar(kind="regex", text="(("),
        Grammar(kind="grammar", text="nothing"),
        Grammar(kind="structural_tag", text='{"type": "structural_tag", "format": {"type": "unheard"}}'),
        Grammar(kind="structural_tag", text="[1"),
    ],
)
async def test_an_invalid_grammar_is_refused_with_a_readable_message(found: Grammar) -> None:
    grammars = CompiledGrammars(Path(TINY_MODEL), 2048, [2])
    with pytest.raises(BadRequest, match="^the grammar cannot be used: [^/]+$"):
        await grammars.matcher(found)
    await grammars.matcher(Grammar(kind="regex", text="a"))  # and the next is compiled as ever


async def test_a_grammar_that_never_compiles_does_not_delay_others(monkeypatch: pytest.MonkeyPatch) -> None:
    grammars, release = CompiledGrammars(Path(TINY_MODEL), 2048, [2]), threading.Event()
    compile_one = grammars._compile_now

    def sometimes_for_ever(key: tuple[str, str]) -> Any:
        if "slow" in key[1]:
            release.wait(30)
        return compile_one(key)

    monkeypatch.setattr(grammars, "_compile_now", sometimes_for_ever)
    monkeypatch.setattr("dynserve.executors.torch.grammars.MAX_WAIT_S", 0.05)
    known, slow = Grammar(kind="regex", text="a"), [Grammar(kind="regex", text=f"slow{i}") for i in range(MAX_THREADS)]
    await grammars.matcher(known)
    for number, found in enumerate(slow):
        await grammars.matcher(Grammar(kind="regex", text=f"quick{number}"))
        with monkeypatch.context() as hasty:
            hasty.setattr("dynserve.executors.torch.grammars.MAX_COMPILE_S", 0.05)
            with pytest.raises(BadRequest, match="takes longer than"):
                await grammars.matcher(found)
        with pytest.raises(BadRequest, match="too long to compile"):  # the second request for it is refused at once
            await grammars.matcher(found)
    await grammars.matcher(known)
    with pytest.raises(Overloaded, match="other grammars"):
        await grammars.matcher(Grammar(kind="regex", text="new"))
    release.set()
    await until(lambda: not grammars._threads.locked())
    await grammars.matcher(Grammar(kind="regex", text="new"))
    await until(lambda: not grammars._slow)
    await grammars.matcher(slow[0])


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"description": "nothing in particular"},
        {"type": "object", "allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]},
        {"allOf": [{"type": "null"}]},
        {"type": "object", "const": 1},
        {"type": "object", "enum": [1, 2]},
        {"anyOf": [{"type": "null"}, {"type": "object"}]},
        {"type": "object", "properties": {}},
    ],
)
async def test_tool_arguments_are_an_object_even_if_their_schema_allows_more(parameters: Any) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    found = grammar(tools=[tool], tool_choice="required")
    call = '<tool_call>\n{{"name": "f", "arguments": {}}}\n</tool_call>'
    assert await accepts(found, call.format("{}"), call.format("null"), call.format("3")) == [True, False, False]


async def test_arguments_that_may_be_null_are_an_object_of_the_schema() -> None:
    parameters = {"type": ["object", "null"], "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    found = grammar(
        tools=[{"type": "function", "function": {"name": "f", "parameters": parameters}}], tool_choice="required"
    )
    call = '<tool_call>\n{{"name": "f", "arguments": {}}}\n</tool_call>'
    assert await accepts(found, *map(call.format, ('{"a": 1}', "null", "{}"))) == [True, False, False]


def test_a_strict_tool_whose_arguments_are_no_object_is_refused() -> None:
    function = {"name": "f", "parameters": {"type": "string"}}
    grammar(tools=[{"type": "function", "function": function}])
    with pytest.raises(BadRequest, match="tools.f: the arguments of a function are an object, not 'string'"):
        grammar(tools=[{"type": "function", "function": function | {"strict": True}}])


@pytest.mark.parametrize("style", ["pythonic", "llama3_json"])
def test_a_strict_tool_that_is_not_enforced_is_named(style: str) -> None:
    request = chat(tools=[{"type": "function", "function": {"name": "f", "strict": True}}])
    assert enforced(request, card(style)).dropped == ["tools.f.strict (not enforced)"]


def test_halves_of_surrogate_pairs_can_be_sent_to_a_worker() -> None:
    found = grammar(guided_json=r'{"const": "\ud800"}')
    assert found.text.encode() == rb'{"const": "\ud800"}' and rb"\\ud800" in found.rules.encode()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ({"name": "my-tool"}, "'my-tool' cannot be one"),
        ({"name": "import"}, "'import' cannot be one"),
        (
            {"name": "f", "parameters": {"properties": {"from": {}}, "required": ["from"]}},
            "'from' cannot be a parameter",
        ),
    ],
)
def test_pythonic_calls_refuse_names_that_are_not_python_identifiers(function: Any, message: str) -> None:
    for choice in ("auto", "required"):
        with pytest.raises(BadRequest, match=message):
            grammar_of(chat(tools=[{"type": "function", "function": function}], tool_choice=choice), card("pythonic"))


@pytest.mark.parametrize(
    "parameters", [{"properties": None}, {"properties": 5}, {"properties": {"a": {}}, "required": None}]
)
def test_malformed_tool_schemas_cause_no_error(parameters: Any) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    for style in TOOL_PARSERS:
        grammar_of(chat(tools=[tool], tool_choice="required"), card(style))


def test_schemas_that_are_too_deep_or_too_wide_are_refused() -> None:
    deep: Any = {"type": "integer"}
    for _ in range(40):
        deep = {"type": "object", "properties": {"a": deep}}
    wide = {"enum": [str(number) for number in range(5000)]}
    for schema, message in ((deep, "64 levels deep"), (wide, "4,000 values")):
        for form in (schema, json.dumps(schema)):
            with pytest.raises(BadRequest, match=message) as refused:
                grammar_of(chat(guided_json=form), card())
            assert refused.value.param == "guided_json"


async def test_only_allowed_tools_can_be_called_and_are_shown() -> None:
    for mode, may_talk in (("auto", True), ("required", False)):
        allowed = {"mode": mode, "tools": [{"type": "function", "function": {"name": "now"}}]}
        choice = {"type": "allowed_tools", "allowed_tools": allowed}
        request = chat(tools=TOOLS, tool_choice=choice)
        assert [function.name for function in request.callable_tools()] == ["now"]
        found = grammar(tools=TOOLS, tool_choice=choice)
        add, now, _ = WRITTEN["hermes"]
        assert await accepts(found, now, add, "Hello") == [True, False, may_talk]
    with pytest.raises(BadRequest, match="names 'see'"):
        chat(
            tools=TOOLS,
            tool_choice={
                "type": "allowed_tools",
                "allowed_tools": {"mode": "auto", "tools": [{"function": {"name": "see"}}]},
            },
        )


async def test_strings_in_pythonic_calls_have_only_escapes_that_python_knows() -> None:
    found = grammar("pythonic", tools=TOOLS, tool_choice="required")
    whole = [f'[find(at="{text}")]' for text in ("plain / text", r"a\\b\n\"c\"", r"a\/b", r"a\qb")]
    assert await accepts(found, *whole) == [True, True, False, False]
