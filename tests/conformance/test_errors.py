"""Every failed request is answered with an error object."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.conformance.conftest import WEATHER, Target, says

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = {"messages": says("Hello")}

BAD: list[tuple[str, Any, str]] = [
    (CHAT, {}, "messages"),
    (CHAT, {"messages": "Hello"}, "messages"),
    (CHAT, {"messages": []}, "messages"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "image_url",
    ),
    (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, "role"),
    (CHAT, HELLO | {"temperature": 5}, "temperature"),
    (CHAT, HELLO | {"top_p": -0.1}, "top_p"),
    (CHAT, HELLO | {"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    (CHAT, HELLO | {"structured_outputs": {"regex": "a"}}, "structured_outputs"),
    (CHAT, HELLO | {"tools": [{"type": "custom"}]}, "tools.0.custom"),
    (CHAT, HELLO | {"n": 0}, "n"),
    (CHAT, HELLO | {"max_tokens": -1}, "max_tokens"),
    (CHAT, HELLO | {"top_logprobs": 50, "logprobs": True}, "top_logprobs"),
    (CHAT, HELLO | {"logit_bias": {"a": 1}}, "logit_bias"),
    (CHAT, HELLO | {"stop": ["x"] * 99}, "stop"),
    (CHAT, HELLO | {"tools": [{"type": "function", "function": {"name": "bad name"}}]}, "name"),
    (CHAT, HELLO | {"tool_choice": "required"}, "tool_choice"),
    (CHAT, HELLO | {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
    (CHAT, HELLO | {"response_format": {"type": "xml"}}, "response_format"),
    (CHAT, HELLO | {"stream_options": {"include_usage": True}}, "stream_options"),
    (CHAT, HELLO | {"functions": [{"name": "f"}]}, "functions"),
    (COMPLETIONS, {}, "prompt"),
    (COMPLETIONS, {"prompt": ""}, "prompt"),
    (COMPLETIONS, {"prompt": [-5]}, "token ids"),
    (COMPLETIONS, {"prompt": "x", "suffix": "y"}, "suffix"),
    (COMPLETIONS, {"prompt": "x", "best_of": 1, "n": 2}, "best_of"),
    ("/v1/embeddings", {"input": []}, "input"),
    ("/v1/embeddings", {"input": "x", "dimensions": 100_000}, "dimensions"),
    ("/v1/responses", {"input": [{"type": "image_generation_call"}]}, "input has no message"),
    ("/v1/responses", {"input": "x", "tools": [{"type": "custom"}]}, "a custom needs a name"),
    (
        "/v1/responses",
        {"input": "x", "tools": [{"type": "web_search"}], "tool_choice": "required"},
        "required needs tools",
    ),
    ("/tokenize", {}, "prompt"),
    ("/detokenize", {"tokens": [10**9]}, "token ids"),
]


@pytest.mark.parametrize(("path", "body", "word"), BAD, ids=[f"{p}-{w}-{i}" for i, (p, _, w) in enumerate(BAD)])
async def test_a_bad_request_is_answered_with_the_name_of_the_invalid_field(
    http: httpx.AsyncClient, target: Target, path: str, body: Any, word: str
) -> None:
    answer = await http.post(path, json={"model": target.model} | body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["type"] == "invalid_request_error", answer.text
    assert word in error["message"] and set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 5000, b'{"model": "\xed\xa0\x80"}']
)
@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
async def test_a_body_that_is_not_a_json_object_is_a_bad_request(
    http: httpx.AsyncClient, path: str, body: bytes
) -> None:
    answer = await http.post(path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


async def test_an_unknown_model_route_or_method_is_an_error_object(http: httpx.AsyncClient, target: Target) -> None:
    unknown = await http.post(CHAT, json={"model": "nobody"} | HELLO)
    assert unknown.status_code == 404 and unknown.json()["error"]["code"] == "model_not_found"
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", CHAT, 405), ("DELETE", "/v1/models", 405)):
        answer = await http.request(method, path)
        assert answer.status_code == status and answer.json()["error"]["message"]


@pytest.mark.tiny_model
async def test_the_error_for_a_too_long_prompt_names_its_length_and_the_limit(
    http: httpx.AsyncClient, target: Target
) -> None:
    cases: list[tuple[str, Any]] = [
        (CHAT, {"messages": says("word " * 9000)}),
        (COMPLETIONS, {"prompt": [5] * 9000}),
        ("/v1/embeddings", {"input": [5] * 9000}),
        ("/v1/responses", {"input": "word " * 9000}),
        ("/v1/messages", {"messages": says("word " * 9000), "max_tokens": 5}),
    ]
    for path, body in cases:
        answer = await http.post(path, json={"model": target.model} | body)
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["code"] == "context_length_exceeded"
        assert "8192" in error["message"] and "90" in error["message"]


async def test_the_sdks_raise_their_matching_exceptions(client: openai.AsyncOpenAI, claude: anthropic.AsyncAnthropic, target: Target) -> None:  # fmt: skip
    messages: Any = says("x")
    with pytest.raises(openai.NotFoundError) as no_model:
        await client.chat.completions.create(model="nobody", messages=messages)
    assert no_model.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        await client.chat.completions.create(model=target.model, messages=messages, temperature=9)
    assert bad.value.param == "temperature"
    with pytest.raises(anthropic.NotFoundError) as not_there:
        await claude.messages.create(model="nobody", messages=messages, max_tokens=5)
    body: Any = not_there.value.body
    assert body["type"] == "error" and body["error"]["type"] == "not_found_error"


@pytest.mark.tiny_model
async def test_a_large_body_is_refused_before_it_is_read(http: httpx.AsyncClient) -> None:
    answer = await http.post(CHAT, content=b" " * (33 << 20))
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"


async def test_clients_that_disconnect_mid_stream_do_not_disturb_later_requests(
    http: httpx.AsyncClient, target: Target
) -> None:
    body = {"model": target.model, "messages": says("Count from 1 to 20."), "stream": True, "n": 4}
    for _ in range(5):
        async with http.stream("POST", CHAT, json=body) as answer:
            async for line in answer.aiter_lines():
                assert json.loads(line.removeprefix("data: "))["choices"]
                break
    assert (await http.post(CHAT, json={"model": target.model, "max_tokens": 5} | HELLO)).status_code == 200
