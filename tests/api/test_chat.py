from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from dynserve.api.chat import ChatRequest
from dynserve.api.completions import CompletionRequest, EmbeddingRequest, packed_prompts
from dynserve.api.fields import parsed
from dynserve.api.messages import CountRequest
from dynserve.api.responses import ResponsesRequest
from dynserve.api.tokenize import DetokenizeRequest
from dynserve.config import TINY_MODEL
from dynserve.errors import BadRequest, ContextTooLong
from dynserve.model_files import read_model_files
from dynserve.text.preprocess import Conversation, Preprocessor, sampling_defaults
from dynserve.wire.requests import SamplingParams, unpack_tokens

PREPROCESSOR = Preprocessor(read_model_files(TINY_MODEL))
HELLO = {"model": "m", "messages": [{"role": "user", "content": "What is 3+4?"}]}


TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "it"}'}}


def chat(**changes: Any) -> Any:
    return parsed(ChatRequest, json.dumps(HELLO | changes).encode())


def ids(request: ChatRequest) -> list[int]:
    return PREPROCESSOR.chat(request.conversation())[1]


def completion(**fields: Any) -> CompletionRequest:
    return parsed(CompletionRequest, json.dumps({"model": "m"} | fields).encode())


def sampling_of(request: Any, defaults: SamplingParams) -> SamplingParams:
    made: SamplingParams = request.sampling(defaults, logprobs=None, prompt_logprobs=False, choice=0)
    return made


def test_a_chat_is_rendered_by_the_models_template() -> None:
    text = "<|im_start|>user\nWhat is 3+4?<|im_end|>\n<|im_start|>assistant\n"
    rendered, found = PREPROCESSOR.chat(chat().conversation())
    assert rendered == text
    assert found == PREPROCESSOR.tokenizer.encode(text, add_special_tokens=False).ids


def test_content_parts_and_the_developer_role_are_the_same_as_their_plain_forms() -> None:
    parts = chat(
        messages=[
            {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief"}]}
        ]
    )
    plain = chat(messages=[{"role": "system", "content": "Be brief"}])
    assert ids(parts) == ids(plain)


def test_a_template_can_refuse_messages_but_not_access_python_internals() -> None:
    files = read_model_files(TINY_MODEL)
    evil = json.dumps({"chat_template": "{{ ''.__class__.__mro__ }}"}).encode()
    with pytest.raises(BadRequest, match="refused"):
        Preprocessor(files | {"tokenizer_config.json": evil}).chat(Conversation(HELLO["messages"]))  # type: ignore[arg-type]
    picky = json.dumps({"chat_template": "{{ raise_exception('no system here') }}"}).encode()
    with pytest.raises(BadRequest, match="no system here"):
        Preprocessor(files | {"tokenizer_config.json": picky}).chat(Conversation(HELLO["messages"]))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 3}, "temperature: .*less than or equal to 2"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
        ({"n": 0}, "n: .*greater than or equal to 1"),
        ({"tools": [{"type": "function"}]}, "tools.0.function: Field required"),
        ({"tools": [{"type": "retrieval"}], "tool_choice": "required"}, "needs tools"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens: 5 is more than max_tokens, 4"),
        ({"min_tokens": 5, "max_completion_tokens": 4}, "min_tokens: 5 is more than max_tokens, 4"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs is not supported; use response_format"),
        ({"regex": "a"}, "regex is not supported; use guided_regex"),
        ({"tools": [TOOL, TOOL]}, "look is listed twice"),
        ({"tool_choice": "required"}, "needs tools"),
        ({"tools": [TOOL], "tool_choice": {"function": {"name": "see"}}}, "names 'see'"),
        ({"tools": [TOOL], "tool_choice": "required", "guided_regex": "a"}, "a tool_choice that requires a call"),
        ({"response_format": {"type": "json_schema"}}, "needs json_schema.schema"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "exclude each other"),
        ({"functions": [{"name": "f"}]}, "functions is not supported; use tools"),
        ({"audio": {"voice": "x"}}, "audio is not supported"),
        ({"modalities": ["audio"]}, "modalities.0"),
        ({"messages": [{"role": "user"}]}, "messages.0.content: a message of role user needs content"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "only an assistant calls tools"),
        ({"messages": [{"role": "user", "content": "x"}], "continue_final_message": True}, "last message"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options needs stream"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop_token_ids": [10**30]}, "stop_token_ids"),
        ({"logit_bias": {"-5": 1}}, "logit_bias"),
    ],
)
def test_an_error_names_the_invalid_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        chat(**changes)


def test_template_variables_cannot_replace_the_messages() -> None:
    with pytest.raises(BadRequest, match="cannot set messages"):
        ids(chat(chat_template_kwargs={"messages": []}))
    ids(chat(chat_template_kwargs={"enable_thinking": False}))


def test_a_body_that_is_not_json_is_a_bad_request() -> None:
    with pytest.raises(BadRequest, match="not a JSON object"):
        parsed(ChatRequest, b"{")


def test_unknown_and_empty_fields_are_ignored() -> None:
    request = chat(user="u", tools=[], response_format={"type": "text"}, some_new_field=1, audio=None)
    assert request.unknown == ["some_new_field"]  # null is absent
    with pytest.raises(BadRequest, match=r"unknown field tempratur \(did you mean temperature\?\)"):
        chat(tempratur=1).refuse_unknown()


def test_logprobs_are_none_or_a_number_of_alternatives() -> None:
    assert chat(logprobs=True, top_logprobs=2).wanted_logprobs() == 2
    assert chat(logprobs=True).wanted_logprobs() == 0
    assert chat().wanted_logprobs() is None


def test_the_error_for_a_too_long_prompt_names_its_length_and_the_limit() -> None:
    with pytest.raises(ContextTooLong, match="64 tokens.*70 "):
        chat().stops(70, 64, None, {})
    assert chat(max_tokens=500).stops(60, 64, None, {}).max_tokens == 4


def test_arguments_of_earlier_tool_calls_reach_the_template_as_objects() -> None:
    history = [
        {"role": "user", "content": "look"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "seen"},
    ]
    text = PREPROCESSOR.render(chat(messages=history).conversation())
    assert '<tool_call>\n{"name": "look", "arguments": {"at": "it"}}\n</tool_call><|im_end|>' in text
    assert "<|im_start|>tool\nseen<|im_end|>" in text


def test_tools_are_in_the_prompt_unless_tool_choice_is_none() -> None:
    shown = PREPROCESSOR.render(chat(tools=[TOOL]).conversation())
    assert '{"name": "look", "parameters": {"type": "object", "properties": {}}}' in shown
    assert PREPROCESSOR.render(chat(tools=[TOOL], tool_choice="none").conversation()) == PREPROCESSOR.render(
        chat().conversation()
    )


@pytest.mark.parametrize("begun", ["1, 2, ", "<", "n", "im_end", "|>", "", "<|im_end|>"])
def test_a_last_message_of_the_assistant_can_be_continued(begun: str) -> None:
    messages = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": begun}]
    text = PREPROCESSOR.render(chat(messages=messages, continue_final_message=True).conversation())
    assert text == f"<|im_start|>user\nCount.<|im_end|>\n<|im_start|>assistant\n{begun}"


def test_lone_surrogates_in_earlier_tool_calls_are_replaced() -> None:
    call = {"function": {"name": "look", "arguments": '{"at": "\\ud83d"}'}}
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]
    assert "\ufffd" in PREPROCESSOR.chat(chat(messages=messages).conversation())[0]


def test_reasoning_effort_turns_the_templates_reasoning_on_or_off() -> None:
    assert PREPROCESSOR.render(chat(reasoning_effort="low").conversation()).endswith("<think>\n")
    assert PREPROCESSOR.render(chat(reasoning_effort="none").conversation()).endswith("assistant\n")


def test_a_prompt_may_be_text_or_token_ids_one_or_many() -> None:
    one = ids_of("one two")
    for form in (one[0], one, ["one two"]):
        assert ids_of(completion(prompt=form).prompt) == one
    assert ids_of(completion(prompt=["one two", "one two"]).prompt) == one * 2


def ids_of(prompts: Any) -> list[list[int]]:
    return [unpack_tokens(packed) for packed in packed_prompts(prompts, "prompt", PREPROCESSOR, 2048)]


@pytest.mark.parametrize("prompt", [[], "", [99999], [-1], ["a", ""], [[1], []], [[1], ["a"]], [1, "a"], ["a"] * 2049])
def test_invalid_prompts_are_refused(prompt: Any) -> None:
    with pytest.raises(BadRequest):
        ids_of(completion(prompt=prompt).prompt)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"suffix": "end"}, "suffix is not supported"),
        ({"max_tokens": 0}, "needs echo"),
        ({"n": 3, "best_of": 2}, "best_of must be at least n"),
        ({"best_of": 2, "stream": True}, "best_of cannot be streamed"),
        ({"n": 100, "prompt": ["a"] * 30}, "3000 answers"),
    ],
)
def test_contradictory_completion_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        completion(**({"prompt": "x"} | fields))


def test_the_models_sampling_defaults_apply_to_fields_a_request_omits() -> None:
    defaults = sampling_defaults({"do_sample": True, "temperature": 0.7, "top_k": 20, "eos_token_id": 1})
    sampling = sampling_of(chat(top_k=5), defaults)
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.7, 5, 1.0)
    assert sampling_defaults({"do_sample": False}).greedy


def test_a_missing_seed_is_random_and_each_choice_has_its_own_seed() -> None:
    defaults = sampling_defaults({})
    assert sampling_of(chat(), defaults).seed != sampling_of(chat(), defaults).seed
    assert sampling_of(chat(seed=5), defaults).seed == 5
    choices = [chat(seed=5).sampling(defaults, logprobs=None, prompt_logprobs=False, choice=i).seed for i in range(3)]
    assert choices == [5, 6, 7]


@pytest.mark.parametrize(
    ("form", "body"),
    [
        (ChatRequest, {"messages": [1] * 20_000}),
        (ChatRequest, {"messages": [{"role": "user", "content": [1] * 20_000}]}),
        (ChatRequest, HELLO | {"tools": [1] * 20_000}),
        (ChatRequest, HELLO | {"stop_token_ids": ["a"] * 20_000}),
        (CompletionRequest, {"prompt": [None] * 20_000}),
        (CompletionRequest, {"prompt": [[None] * 20_000]}),
        (CompletionRequest, {"prompt": "x", "logit_bias": {f"a{i}": 1 for i in range(20_000)}}),
        (EmbeddingRequest, {"input": [{}] * 20_000}),
        (CountRequest, {"messages": [{"role": "user", "content": [1] * 20_000}]}),
        (ResponsesRequest, {"input": [1] * 20_000}),
        (DetokenizeRequest, {"tokens": ["a"] * 20_000}),
    ],
)
def test_a_list_of_invalid_items_does_not_give_one_error_per_item(form: Any, body: dict[str, Any]) -> None:
    raw = json.dumps({"model": "m"} | body).encode()
    with pytest.raises(ValidationError) as wrong:
        form.model_validate_json(raw)
    assert wrong.value.error_count() < 20  # each costs memory, and time of the event loop
    with pytest.raises(BadRequest):
        parsed(form, raw)
