from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynserve.dialects import chain
from dynserve.dialects.base import CallArguments, CallStart, Content, Piece
from dynserve.dialects.client_names import CustomInput
from dynserve.render.formats import make_format
from dynserve.render.formats.base import AnswerEnd, Transcript
from dynserve.wire.link import Usage
from dynserve.wire.requests import RenderOptions, ToolName, ToolParsing

NAMES = {
    "patch": ToolName(name="patch", custom=True),
    "demo__look": ToolName(name="look", namespace="demo"),
    "demo__run": ToolName(name="run", namespace="demo", custom=True),
}


@given(st.text(), st.booleans(), st.data())
def test_the_input_of_a_custom_tool_is_decoded_while_it_arrives(text: str, ascii_: bool, data: st.DataObject) -> None:
    decoder = CustomInput()
    arguments, out, at = json.dumps({"input": text}, ensure_ascii=ascii_), "", 0
    while at < len(arguments):
        size = data.draw(st.integers(1, 7))
        out += decoder.push(arguments[at : at + size])
        at += size
        assert text.startswith(out)
    assert out + decoder.finish() == text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ('{"patch": "x"}', '{"patch": "x"}'),  # not what the tool asks for: passed on
        ("[1]", "[1]"),
        ("{", "{"),
        ('{"a": 1, "input": "x"}', "x"),
        ('{"input": "half', "half"),
        ('{"input": "half\\', "half"),
        ('{"input": "\\ud800x"}', "\ufffdx"),  # UTF-8 has no halves of surrogate pairs
    ],
)
def test_other_arguments_of_a_custom_tool_are_passed_on(arguments: str, text: str) -> None:
    decoder = CustomInput()
    assert "".join(decoder.push(char) for char in arguments) + decoder.finish() == text


def pieces(text: str) -> list[Piece]:
    tools = ToolParsing(parser="hermes", names=(*NAMES, "plain"), client_names=NAMES, enforced=True)
    parser = chain(tools, None)
    assert parser is not None
    out: list[Piece] = []
    for char in text:
        out += parser.push(char)
    return out + parser.finish()


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>\n"


ANSWER = (
    "Well. "
    + call("patch", input='a "b"\n')
    + call("demo__look", at=1)
    + call("demo__run", input="x")
    + call("plain", y=2)
)


def test_calls_have_the_names_and_the_form_that_the_client_knows() -> None:
    found: list[list[Any]] = []
    for piece in pieces(ANSWER):
        if isinstance(piece, CallStart):
            found.append([piece.namespace, piece.name, piece.custom, ""])
        elif isinstance(piece, CallArguments):
            found[-1][-1] += piece.text
    assert found == [
        ["", "patch", True, 'a "b"\n'],
        ["demo", "look", False, '{"at": 1}'],
        ["demo", "run", True, "x"],
        ["", "plain", False, '{"y": 2}'],
    ]
    assert "".join(piece.text for piece in pieces(ANSWER) if isinstance(piece, Content)).strip() == "Well."


def rendered(kind: Any, *, stream: bool) -> Any:
    """The body of an answer, or its events."""
    form = make_format(RenderOptions(kind=kind, response_id="id", model="m", created=1, stream=stream))
    end = AnswerEnd("stop", Usage(1, 1, 0))
    if not stream:
        transcript = Transcript(RenderOptions(kind=kind, response_id="id", model="m", created=1))
        transcript.add(pieces(ANSWER), None)
        return json.loads(form.body(transcript, end))
    data = form.first() + b"".join(form.piece(piece, None) for piece in pieces(ANSWER)) + form.last(end, None)
    lines = [line[6:] for line in data.decode().split("\n") if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


def test_a_chat_shows_custom_calls_as_openai_does() -> None:
    calls = rendered("chat", stream=False)["choices"][0]["message"]["tool_calls"]
    assert calls[0] == {"id": calls[0]["id"], "type": "custom", "custom": {"name": "patch", "input": 'a "b"\n'}}
    assert calls[3]["function"] == {"name": "plain", "arguments": '{"y": 2}'}
    parts: dict[int, Any] = {}
    for chunk in rendered("chat", stream=True):
        for part in (chunk["choices"][0]["delta"].get("tool_calls") or ()) if chunk["choices"] else ():
            if "id" in part:
                parts[part["index"]] = {part["type"]: dict(part[part["type"]])}
            elif "custom" in part:
                parts[part["index"]]["custom"]["input"] += part["custom"]["input"]
    assert parts[0] == {"custom": {"name": "patch", "input": 'a "b"\n'}}


def test_a_response_shows_custom_calls_and_namespaces_as_openai_does() -> None:
    items = rendered("response", stream=False)["output"][1:]
    assert [(item["type"], item["name"], item.get("namespace"), item.get("input", item.get("arguments"))) for item in items] == [
        ("custom_tool_call", "patch", None, 'a "b"\n'),
        ("function_call", "look", "demo", '{"at": 1}'),
        ("custom_tool_call", "run", "demo", "x"),
        ("function_call", "plain", None, '{"y": 2}'),
    ]  # fmt: skip
    events = rendered("response", stream=True)
    deltas = [event["delta"] for event in events if event["type"] == "response.custom_tool_call_input.delta"]
    assert "".join(deltas) == 'a "b"\nx'
    done = [event["input"] for event in events if event["type"] == "response.custom_tool_call_input.done"]
    assert done == ['a "b"\n', "x"]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
