"""Requests as real clients send them: entries without a meaning here are left out and named, nulls are absent."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from dynserve.api.chat import ChatRequest
from dynserve.api.completions import CompletionRequest
from dynserve.api.fields import Request, parsed
from dynserve.api.messages import MessagesRequest
from dynserve.api.responses import ResponsesRequest
from dynserve.cluster import Cluster
from dynserve.errors import BadRequest
from tests.conftest import MODEL

ASKED = [{"role": "user", "content": "x"}]
FUNCTION = {"type": "function", "name": "exec", "description": "d", "strict": False, "parameters": {
    "type": "object", "properties": {"cmd": {"type": "string"}}, "required": ["cmd"]}}  # fmt: skip
PATCH = {"type": "custom", "name": "apply_patch", "description": "Edits files.",
         "format": {"type": "grammar", "syntax": "lark", "definition": 'start: "*** Begin"'}}  # fmt: skip
SPACE = {"type": "namespace", "name": "mcp__demo", "description": "", "tools": [
    {"type": "function", "name": "look_up", "parameters": {"type": "object", "properties": {}}},
    {"type": "custom", "name": "run"}]}  # fmt: skip
SEARCH = {"type": "web_search", "external_web_access": True, "search_content_types": ["text"]}
# the form of Codex' requests: its tools, and a history of every kind of item
CODEX: dict[str, Any] = {
    "model": MODEL, "stream": True, "store": False, "tool_choice": "auto", "parallel_tool_calls": True,
    "include": ["reasoning.encrypted_content"], "reasoning": {"effort": "max", "summary": "auto", "context": None},
    "prompt_cache_key": "k", "client_metadata": {"a": "b"}, "text": {"verbosity": "low"},
    "instructions": "Be brief.",
    "tools": [FUNCTION, PATCH, SPACE, SEARCH, {"type": "local_shell"}, {"type": "tool_search", "execution": "client"}],
    "input": [
        {"type": "message", "id": "m1", "role": "developer", "content": [{"type": "input_text", "text": "Obey."}]},
        {"type": "message", "id": "m2", "role": "user", "content": [{"type": "input_text", "text": "Do it."}]},
        {"type": "reasoning", "id": "r1", "summary": [{"type": "summary_text", "text": "s"}],
         "content": [{"type": "reasoning_text", "text": "t"}], "encrypted_content": None},
        {"type": "message", "status": "completed", "role": "assistant", "phase": "commentary",
         "content": [{"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}]},
        {"type": "function_call", "id": "f1", "name": "exec", "arguments": '{"cmd": "ls"}', "call_id": "c1"},
        {"type": "custom_tool_call", "call_id": "c2", "name": "apply_patch", "input": '*** Begin\n"x"'},
        {"type": "function_call", "name": "look_up", "namespace": "mcp__demo", "arguments": "{}", "call_id": "c3"},
        {"type": "function_call_output", "call_id": "c1", "output": [
            {"type": "input_text", "text": "files"}, {"type": "input_image", "image_url": "data:"}]},
        {"type": "custom_tool_call_output", "call_id": "c2", "output": "patched"},
        {"type": "function_call_output", "call_id": "c3", "output": "found"},
        {"type": "local_shell_call", "call_id": "c4", "status": "completed", "action": {"type": "exec", "command": []}},
        {"type": "function_call_output", "call_id": "c4", "output": "of a call that is left out"},
        {"type": "web_search_call", "status": "completed", "action": {"type": "search", "query": "x"}},
        {"type": "tool_search_call", "call_id": "c5", "arguments": {"query": "x"}},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Go on."}]},
    ],
}  # fmt: skip
# the form of Claude Code's
CLAUDE: dict[str, Any] = {
    "model": MODEL, "max_tokens": 32, "stream": True, "metadata": {"user_id": "{}"},
    "thinking": {"type": "adaptive", "display": None}, "output_config": {"effort": "high"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
    "tool_choice": {"type": "auto", "disable_parallel_tool_use": None},
    "tools": [
        {"name": "Read", "description": "d", "input_schema": {"type": "object"}, "eager_input_streaming": True},
        {"type": "web_search_20250305", "name": "web_search", "max_uses": 8},
        {"type": "mcp_toolset", "mcp_server_name": "x"},
    ],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "Look.", "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm", "signature": "s"},
            {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {}},
            {"type": "tool_use", "id": "t1", "name": "Read", "input": {"path": "a.png"}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t1", "is_error": True, "content": [
                {"type": "text", "text": "an image:"},
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "x"}},
                {"type": "tool_reference", "tool_name": "mcp__x"}]},
            {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "x"}}]},
        {"role": "system", "content": "Remember."},
    ],
}  # fmt: skip


def request(form: type[Request], body: dict[str, Any]) -> Any:
    return parsed(form, json.dumps(body).encode())


def test_a_request_of_codex_keeps_everything_that_has_a_meaning() -> None:
    made = request(ResponsesRequest, CODEX)
    chat = made.chat()
    assert [function.name for function in chat.functions()] == [
        "exec",
        "apply_patch",
        "mcp__demo__look_up",
        "mcp__demo__run",
    ]
    patch = chat.functions()[1]
    assert "This" not in patch.description and 'lark grammar:\nstart: "*** Begin"' in patch.description
    assert patch.parameters["required"] == ["input"]
    shown = [
        (m["role"], m["content"], [c["function"] for c in m.get("tool_calls", ())])
        for m in chat.conversation().messages
    ]
    assert shown[0][:2] == ("system", "Be brief.") and shown[1][:2] == ("system", "Obey.")
    role, said, calls = shown[3]
    assert (role, said) == ("assistant", "I look.")
    assert [(c["name"], json.loads(c["arguments"])) for c in calls] == [
        ("exec", {"cmd": "ls"}), ("apply_patch", {"input": '*** Begin\n"x"'}), ("mcp__demo__look_up", {}),
    ]  # fmt: skip
    assert [row[:2] for row in shown[4:]] == [
        ("tool", "files[input_image left out: this model reads text]"), ("tool", "patched"), ("tool", "found"),
        ("user", "Go on."),
    ]  # fmt: skip
    assert made.unknown == [
        "tools.1.format (grammar)", "tools.3 (web_search)", "tools.4 (local_shell)", "tools.5 (tool_search)",
        "input.output (input_image)", "input (local_shell_call)", "input (web_search_call)", "input (tool_search_call)",
    ]  # fmt: skip


def test_tools_that_codex_adds_as_an_item_are_tools() -> None:
    body = CODEX | {
        "tools": None,
        "input": [{"type": "additional_tools", "role": "developer", "tools": [FUNCTION]}, *ASKED],
    }
    assert [function.name for function in request(ResponsesRequest, body).chat().functions()] == ["exec"]


def test_a_tool_may_be_repeated_and_chosen_by_the_name_that_the_client_knows() -> None:
    space = {"type": "namespace", "name": "mcp", "tools": [FUNCTION | {"name": "look"}]}
    body = CODEX | {"input": "Go.", "tools": [FUNCTION, FUNCTION, space]}

    def chosen(**choice: Any) -> Any:
        return request(ResponsesRequest, body | {"tool_choice": choice}).chat().tool_choice.name

    assert [f.name for f in request(ResponsesRequest, body).chat().functions()] == ["exec", "mcp__look"]
    assert chosen(type="function", name="exec") == "exec"
    assert chosen(type="function", name="look") == chosen(type="function", namespace="mcp", name="look") == "mcp__look"
    with pytest.raises(BadRequest, match="this server does not run tools of type 'file_search'"):
        chosen(type="file_search")
    long = {"type": "namespace", "name": "m" * 200, "tools": [FUNCTION | {"name": "n" * 60}]}
    made = request(ResponsesRequest, body | {"tools": [long]})
    with pytest.raises(BadRequest, match=r"tools.0.tools.0: .* is longer than 256 characters with its namespace"):
        made.chat()


def test_a_request_of_claude_code_keeps_everything_that_has_a_meaning() -> None:
    made = request(MessagesRequest, CLAUDE)
    chat = made.chat()
    assert [function.name for function in chat.functions()] == ["Read"]
    assert [(m.role, m.text()) for m in chat.messages] == [
        ("system", "Be brief."), ("user", "Look."), ("assistant", ""),
        ("tool", "an image:[image left out: this model reads text][tool_reference: mcp__x]"),
        ("user", "[document left out: this model reads text]"), ("system", "Remember."),
    ]  # fmt: skip
    assert chat.chat_template_kwargs == {"enable_thinking": True, "reasoning_effort": "high"}
    assert made.unknown == [
        "context_management", "tools.1 (web_search_20250305)", "tools.2 (mcp_toolset)",
        "messages.content (server_tool_use)", "messages.content.content (image)",
        "messages.content.content (tool_reference)", "messages.content (document)",
    ]  # fmt: skip


def test_an_image_of_the_user_is_refused_because_the_answer_would_be_about_nothing() -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "x"}}
    with pytest.raises(BadRequest, match="blocks of type 'image' are not supported"):
        request(MessagesRequest, CLAUDE | {"messages": [{"role": "user", "content": [image]}]}).chat()
    part = {"type": "input_image", "image_url": "x"}
    body = {"model": "m", "input": [{"role": "user", "content": [part]}]}
    with pytest.raises(BadRequest, match="content parts of type 'input_image' are not supported"):
        request(ResponsesRequest, body).chat().conversation()


NULLS: list[tuple[type[Request], dict[str, Any]]] = [
    (ChatRequest, {"messages": ASKED, "stream": True, "stream_options": {"include_usage": None, "include_obfuscation": None}}),
    (ChatRequest, {"messages": ASKED, "stream_options": {}}),
    (ChatRequest, {"messages": ASKED, "stream_options": None, "tools": None, "tool_choice": None, "stop": None, "n": None,
                   "ignore_eos": None, "skip_special_tokens": None, "include_stop_str_in_output": None,
                   "continue_final_message": None, "logprobs": None, "top_logprobs": None, "min_tokens": None, "seed": None,
                   "presence_penalty": None, "logit_bias": None, "response_format": None, "function_call": None}),
    (ChatRequest, {"messages": [*ASKED, {
        "role": "assistant", "content": None, "refusal": None, "audio": None, "function_call": None,
        "tool_calls": [{"id": None, "type": None, "index": 0, "function": {"name": "f", "arguments": None}}]}]}),
    (ChatRequest, {"messages": ASKED, "tools": [{"type": None, "function": {
        "name": "f", "description": None, "parameters": None, "strict": None}}]}),
    (ChatRequest, {"messages": ASKED, "tools": [{"function": {"name": "f"}}]}),
    (CompletionRequest, {"prompt": "x", "echo": None, "suffix": None, "best_of": None, "stream_options": None,
                         "response_format": None, "logprobs": None, "max_tokens": None}),
    (ResponsesRequest, {"input": [{"type": None, "role": "user", "content": "x", "status": None}], "tools": None,
                        "stream_options": {"include_usage": None}, "text": {"format": None}, "reasoning": None}),
    (MessagesRequest, {"messages": ASKED, "max_tokens": 5, "tools": None, "tool_choice": None, "thinking": None,
                       "system": None, "stop_sequences": None, "top_k": None, "output_config": None}),
]  # fmt: skip


@pytest.mark.parametrize(("form", "body"), NULLS)
def test_null_is_absent_everywhere(form: type[Request], body: dict[str, Any]) -> None:
    made = request(form, {"model": "m"} | body)
    assert made.unknown == []
    chat = made if isinstance(made, ChatRequest | CompletionRequest) else made.chat()
    if isinstance(chat, ChatRequest):
        chat.conversation()
        assert chat.skip_special_tokens and not chat.ignore_eos


def test_unknown_fields_are_named_at_every_depth() -> None:
    body = {
        "model": "m", "colour": 1, "stream": True, "stream_options": {"include_usage": True, "sound": 2},
        "messages": [{"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {}, "smell": 3}], "mood": 4}],
        "tools": [{"type": "function", "function": {"name": "f", "strict": True, "taste": 5}, "cache_control": {}}],
    }  # fmt: skip
    made = request(ChatRequest, body)
    # `mood` belongs to the template; cache hints and what clients repeat from answers are not worth a line
    assert made.unknown == ["colour", "stream_options.sound", "messages.content.smell", "tools.function.taste"]
    with pytest.raises(BadRequest, match="unknown field colour"):
        made.refuse_unknown()


BOUNDS: list[tuple[type[Request], dict[str, Any]]] = [
    (ChatRequest, {"messages": ASKED, "top_p": 0}),
    (ChatRequest, {"messages": ASKED, "priority": 2**40}),
    (ChatRequest, {"messages": ASKED, "seed": -(2**63)}),
    (ChatRequest, {"messages": ASKED, "reasoning_effort": "max"}),
    (ChatRequest, {"messages": [*ASKED, {"role": "function", "name": "f", "content": "1"}]}),
    (MessagesRequest, {"messages": ASKED, "max_tokens": 5, "temperature": 1.7, "top_k": -1, "top_p": 0}),
    (MessagesRequest, {"messages": ASKED, "max_tokens": 5, "thinking": {"type": "between_tools"}}),
    (ResponsesRequest, {"input": "x", "top_p": 0, "reasoning": {"effort": "max"}, "priority": -(2**40)}),
    (CompletionRequest, {"prompt": "x", "response_format": {"type": "json_object"}}),
]  # fmt: skip


@pytest.mark.parametrize(("form", "body"), BOUNDS)
def test_bounds_are_no_narrower_than_those_of_the_apis(form: type[Request], body: dict[str, Any]) -> None:
    request(form, {"model": "m"} | body)


def test_a_top_p_of_zero_is_the_likeliest_token() -> None:
    from dynserve.wire.requests import SamplingParams

    made = request(ChatRequest, {"model": "m", "messages": ASKED, "top_p": 0, "top_k": 50})
    sampling = made.sampling(SamplingParams(), logprobs=None, prompt_logprobs=False, choice=0)
    assert (sampling.top_p, sampling.top_k, sampling.greedy) == (1.0, 1, True)


async def test_what_is_left_out_is_named_in_a_header() -> None:
    async with Cluster(aggregated=1, executor="simulated", engine={"speed": 0}) as cluster, cluster.client() as client:

        async def warning(path: str, body: dict[str, Any]) -> str:
            answer: httpx.Response = await client.post(path, json=body | {"max_output_tokens": 3})
            assert answer.status_code == 200, answer.text
            return answer.headers["x-dynserve-warning"]

        codex = {name: value for name, value in CODEX.items() if name != "include"}
        assert "tools.3 (web_search), tools.4 (local_shell)" in await warning("/v1/responses", codex)
        assert "tools.1 (web_search_20250305)" in await warning("/v1/messages", CLAUDE)
