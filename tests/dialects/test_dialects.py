from __future__ import annotations

import json
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynserve import config
from dynserve import dialects as parsers
from dynserve.dialects import (
    CallArguments,
    CallStart,
    Content,
    Piece,
    ReasoningText,
    chain,
    detect_reasoning,
    detect_tools,
)
from dynserve.dialects.reasoning import is_open
from dynserve.wire.requests import ReasoningParsing, ToolParsing

NAMES = ("get_weather", "add")


def parse(parser: Any, text: str, sizes: list[int] | None = None) -> list[Piece]:
    """Returns the merged pieces of a text that is fed to the parser in parts of these sizes, used in turn."""
    pieces: list[Piece] = []
    at, turn = 0, 0
    while at < len(text):
        size = sizes[turn % len(sizes)] if sizes else len(text)
        pieces += parser.push(text[at : at + size])
        at, turn = at + size, turn + 1
    return merged([*pieces, *parser.finish()])


def merged(pieces: list[Piece]) -> list[Piece]:
    out: list[Piece] = []
    for piece in pieces:
        if out and type(out[-1]) is type(piece) and not isinstance(piece, CallStart):
            out[-1] = type(piece)(out[-1][0] + piece[0])
        else:
            out.append(piece)
    return out


def tools(style: str, *, enforced: bool = False) -> Any:
    parser = chain(ToolParsing(parser=style, names=NAMES, enforced=enforced), None)
    assert parser is not None
    return parser


PARIS = [CallStart("get_weather"), CallArguments('{"city": "Paris"}')]
TWO = [*PARIS, CallStart("add"), CallArguments('{"a": 1, "b": [2, "}"]}')]
ADD = '{"a": 1, "b": [2, "}"]}'

# style, text, pieces
CALLS: list[tuple[str, str, list[Piece]]] = [
    ("hermes", '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>', PARIS),
    (
        "hermes",
        'Let me see.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
        f'<tool_call>{{"name": "add", "arguments": {ADD}}}</tool_call>',
        [Content("Let me see."), *TWO],
    ),
    ("llama3_json", '{"name": "get_weather", "parameters": {"city": "Paris"}}', PARIS),
    ("llama3_json", f'<|python_tag|>{{"name": "get_weather", "parameters": {{"city": "Paris"}}}}; {{"name": "add", "parameters": {ADD}}}', TWO),
    ("mistral", f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {{"city": "Paris"}}}}, {{"name": "add", "arguments": {ADD}}}]', TWO),
    ("mistral", f'Yes.[TOOL_CALLS]get_weather[ARGS]{{"city": "Paris"}}[TOOL_CALLS]add{ADD}', [Content("Yes."), *TWO]),
    ("mistral_v11", f'Yes.[TOOL_CALLS]get_weather[ARGS]{{"city": "Paris"}}[TOOL_CALLS]add[ARGS]{ADD}', [Content("Yes."), *TWO]),
    (
        "deepseek_v3",
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{"city": "Paris"}\n```'
        f"<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{ADD}\n```"
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        TWO,
    ),
    (
        "deepseek_v31",
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris"}<｜tool▁call▁end｜>'
        f"<｜tool▁call▁begin｜>add<｜tool▁sep｜>{ADD}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        TWO,
    ),
    ("pythonic", '[get_weather(city="Paris")]', PARIS),
    ("pythonic", "[get_weather(city='Paris'), add(a=1, b=[2, '}'])]", TWO),
]  # fmt: skip
SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=5)


@pytest.mark.parametrize(("style", "text", "expected"), CALLS, ids=[f"{c[0]}-{i}" for i, c in enumerate(CALLS)])
@pytest.mark.parametrize("enforced", [False, True])
@given(sizes=SIZES)
def test_tool_calls_are_found_wherever_their_text_is_split(
    style: str, text: str, expected: list[Piece], enforced: bool, sizes: list[int]
) -> None:
    assert parse(tools(style, enforced=enforced), text, sizes) == expected


def test_every_tool_parser_has_examples() -> None:
    assert {style for style, *_ in CALLS} == set(config.TOOL_PARSERS)


# text that only resembles a call stays text
TEXTS = [
    ("hermes", "no call at all"),
    ("hermes", "a < b and <tool_calls> and <tool"),
    ("hermes", '<tool_call>\n{"name": "get_weather", "arguments": {"city": Paris}}\n</tool_call>'),
    ("hermes", '<tool_call>\n{"name": "get_weather", "argum'),
    ("hermes", "<tool_call>not json</tool_call> and more"),
    ("hermes", '<tool_call>{"arguments": {}}</tool_call>'),
    ("hermes", "use <tool_call> like this"),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>'),
    ("llama3_json", '  {"x": 1}'),
    ("pythonic", '[add(**{"a": 1})]'),
    ("llama3_json", '{"answer": 42}'),
    ("llama3_json", '{"name": "unknown", "parameters": {}}'),
    ("llama3_json", "  plain  "),
    ("mistral", "[TOOL_CALLS] nothing of the kind"),
    ("pythonic", "[1, 2, 3]"),
    ("pythonic", "[unknown(a=1)]"),
    ("pythonic", "[get_weather(city=somewhere)]"),
    ("pythonic", "plain [get_weather(city='x')]"),
    ("deepseek_v3", "<｜tool▁calls▁begin｜> hm"),
]


@pytest.mark.parametrize(("style", "text"), TEXTS, ids=[f"{c[0]}-{i}" for i, c in enumerate(TEXTS)])
@given(sizes=SIZES)
def test_text_that_only_resembles_a_call_is_returned_whole(style: str, text: str, sizes: list[int]) -> None:
    pieces = parse(tools(style), text, sizes)
    assert all(isinstance(piece, Content) for piece in pieces)
    assert "".join(piece[0] for piece in pieces) == text


@given(st.text('<>/toolca_ {}"[]:,abc\n\\;', max_size=80), st.sampled_from(sorted({c[0] for c in CALLS})), SIZES)
def test_parsers_accept_any_text_and_splitting_it_changes_nothing(text: str, style: str, sizes: list[int]) -> None:
    assert parse(tools(style), text, sizes) == parse(tools(style), text)


@given(
    st.lists(
        st.sampled_from(["<tool_call>", "</tool_call>", "\n", '{"name": "add", "arguments": {}}', "x", "{", "}"]),
        max_size=8,
    ),
    SIZES,
)
def test_random_parts_of_calls_parse_the_same_however_they_are_split(parts: list[str], sizes: list[int]) -> None:
    text = "".join(parts)
    assert parse(tools("hermes"), text, sizes) == parse(tools("hermes"), text)


@pytest.mark.parametrize(
    ("style", "text", "expected"),
    [
        ("hermes", '<tool_call>{"name": "add", "arguments": null}</tool_call>', [CallStart("add"), CallArguments("{}")]),
        ("hermes", '<tool_call>{"name": "add", "arguments": {"a": "x\ny"}}</tool_call>', [CallStart("add"), CallArguments('{"a": "x\\ny"}')]),
        ("hermes", '<tool_call>{"name": "add", "arguments": {"a": "\\ud83d"}}</tool_call>', [CallStart("add"), CallArguments('{"a": "\\ud83d"}')]),
        ("deepseek_v31", '<｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": "x\ny"}<｜tool▁call▁end｜>', [CallStart("add"), CallArguments('{"a": "x\\ny"}')]),
        ("llama3_json", '{"name": "add", "parameters": {}}, {"name": "add", "parameters": {}}', [CallStart("add"), CallArguments("{}")] * 2),
        ("mistral", '[TOOL_CALLS]add[ARGS]{"a": 1}', [CallStart("add"), CallArguments('{"a": 1}')]),
        ("hermes", 'before <tool_call>{"name": "add", "arguments": {}}</tool_call> after', [Content("before"), CallStart("add"), CallArguments("{}"), Content(" after")]),
        ("hermes", '<tool_call>{"name": "add", "arguments": {}}</tool_call> <', [CallStart("add"), CallArguments("{}")]),
        ("hermes", '<tool_call>{"name": "add", "arguments": {}}</tool_call> x<', [CallStart("add"), CallArguments("{}"), Content("x<")]),
    ],
)  # fmt: skip
@given(sizes=SIZES)
def test_slightly_malformed_calls_are_understood(
    style: str, text: str, expected: list[Piece], sizes: list[int]
) -> None:
    assert parse(tools(style), text, sizes) == expected


def test_calls_enforced_by_a_grammar_are_streamed_piece_by_piece() -> None:
    parser = tools("hermes", enforced=True)
    assert parser.push('<tool_call>\n{"name": "add", "arguments": {"a"') == [CallStart("add"), CallArguments('{"a"')]
    assert parser.push(": 1") == [CallArguments(": 1")]
    assert parser.finish() == []  # the answer was cut: what was shown stands
    parser = tools("hermes")
    assert parser.push('<tool_call>\n{"name": "add", "arguments": {"a"') == []


def test_arguments_inside_a_json_string_are_decoded() -> None:
    text = json.dumps({"name": "add", "arguments": '{"a": 1}'})
    assert parse(tools("hermes"), f"<tool_call>{text}</tool_call>") == [CallStart("add"), CallArguments('{"a": 1}')]


@pytest.mark.parametrize(
    ("open_", "text", "expected"),
    [
        (False, "<think>\nHm, so.\n</think>\n\nYes.", [ReasoningText("Hm, so."), Content("Yes.")]),
        (True, "Hm, so.\n</think>\n\nYes.", [ReasoningText("Hm, so."), Content("Yes.")]),
        (True, "<think>Hm</think>Yes.", [ReasoningText("Hm"), Content("Yes.")]),
        (False, "Yes, <think> is a tag.", [Content("Yes, <think> is a tag.")]),
        (True, "Hm, and then nothing", [ReasoningText("Hm, and then nothing")]),
        (False, "<think>a < b </thin </think>", [ReasoningText("a < b </thin")]),
        (False, "<thi", [Content("<thi")]),
        (False, " \n", [Content(" \n")]),
        (False, "<think>\n\n</think>\n\nYes.", [Content("Yes.")]),
        (True, "", []),
    ],
)
@given(sizes=SIZES)
def test_reasoning_is_separated_wherever_its_text_is_split(
    open_: bool, text: str, expected: list[Piece], sizes: list[int]
) -> None:
    assert parse(chain(None, ReasoningParsing(parser="qwen3", open=open_)), text, sizes) == expected


@given(sizes=SIZES)
def test_tool_calls_are_parsed_only_after_the_reasoning(sizes: list[int]) -> None:
    both = chain(ToolParsing(parser="hermes", names=NAMES), ReasoningParsing(parser="qwen3"))
    text = '<think>shall I <tool_call>?</think>\n<tool_call>{"name": "add", "arguments": {}}</tool_call>'
    assert parse(both, text, sizes) == [ReasoningText("shall I <tool_call>?"), CallStart("add"), CallArguments("{}")]


def test_an_open_reasoning_block_is_detected_in_the_prompt() -> None:
    assert is_open("qwen3", "<|im_start|>assistant\n<think>\n")
    assert not is_open("qwen3", "<|im_start|>assistant\n")
    assert not is_open("qwen3", "<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert is_open("deepseek_r1", "<｜Assistant｜>")
    assert not is_open("deepseek_r1", "<｜Assistant｜></think>")
    assert not is_open("deepseek_r1", "<｜Assistant｜>The answer is", continued=True)
    assert is_open("qwen3", "assistant\n<think>\nFirst,", continued=True)


@pytest.mark.parametrize(
    ("template", "config", "expected"),
    [
        ("{% if tools %}<tool_call>{% endif %}", {}, "hermes"),
        ("{% if tools %}[TOOL_CALLS]{% endif %}", {}, "mistral"),
        ("{% if tools %}[TOOL_CALLS][ARGS]{% endif %}", {}, "mistral_v11"),
        ("{% if tools %}<tool_call><function={% endif %}", {}, ""),
        ("{% if tools %}<｜tool▁calls▁begin｜> ```json{% endif %}", {}, "deepseek_v3"),
        ("{% if tools %}<｜tool▁calls▁begin｜>{% endif %}", {}, "deepseek_v31"),
        ("{% if tools %}<|python_tag|>{% endif %}", {}, "llama3_json"),
        ("{% if tools %}{% endif %}", {"model_type": "qwen3"}, "hermes"),
        ("{% if tools %}{% endif %}", {"model_type": "gpt9"}, ""),
        ("no such thing", {"model_type": "qwen3"}, ""),
    ],
)
def test_the_tool_parser_is_detected_from_the_template(template: str, config: dict[str, str], expected: str) -> None:
    assert detect_tools(template, config) == expected


def test_the_reasoning_parser_is_detected_from_the_template() -> None:
    assert detect_reasoning("{{ x }}") == ""
    assert detect_reasoning("{% if enable_thinking is false %}<think>\n\n</think>{% endif %}") == "qwen3"
    # a template that strips reasoning from history does not say that answers begin with it
    assert detect_reasoning("{{ content.split('</think>')[-1] }}") == "qwen3"
    assert not is_open("qwen3", "<｜Assistant｜>")


def test_the_choices_of_the_flags_are_the_existing_parsers() -> None:
    assert set(config.TOOL_PARSERS) == {*parsers.STYLES, "pythonic"}
    assert set(config.REASONING_PARSERS) == set(parsers.reasoning.NAMES)
    assert "auto" in get_args(get_type_hints(config.WorkerConfig)["pooling"])
