from __future__ import annotations

import json
from typing import Any

import pytest

from dynserve.config import TINY_MODEL
from dynserve.errors import BadRequest, ContextTooLong
from dynserve.openai.model_files import read_model_files
from dynserve.openai.prompt import Preprocessor, sampling_defaults
from dynserve.openai.protocol import parse_chat, parse_completion

PREPROCESSOR = Preprocessor(read_model_files(TINY_MODEL))
HELLO = {"model": "m", "messages": [{"role": "user", "content": "What is 3+4?"}]}


def chat(**changes: Any) -> Any:
    return parse_chat(json.dumps(HELLO | changes).encode())


def test_a_chat_is_rendered_by_the_models_template() -> None:
    # what transformers' apply_chat_template gives for the same messages
    expected = [1, 330, 262, 201, 290, 275, 223, 21, 13, 22, 33, 2, 201, 1, 67, 360, 421, 286, 201]
    assert chat().prompt_ids(PREPROCESSOR) == expected


def test_content_parts_and_the_developer_role_are_the_same_as_their_plain_forms() -> None:
    parts = chat(
        messages=[
            {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief"}]}
        ]
    )
    plain = chat(messages=[{"role": "system", "content": "Be brief"}])
    assert parts.prompt_ids(PREPROCESSOR) == plain.prompt_ids(PREPROCESSOR)


def test_a_template_can_refuse_messages_but_not_reach_out() -> None:
    files = read_model_files(TINY_MODEL)
    evil = json.dumps({"chat_template": "{{ ''.__class__.__mro__ }}"}).encode()
    with pytest.raises(BadRequest, match="refused"):
        Preprocessor(files | {"tokenizer_config.json": evil}).chat(HELLO["messages"])  # type: ignore[arg-type]
    picky = json.dumps({"chat_template": "{{ raise_exception('no system here') }}"}).encode()
    with pytest.raises(BadRequest, match="no system here"):
        Preprocessor(files | {"tokenizer_config.json": picky}).chat(HELLO["messages"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 3}, "temperature: .*less than or equal to 2"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
        ({"n": 2}, "n other than 1 is not supported yet"),
        ({"tools": [{"type": "function"}]}, "tools is not supported yet"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported yet"),
        ({"stream_options": {"include_usage": True}}, "stream_options needs stream"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop_token_ids": [10**30]}, "stop_token_ids"),
        ({"logit_bias": {"-5": 1}}, "logit_bias"),
    ],
)
def test_a_wrong_field_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        chat(**changes)


def test_template_variables_cannot_replace_the_messages() -> None:
    with pytest.raises(BadRequest, match="cannot set messages"):
        chat(chat_template_kwargs={"messages": []}).prompt_ids(PREPROCESSOR)
    chat(chat_template_kwargs={"enable_thinking": False}).prompt_ids(PREPROCESSOR)


def test_a_body_that_is_no_json_is_a_bad_request() -> None:
    with pytest.raises(BadRequest, match="not a JSON object"):
        parse_chat(b"{")


def test_fields_that_are_unknown_or_say_nothing_are_ignored() -> None:
    chat(user="u", tools=[], response_format={"type": "text"}, some_new_field=1)


def test_top_logprobs_needs_logprobs() -> None:
    with pytest.raises(BadRequest):
        chat(top_logprobs=2).wanted_logprobs()
    assert chat(logprobs=True, top_logprobs=2).wanted_logprobs() == 2
    assert chat(logprobs=True).wanted_logprobs() == 0
    assert chat().wanted_logprobs() is None


def test_a_prompt_over_the_context_names_both_numbers() -> None:
    with pytest.raises(ContextTooLong, match="64 tokens.*70 tokens"):
        chat().stops(70, 64, None)
    assert chat(max_tokens=500).stops(60, 64, None).max_tokens == 4


def test_a_prompt_may_be_text_or_token_ids() -> None:
    text = parse_completion(json.dumps({"model": "m", "prompt": "one two"}).encode())
    ids = text.prompt_ids(PREPROCESSOR)
    for form in (ids, [ids], ["one two"]):
        assert parse_completion(json.dumps({"model": "m", "prompt": form}).encode()).prompt_ids(PREPROCESSOR) == ids


@pytest.mark.parametrize("prompt", [[], "", [99999], [-1], ["a", "b"]])
def test_prompts_that_cannot_be_answered_are_refused(prompt: Any) -> None:
    request = parse_completion(json.dumps({"model": "m", "prompt": prompt}).encode())
    with pytest.raises(BadRequest):
        request.prompt_ids(PREPROCESSOR)


def test_the_models_own_sampling_defaults_fill_what_a_request_leaves_out() -> None:
    defaults = sampling_defaults({"do_sample": True, "temperature": 0.7, "top_k": 20, "eos_token_id": 1})
    sampling = chat(top_k=5).sampling(defaults, None)
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.7, 5, 1.0)
    assert sampling_defaults({"do_sample": False}).greedy


def test_a_seed_is_drawn_once_when_none_is_given() -> None:
    defaults = sampling_defaults({})
    assert chat().sampling(defaults, None).seed != chat().sampling(defaults, None).seed
    assert chat(seed=5).sampling(defaults, None).seed == 5
