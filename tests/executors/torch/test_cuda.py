"""The steps of the GPU, run by an emulator of its kernels and compared with a plain forward pass and with each other."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dynserve.executors.kv_blocks import BlockManager
from dynserve.executors.scheduler import Scheduler, Sequence, Slice
from dynserve.executors.torch.attention import KvCache
from dynserve.executors.torch.cuda.drawing import Drawing
from dynserve.executors.torch.cuda.forward import Forward
from dynserve.executors.torch.cuda.kernels import Shape
from dynserve.executors.torch.cuda.runner import CudaRunner, CudaStep
from dynserve.executors.torch.model import Transformer
from dynserve.executors.torch.model_config import ModelConfig
from dynserve.executors.torch.sampler import sample
from dynserve.wire.requests import SamplingParams, StopConditions
from tests.conftest import make_request
from tests.executors.torch.emulated import Emulated
from tests.reference import Reference

VOCAB = 600
BLOCK = 16
CHECKPOINTS: dict[str, dict[str, Any]] = {
    # heads of 64, seven to a group, biases, tied: Qwen2.5-0.5B's proportions
    "qwen2": {"num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": True},
    "qwen3": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 128, "tie_word_embeddings": False},
    "llama": {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32, "tie_word_embeddings": False},
}


def make_checkpoint(folder: Path, family: str) -> Path:
    """Random weights, of sizes that no number of lanes or warps divides."""
    hidden, inner, layers, own = 136, 328, 2, CHECKPOINTS[family]
    heads, kv, dim = own["num_attention_heads"], own["num_key_value_heads"], own["head_dim"]
    config = {
        "model_type": family, "vocab_size": VOCAB, "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "max_position_embeddings": 1024, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    } | own  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    shapes = {"model.embed_tokens.weight": (VOCAB, hidden), "model.norm.weight": (hidden,)}
    if not own["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (VOCAB, hidden)
    for i in range(layers):
        p = f"model.layers.{i}."
        shapes |= {p + "input_layernorm.weight": (hidden,), p + "post_attention_layernorm.weight": (hidden,)}
        for name, rows in (("q", heads * dim), ("k", kv * dim), ("v", kv * dim)):
            shapes[f"{p}self_attn.{name}_proj.weight"] = (rows, hidden)
            if family == "qwen2":
                shapes[f"{p}self_attn.{name}_proj.bias"] = (rows,)
        if family == "qwen3":
            shapes |= {p + "self_attn.q_norm.weight": (dim,), p + "self_attn.k_norm.weight": (dim,)}
        shapes |= {p + "self_attn.o_proj.weight": (hidden, heads * dim), p + "mlp.down_proj.weight": (hidden, inner)}
        shapes |= {p + "mlp.gate_proj.weight": (inner, hidden), p + "mlp.up_proj.weight": (inner, hidden)}
    weights = {
        name: (torch.randn(shape, generator=generator) * (0.1 if len(shape) > 1 else 0.3) + ("norm" in name)).bfloat16()
        for name, shape in shapes.items()
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, str(folder / "model.safetensors"))
    return folder


class Emulation:
    """One model with the GPU's runner, and a scheduler that feeds it."""

    def __init__(self, folder: Path, library: Path, *, max_rows: int = 64, num_blocks: int = 200) -> None:
        config = ModelConfig.read(folder)
        self.reference = Reference(folder)
        self.model = Transformer(config, folder, torch.device("cpu"), torch.bfloat16)
        for holder in (
            self.model,
            *self.model.layers,
        ):  # files are mapped as they are, and not aligned as a GPU's memory is
            for name, value in vars(holder).items():
                if isinstance(value, torch.Tensor):
                    setattr(holder, name, value.clone())
        shape = Shape.of(config, BLOCK)
        names = [*Forward.kernel_names(shape, config.qkv_bias), *Drawing.kernel_names()]
        self.emulated = Emulated(shape, names, library)
        cache = KvCache(
            num_blocks=num_blocks, block_size=BLOCK, num_layers=config.num_layers, kv_heads=config.num_kv_heads,
            head_dim=config.head_dim, dtype=torch.bfloat16, device=torch.device("cpu"), model="m",
        )  # fmt: skip
        self.runner = CudaRunner(
            self.model, cache, shape, self.emulated, max_rows=max_rows, max_samples=8, max_seq_len=1024
        )
        self.scheduler = Scheduler(
            BlockManager(num_blocks, BLOCK), max_batch_size=8, max_num_tokens=max_rows, max_seq_len=1024, chunked=True
        )
        self.tickets = 0

    def add(self, prompt: list[int], **options: Any) -> Sequence:
        self.tickets += 1
        sequence = Sequence(self.tickets, make_request(prompt, **options), BLOCK, frozenset(), 0.0)
        self.scheduler.add(sequence)
        return sequence

    def run(self, check: Callable[[CudaStep], None] = lambda step: None, *, overlap: bool = True) -> None:
        """Runs all added sequences to their end, as the executor's thread does."""
        begun: CudaStep | None = None
        while begun is not None or not self.scheduler.idle:
            step = begun or self.runner.begin(self.scheduler.schedule(0.0), None)
            check(step)
            begun = None
            if overlap and (more := self.scheduler.ahead(step.work)):
                begun = self.runner.begin(more, step)
            self.scheduler.commit(step.work, step.result())
        self.scheduler.check()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(params=CHECKPOINTS)
def emulation(request: pytest.FixtureRequest, tmp_path: Path, library: Path) -> Emulation:
    return Emulation(make_checkpoint(tmp_path / "model", request.param), library)


@pytest.fixture
def llama(tmp_path: Path, library: Path) -> Emulation:
    return Emulation(make_checkpoint(tmp_path / "model", "llama"), library)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    generator = random.Random(seed * 1000 + length)
    return [generator.randrange(VOCAB) for _ in range(length)]


def error_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_every_step_computes_the_logits_of_a_plain_forward_pass(emulation: Emulation) -> None:
    """Prompts in one step and in chunks, mixed batches of prompts and answers, and small decode batches."""
    seen: set[int] = set()

    def check(step: CudaStep) -> None:
        rows = [s for s in step.work if s.samples]
        for row, slice_ in enumerate(rows):
            tokens = slice_.sequence.tokens[: slice_.start + slice_.size]
            expected = emulation.reference.logits(tokens)[-1]
            assert error_of(emulation.runner._forward.logits[row], expected) < 0.03
        seen.add(len(rows))

    for length, new in ((1, 8), (5, 3), (23, 4), (17, 7), (70, 2), (9, 3)):
        emulation.add(
            prompt_of(length),
            stop=StopConditions(max_tokens=new, ignore_eos=True),
            sampling=SamplingParams(temperature=0.0),
        )
    emulation.run(check, overlap=False)
    assert {1, 2, 4, 5} <= seen
    launched = {name.split("<")[0] for name in emulation.emulated.launched}
    assert {"product", "attend", "rope_write", "rms_norm", "silu_mul", "begin", "choose"} <= launched


@pytest.mark.parametrize("going_on", [20, 200])
def test_steps_with_long_prompts_compute_the_logits_of_a_plain_forward_pass(
    tmp_path: Path, library: Path, monkeypatch: Any, going_on: int
) -> None:
    """Prompts of more tokens than rows are attended one by one: from the start, behind a cached prefix, and beside answers;
    in steps that fit a graph, and in steps that are too long for any."""
    emulation = Emulation(make_checkpoint(tmp_path / "model", "qwen2"), library, max_rows=900)
    shared = prompt_of(64, 9)
    errors: list[float] = []
    steps: list[int] = []
    long_layers = Forward.long_layers
    monkeypatch.setattr(Forward, "long_layers", lambda *args: steps.append(args[2]) or long_layers(*args))

    def check(step: CudaStep) -> None:
        for row, slice_ in enumerate(s for s in step.work if s.samples):
            expected = emulation.reference.logits(slice_.sequence.tokens[: slice_.start + slice_.size])[-1]
            errors.append(error_of(emulation.runner._forward.logits[row], expected))

    greedy, stop = SamplingParams(temperature=0.0), StopConditions(max_tokens=2, ignore_eos=True)
    emulation.add([*shared, 1], sampling=greedy, stop=StopConditions(max_tokens=1, ignore_eos=True))
    emulation.run(check, overlap=False)
    for prompt in (prompt_of(380), [*shared, *prompt_of(going_on)], prompt_of(2), [*shared, 7], prompt_of(130)):
        emulation.add(prompt, sampling=greedy, stop=stop)
    emulation.run(check, overlap=False)
    assert len(errors) == 11 and max(errors) < 0.03
    assert bool(steps) == (going_on == 200)


def test_attention_over_a_long_context_is_combined_from_its_parts(tmp_path: Path, library: Path) -> None:
    """Several thread blocks attend to the keys of one row, and the last one adds up."""
    emulation = Emulation(make_checkpoint(tmp_path / "model", "llama"), library, max_rows=600)
    stop = StopConditions(max_tokens=3, ignore_eos=True)
    sequence = emulation.add(prompt_of(530), sampling=SamplingParams(temperature=0.0), stop=stop)
    checked = []

    def check(step: CudaStep) -> None:
        expected = emulation.reference.logits(sequence.tokens)[-1]
        checked.append(error_of(emulation.runner._forward.logits[0], expected))

    emulation.run(check, overlap=False)
    assert len(checked) == 3 and max(checked) < 0.03


def test_a_step_begun_ahead_continues_with_the_token_that_is_not_known_yet(llama: Emulation) -> None:
    emulation, stop = llama, StopConditions(max_tokens=9, ignore_eos=True)
    sampling = [
        SamplingParams(temperature=0.0), SamplingParams(temperature=0.9, seed=3),
        SamplingParams(temperature=1.2, seed=4, presence_penalty=1.5, repetition_penalty=1.3, logit_bias={5: 3.0}),
    ]  # fmt: skip
    found = []
    for overlap in (False, True):
        sequences = [emulation.add(prompt_of(20 + i, i), sampling=s, stop=stop) for i, s in enumerate(sampling)]
        emulation.run(overlap=overlap)
        emulation.scheduler.blocks.clear()  # or the second time would compute less of the prompts, in other steps
        found.append([s.tokens for s in sequences])
    assert found[0] == found[1]


def test_the_extra_step_of_a_sequence_that_stopped_is_discarded(llama: Emulation) -> None:
    probe = llama.add(
        prompt_of(6), sampling=SamplingParams(temperature=0.0), stop=StopConditions(max_tokens=9, ignore_eos=True)
    )
    llama.run()
    end = probe.tokens[9]
    first = probe.tokens.index(end, 6)
    stopped = llama.add(
        prompt_of(6), sampling=SamplingParams(temperature=0.0), stop=StopConditions(max_tokens=9, token_ids=(end,))
    )
    other = llama.add(
        prompt_of(9), sampling=SamplingParams(temperature=0.0), stop=StopConditions(max_tokens=9, ignore_eos=True)
    )
    llama.run()
    assert stopped.tokens == probe.tokens[:first] and len(other.tokens) == 18
    assert llama.scheduler.blocks.free == llama.scheduler.blocks.num_blocks


# drawing


class Draws:
    """The device's sampler over synthetic logits."""

    def __init__(self, emulation: Emulation) -> None:
        self._emulation = emulation

    def device(self, logits: torch.Tensor, sampling: list[SamplingParams], prompts: list[list[int]]) -> list[int]:
        runner = self._emulation.runner
        sequences = [
            Sequence(i, make_request(prompt, sampling=s), BLOCK, frozenset(), 0.0)
            for i, (prompt, s) in enumerate(zip(prompts, sampling, strict=True))
        ]
        positions, unknown = [len(s.tokens) for s in sequences], [-1] * len(sequences)
        with torch.inference_mode():
            runner._drawing.prepare(sequences, positions, range(len(sequences)), len(sequences))
            runner._forward.logits[: len(logits)] = logits
            return [s.token_id for s in runner._drawing.draw(sequences, unknown).read()]

    @staticmethod
    def host(logits: torch.Tensor, sampling: list[SamplingParams], prompts: list[list[int]]) -> list[int]:
        sequences = [
            Sequence(i, make_request(prompt, sampling=s), BLOCK, frozenset(), 0.0)
            for i, (prompt, s) in enumerate(zip(prompts, sampling, strict=True))
        ]
        return [s.token_id for s in sample(logits, sequences)]


@pytest.fixture
def draws(llama: Emulation) -> Draws:
    return Draws(llama)


FIELDS = [
    SamplingParams(temperature=0.0), SamplingParams(temperature=1.0, seed=1), SamplingParams(temperature=0.7, seed=2, top_k=5),
    SamplingParams(temperature=1.0, seed=3, top_p=0.5), SamplingParams(temperature=1.3, seed=4, min_p=0.1),
    SamplingParams(temperature=0.9, seed=5, top_k=40, top_p=0.8, min_p=0.02), SamplingParams(temperature=2.0, seed=6, top_p=0.99),
    SamplingParams(temperature=0.8, seed=7, top_k=VOCAB + 5),
]  # fmt: skip


@pytest.mark.parametrize("spread", [0.5, 3.0, 12.0])
def test_both_samplers_draw_the_same_tokens(draws: Draws, spread: float) -> None:
    generator = torch.Generator().manual_seed(int(spread * 10))
    for length in range(1, 7):
        logits = torch.randn(len(FIELDS), VOCAB, generator=generator) * spread
        prompts = [prompt_of(length, i) for i in range(len(FIELDS))]
        assert draws.device(logits, FIELDS, prompts) == draws.host(logits, FIELDS, prompts)


def test_equal_logits_are_cut_by_top_k_alike_on_device_and_host(draws: Draws) -> None:
    """Among equal logits the smaller token id comes first, and top_k cuts through the middle of them."""
    logits = torch.zeros(8, VOCAB)
    logits[:, 100:110] = 1.0
    fields = [SamplingParams(temperature=1.0, seed=seed, top_k=13) for seed in range(8)]
    for length in range(1, 7):
        prompts = [prompt_of(length)] * 8
        found = draws.device(logits, fields, prompts)
        assert found == draws.host(logits, fields, prompts)
        assert {token for token in found if token < 100} <= {0, 1, 2} and all(token < 110 for token in found)


def test_tokens_of_probability_zero_are_not_drawn(draws: Draws) -> None:
    logits = torch.full((8, VOCAB), float("-inf"))
    logits[:, 17] = -5.0
    logits[:, 33] = -5.5
    for length in range(1, 10):
        assert set(draws.device(logits, FIELDS, [prompt_of(length, i) for i in range(8)])) <= {17, 33}


def test_tokens_drawn_on_the_device_follow_the_distribution(draws: Draws) -> None:
    logits = torch.full((8, VOCAB), float("-inf"))
    logits[:, 3:6] = torch.log(torch.tensor([0.1, 0.6, 0.3]))
    found = np.array([
        draws.device(logits, [SamplingParams(seed=seed * 8 + i) for i in range(8)], [[1]] * 8) for seed in range(30)
    ])  # fmt: skip
    assert [float((found == token).mean()) for token in (3, 4, 5)] == pytest.approx([0.1, 0.6, 0.3], abs=0.1)


def test_a_grammar_applies_only_to_its_own_row_of_the_batch(llama: Emulation) -> None:
    class Only:
        """A grammar of one token."""

        def mask(self, tokens: list[int], prompt_len: int, logits: torch.Tensor) -> None:
            kept = logits[42].clone()
            logits.fill_(float("-inf"))
            logits[42] = kept

    constrained = llama.add(
        prompt_of(4), sampling=SamplingParams(temperature=1.0), stop=StopConditions(max_tokens=6, ignore_eos=True)
    )
    constrained.matcher = Only()
    free = llama.add(
        prompt_of(4), sampling=SamplingParams(temperature=0.0), stop=StopConditions(max_tokens=6, ignore_eos=True)
    )
    llama.run()
    assert constrained.tokens[4:] == [42] * 6 and free.tokens[4:] != [42] * 6


def test_log_probabilities_are_those_of_the_model(llama: Emulation) -> None:
    sequence = llama.add(
        prompt_of(8),
        sampling=SamplingParams(temperature=0.0, logprobs=3, logit_bias={7: 50.0}),
        stop=StopConditions(max_tokens=1),
    )
    step = llama.runner.begin(llama.scheduler.schedule(0.0), None)
    ((sampled,),) = step.result()
    expected = torch.log_softmax(llama.reference.logits(sequence.tokens)[-1], -1)
    assert sampled.token_id == 7 and sampled.logprob is not None
    assert sampled.logprob.logprob == pytest.approx(float(expected[7]), abs=0.1)
    assert sampled.logprob.top[0][1] == pytest.approx(float(expected.max()), abs=0.1)


def test_a_preempted_sequence_uses_its_new_blocks(llama: Emulation) -> None:
    sequence = llama.add(
        prompt_of(50), sampling=SamplingParams(temperature=0.0), stop=StopConditions(max_tokens=4, ignore_eos=True)
    )
    step = llama.runner.begin(llama.scheduler.schedule(0.0), None)
    llama.scheduler.commit(step.work, step.result())
    llama.scheduler.blocks.clear()
    llama.scheduler._preempt(sequence)
    llama.scheduler.blocks.release(llama.scheduler.blocks.allocate(3)[::-1])  # the next ones come in another order
    llama.run()
    again = llama.add(
        prompt_of(50), sampling=SamplingParams(temperature=0.0), stop=StopConditions(max_tokens=4, ignore_eos=True)
    )
    llama.run()
    assert again.tokens == sequence.tokens


def test_slots_of_ended_sequences_are_reused(llama: Emulation) -> None:
    for i in range(40):  # more than there are slots
        llama.add([i + 1], sampling=SamplingParams(temperature=0.0), stop=StopConditions(max_tokens=2, ignore_eos=True))
    llama.run()
    work: list[Slice] = llama.scheduler.schedule(0.0)
    assert work == []
