"""The bytes of each API: streamed and unary answers are equal, and a replayed renderer continues with the same bytes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Tokenizer

from dynserve.config import TINY_MODEL
from dynserve.render.renderer import Renderer
from dynserve.text.detokenize import Vocabulary
from dynserve.wire.requests import (
    PriorOutput,
    ReasoningParsing,
    RenderOptions,
    StopConditions,
    TokenLogprob,
    ToolParsing,
    pack_tokens,
)

TOKENIZER = Tokenizer.from_file(str(TINY_MODEL / "tokenizer.json"))
VOCABULARY = Vocabulary(TOKENIZER)
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
ANSWERS = {
    "content": "Hello there, 你好 🙂",
    "thought": "<think>\nHm, so.\n</think>\n\nYes.",
    "calls": f"{CALL}\n{CALL}",
    "all": f"<think>\nHm.\n</think>\n\nLet me see. {CALL} Done.",
    "nothing": "",
    "only a thought": "<think>\nHm, and",
    "cut call": '<tool_call>\n{"name": "add", "arguments": {"a": ',
    "line ends": "one\u2028two\u0085three\u2029four",
}
KINDS: list[Any] = ["chat", "response", "message"]
RULES = StopConditions(max_tokens=99)
PROMPT = pack_tokens([300] * 5)


def spec(kind: Any, *, stream: bool, enforced: bool = True, **changes: Any) -> RenderOptions:
    return RenderOptions(
        kind=kind, response_id="resp_1", model="m", created=1, stream=stream, usage=True,
        tools=ToolParsing(parser="hermes", names=("add",), enforced=enforced), reasoning=ReasoningParsing(parser="qwen3"), **changes,
    )  # fmt: skip


def tokens_of(text: str) -> list[int]:
    ids: list[int] = TOKENIZER.encode(text, add_special_tokens=False).ids
    return ids


def rendered(
    render: RenderOptions, text: str, reason: str = "stop", stop: StopConditions = RULES
) -> tuple[list[bytes], Any]:
    renderer = Renderer(render, stop, PROMPT, VOCABULARY)
    parts = []
    for id_ in tokens_of(text):
        parts.append(renderer.push([id_], None if render.logprobs is None else [TokenLogprob(id_, -1.0)]))
        if renderer.stopped:
            break
    last, usage = renderer.finish(reason)
    return [*parts, last], usage


def events(data: bytes) -> list[Any]:
    assert b"\xe2\x80\xa8" not in data and b"\xc2\x85" not in data  # clients must not read these as line ends
    blocks = [block for block in data.decode().split("\n\n") if block]
    lines = [line for block in blocks for line in block.split("\n") if line.startswith("data: ")]
    return [json.loads(line[6:]) for line in lines if line != "data: [DONE]"]


def together(kind: str, chunks: list[Any]) -> Any:
    """Returns the reasoning, text and calls that a client assembles from a stream, in order, and the finish reason."""
    if kind == "chat":
        message: dict[str, Any] = {"reasoning": "", "content": "", "calls": []}
        for choice in (c for chunk in chunks for c in chunk["choices"]):
            delta = choice["delta"]
            message["reasoning"] += delta.get("reasoning_content", "")
            message["content"] += delta.get("content", "")
            for call in delta.get("tool_calls", []):
                if "id" in call:
                    message["calls"].append([call["id"], call["function"]["name"], ""])
                message["calls"][call["index"]][2] += call["function"]["arguments"]
        return message, chunks[-2]["choices"][0]["finish_reason"]
    if kind == "response":
        return chunks[-1]["response"]["output"], chunks[-1]["response"]["status"]
    blocks: list[Any] = []
    for chunk in chunks:
        if chunk["type"] == "content_block_start":
            blocks.append(chunk["content_block"] | ({"input": ""} if "input" in chunk["content_block"] else {}))
        elif chunk["type"] == "content_block_delta":
            delta = chunk["delta"]
            field = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "input"}[delta["type"]]
            blocks[-1][field] += delta.get("text", delta.get("thinking", delta.get("partial_json")))
    whole = []
    for block in blocks:
        if "input" in block:
            try:
                block["input"] = json.loads(block["input"])
            except ValueError:
                continue  # truncated: a unary message does not contain it
        whole.append(block)
    reason = next(chunk["delta"] for chunk in chunks if chunk["type"] == "message_delta")
    return whole, reason["stop_reason"]


def whole(kind: str, body: Any) -> Any:
    if kind == "chat":
        message = body["choices"][0]["message"]
        calls = [[c["id"], c["function"]["name"], c["function"]["arguments"]] for c in message.get("tool_calls", [])]
        found = {"reasoning": message.get("reasoning_content", ""), "content": message["content"] or "", "calls": calls}
        return found, body["choices"][0]["finish_reason"]
    if kind == "response":
        return body["output"], body["status"]
    return body["content"], body["stop_reason"]


@pytest.mark.parametrize("reason", ["stop", "length"])
@pytest.mark.parametrize("enforced", [False, True])
@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("kind", KINDS)
def test_streamed_and_unary_answers_have_the_same_content(kind: str, answer: str, enforced: bool, reason: str) -> None:
    parts, usage = rendered(spec(kind, stream=True, enforced=enforced), ANSWERS[answer], reason)
    (*empty, body), usage_again = rendered(spec(kind, stream=False, enforced=enforced), ANSWERS[answer], reason)
    assert not any(empty) and usage == usage_again
    assert together(kind, events(b"".join(parts))) == whole(kind, json.loads(body))


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_replayed_renderer_continues_with_the_same_bytes(kind: str, answer: str, stream: bool) -> None:
    ids, render = tokens_of(ANSWERS[answer]), spec(kind, stream=stream, logprobs=1)
    parts, usage = rendered(render, ANSWERS[answer])
    for cut in range(1, len(ids)):
        renderer = Renderer(render, RULES, PROMPT, VOCABULARY)
        renderer.replay(PriorOutput(ids[:cut], [TokenLogprob(id_, -1.0) for id_ in ids[:cut]]))
        rest = [renderer.push([id_], [TokenLogprob(id_, -1.0)]) for id_ in ids[cut:]]
        last, usage_again = renderer.finish("stop")
        assert [*rest, last] == parts[cut:] and usage_again == usage


def test_an_echo_with_log_probabilities_is_replayed() -> None:
    ids = tokens_of("one two three")
    render = RenderOptions(kind="completion", response_id="c", model="m", created=1, logprobs=1, echo=True)
    prompt = tokens_of("zero")
    entries = [TokenLogprob(id_, -1.0, [(5, -0.5)]) for id_ in [*prompt, *ids]]
    first = Renderer(render, RULES, pack_tokens(prompt), VOCABULARY)
    first.push(ids[:1], entries[: len(prompt) + 1])
    for at, id_ in enumerate(ids[1:], len(prompt) + 1):
        first.push([id_], entries[at : at + 1])
    second = Renderer(render, RULES, pack_tokens(prompt), VOCABULARY)
    second.replay(PriorOutput(ids[:2], entries[: len(prompt) + 2]))
    for at, id_ in enumerate(ids[2:], len(prompt) + 2):
        second.push([id_], entries[at : at + 1])
    body = first.finish("stop")[0]
    assert second.finish("stop")[0] == body
    choice = json.loads(body)["choices"][0]
    assert choice["text"] == "zeroone two three"
    columns = choice["logprobs"]
    assert columns["token_logprobs"][0] is None and columns["top_logprobs"][0] is None
    chosen = {VOCABULARY.token_text(id_): -1.0 for id_ in ids[:1]}
    assert columns["top_logprobs"][len(prompt)] == {VOCABULARY.token_text(5): -0.5} | chosen


def test_reasoning_tokens_are_counted_without_tool_calls() -> None:
    _, usage = rendered(spec("chat", stream=False), ANSWERS["all"])
    reasoning = len(tokens_of("<think>\nHm.\n</think>"))
    assert reasoning - 1 <= usage.reasoning_tokens <= reasoning
    assert usage.completion_tokens == len(tokens_of(ANSWERS["all"]))
    _, usage = rendered(spec("chat", stream=False), ANSWERS["calls"])
    assert usage.reasoning_tokens == 0


def test_the_finish_reason_of_a_named_tool_is_stop_and_of_others_tool_calls() -> None:
    for named, expected in ((True, "stop"), (False, "tool_calls")):
        tools = ToolParsing(parser="hermes", names=("add",), named=named)
        render = RenderOptions(kind="chat", response_id="c", model="m", created=1, tools=tools)
        body = json.loads(rendered(render, CALL)[0][-1])
        assert body["choices"][0]["finish_reason"] == expected
    assert json.loads(rendered(render, CALL, "length")[0][-1])["choices"][0]["finish_reason"] == "length"


def test_mistrals_calls_have_ids_of_nine_characters() -> None:
    tools = ToolParsing(parser="mistral", names=("add",))
    render = RenderOptions(kind="chat", response_id="c", model="m", created=1, tools=tools)
    message = json.loads(rendered(render, '[TOOL_CALLS][{"name": "add", "arguments": {}}]')[0][-1])["choices"][0][
        "message"
    ]
    assert len(message["tool_calls"][0]["id"]) == 9


def test_the_stop_string_that_ended_a_message_is_reported() -> None:
    stop = StopConditions(max_tokens=9, strings=("nothing", " two"))
    render = RenderOptions(kind="message", response_id="c", model="m", created=1)
    body = json.loads(rendered(render, "one two three", stop=stop)[0][-1])
    assert (body["stop_reason"], body["stop_sequence"], body["content"][0]["text"]) == ("stop_sequence", " two", "one")


def test_parsers_read_marks_that_the_tokenizer_declares_as_special() -> None:
    special = Tokenizer.from_str(TOKENIZER.to_str().replace('"special":false', '"special":true'))
    vocabulary = Vocabulary(special)
    assert special.token_to_id("<think>") in vocabulary.special
    text = f"<think>Hm.</think>{CALL}"
    renderer = Renderer(spec("chat", stream=False), RULES, PROMPT, vocabulary)
    for id_ in special.encode(text, add_special_tokens=False).ids:
        renderer.push([id_], None)
    message = json.loads(renderer.finish("stop")[0])["choices"][0]["message"]
    assert message["reasoning_content"] == "Hm." and message["tool_calls"][0]["function"]["name"] == "add"
