"""The conformance of completions, embeddings, Responses, Messages, tokenize and models."""

from __future__ import annotations

import base64
import json
import math
from array import array
from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.conformance.conftest import WEATHER, Target, says

Client = openai.AsyncOpenAI
FLAT: Any = {"type": "function", **WEATHER["function"]}
CLAUDES: Any = {
    "name": "get_weather",
    "description": "Get the weather.",
    "input_schema": WEATHER["function"]["parameters"],
}


async def complete(client: Client, target: Target, prompt: Any, **fields: Any) -> Any:
    return await client.completions.create(model=target.model, prompt=prompt, **({"temperature": 0} | fields))


async def test_prompts_are_texts_or_tokens_one_or_many(client: Client, target: Target, http: httpx.AsyncClient) -> None:
    texts = ["one, two, three,", "1 2 3 4"]
    single = [(await complete(client, target, text, max_tokens=4)).choices[0].text for text in texts]
    many = await complete(client, target, texts, max_tokens=4)
    assert [(c.index, c.text) for c in many.choices] == list(enumerate(single))
    ids = [(await http.post("/tokenize", json={"model": target.model, "prompt": t})).json()["tokens"] for t in texts]
    assert [c.text for c in (await complete(client, target, ids, max_tokens=4)).choices] == single
    assert (await complete(client, target, ids[0], max_tokens=4)).choices[0].text == single[0]
    assert many.usage.completion_tokens == 8 and many.usage.prompt_tokens == sum(map(len, ids))


async def test_many_prompts_are_streamed_with_their_indexes(client: Client, target: Target) -> None:
    prompts = [f"{i}, {i + 1}, {i + 2}," for i in range(12)]
    unary = await complete(client, target, prompts, max_tokens=5, n=2)
    stream = await complete(client, target, prompts, max_tokens=5, n=2, stream=True)
    texts = [""] * 24
    ends = [""] * 24
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            ends[choice.index] = choice.finish_reason or ends[choice.index]
    assert texts == [c.text for c in unary.choices] and ends == [c.finish_reason for c in unary.choices]


async def test_an_echo_has_the_prompt_and_its_logprobs(client: Client, target: Target) -> None:
    answer = await complete(client, target, "one, two,", max_tokens=3, echo=True, logprobs=2)
    (choice,) = answer.choices
    assert choice.text.startswith("one, two,")
    assert choice.logprobs.token_logprobs[0] is None and choice.logprobs.top_logprobs[0] is None
    assert "".join(choice.logprobs.tokens) == choice.text
    assert len(choice.logprobs.token_logprobs) == answer.usage.total_tokens
    assert all(value <= 0 for value in choice.logprobs.token_logprobs[1:])
    for offset, token in zip(choice.logprobs.text_offset, choice.logprobs.tokens, strict=True):
        assert choice.text[offset:].startswith(token)
    scored = (await complete(client, target, "one, two,", max_tokens=0, echo=True, logprobs=1)).choices[0]
    assert scored.text == "one, two," and scored.finish_reason == "length"
    known = choice.logprobs.token_logprobs[1 : len(scored.logprobs.tokens)]
    assert scored.logprobs.token_logprobs[1:] == pytest.approx(known, abs=1e-3)


async def test_a_streamed_echo_equals_the_unary_echo(client: Client, target: Target) -> None:
    unary = await complete(client, target, "one, two,", max_tokens=3, echo=True)
    stream = await complete(client, target, "one, two,", max_tokens=3, echo=True, stream=True)
    assert "".join([c.choices[0].text async for c in stream if c.choices]) == unary.choices[0].text


async def test_best_of_returns_the_likeliest_answers(client: Client, target: Target) -> None:
    hot: Any = {"temperature": 1.5, "max_tokens": 6, "seed": 4, "logprobs": 0}
    several = (await complete(client, target, "one, two,", n=5, best_of=5, **hot)).choices
    best = await complete(client, target, "one, two,", n=2, best_of=5, **hot)

    def mean(choice: Any) -> float:
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    likeliest = sorted(several, key=mean, reverse=True)[:2]
    assert [c.index for c in best.choices] == [0, 1]
    assert [mean(c) for c in best.choices] == pytest.approx([mean(c) for c in likeliest], abs=1e-3)


async def test_embeddings_are_normalised_and_in_order(client: Client, target: Target) -> None:
    texts = ["red dog", "red dogs", "What is the weather in Paris?"]
    found = await client.embeddings.create(model=target.model, input=texts, encoding_format="float")
    vectors = [item.embedding for item in found.data]
    assert [item.index for item in found.data] == [0, 1, 2]
    assert all(math.isclose(math.fsum(v * v for v in vector), 1, rel_tol=1e-4) for vector in vectors)
    near, far = (sum(a * b for a, b in zip(vectors[0], vectors[i], strict=True)) for i in (1, 2))
    assert near > far
    short = await client.embeddings.create(model=target.model, input=texts[0], dimensions=8)
    assert len(short.data[0].embedding) == 8
    assert math.isclose(math.fsum(v * v for v in short.data[0].embedding), 1, rel_tol=1e-4)
    coded: Any = await client.embeddings.create(model=target.model, input=texts[0], encoding_format="base64")
    values = array("f", base64.b64decode(coded.data[0].embedding))
    assert list(values) == pytest.approx(vectors[0], abs=1e-4)
    assert found.usage.total_tokens == found.usage.prompt_tokens > 0


async def test_a_response_consists_of_output_items(client: Client, target: Target) -> None:
    answer = await client.responses.create(model=target.model, input="What is 3+4?", instructions="Be brief.")
    assert answer.status == "completed" and answer.output[0].type == "message" and answer.output_text
    assert (
        answer.usage is not None and answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    )
    cut = await client.responses.create(model=target.model, input="Count from 1 to 20.", max_output_tokens=2)
    assert (
        cut.status == "incomplete" and cut.incomplete_details and cut.incomplete_details.reason == "max_output_tokens"
    )


@pytest.mark.tiny_model
async def test_a_response_calls_tools_and_continues_with_their_outputs(client: Client, target: Target) -> None:
    history: Any = says("What is the weather in Paris?")
    first = await client.responses.create(model=target.model, input=history, tools=[FLAT])
    (call,) = first.output
    assert call.type == "function_call" and json.loads(call.arguments) == {"city": "Paris"}
    history += [item.model_dump() for item in first.output]
    history.append({"type": "function_call_output", "call_id": call.call_id, "output": "sunny"})
    second = await client.responses.create(model=target.model, input=history, tools=[FLAT])
    assert second.output_text == "It is sunny in Paris."


@pytest.mark.tiny_model
async def test_a_response_is_streamed_as_numbered_events(client: Client, target: Target) -> None:
    stream = await client.responses.create(
        model=target.model, input="What is 3+4?", reasoning={"effort": "low"}, stream=True
    )
    events = [event async for event in stream]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"
    for kind in ("output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done", "reasoning_text.delta", "output_item.done"):  # fmt: skip
        assert f"response.{kind}" in kinds
    last: Any = events[-1]
    assert [item.type for item in last.response.output] == ["reasoning", "message"] and last.response.output_text == "7"
    async with client.responses.stream(
        model=target.model, input="Weather in Oslo and Rome?", tools=[FLAT]
    ) as helper:  # the SDK puts the answer together itself, and is strict about the order of events
        final = await helper.get_final_response()
    assert [json.loads(item.arguments)["city"] for item in final.output if item.type == "function_call"] == [
        "Oslo",
        "Rome",
    ]


async def test_a_response_follows_a_schema(client: Client, target: Target) -> None:
    schema = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"], "additionalProperties": False}  # fmt: skip
    form: Any = {"format": {"type": "json_schema", "name": "switch", "schema": schema, "strict": True}}
    answer = await client.responses.create(model=target.model, input="on?", text=form, max_output_tokens=200)
    assert isinstance(json.loads(answer.output_text)["on"], bool)


async def test_previous_response_id_is_refused_because_nothing_is_stored(client: Client, target: Target) -> None:
    with pytest.raises(openai.BadRequestError, match="this server stores nothing"):
        await client.responses.create(model=target.model, input="x", previous_response_id="resp_1")


async def test_the_anthropic_sdk_receives_a_message(claude: anthropic.AsyncAnthropic, target: Target) -> None:
    answer = await claude.messages.create(
        model=target.model, max_tokens=20, system="Be brief.", messages=says("What is 3+4?")
    )
    assert answer.type == "message" and answer.role == "assistant" and answer.stop_reason == "end_turn"
    assert answer.content[0].type == "text" and answer.content[0].text
    cut = await claude.messages.create(model=target.model, max_tokens=2, messages=says("Count from 1 to 20."))
    assert cut.stop_reason == "max_tokens" and cut.usage.output_tokens == 2
    count = await claude.messages.count_tokens(model=target.model, system="Be brief.", messages=says("What is 3+4?"))
    assert count.input_tokens == answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0)


@pytest.mark.tiny_model
async def test_the_anthropic_sdk_stops_continues_reasons_and_calls_tools(
    claude: anthropic.AsyncAnthropic, target: Target
) -> None:
    async def create(text: str, **fields: Any) -> Any:
        return await claude.messages.create(model=target.model, max_tokens=60, messages=says(text), **fields)

    stopped = await create("Count from 1 to 9.", stop_sequences=[", 5"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", ", 5")
    assert stopped.content[0].text == "1, 2, 3, 4"
    begun: Any = [*says("Count from 1 to 9."), {"role": "assistant", "content": "1, 2, 3, 4, 5,"}]
    more = await claude.messages.create(model=target.model, max_tokens=60, messages=begun)
    assert more.content[0].text == " 6, 7, 8, 9"  # type: ignore[union-attr]
    reasoning = await create("What is 3+4?", thinking={"type": "enabled", "budget_tokens": 1024})
    assert [block.type for block in reasoning.content] == ["thinking", "text"] and reasoning.content[1].text == "7"
    called = await create("What is the weather in Paris?", tools=[CLAUDES])
    assert called.stop_reason == "tool_use" and called.content[0].input == {"city": "Paris"}
    history: Any = [
        *says("What is the weather in Paris?"),
        {"role": "assistant", "content": [block.model_dump() for block in called.content]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": called.content[0].id, "content": "sunny"}]},
    ]
    answer = await claude.messages.create(model=target.model, max_tokens=60, messages=history, tools=[CLAUDES])  # fmt: skip
    assert answer.content[0].text == "It is sunny in Paris."  # type: ignore[union-attr]
    forced = await create("Hello!", tools=[CLAUDES], tool_choice={"type": "tool", "name": "get_weather"})
    assert forced.content[0].name == "get_weather"


@pytest.mark.tiny_model
async def test_the_anthropic_sdk_assembles_a_stream(claude: anthropic.AsyncAnthropic, target: Target) -> None:
    async with claude.messages.stream(
        model=target.model, max_tokens=60, messages=says("Weather in Oslo and Rome?"), tools=[CLAUDES]
    ) as stream:
        final = await stream.get_final_message()
    assert final.stop_reason == "tool_use"
    assert [block.input for block in final.content if block.type == "tool_use"] == [{"city": "Oslo"}, {"city": "Rome"}]
    async with claude.messages.stream(model=target.model, max_tokens=60, messages=says("Count from 1 to 5.")) as stream:
        text = "".join([part async for part in stream.text_stream])
    assert text == "1, 2, 3, 4, 5"


async def test_detokenize_is_the_inverse_of_tokenize(http: httpx.AsyncClient, target: Target) -> None:
    text = "Grüße, 你好 👋 e\u0301"
    tokenized = (
        await http.post("/tokenize", json={"model": target.model, "prompt": text, "return_token_strs": True})
    ).json()
    assert (
        tokenized["count"] == len(tokenized["tokens"]) == len(tokenized["token_strs"])
        and tokenized["max_model_len"] > 0
    )
    back = (await http.post("/detokenize", json={"model": target.model, "tokens": tokenized["tokens"]})).json()
    assert back["prompt"].endswith(text)
    chat = (await http.post("/tokenize", json={"model": target.model, "messages": says("Hello")})).json()
    assert chat["count"] > 3


async def test_models_can_be_listed_and_retrieved(client: Client, target: Target) -> None:
    assert target.model in [model.id async for model in client.models.list()]
    assert (await client.models.retrieve(target.model)).id == target.model
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("nobody/knows/this")


@pytest.mark.tiny_model
async def test_answers_and_errors_carry_the_x_request_id_of_the_request(
    http: httpx.AsyncClient, target: Target
) -> None:
    body = {"model": target.model, "messages": says("What is 3+4?")}
    answer = await http.post("/v1/chat/completions", json=body, headers={"x-request-id": "mine"})
    assert answer.headers["x-request-id"] == "mine"
    wrong = await http.post("/v1/chat/completions", json={"model": "nobody"}, headers={"x-request-id": "mine-2"})
    assert wrong.headers["x-request-id"] == "mine-2"
