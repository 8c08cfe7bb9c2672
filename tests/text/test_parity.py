from __future__ import annotations

import pytest

from dynserve.config import TINY_MODEL
from dynserve.model_files import read_model_files
from dynserve.text.parity import NOON, difference, parity
from dynserve.text.preprocess import Conversation, Preprocessor


@pytest.fixture(scope="module")
def preprocessor() -> Preprocessor:
    return Preprocessor(read_model_files(TINY_MODEL))


def test_equal_sides_have_no_difference(preprocessor: Preprocessor) -> None:
    assert difference(parity(preprocessor, 32), parity(preprocessor, 32)) is None


@pytest.mark.parametrize("block_size", [1, 16, 32, 4096])
def test_every_block_size_has_blocks_to_compare(preprocessor: Preprocessor, block_size: int) -> None:
    ours = parity(preprocessor, block_size)
    assert ours["hashes"] != ours["salt"] != parity(preprocessor, block_size + 1)["salt"]


def test_the_first_stage_that_differs_is_the_cause(preprocessor: Preprocessor) -> None:
    ours = parity(preprocessor, 32)
    assert difference(parity(preprocessor, 64), ours) == "its block size is 64, the model's is 32"
    for stage, word in (("template", "template"), ("tokenizer", "tokenizer"), ("hashes", "seed"), ("salt", "salt")):
        cause = difference(ours | {stage: "other"}, ours)
        assert cause is not None and word in cause
    assert difference({}, ours) is not None  # a worker that reports nothing is not trusted


def test_a_model_without_a_template_can_be_compared() -> None:
    files = {name: content for name, content in read_model_files(TINY_MODEL).items() if name == "tokenizer.json"}
    bare = Preprocessor(files)
    assert difference(parity(bare, 32), parity(bare, 32)) is None


def test_parity_renders_templates_that_print_the_date_at_a_fixed_time() -> None:
    files = read_model_files(TINY_MODEL)
    dated = files | {
        "chat_template.jinja": b"{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    }
    preprocessor = Preprocessor(dated)
    assert preprocessor.render(Conversation([{"role": "user", "content": "x"}]), now=NOON) == "01 Jan 2000x"
    assert preprocessor.render(Conversation([{"role": "user", "content": "x"}])) != "01 Jan 2000x"
    assert parity(preprocessor, 32)["template"] != parity(Preprocessor(files), 32)["template"]


def test_two_templates_that_fail_alike_have_no_difference() -> None:
    broken = read_model_files(TINY_MODEL) | {"chat_template.jinja": b"{{ 1 / 0 }}"}
    assert difference(parity(Preprocessor(broken), 32), parity(Preprocessor(broken), 32)) is None
