"""`/v1/chat/completions`, field by field, through the openai SDK."""

from __future__ import annotations

import json
import re
from typing import Any

import openai
import pytest

from tests.conformance.conftest import WEATHER, Target, says

Client = openai.AsyncOpenAI
SUM = "What is 3+4?"
COUNT = "Count from 1 to 9."


async def ask(client: Client, target: Target, text: str = SUM, **fields: Any) -> Any:
    fields = {"temperature": 0, "max_tokens": 60} | fields
    return await client.chat.completions.create(model=target.model, messages=says(text), **fields)


async def chunks_of(client: Client, target: Target, text: str = SUM, **fields: Any) -> list[Any]:
    return [chunk async for chunk in await ask(client, target, text, stream=True, **fields)]


def text_of(chunks: list[Any], index: int = 0) -> str:
    return "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices if c.index == index)


async def test_an_answer_has_openais_fields(client: Client, target: Target) -> None:
    answer = await ask(client, target)
    (choice,) = answer.choices
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-") and answer.model == target.model
    assert choice.index == 0 and choice.message.role == "assistant" and choice.finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@pytest.mark.tiny_model
async def test_the_tiny_model_adds(client: Client, target: Target) -> None:
    assert (await ask(client, target)).choices[0].message.content == "7"


MESSAGES: dict[str, list[Any]] = {
    "string": says(SUM),
    "parts": [{"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "3+4?"}]}],
    "system": [{"role": "system", "content": "Be brief."}, *says(SUM)],
    "developer": [{"role": "developer", "content": [{"type": "text", "text": "Be brief."}]}, *says(SUM)],
    "named": [{"role": "user", "name": "ann", "content": SUM}],
    "history": [*says("Hello"), {"role": "assistant", "content": "Hello!"}, *says(SUM)],
    "refusal": [*says("x"), {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, *says(SUM)],
    "tools": [
        *says("Weather in Rome?"),
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ],
    "tool parts": [
        *says("Weather in Rome?"),
        {
            "role": "assistant",
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "sunny"}]},
    ],
}


@pytest.mark.parametrize("form", MESSAGES)
async def test_every_form_of_message_is_understood(client: Client, target: Target, form: str) -> None:
    tools: Any = [WEATHER] if "tool" in form else openai.omit
    answer = await client.chat.completions.create(
        model=target.model, messages=MESSAGES[form], max_tokens=20, temperature=0, tools=tools
    )
    assert answer.choices[0].message.content
    if target.ours:
        assert answer.choices[0].message.content == ("It is sunny in Rome." if form == "tools" else answer.choices[0].message.content)  # fmt: skip


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
async def test_an_answer_ends_at_its_limit(client: Client, target: Target, field: str) -> None:
    answer = await ask(client, target, COUNT, **({"max_tokens": openai.omit} | {field: 3}))
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 3


async def test_choices_come_with_their_indexes(client: Client, target: Target) -> None:
    answer = await ask(client, target, COUNT, n=3, seed=5, temperature=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    again = await ask(client, target, COUNT, n=3, seed=5, temperature=1)
    assert [c.message.content for c in again.choices] == [c.message.content for c in answer.choices]
    assert answer.usage.completion_tokens >= 3


async def test_choices_are_streamed_with_their_indexes(client: Client, target: Target) -> None:
    chunks = await chunks_of(client, target, COUNT, n=3, stream_options={"include_usage": True})
    unary = await ask(client, target, COUNT, n=3)
    assert [text_of(chunks, i) for i in range(3)] == [c.message.content for c in unary.choices]
    ends = {c.index: c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason}
    assert ends == {c.index: c.finish_reason for c in unary.choices}
    assert chunks[-1].usage.completion_tokens == unary.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == unary.usage.prompt_tokens


async def test_a_seed_makes_an_answer_repeatable(client: Client, target: Target) -> None:
    hot = {"temperature": 2, "seed": 7, "max_tokens": 20}
    first, second = [await ask(client, target, "Tell me a story.", **hot) for _ in range(2)]
    assert first.choices[0].message.content == second.choices[0].message.content


async def test_all_sampling_fields_are_accepted(client: Client, target: Target) -> None:
    extra = {"top_k": 5, "min_p": 0.05, "repetition_penalty": 1.1, "min_tokens": 2, "skip_special_tokens": True}
    answer = await ask(
        client, target, temperature=0.7, top_p=0.9, presence_penalty=0.5, frequency_penalty=0.5, extra_body=extra
    )
    assert answer.usage.completion_tokens >= 2


async def test_a_penalty_keeps_words_from_coming_again(client: Client, target: Target) -> None:
    text = (await ask(client, target, "Say: red red red red red red", extra_body={"repetition_penalty": 50})).choices[0]
    assert text.message.content.count("red") <= 2


async def test_a_stop_string_ends_the_answer_before_it(client: Client, target: Target) -> None:
    whole = (await ask(client, target, COUNT)).choices[0].message.content
    cut = whole[len(whole) // 2 :][:3]
    answer = await ask(client, target, COUNT, stop=[cut, "never"])
    assert answer.choices[0].message.content == whole[: whole.index(cut)] and answer.choices[0].finish_reason == "stop"
    chunks = await chunks_of(client, target, COUNT, stop=cut)
    assert text_of(chunks) == answer.choices[0].message.content
    kept = await ask(client, target, COUNT, stop=cut, extra_body={"include_stop_str_in_output": True})
    assert kept.choices[0].message.content == whole[: whole.index(cut)] + cut


@pytest.mark.tiny_model
async def test_end_of_turn_tokens_are_obeyed_ignored_and_replaced(client: Client, target: Target, http: Any) -> None:
    on = await ask(client, target, max_tokens=12, extra_body={"ignore_eos": True})
    assert on.usage.completion_tokens == 12 and "<|im_end|>" not in on.choices[0].message.content
    shown = await ask(client, target, max_tokens=12, extra_body={"ignore_eos": True, "skip_special_tokens": False})
    assert "<|im_end|>" in shown.choices[0].message.content
    (comma,) = (await http.post("/tokenize", json={"model": target.model, "prompt": ","})).json()["tokens"]
    cut = await ask(client, target, COUNT, extra_body={"stop_token_ids": [comma]})
    assert cut.choices[0].message.content == "1" and cut.choices[0].finish_reason == "stop"
    longer = await ask(client, target, extra_body={"min_tokens": 6})
    assert longer.usage.completion_tokens >= 6


@pytest.mark.tiny_model
async def test_a_bias_bans_or_forces_a_token(client: Client, target: Target, http: Any) -> None:
    (seven,) = (await http.post("/tokenize", json={"model": target.model, "prompt": "7"})).json()["tokens"]
    banned = await ask(client, target, logit_bias={str(seven): -100})
    assert not banned.choices[0].message.content.startswith("7")
    forced = await ask(client, target, COUNT, logit_bias={str(seven): 100}, max_tokens=4)
    assert forced.choices[0].message.content == "7777"


async def test_logprobs_belong_to_the_tokens_of_the_answer(client: Client, target: Target) -> None:
    answer = await ask(client, target, COUNT, logprobs=True, top_logprobs=3, max_tokens=6)
    entries = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in entries) == answer.choices[0].message.content
    for entry in entries:
        assert bytes(entry.bytes).decode() == entry.token and entry.logprob <= 0
        assert len(entry.top_logprobs) == 3 and entry.top_logprobs[0].token == entry.token
    chunks = await chunks_of(client, target, COUNT, logprobs=True, top_logprobs=3, max_tokens=6)
    streamed = [e for chunk in chunks for c in chunk.choices if c.logprobs for e in c.logprobs.content or ()]
    assert [e.token for e in streamed] == [e.token for e in entries]


async def test_a_stream_begins_with_the_role_and_ends_with_a_finish_reason(client: Client, target: Target) -> None:
    chunks = await chunks_of(client, target)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks][:-1] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == "stop" and len({c.id for c in chunks}) == 1
    assert all(c.usage is None for c in chunks)


async def test_usage_comes_in_the_last_chunk_or_in_every_chunk(client: Client, target: Target) -> None:
    chunks = await chunks_of(client, target, COUNT, stream_options={"include_usage": True})
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 0
    assert all(chunk.usage is None for chunk in chunks[:-1])
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await chunks_of(client, target, COUNT, stream_options=options)
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] > counts[0]


SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "warm": {"type": "boolean"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "warm", "days"],
    "additionalProperties": False,
}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("temperature", [0, 2])
async def test_an_answer_follows_a_json_schema(client: Client, target: Target, stream: bool, temperature: int) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA, "strict": True}}
    fields: Any = {"response_format": form, "temperature": temperature, "max_tokens": 400, "seed": 3}
    if stream:
        text = text_of(await chunks_of(client, target, "Weather?", **fields))
    else:
        text = (await ask(client, target, "Weather?", **fields)).choices[0].message.content
    found = json.loads(text)
    assert found["city"] in ("Rome", "Oslo") and isinstance(found["warm"], bool) and 1 <= found["days"] <= 9


async def test_an_answer_is_a_json_object(client: Client, target: Target) -> None:
    form: Any = {"type": "json_object"}
    # an object may be longer than any limit, so only its beginning is certain
    answer = (await ask(client, target, "Say: {}", response_format=form, max_tokens=200)).choices[0]
    assert answer.message.content.lstrip().startswith("{")
    if answer.finish_reason == "stop":
        assert isinstance(json.loads(answer.message.content), dict)


@pytest.mark.parametrize(
    ("field", "value", "pattern"),
    [
        ("guided_regex", r"[a-c]{3}-\d{2}", r"[a-c]{3}-\d{2}"),
        ("guided_choice", ["red dog", "blue cat", 'a "quoted" one'], r'red dog|blue cat|a "quoted" one'),
        ("guided_grammar", 'root ::= "yes" | "no" more\nmore ::= "!" | "?"', r"yes|no[!?]"),
        ("guided_json", {"type": "array", "items": {"type": "boolean"}, "maxItems": 3}, r"\[[\s\S]*\]"),
    ],
)
async def test_an_answer_follows_a_grammar(
    client: Client, target: Target, field: str, value: Any, pattern: str
) -> None:
    for temperature in (0, 2):
        answer = await ask(client, target, temperature=temperature, extra_body={field: value}, seed=1)
        assert re.fullmatch(pattern, answer.choices[0].message.content), answer
        assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"guided_json": {"type": "nonsense"}}, "nonsense"),
        ({"guided_regex": "("}, "grammar cannot be used"),
        ({"guided_grammar": "root ::= missing"}, "missing"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 3}}}},
            "it is not a type or a list of types",
        ),
    ],
)
async def test_a_bad_grammar_is_a_bad_request_with_its_reason(
    client: Client, target: Target, fields: Any, message: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        await ask(client, target, extra_body=fields)


@pytest.mark.tiny_model
async def test_with_tool_choice_auto_the_model_calls_a_tool_or_answers(client: Client, target: Target) -> None:
    tools: Any = [WEATHER]
    called = (await ask(client, target, "What is the weather in Paris?", tools=tools)).choices[0]
    (call,) = called.message.tool_calls
    assert called.finish_reason == "tool_calls" and called.message.content is None
    assert call.function.name == "get_weather" and json.loads(call.function.arguments) == {"city": "Paris"}
    said = (await ask(client, target, "Say: red dog", tools=tools)).choices[0]
    assert said.message.content == "red dog" and said.message.tool_calls is None and said.finish_reason == "stop"


@pytest.mark.tiny_model
async def test_tool_calls_are_streamed_as_openai_streams_them(client: Client, target: Target) -> None:
    tools: Any = [WEATHER]
    chunks = await chunks_of(client, target, "Weather in Oslo and Rome?", tools=tools)
    deltas = [call for chunk in chunks for c in chunk.choices for call in c.delta.tool_calls or ()]
    heads = [call for call in deltas if call.id]
    assert [(call.index, call.type, call.function.name, call.function.arguments) for call in heads] == [
        (0, "function", "get_weather", ""),
        (1, "function", "get_weather", ""),
    ]
    arguments = ["".join(c.function.arguments for c in deltas if c.index == i) for i in (0, 1)]
    assert [json.loads(text)["city"] for text in arguments] == ["Oslo", "Rome"]
    assert len(deltas) > 4  # piece by piece
    assert text_of(chunks) == "" and chunks[-1].choices[0].finish_reason == "tool_calls"
    single = await chunks_of(client, target, "Weather in Oslo and Rome?", tools=tools, parallel_tool_calls=False)
    assert {call.index for chunk in single for c in chunk.choices for call in c.delta.tool_calls or ()} == {0}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_tool_is_called_with_tool_choice_required(client: Client, target: Target, stream: bool) -> None:
    tools: Any = [WEATHER]
    fields: Any = {"tools": tools, "tool_choice": "required", "temperature": 1, "seed": 3, "max_tokens": 300}
    if stream:
        chunks = await chunks_of(client, target, "Hello!", **fields)
        deltas = [call for chunk in chunks for c in chunk.choices for call in c.delta.tool_calls or ()]
        name = deltas[0].function.name
        text = "".join(call.function.arguments for call in deltas if call.index == 0)
        reason = chunks[-1].choices[0].finish_reason
    else:
        choice = (await ask(client, target, "Hello!", **fields)).choices[0]
        name, text = choice.message.tool_calls[0].function.name, choice.message.tool_calls[0].function.arguments
        reason = choice.finish_reason
    assert name == "get_weather" and isinstance(json.loads(text)["city"], str) and reason == "tool_calls"


async def test_a_named_tool_is_called_and_no_other(client: Client, target: Target) -> None:
    other = {"type": "function", "function": {"name": "other", "parameters": {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}}}  # fmt: skip
    tools: Any = [WEATHER, other]
    choice: Any = {"type": "function", "function": {"name": "other"}}
    answer = (await ask(client, target, "Weather in Rome?", tools=tools, tool_choice=choice)).choices[0]
    assert [call.function.name for call in answer.message.tool_calls] == ["other"]
    assert isinstance(json.loads(answer.message.tool_calls[0].function.arguments)["on"], bool)
    assert answer.finish_reason == "stop"  # as OpenAI ends it


async def test_no_tool_is_called_with_tool_choice_none(client: Client, target: Target) -> None:
    tools: Any = [WEATHER]
    answer = (await ask(client, target, "What is the weather in Paris?", tools=tools, tool_choice="none")).choices[0]
    assert answer.message.tool_calls is None and answer.message.content


@pytest.mark.tiny_model
async def test_reasoning_is_separate_from_the_content(client: Client, target: Target) -> None:
    answer = await ask(client, target, reasoning_effort="low")
    assert answer.choices[0].message.content == "7"
    assert answer.choices[0].message.reasoning_content == "The result is 7."
    assert answer.usage.completion_tokens_details.reasoning_tokens > 3
    chunks = await chunks_of(client, target, extra_body={"chat_template_kwargs": {"enable_thinking": True}})
    reasoning = "".join(getattr(c.delta, "reasoning_content", None) or "" for chunk in chunks for c in chunk.choices)
    assert reasoning == "The result is 7." and text_of(chunks) == "7"
    assert (await ask(client, target, reasoning_effort="none")).usage.completion_tokens_details.reasoning_tokens == 0


@pytest.mark.tiny_model
async def test_a_schema_applies_only_after_the_reasoning_has_ended(client: Client, target: Target) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}}
    answer = (await ask(client, target, reasoning_effort="low", response_format=form)).choices[0].message
    assert answer.reasoning_content == "The result is 7." and isinstance(json.loads(answer.content), int)


@pytest.mark.tiny_model
async def test_a_final_assistant_message_is_continued(client: Client, target: Target) -> None:
    messages: Any = [*says(COUNT), {"role": "assistant", "content": "1, 2, 3, 4, 5,"}]
    answer = await client.chat.completions.create(
        model=target.model, messages=messages, temperature=0, extra_body={"continue_final_message": True}
    )
    assert answer.choices[0].message.content == " 6, 7, 8, 9"


async def test_openai_fields_without_effect_are_accepted_without_a_warning(http: Any, target: Target) -> None:
    body = {
        "model": target.model, "messages": says(SUM), "user": "u", "metadata": {"a": "b"}, "store": True,
        "service_tier": "auto", "cache_salt": "s", "prompt_cache_key": "k", "priority": 1, "parallel_tool_calls": True,
    }  # fmt: skip
    answer = await http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200 and "x-dynserve-warning" not in answer.headers


@pytest.mark.tiny_model
async def test_unknown_fields_are_named_in_a_header(http: Any, target: Target) -> None:
    body = {"model": target.model, "messages": says(SUM), "tempratur": 1, "zß": 2}
    answer = await http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200
    assert answer.headers["x-dynserve-warning"] == "ignored: tempratur, z?"
