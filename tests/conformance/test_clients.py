"""Third-party clients, used as their manuals show: the openai SDK's helpers, LangChain, LiteLLM."""

from __future__ import annotations

import json
import warnings
from typing import Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel

from tests.conformance.conftest import WEATHER, Target, says

Client = openai.AsyncOpenAI


class Weather(BaseModel):
    city: Literal["Paris", "Rome"]
    warm: bool


class GetWeather(BaseModel):
    """Get the weather."""

    city: str


async def test_the_sdk_parses_an_answer_into_a_model(client: Client, target: Target) -> None:
    answer = await client.chat.completions.parse(
        model=target.model, messages=says("Weather?"), response_format=Weather, max_tokens=300
    )
    assert isinstance(answer.choices[0].message.parsed, Weather)
    response = await client.responses.parse(
        model=target.model, input="Weather?", text_format=Weather, max_output_tokens=300
    )
    assert isinstance(response.output_parsed, Weather)


async def test_the_sdk_parses_tool_calls(client: Client, target: Target) -> None:
    tool: Any = openai.pydantic_function_tool(GetWeather)
    answer = await client.chat.completions.parse(
        model=target.model, messages=says("What is the weather in Paris?"), tools=[tool], tool_choice="required",
        max_tokens=300, seed=1,
    )  # fmt: skip
    (call, *_) = answer.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, GetWeather)


async def test_the_sdks_stream_helper_assembles_an_answer(client: Client, target: Target) -> None:
    async with client.chat.completions.stream(
        model=target.model, messages=says("What is the weather in Paris?"), tools=[WEATHER], temperature=0  # type: ignore[list-item]
    ) as stream:  # fmt: skip
        kinds = [event.type async for event in stream]
        final = await stream.get_final_completion()
    assert "chunk" in kinds
    if target.ours:
        (call,) = final.choices[0].message.tool_calls or []
        assert json.loads(call.function.arguments) == {"city": "Paris"}
        assert "tool_calls.function.arguments.done" in kinds


async def test_langchain_works_for_chat_streams_tools_schemas_and_embeddings(target: Target) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.utils.function_calling import convert_to_openai_tool
    from langchain_openai import ChatOpenAI, OpenAIEmbeddings

    async with httpx.AsyncClient(trust_env=False, timeout=60) as connections:
        common: Any = {
            "base_url": f"{target.root}/v1", "api_key": target.key, "max_retries": 0, "http_async_client": connections,
        }  # fmt: skip
        model = ChatOpenAI(model=target.model, temperature=0, max_tokens=300, **common)
        answer = await model.ainvoke("What is 3+4?")
        assert answer.content and answer.usage_metadata
        assert "".join([str(part.content) async for part in model.astream("What is 3+4?")]) == answer.content
        tools = model.bind_tools([WEATHER], tool_choice="required")
        called = await tools.ainvoke("What is the weather in Paris?")
        (call, *_) = called.tool_calls
        assert call["name"] == "get_weather"
        history = [HumanMessage("What is the weather in Paris?"), called, ToolMessage("sunny", tool_call_id=call["id"])]
        assert (await model.bind_tools([WEATHER]).ainvoke(history)).content
        for method in ("json_schema", "function_calling"):
            structured = model.with_structured_output(Weather, method=method)  # type: ignore[arg-type]
            assert isinstance(await structured.ainvoke("Weather?"), Weather)
        assert convert_to_openai_tool(Weather)["function"]["name"] == "Weather"
        embeddings = OpenAIEmbeddings(model=target.model, check_embedding_ctx_length=False, **common)
        assert len(await embeddings.aembed_documents(["red dog", "blue cat"])) == 2


async def test_litellm_works_for_chat_streams_tools_and_embeddings(target: Target) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its import is full of others' deprecations
        import litellm

        common: Any = {"model": f"openai/{target.model}", "api_base": f"{target.root}/v1", "api_key": target.key}
        answer: Any = await litellm.acompletion(messages=says("What is 3+4?"), temperature=0, max_tokens=20, **common)
        stream: Any = await litellm.acompletion(
            messages=says("What is 3+4?"), temperature=0, max_tokens=20, stream=True, **common
        )
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        called: Any = await litellm.acompletion(
            messages=says("Weather in Rome?"), tools=[WEATHER], tool_choice="required", max_tokens=300, **common
        )
        embedded: Any = await litellm.aembedding(input=["red dog"], encoding_format="float", **common)
        await litellm.close_litellm_async_clients()
    assert text == answer.choices[0].message.content
    assert called.choices[0].message.tool_calls[0].function.name == "get_weather"
    assert len(embedded.data) == 1


@pytest.mark.tiny_model
async def test_an_error_in_the_middle_of_a_stream_reaches_the_sdk_as_an_error(deploy: Any) -> None:
    deployment = deploy()
    deployment.frontend("--max-migrations", "0")
    worker = deployment.worker("prefill_and_decode", "--executor", "simulated", engine={"step_ms": 20})
    deployment.wait_for(1)
    async with Client(base_url=f"{deployment.base}/v1", api_key="none", max_retries=0) as client:
        stream = await client.chat.completions.create(
            model="tiny_model", messages=says("Hello"), max_tokens=500, stream=True, extra_body={"ignore_eos": True}
        )
        for _ in range(3):
            await anext(aiter(stream))
        worker.kill()
        with pytest.raises(openai.APIError, match="was lost"):
            [chunk async for chunk in stream]
    deployment.stop()


CUSTOM: Any = {
    "type": "custom",
    "custom": {"name": "run", "description": "Runs a command.", "format": {"type": "text"}},
}


@pytest.mark.tiny_model
async def test_the_sdk_gets_the_calls_of_custom_tools_in_chats(client: Client, target: Target) -> None:
    asked: Any = {
        "model": target.model, "messages": says("Run ls"), "tools": [CUSTOM], "tool_choice": "required",
        "parallel_tool_calls": False, "max_tokens": 400, "temperature": 0, "logit_bias": {},
    }  # fmt: skip
    answer = await client.chat.completions.create(**asked)
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.type == "custom" and call.custom.name == "run" and isinstance(call.custom.input, str)
    streamed = ""
    async for chunk in await client.chat.completions.create(**asked, stream=True):
        for part in (chunk.choices[0].delta.tool_calls or []) if chunk.choices else []:
            custom: Any = (part.model_extra or {}).get("custom") or {}
            streamed += custom.get("input", "")
    assert streamed == call.custom.input
    # the call and its result as the SDK sends them back
    history: Any = [
        *says("Run ls"), answer.choices[0].message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "files"},
    ]  # fmt: skip
    again = await client.chat.completions.create(
        model=target.model, messages=history, tools=[CUSTOM], max_tokens=5, temperature=0
    )
    assert again.usage is not None and answer.usage is not None
    assert again.usage.prompt_tokens > answer.usage.prompt_tokens


@pytest.mark.tiny_model
async def test_the_sdk_gets_the_calls_of_custom_tools_and_namespaces_in_responses(
    client: Client, target: Target
) -> None:
    space = {"type": "namespace", "name": "demo", "description": "d", "tools": [{"type": "custom", "name": "run"}]}
    tools: Any = [space, {"type": "web_search"}]
    asked: Any = {
        "model": target.model, "input": "Run ls", "tools": tools, "tool_choice": "required",
        "parallel_tool_calls": False, "max_output_tokens": 400, "temperature": 0,
    }  # fmt: skip
    raw = await client.responses.with_raw_response.create(**asked)
    assert raw.headers["x-dynserve-warning"] == "ignored: tools.1 (web_search)"
    (item,) = raw.parse().output
    assert item.type == "custom_tool_call" and item.name == "run" and item.namespace == "demo"
    async with client.responses.stream(**asked) as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_response()
    assert "response.custom_tool_call_input.done" in kinds
    (streamed,) = final.output
    assert streamed.type == "custom_tool_call" and streamed.input == item.input
    history: Any = [
        {"role": "user", "content": "Run ls"}, item.model_dump(exclude_none=True),
        {"type": "custom_tool_call_output", "call_id": item.call_id, "output": "files"},
    ]  # fmt: skip
    again = await client.responses.create(model=target.model, input=history, tools=tools, max_output_tokens=5)
    assert again.status in ("completed", "incomplete")
