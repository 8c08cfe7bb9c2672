"""Detokenizers beside the tokenizers' own `decode`, for vocabularies of every kind."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from dynserve.config import TINY_MODEL
from dynserve.render.renderer import Renderer
from dynserve.text.detokenize import Bytewise, Vocabulary, Windowed
from dynserve.wire.requests import RenderOptions, StopConditions, TokenLogprob, pack_tokens

CORPUS = ["hello world, the world says hello to you", "one two  three words in a line\n", "a naïve café über"] * 20
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIAL = ["<s>", "</s>", "<|end|>"]
TEXTS = ("hello world", " hello", "  two  spaces ", "naïve über", "你好 world 🙂", "a\nb\tc", "x")


def llama() -> Tokenizer:
    """Llama 2, Mistral, TinyLlama, Phi 3: a space before each text, which the decoder drops again."""
    tokenizer = _sentence_piece()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def gemma() -> Tokenizer:
    tokenizer = _sentence_piece()
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = _sentence_piece()
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", *SPECIAL]))
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _sentence_piece() -> Tokenizer:
    """A BPE model over `▁`, with single bytes for all other characters."""
    learner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    learner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learner.pre_tokenizer = pre_tokenizers.Split(Regex("▁+[^▁]*"), "isolated")
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", *SPECIAL, *BYTES], show_progress=False)
    learner.train_from_iterator(CORPUS, trainer)
    tokenizer = Tokenizer(learner.model)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "llama": llama,
    "gemma": gemma,
    "metaspace": metaspace,
    "byte level": lambda: Tokenizer.from_file(str(TINY_MODEL / "tokenizer.json")),
    "word piece": word_piece,
}


@pytest.fixture(params=KINDS, scope="module")
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return KINDS[request.param]()


def test_vocabularies_of_bytes_are_recognised() -> None:
    kinds = {name: type(Vocabulary(make()).detokenizer()) for name, make in KINDS.items()}
    assert kinds == dict.fromkeys(KINDS, Bytewise) | {"word piece": Windowed}


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_comes_back_as_the_tokenizer_decodes_it(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    detokenizer = Vocabulary(tokenizer).detokenizer()
    pieces = [detokenizer.push([id_]) for id_ in ids]
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


@given(st.text(max_size=20), st.text(max_size=20))
def test_an_answer_continues_its_prompt_to_the_letter(prompt: str, answer: str) -> None:
    for tokenizer in (LLAMA, GEMMA):
        before, after = tokenizer.encode("x" + prompt).ids, tokenizer.encode("x" + prompt + answer).ids
        if after[: len(before)] != before:
            continue  # the answer merges with the end of the prompt
        detokenizer = Vocabulary(tokenizer).detokenizer(after=before)
        text = detokenizer.push(after[len(before) :]) + detokenizer.flush()
        assert tokenizer.decode(before) + text == tokenizer.decode(after)


LLAMA, GEMMA = llama(), gemma()


def test_the_first_space_of_an_answer_is_kept_and_that_of_a_text_is_not() -> None:
    vocabulary = Vocabulary(LLAMA)
    ids = LLAMA.encode("hello world").ids
    assert vocabulary.detokenizer().push(ids) == "hello world"
    assert vocabulary.detokenizer(after=[1]).push(ids) == " hello world"
    space = LLAMA.token_to_id("▁")
    assert vocabulary.detokenizer().push([space]) == ""


def test_each_token_has_a_text_and_bytes_of_its_own() -> None:
    vocabulary = Vocabulary(LLAMA)
    texts = [vocabulary.token_text(id_) for id_ in range(LLAMA.get_vocab_size())]
    twice = {text for text in texts if texts.count(text) > 1}
    # a letter, and the byte of the same letter, which no text is cut into
    assert all(len(text) == 1 and text.isascii() for text in twice)
    assert vocabulary.token_bytes(LLAMA.token_to_id("<0xE4>")) == b"\xe4"
    assert vocabulary.token_text(LLAMA.token_to_id("<0xE4>")) == r"bytes:\xe4"
    assert vocabulary.token_text(LLAMA.token_to_id("▁hello")) == " hello"
    assert vocabulary.token_text(LLAMA.token_to_id("</s>")) == "</s>"


def completion(text: str, **changes: object) -> tuple[str, dict[str, list[object]]]:
    """The whole answer of a completion that repeats its own prompt, with its log-probabilities."""
    ids = LLAMA.encode(text).ids
    render = RenderOptions(kind="completion", response_id="id", model="m", created=1, logprobs=0, **changes)  # type: ignore[arg-type]
    renderer = Renderer(render, StopConditions(max_tokens=99), pack_tokens(ids), Vocabulary(LLAMA))
    entries = [TokenLogprob(id_, -0.5) for id_ in ids]
    for at, id_ in enumerate(ids):
        renderer.push([id_], [*entries, entries[0]] if render.echo and not at else [entries[at]])
    choice = json.loads(renderer.finish("stop")[0])
    choice = choice.get("choices", [choice])[0]
    return choice["text"], choice["logprobs"]


@pytest.mark.parametrize("text", ["hello world", "你好 world", "naïve 🙂 über"])
def test_offsets_are_those_of_the_tokens_in_the_text(text: str) -> None:
    answer, columns = completion(text)
    assert answer == " " + text
    for token, offset in zip(columns["tokens"], columns["text_offset"], strict=True):
        assert isinstance(token, str) and isinstance(offset, int)
        assert token.startswith("bytes:") or answer[offset:].startswith(token)


def test_an_echoed_prompt_is_the_text_that_the_client_sent() -> None:
    answer, columns = completion("hello world", echo=True)
    assert answer == "hello world hello world"
    assert columns["text_offset"][:2] == [0, 5]


def test_a_stop_string_that_is_a_special_token_is_named_and_shown_on_request() -> None:
    end = LLAMA.token_to_id("<|end|>")
    for include, text in ((False, " hello"), (True, " hello<|end|>")):
        stop = StopConditions(max_tokens=9, strings=("<|end|>", "never"), token_ids=(end,), include_string=include)
        render = RenderOptions(kind="message", response_id="id", model="m", created=1)
        renderer = Renderer(render, stop, pack_tokens([1]), Vocabulary(LLAMA))
        renderer.push([LLAMA.token_to_id("▁hello")], None)
        message = json.loads(renderer.finish("stop", end)[0])
        assert message["content"][0]["text"] == text
        assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "<|end|>")
