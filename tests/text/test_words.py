from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from dynserve.config import TINY_MODEL
from dynserve.model_files import read_model_files
from dynserve.text.preprocess import Preprocessor
from dynserve.text.segments import Segments
from dynserve.text.words import MAX_TEXT, MAX_WORDS, SHORT_TEXT, TOO_LONG, Words, words_of
from dynserve.text.words import _in_ascii as in_ascii

SOURCE = (TINY_MODEL / "tokenizer.json").read_text()
# how the families that are served cut words: Qwen 2 and 3, Llama 3, GPT-4o and Llama 4, DeepSeek's letters
PATTERNS = [
    json.loads(SOURCE)["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"],
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
]
# special tokens are split off a text before words are
SPECIAL = [token["content"] for token in json.loads(SOURCE)["added_tokens"]]
ASCII = st.text(st.characters(max_codepoint=127), max_size=80).filter(lambda text: not any(t in text for t in SPECIAL))
PROSE = st.lists(
    st.sampled_from([" the", "The", "'s", "'LL", " ", "  ", "\n", "\r\n", "\t", "12", "3", "_x", "();", "\x1c", "\x85"])
)


def tokenizer(pattern: str = PATTERNS[0]) -> Tokenizer:
    made = Tokenizer.from_str(SOURCE)
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return made


TOKENIZERS = [tokenizer(pattern) for pattern in PATTERNS]
WORDS = [words_of(one) for one in TOKENIZERS]


@pytest.mark.parametrize("number", range(len(PATTERNS)))
@settings(max_examples=150)
@given(text=st.one_of(ASCII, PROSE.map("".join)))
def test_the_word_cache_gives_the_tokenizers_own_ids(number: int, text: str) -> None:
    words = WORDS[number]
    assert words is not None
    ids = words.encode(text)
    assert ids is None if not text.isascii() else ids == TOKENIZERS[number].encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("number", range(len(PATTERNS)))
def test_a_long_text_in_pieces_gives_the_tokenizers_own_ids(number: int) -> None:
    text = "It's 2024;  def f(x):\n    return [x, 'y']\n\n" * 400
    words = WORDS[number]
    assert words is not None
    assert words.encode(text) == TOKENIZERS[number].encode(text, add_special_tokens=False).ids


def test_texts_that_are_too_long_or_have_too_many_new_words_use_the_library() -> None:
    words = words_of(TOKENIZERS[0])
    assert words is not None
    assert words.encode(" ".join(f"w{number}x" for number in range(2000))) is not None
    letters = [chr(97 + number // 676) + chr(97 + number // 26 % 26) + chr(97 + number % 26) for number in range(3000)]
    assert words.encode(" ".join(letters)) is None
    assert words.encode("a " * (MAX_TEXT // 2 + 1)) is None


def test_other_kinds_of_tokenizers_use_the_library() -> None:
    lower = tokenizer()
    lower.normalizer = normalizers.Lowercase()
    own = tokenizer()
    own.add_tokens([AddedToken("wörd", normalized=True)])
    plain = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    sentences = tokenizer()
    sentences.pre_tokenizer = pre_tokenizers.Metaspace()
    drawn = tokenizer()
    drawn.model.dropout = 0.5
    within = tokenizer(r"[\p{L}&&[^a]]+|[^\p{L}]|a")
    odd = tokenizer(r"\p{Han}+|[^\p{Han}]+")
    for made in (lower, own, plain, sentences, drawn, within, odd):
        assert words_of(made) is None


@pytest.mark.parametrize(
    "pattern",
    [
        r"a$|[^a]+|a",  # the end of a line there, of the text here
        r"\w+\Z|\w|\W",
        r"^\w|\w+|\W+",
        r"(?m:.+)|\n",
        r".+|\n",
        r"\d{1,3}+|\D+",  # possessive here, twice repeated there
        r"\d{3}?|\d|\D+",
        r"[\p{M}]|\w+|\W+",
        r"[^\p{M}]+",
        r"(\w)(\w*)|\W+",
        r"(\w+)|\W+",
        r"(?<w>\w+)|\W+",
        r"[+-\p{L}]+|[^a-zA-Z+-]+",
        r"[a\p{Lt}-z]+|[^a\p{Lt}-z]+",
        r"[[:alpha:]]+|[^[:alpha:]]+",
        r"\h+|\H+",
        r"\w*|\W",
        r"(?=a)|\w+|\W+",
        r"(?i:\p{Lu}+)|\w|\W",
        r"[\]a]?(?=a)(?:a+?b?){2}|(?i:\p{Lu}?+)?(?:a+?b?)|\s|\S",
        r"(?i:(?:a|[\p{Ll}])+)|\w|\W",
        r"[\p{M}^a]+|a|\w",
        r"[\p{M}^]+|\^|[\w]",
        r"\bx|\w+|\W+",
        r"(?i)a+|[^a]+",
        r"(?-i:a)+|[^a]+",
        r"\p{Alpha}+|\P{L}+",
        r"[é]+|[^é]+",
        r"é+|[^é]+",
        r"[^a",
        "\\w+|\\",
    ],
)
def test_a_pattern_that_may_mean_something_else_in_python_uses_the_library(pattern: str) -> None:
    assert in_ascii(pattern) is None or words_of(tokenizer(pattern)) is None


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
        r"[a-c\p{Lu}]+|[\p{L}_-]+|\d{2,}|[^\p{L}_\-0-9]+?|\d|[-_]",
        r"\p{N}{2}|\p{N}|\P{N}+".replace(r"\P{N}", r"[^\p{N}]"),
        r"[.$^|]+|\w{1,}|[^.$^|\w]{1,4}",
    ],
)
@settings(max_examples=60)
@given(text=ASCII)
def test_a_pattern_that_means_the_same_in_python_gives_the_same_words(pattern: str, text: str) -> None:
    made, words = EXPRESSIONS.setdefault(pattern, (one := tokenizer(pattern), words_of(one)))
    assert words is not None
    assert words.encode(text) == made.encode(text, add_special_tokens=False).ids


EXPRESSIONS: dict[str, tuple[Tokenizer, Words | None]] = {}


def test_a_text_that_the_pattern_does_not_match_everywhere_uses_the_library() -> None:
    made = tokenizer(r"(?=xyq)|\S+|\s+")
    words = words_of(made)
    assert words is not None
    assert words.encode("a b") == made.encode("a b").ids
    for text in ("xyqaxyq xyq", "a " * SHORT_TEXT + "xyq"):
        assert words.encode(text) is None


def test_an_error_in_the_word_cache_falls_back_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Words, text: str) -> list[int]:
        raise TypeError("not a word")

    monkeypatch.setattr(Words, "encode", broken)
    assert words_of(tokenizer()) is None


def test_a_long_word_in_a_long_text_uses_the_library() -> None:
    words = words_of(TOKENIZERS[0])
    assert words is not None
    text = "the end. " * (SHORT_TEXT // 9)
    assert words.encode(text + "x" * (TOO_LONG - 1)) is not None
    assert words.encode(text + "x" * TOO_LONG) is None


def test_a_pattern_with_gaps_uses_the_library() -> None:
    gaps = tokenizer(r"\p{L}+")
    words = words_of(gaps)
    assert words is None or words.encode("a b") is None


def test_the_cache_of_words_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_WORDS > 10_000
    monkeypatch.setattr("dynserve.text.words.MAX_WORDS", 10)
    words = words_of(TOKENIZERS[0])
    assert words is not None
    for number in range(100):
        text = f"w{number} again {'x' * 100}"
        assert words.encode(text) == TOKENIZERS[0].encode(text).ids
    assert len(words._known) <= 10


def test_special_tokens_within_a_text_and_around_it_are_kept() -> None:
    text = "<|im_start|>user\nhi there<|im_end|>\n<think>x</think>"
    assert Segments(TOKENIZERS[0]).encode(text) == TOKENIZERS[0].encode(text).ids
    files = dict(read_model_files(TINY_MODEL))
    framed = Tokenizer.from_str(SOURCE)
    framed.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|im_end|>", special_tokens=[("<|endoftext|>", 0), ("<|im_end|>", 2)]
    )
    files["tokenizer.json"] = framed.to_str().encode()
    preprocessor = Preprocessor(files)
    for prompt in (text, "plain words", "", "naïve café"):
        assert preprocessor.tokenize(prompt) == framed.encode(prompt).ids
        assert preprocessor.tokenize(prompt, special=False) == framed.encode(prompt, add_special_tokens=False).ids


def test_a_tokenizer_without_a_byte_alphabet_uses_the_library() -> None:
    made = tokenizer()
    made.decoder = decoders.Fuse()
    assert isinstance(words_of(made), Words)  # the decoder does not matter
    made.pre_tokenizer = None  # type: ignore[assignment]
    assert words_of(made) is None
