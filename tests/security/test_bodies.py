"""Bodies that would take long to parse, and prompts that no context can hold: refused before anything is built of them."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynserve.api.body_bounds import MAX_ESCAPES, MAX_FIELD, BodyBounds, _count_ids
from dynserve.api.chat import ChatRequest
from dynserve.api.fields import parsed
from dynserve.api.grammar import grammar_of
from dynserve.cluster import Cluster
from dynserve.config import TINY_MODEL
from dynserve.errors import BadRequest, BodyTooLarge, ContextTooLong
from dynserve.executors.base import ExecutorLimits, _any_beyond, check_request
from dynserve.model_files import read_model_files
from dynserve.text.preprocess import SLICE, Preprocessor
from dynserve.text.segments import any_of
from dynserve.wire.discovery import Card
from dynserve.wire.requests import PriorOutput, pack_tokens
from tests.conftest import MODEL, make_request

PREPROCESSOR = Preprocessor(read_model_files(TINY_MODEL))
BOUNDS = BodyBounds(values=1000, ids=5000)


def values_of(node: Any) -> int:
    if isinstance(node, dict):
        return 1 + sum(map(values_of, node.values()))
    return 1 + sum(map(values_of, node)) if isinstance(node, list) else 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(alphabet='ab"\\,[{}]:\u00e4\n'),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(alphabet='ab"\\,['), inner, max_size=5),
    max_leaves=30,
)


@given(JSON, st.booleans())
def test_json_values_are_counted_without_parsing(node: Any, ascii_only: bool) -> None:
    body = json.dumps(node, ensure_ascii=ascii_only).encode()
    counted = BodyBounds()._count_values(body)
    # an empty list or object counts one value more than it has
    assert values_of(node) <= counted <= 2 * values_of(node) + 1


@given(st.lists(st.integers(0, 99999)) | st.lists(st.lists(st.integers(0, 99999))) | st.lists(st.text()))
def test_token_ids_are_counted_separately(prompt: Any) -> None:
    import msgspec

    raw = msgspec.Raw(json.dumps(prompt).encode())
    counted = _count_ids(raw)
    if any(isinstance(item, str) for item in prompt):
        assert counted is None
    else:
        assert counted is not None and values_of(prompt) - 1 <= counted[0] <= 2 * values_of(prompt)
        assert counted[1] == 1 + sum(isinstance(item, list) for item in prompt)


def test_a_body_within_its_bounds_passes_even_if_it_is_invalid() -> None:
    for body in (b"", b"{", b"[1,2]", b'"x"', b"\xff", b'{"prompt": "x"}', b'{"a": ' + b"[" * 500, b'{"\\ud800": 1}'):
        BOUNDS.check(body)
    BOUNDS.check(json.dumps({"prompt": [7] * 4900}).encode())
    BOUNDS.check(json.dumps({"messages": [{"role": "user", "content": ", [ {" * 100_000}]}).encode())
    BOUNDS.check(json.dumps({"prompt": [", , ," * 1000] * 50}).encode())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"unknown": [[]] * 2000}, "values"),
        ({"prompt": [[1]] * 3000}, "prompt: 6,000 token ids|values"),
        ({"prompt": [[1]] * 2100}, "prompt: 2,100 lists; a request may have 2,048"),
        ({"prompt": ["a"] * 1500}, "1,50. values"),
        ({"prompt": ["a"] * 2100}, "over 2,000 names and texts"),
        ({"prompt": [{}] * 2000}, "values"),
        ({"messages": [{"role": "user", "content": "x"}] * 600}, "names and texts|values"),
        ({"user": "x" * (MAX_FIELD + 1)}, "user: 65,539 bytes of JSON; this field may have 65,536"),
        ({"metadata": {"a": "x" * MAX_FIELD}}, "metadata: "),
        ({"x" * 1000: "x" * MAX_FIELD}, "x{64}: "),
        ({"tools": "x" * (5 << 20)}, "tools: "),
        ({"prompt": "\\" * (MAX_ESCAPES // 2 + 1)}, "escape sequences; send its text as UTF-8"),
    ],
)
def test_a_body_beyond_its_bounds_is_refused_with_the_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BodyTooLarge, match=message):
        BOUNDS.check(json.dumps(fields).encode())


def test_json_within_json_is_bounded_too() -> None:
    def body(arguments: str) -> bytes:
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
        turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
        return json.dumps({"model": "m", "messages": turns}).encode()

    code = json.dumps({"file": "a, b = [1, 2], {3: 4}\n" * 20_000})  # a text full of separators, and two values
    assert parsed(ChatRequest, body(code)).conversation().messages[1]["tool_calls"][0]["function"]["arguments"]
    for arguments in ('{"a": [' + "[]," * 40_000 + "1]}", '{"a": [' + '"",' * 40_000 + "1]}"):
        with pytest.raises(BodyTooLarge, match="messages: over 32,000 values in JSON texts"):
            parsed(ChatRequest, body(arguments))
    card = CARD_WITH_GRAMMARS
    for schema in ("[" * 300_000, '{"enum": [' + "1," * 20_000 + "1]}"):
        request = parsed(ChatRequest, json.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}], "guided_json": schema}).encode())  # fmt: skip
        with pytest.raises(BodyTooLarge, match="guided_json"):
            grammar_of(request, card)


CARD_WITH_GRAMMARS = Card(
    model="m", block_size=32, max_seq_len=100, num_blocks=4, max_batch_size=2, eos_token_ids=[], grammars=True
)


@given(st.lists(st.text(alphabet="<|ab>", min_size=1, max_size=6), min_size=1, max_size=12), st.text(alphabet="<|ab>x"))
def test_special_tokens_are_matched_longest_first(words: list[str], text: str) -> None:
    plain = re.compile("|".join(map(re.escape, sorted(set(words), key=len, reverse=True))))
    assert re.findall(any_of(words), text) == plain.findall(text)


def test_many_special_tokens_with_a_common_prefix_are_matched_quickly() -> None:
    tokens = [f"<unused{number}>" for number in range(6000)]
    began = time.process_time()
    assert re.findall(any_of(tokens), "<unused" * 20_000 + "<unused5999>") == ["<unused5999>"]
    assert time.process_time() - began < 10  # one after the other they would take minutes


async def test_large_bodies_are_answered_like_small_ones() -> None:
    """They are parsed in threads, unlike small ones."""
    async with Cluster(aggregated=1, executor="simulated", engine={"speed": 0}) as cluster, cluster.client() as client:
        for path, ask in (
            ("/v1/completions", {"prompt": "one two", "max_tokens": 3}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}),
            ("/v1/responses", {"input": "Hello", "max_output_tokens": 3}),
            ("/v1/messages", {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}),
            ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "Hello"}]}),
            ("/tokenize", {"prompt": "one two"}),
            ("/detokenize", {"tokens": [300, 301]}),
        ):
            body = json.dumps({"model": MODEL, **ask}).encode()
            small = await client.post(path, content=body)
            large = await client.post(path, content=body + b" " * 100_000)
            assert small.status_code == large.status_code == 200, (path, small.text, large.text)
            assert small.json().get("usage") == large.json().get("usage") and len(small.text) == len(large.text)
            wrong = await client.post(path, content=body[:-1] + b" " * 100_000)
            assert wrong.status_code == 400 and wrong.json()["error"]["message"], path
            many = await client.post(path, content=body[:-1] + b', "odd": [' + b"[]," * 50_000 + b"1]}")
            assert many.status_code == 413 and "odd: " in many.json()["error"]["message"], path
        assert cluster.frontend.gate.open_requests.count == 0


def test_a_text_that_cannot_fit_is_not_tokenised_whole() -> None:
    text = "some words of a text " * 400_000
    began = time.process_time()
    for tokenise in (lambda: PREPROCESSOR.tokenize(text, max_context=2048), lambda: PREPROCESSOR.tokenize(text, special=False, max_context=2048)):  # fmt: skip
        with pytest.raises(ContextTooLong, match=r"maximum context length is 2048 tokens.*more than 4096 tokens"):
            tokenise()
    assert time.process_time() - began < 5  # the whole text takes many times as long
    assert len(PREPROCESSOR.tokenize("a " * (SLICE * 2), max_context=SLICE * 2)) > SLICE  # what may fit is tokenised


LIMITS = ExecutorLimits(block_size=32, num_blocks=8, max_seq_len=256, max_batch_size=4, vocab_size=100)


def test_token_ids_beyond_the_models_vocabulary_are_refused() -> None:
    check_request(make_request([0, 99]), LIMITS, None)
    check_request(make_request([5], prior=PriorOutput([99])), LIMITS, None)
    check_request(make_request([5], prior=PriorOutput([])), LIMITS, None)
    for request in (make_request([0, 100]), make_request([2**32 - 1, 5]), make_request([5], prior=PriorOutput([100]))):
        with pytest.raises(BadRequest, match="is not one of this model's 0 to 99"):
            check_request(request, LIMITS, None)


@given(
    st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 300), min_size=1),
    st.integers(1, 2**31 - 1) | st.integers(1, 300),
)
def test_the_vectorised_check_of_token_ids_equals_a_check_one_by_one(ids: list[int], rows: int) -> None:
    assert _any_beyond(pack_tokens(ids), rows) == any(id_ >= rows for id_ in ids)


async def test_a_token_id_that_only_the_tokenizer_has_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "surplus"
    shutil.copytree(TINY_MODEL, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    tokenizer["added_tokens"].append({"id": 2048, "content": "<surplus>"} | flags)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    async with Cluster(aggregated=1, model=folder) as cluster, cluster.client() as client:
        assert "the tokenizer has ids up to 2048, the model only 0 to 2047" in caplog.text
        for prompt in ("one <surplus> two", [5, 2048]):
            answer = await client.post("/v1/completions", json={"model": "surplus", "prompt": prompt})
            assert answer.status_code == 400 and "2048" in answer.json()["error"]["message"]
        good = await client.post("/v1/completions", json={"model": "surplus", "prompt": "one two", "max_tokens": 2})
        assert good.status_code == 200
