from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from dynserve.config import TINY_MODEL
from dynserve.render.renderer import Renderer, StopStrings
from dynserve.text.detokenize import Vocabulary, Windowed
from dynserve.wire.requests import PriorOutput, RenderOptions, StopConditions, TokenLogprob, pack_tokens

TOKENIZER = Tokenizer.from_file(str(TINY_MODEL / "tokenizer.json"))
VOCABULARY = Vocabulary(TOKENIZER)
TEXTS = [
    "plain words",
    "naïve café",
    "你好，世界",
    "👩‍👩‍👧‍👦 family 🇩🇪",
    "é combining",
    "a\u0301\u0323b",
    "mixed 混合 🙂 text",
]


def render(kind: str = "chat", **changes: Any) -> RenderOptions:
    return RenderOptions(kind=kind, response_id="id", model="m", created=1, **changes)  # type: ignore[arg-type]


def prompt(tokens: int) -> bytes:
    return pack_tokens([300] * tokens)


def events(data: bytes) -> list[Any]:
    return [json.loads(line[6:]) for line in data.decode().split("\n\n") if line and line != "data: [DONE]"]


def content(chunks: list[Any]) -> str:
    return "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])


@given(st.lists(st.integers(0, 2047), max_size=40))
def test_any_tokens_pushed_one_by_one_give_the_tokenizers_own_text(token_ids: list[int]) -> None:
    detokenizer = VOCABULARY.detokenizer()
    text = "".join(detokenizer.push([id_]) for id_ in token_ids) + detokenizer.flush()
    assert text == TOKENIZER.decode(token_ids, skip_special_tokens=True)


@given(st.lists(st.integers(0, 2047), max_size=40), st.sampled_from(["chat", "completion", "message", "response"]))
def test_the_fast_path_for_a_token_gives_the_same_bytes_as_the_slow_one(token_ids: list[int], kind: str) -> None:
    short, long = (
        Renderer(render(kind, stream=True), StopConditions(max_tokens=99), prompt(2), VOCABULARY) for _ in range(2)
    )
    long._around = None
    for token_id in token_ids:
        assert short.push([token_id], None) == long.push([token_id], None)
    assert short.finish("stop") == long.finish("stop")


@pytest.mark.parametrize("text", TEXTS)
def test_no_piece_has_a_broken_character(text: str) -> None:
    for detokenizer in (VOCABULARY.detokenizer(), Windowed(TOKENIZER, VOCABULARY.special)):
        pieces = [detokenizer.push([id_]) for id_ in TOKENIZER.encode(text).ids]
        assert "".join(pieces) + detokenizer.flush() == text
        assert not any("\ufffd" in piece for piece in pieces)


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3), st.data())
def test_text_is_cut_at_the_first_stop_string(text: str, stops: list[str], data: st.DataObject) -> None:
    matcher, out, at = StopStrings(tuple(stops)), "", 0
    while at < len(text) and matcher.matched is None:
        size = data.draw(st.integers(1, 3))
        out += matcher.push(text[at : at + size])
        at += size
        assert not any(stop in out for stop in stops)
    out += "" if matcher.matched is not None else matcher.flush()
    ends = [text[:at].find(stop) for stop in stops if stop in text[:at]]
    assert out == (text[: min(ends)] if matcher.matched is not None else text)


def test_a_stop_string_can_be_kept_in_the_output() -> None:
    assert StopStrings(("END",), keep=True).push("one END two") == "one END"


def test_a_stream_begins_with_the_role_and_ends_with_reason_usage_and_done() -> None:
    renderer = Renderer(render(stream=True, usage=True), StopConditions(max_tokens=9), prompt(5), VOCABULARY)
    data = b"".join(renderer.push([id_], None) for id_ in TOKENIZER.encode("Hello there").ids)
    last, usage = renderer.finish("stop", 2)
    chunks = events(data + last)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert content(chunks) == "Hello there"
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == usage.completion_tokens
    assert last.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("kind", ["chat", "completion"])
@pytest.mark.parametrize("stop", [(), ("wor",), ("lo th", "zzz")])
@pytest.mark.parametrize("text", ["Hello there world", *TEXTS])
def test_a_replayed_renderer_continues_with_the_same_bytes(kind: str, stop: tuple[str, ...], text: str) -> None:
    ids = TOKENIZER.encode(text).ids
    rules, spec = StopConditions(max_tokens=99, strings=stop), render(kind, stream=True, logprobs=0)
    probs = [TokenLogprob(id_, -1.0) for id_ in ids]
    whole = Renderer(spec, rules, prompt(3), VOCABULARY)
    parts = [whole.push([id_], [p]) for id_, p in zip(ids, probs, strict=True)]
    end, _ = whole.finish("stop")
    for cut in range(1, len(ids)):
        second = Renderer(spec, rules, prompt(3), VOCABULARY)
        second.replay(PriorOutput(ids[:cut], probs[:cut]))
        rest = [second.push([id_], [p]) for id_, p in zip(ids[cut:], probs[cut:], strict=True)]
        assert parts[cut:] == rest and second.finish("stop")[0] == end


def test_a_unary_body_is_one_json_object() -> None:
    renderer = Renderer(render("completion", logprobs=1), StopConditions(max_tokens=9), prompt(5), VOCABULARY)
    ids = TOKENIZER.encode("one two").ids
    for id_ in ids:
        assert renderer.push([id_], [TokenLogprob(id_, -0.5, [(id_, -0.5)])]) == b""
    body = json.loads(renderer.finish("length")[0])
    assert body["choices"][0]["text"] == "one two"
    assert "".join(body["choices"][0]["logprobs"]["tokens"]) == "one two"
    assert body["usage"]["total_tokens"] == 5 + len(ids)


def test_special_tokens_are_shown_only_if_skip_special_tokens_is_false() -> None:
    for skip, expected in ((True, ""), (False, "<|im_end|>")):
        renderer = Renderer(render(skip_special_tokens=skip), StopConditions(max_tokens=9), prompt(1), VOCABULARY)
        renderer.push([2], None)
        assert json.loads(renderer.finish("stop")[0])["choices"][0]["message"]["content"] == expected


def test_render_options_survive_encoding_and_decoding() -> None:
    spec = render(stream=True, logprobs=3)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(spec), type=RenderOptions) == spec
