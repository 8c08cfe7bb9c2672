from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from dynserve.config import TINY_MODEL
from dynserve.text.segments import Segments

TOKENIZER = Tokenizer.from_file(str(TINY_MODEL / "tokenizer.json"))
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<tool_call>", "</tool_call>", "<think>", "</think>"]
PARTS = st.one_of(
    st.sampled_from(
        [*SPECIAL, "<|im_", "end|>", "\n", " ", "user\n", "What is 3+4?", "assistant", "é", "\u0301", "🙂"]
    ),
    st.text(max_size=12),
)
SHARED = Segments(TOKENIZER)  # keeps the segments of earlier examples


@given(st.lists(PARTS, max_size=12))
def test_token_ids_are_exactly_those_of_the_whole_text(parts: list[str]) -> None:
    text = "".join(parts)
    whole = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert Segments(TOKENIZER).encode(text) == whole
    assert SHARED.encode(text) == whole and SHARED.encode(text) == whole


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text(max_size=60)), min_size=1, max_size=8))
def test_every_turn_of_a_conversation_has_the_ids_of_its_whole_text(turns: list[tuple[str, str]]) -> None:
    segments, text = Segments(TOKENIZER), ""
    for role, content in turns:
        text += f"<|im_start|>{role}\n{content}<|im_end|>\n"
        prompt = text + "<|im_start|>assistant\n"
        assert segments.encode(prompt) == TOKENIZER.encode(prompt, add_special_tokens=False).ids


def test_the_next_turn_tokenizes_only_its_new_text() -> None:
    segments = Segments(TOKENIZER)
    turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    first = turn.format("word " * 2000)
    segments.encode(first)
    before = segments.misses
    segments.encode(first + "answer<|im_end|>\n" + turn.format("next?"))
    assert segments.misses - before < 100 < len(first) <= segments.hits + 100


def test_cached_segments_are_bounded_and_the_oldest_are_evicted_first() -> None:
    segments = Segments(TOKENIZER, budget=20_000)
    for number in range(200):
        segments.encode(f"<|im_start|>{number} {'x' * 100}<|im_end|>")
        assert segments._bytes <= 20_000
    hits = segments.hits
    segments.encode(f"<|im_start|>199 {'x' * 100}<|im_end|>")
    assert segments.hits > hits
    misses = segments.misses
    segments.encode(f"<|im_start|>0 {'x' * 100}<|im_end|>")
    assert segments.misses > misses
    segments.encode("y" * 50_000)  # a segment that would evict all others is not kept
    assert "y" * 50_000 not in segments._known


def made(pre_tokenizer: Any, **flags: bool) -> Tokenizer:
    alphabet = {char: at for at, char in enumerate(["<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz"])}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken("[S]", normalized=False, **flags)])
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "exact"),
    [
        (made(pre_tokenizers.Metaspace(prepend_scheme="always")), True),
        (made(pre_tokenizers.Metaspace(prepend_scheme="never")), True),
        (made(pre_tokenizers.Metaspace(prepend_scheme="first")), False),
        (made(pre_tokenizers.Metaspace(prepend_scheme="always"), rstrip=True), False),
        (made(pre_tokenizers.Metaspace(prepend_scheme="always"), single_word=True), False),
    ],
)
def test_tokenizers_that_depend_on_neighbouring_text_get_the_whole_text(tokenizer: Tokenizer, exact: bool) -> None:
    segments = Segments(tokenizer)
    assert segments.exact is exact
    for text in ("[S]ab[S] c d[S]", "ab [S]  cd", "a[S]", "[S]", "", " [S][S] x"):
        assert segments.encode(text) == tokenizer.encode(text, add_special_tokens=False).ids


def test_a_tokenizer_without_special_tokens_is_used_unchanged() -> None:
    raw = json.loads(TOKENIZER.to_str())
    raw["added_tokens"] = []
    plain = Tokenizer.from_str(json.dumps(raw))
    assert Segments(plain).encode("one two") == plain.encode("one two").ids
