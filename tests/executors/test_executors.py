"""The contract of executors, on the torch and the simulated one; and the torch one against a plain forward pass."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import save_file

from dynserve.config import TINY_MODEL, WorkerConfig
from dynserve.errors import ConfigError, ContextTooLong, EngineDied, Unavailable, WorkerLost
from dynserve.executors.base import Executor, Output, generate, open_executor
from dynserve.executors.engine import EngineSteps
from dynserve.executors.handoff import belongs
from dynserve.executors.torch.attention import KvCache
from dynserve.executors.torch.model_config import ModelConfig
from dynserve.executors.transceiver import MemoryTransceivers
from dynserve.wire.events import KvEvent, Stored
from dynserve.wire.requests import GenerateRequest, PriorOutput, SamplingParams, StopConditions
from tests.conftest import make_request, until
from tests.reference import Reference

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "tiny_model.json").read_text())
ENGINE: dict[str, Any] = {"num_blocks": 200, "speed": 0}


class Opener:
    """Executors of one kind; TensorRT-LLM's are the double's, in this process."""

    def __init__(self, name: str, stack: AsyncExitStack) -> None:
        self.name, self._stack, self._transceivers, self._count = name, stack, MemoryTransceivers(), 0

    async def __call__(self, model: Path = TINY_MODEL, **engine: Any) -> Executor:
        self._count += 1
        options = doubled(ENGINE | engine) if self.name == "trtllm" else ENGINE | engine
        config = WorkerConfig(model_path=str(model), executor=self.name, override_engine_args=json.dumps(options))  # type: ignore[arg-type]
        return await self._stack.enter_async_context(open_executor(config, f"w{self._count}", self._transceivers))


def doubled(engine: dict[str, Any]) -> dict[str, Any]:
    """Returns the same options under TensorRT-LLM's names."""
    options = {k: v for k, v in engine.items() if k not in ("num_blocks", "speed", "step_ms")}
    cache = {"max_tokens": engine["num_blocks"] * 32, "enable_partial_reuse": False}
    transceiver = {"backend": "NIXL", **engine.get("cache_transceiver_config", {})}
    return options | {"kv_cache_config": cache, "cache_transceiver_config": transceiver}


@pytest.fixture(params=["torch", "simulated", "trtllm"])
async def opened(request: pytest.FixtureRequest, trtllm_double: None) -> AsyncIterator[Opener]:
    async with AsyncExitStack() as stack:
        yield Opener(request.param, stack)


@pytest.fixture
async def torch_opened() -> AsyncIterator[Opener]:
    async with AsyncExitStack() as stack:
        yield Opener("torch", stack)


async def answer(executor: Executor, request: GenerateRequest) -> tuple[list[int], Output]:
    tokens: list[int] = []
    async for output in generate(executor, request):
        tokens += output.token_ids
        last = output
    return tokens, last


async def test_an_answer_has_max_tokens_tokens(opened: Opener) -> None:
    tokens, last = await answer(await opened(), make_request([5, 6, 7]))
    assert (len(tokens), last.reason) == (8, "length")


async def test_the_same_request_gets_the_same_answer_alone_and_in_a_batch(opened: Opener) -> None:
    executor = await opened()
    requests = [make_request([i, i + 1, *range(300, 300 + 7 * i)]) for i in range(1, 20)]
    alone = [(await answer(executor, request))[0] for request in requests]
    crowd = await asyncio.gather(*(answer(executor, request) for request in requests))
    assert alone == [tokens for tokens, _ in crowd]


async def test_a_repeated_prompt_is_found_in_the_cache(opened: Opener) -> None:
    executor = await opened()
    prompt = list(range(300, 400))
    first, second = [(await answer(executor, make_request(prompt)))[1] for _ in range(2)]
    assert (first.cached_tokens, second.cached_tokens) == (0, 96)


async def test_another_cache_salt_shares_no_cached_blocks(opened: Opener) -> None:
    executor = await opened()
    prompt = list(range(300, 400))
    await answer(executor, make_request(prompt))
    assert (await answer(executor, make_request(prompt, cache_salt="tenant")))[1].cached_tokens == 0


async def test_prefill_and_decode_on_two_executors_give_the_answer_of_one(opened: Opener) -> None:
    prefill, decode, both = await opened(), await opened(), await opened()
    for length in (1, 31, 32, 33, 64, 100):
        request = make_request(list(range(300, 300 + length)))
        expected, _ = await answer(both, request)
        outputs: list[Output] = []
        ticket = prefill.submit(msgspec.structs.replace(request, phase="prefill"), outputs.append)
        await until(lambda outputs=outputs: bool(outputs))
        first, handed = outputs[0].token_ids, outputs[0]
        assert handed.reason == "handoff" and handed.handoff is not None and prefill.load().open_handoffs == 1
        rest, last = await answer(
            decode, msgspec.structs.replace(request, phase="decode", prior=PriorOutput(first), handoff=handed.handoff)
        )
        assert first + rest == expected and last.reason == "length"
        prefill.handoff_done(ticket)
        await until(lambda: prefill.load().open_handoffs == 0)
    assert decode.counters()["kv_transfers_done_total"] == 6
    await until(lambda: prefill.load().free_blocks == decode.load().free_blocks == 200)


@pytest.mark.parametrize("length", [20, 63, 64])
@pytest.mark.parametrize("known", [1, 2, 34])
async def test_an_interrupted_answer_continues_alone_or_through_a_hand_off(
    opened: Opener, length: int, known: int
) -> None:
    stop = StopConditions(max_tokens=48, ignore_eos=True)
    request = make_request(list(range(300, 300 + length)), stop=stop)
    whole, _ = await answer(await opened(), request)
    prefill, decode = await opened(), await opened()
    interrupted = msgspec.structs.replace(request, prior=PriorOutput(whole[:known], cached_tokens=7))
    alone, last = await answer(await opened(), interrupted)
    assert whole[:known] + alone == whole and last.reason == "length"
    first, handed = await answer(prefill, msgspec.structs.replace(interrupted, phase="prefill"))
    assert handed.handoff is not None and handed.handoff.num_tokens == length + known
    prior = PriorOutput(whole[:known] + first)
    moved = msgspec.structs.replace(request, phase="decode", prior=prior, handoff=handed.handoff)
    rest, last = await answer(decode, moved)
    assert whole[:known] + first + rest == whole and last.reason == "length"
    assert decode.counters()["kv_transfers_done_total"] == 1
    assert decode.counters().get("kv_transfers_failed_total", 0) == 0
    forged = msgspec.structs.replace(moved, id="another", prior=PriorOutput([5] * (known + 1)))
    assert not belongs(handed.handoff, msgspec.structs.replace(forged, id=moved.id))


@pytest.mark.parametrize("change", [{"request_id": "other"}, {"sequence_hash": 1}, {"id": 12345}, {"state": b"junk"}])
async def test_a_hand_off_that_fails_is_prefilled_locally_and_counted(opened: Opener, change: dict[str, Any]) -> None:
    prefill, decode = await opened(), await opened()
    request = make_request(list(range(300, 370)))
    expected, _ = await answer(decode, msgspec.structs.replace(request, cache_salt=""))
    request = msgspec.structs.replace(request, id="second")
    first, handed = await answer(prefill, msgspec.structs.replace(request, phase="prefill"))
    assert handed.handoff is not None
    wrong = msgspec.structs.replace(handed.handoff, **change)
    rest, _ = await answer(
        decode, msgspec.structs.replace(request, phase="decode", prior=PriorOutput(first), handoff=wrong)
    )
    assert first + rest == expected
    assert decode.counters()["kv_transfers_failed_total"] == 1


async def test_an_abort_frees_blocks_and_ends_the_output(opened: Opener) -> None:
    executor = await opened(step_ms=1, speed=1)
    outputs: list[Output] = []
    ticket = executor.submit(
        make_request([1, 2], stop=StopConditions(max_tokens=5000, ignore_eos=True)), outputs.append
    )
    await until(lambda: len(outputs) > 2)
    executor.abort(ticket)
    executor.abort(ticket)
    seen = len(outputs)
    await until(lambda: executor.load().free_blocks == 200 and executor.load().running == 0)
    assert len(outputs) == seen


async def test_an_abort_after_prefill_cancels_the_hand_off(opened: Opener) -> None:
    """TensorRT-LLM cannot abort a prefill that has ended: it frees the blocks at its own limit of a transfer."""
    executor = await opened(cache_transceiver_config={"kv_transfer_timeout_ms": 1000})
    outputs: list[Output] = []
    ticket = executor.submit(make_request([1, 2], phase="prefill"), outputs.append)
    await until(lambda: bool(outputs))
    assert executor.load().open_handoffs == 1
    executor.abort(ticket)
    await until(lambda: executor.load().free_blocks == 200)
    assert executor.load().open_handoffs == 0


async def test_kv_events_report_the_cached_blocks(opened: Opener) -> None:
    executor = await opened()
    events: list[KvEvent] = []
    executor.listen_kv(events.extend)
    await answer(executor, make_request(list(range(300, 370))))
    await until(lambda: sum(len(e.hashes) for e in events if isinstance(e, Stored)) == 2)


async def test_preemption_changes_no_answer(opened: Opener) -> None:
    roomy, tight = await opened(), await opened(num_blocks=10)
    stop = StopConditions(max_tokens=60, ignore_eos=True)
    requests = [make_request([300 + i] * 40, stop=stop) for i in range(6)]
    expected = [(await answer(roomy, request))[0] for request in requests]
    found = await asyncio.gather(*(answer(tight, request) for request in requests))
    assert [tokens for tokens, _ in found] == expected
    if opened.name != "trtllm":  # it does not report preemptions
        assert tight.counters()["preemptions_total"] > 0
    await until(lambda: tight.load().free_blocks == 10)


async def test_a_prompt_over_the_context_is_refused_at_once(opened: Opener) -> None:
    executor = await opened(max_seq_len=64)
    with pytest.raises(ContextTooLong, match="64"):
        executor.submit(make_request([5] * 64), print)


# the torch executor against Hugging Face and a plain forward pass


@pytest.mark.parametrize("engine", [{}, {"max_num_tokens": 16}, {"max_num_tokens": 48, "max_batch_size": 3}])
async def test_greedy_answers_are_those_of_hugging_face(torch_opened: Opener, engine: dict[str, Any]) -> None:
    executor = await torch_opened(**({"num_blocks": 1000} | engine))
    stop = StopConditions(max_tokens=24, ignore_eos=True)
    found = await asyncio.gather(*(answer(executor, make_request(case["prompt"], stop=stop)) for case in GOLDEN))
    assert [tokens for tokens, _ in found] == [case["answer"] for case in GOLDEN]


def test_the_plain_forward_pass_agrees_with_hugging_face() -> None:
    reference = Reference(TINY_MODEL)
    for case in GOLDEN[:6]:
        assert reference.greedy(case["prompt"], 8) == case["answer"][:8]


def test_a_new_kv_cache_holds_no_garbage_of_earlier_memory() -> None:
    for _ in range(5):
        torch.full(
            (8, 2, 2, 32, 2, 8), float("nan")
        )  # freed at once: the next allocation of its size may get its memory
        cache = KvCache(
            num_blocks=8, block_size=32, num_layers=2, kv_heads=2, head_dim=8, dtype=torch.float32,
            device=torch.device("cpu"), model="m",
        )  # fmt: skip
        assert not any(any(cache.view(block)) for block in range(8))


FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 8, "tie_word_embeddings": False},
    "llama": {"tie_word_embeddings": True},
    "qwen2": {"tie_word_embeddings": False},
}


def make_checkpoint(folder: Path, family: str) -> Path:
    """Random weights of a very small model, in the family's own names."""
    config = {
        "model_type": family, "vocab_size": 2048, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "eos_token_id": 2,
    } | FAMILIES[family]  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    dim = config.get("head_dim", 8)
    shapes = {"model.embed_tokens.weight": (2048, 32), "model.norm.weight": (32,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (2048, 32)
    for i in range(2):
        p = f"model.layers.{i}."
        shapes |= {p + "input_layernorm.weight": (32,), p + "post_attention_layernorm.weight": (32,)}
        for name, rows in (("q", 4 * dim), ("k", 2 * dim), ("v", 2 * dim)):
            shapes[f"{p}self_attn.{name}_proj.weight"] = (rows, 32)
            if family == "qwen2":
                shapes[f"{p}self_attn.{name}_proj.bias"] = (rows,)
        if family == "qwen3":
            shapes |= {p + "self_attn.q_norm.weight": (dim,), p + "self_attn.k_norm.weight": (dim,)}
        shapes |= {p + "self_attn.o_proj.weight": (32, 4 * dim), p + "mlp.down_proj.weight": (32, 48)}
        shapes |= {p + "mlp.gate_proj.weight": (48, 32), p + "mlp.up_proj.weight": (48, 32)}
    weights = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_bytes((TINY_MODEL / "tokenizer.json").read_bytes())
    save_file(weights, str(folder / "model.safetensors"))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
async def test_each_family_agrees_with_the_plain_forward_pass(
    torch_opened: Opener, tmp_path: Path, family: str
) -> None:
    folder = make_checkpoint(tmp_path / family, family)
    executor = await torch_opened(folder, max_num_tokens=20)
    prompt = [(i * 37) % 2048 for i in range(45)]
    tokens, _ = await answer(executor, make_request(prompt))
    assert tokens == Reference(folder).greedy(prompt, 8)


def test_a_model_of_another_family_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ConfigError, match="'mamba' is not supported; one of qwen2, qwen3, llama is"):
        ModelConfig.read(tmp_path)


async def test_a_checkpoint_without_weights_is_refused(torch_opened: Opener, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", "llama")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"no model\.safetensors"):
        await torch_opened(folder)


# sampling


async def test_a_seed_draws_the_same_on_one_worker_and_across_a_hand_off(torch_opened: Opener) -> None:
    prefill, decode, both = await torch_opened(), await torch_opened(), await torch_opened()
    request = make_request([300, 301, 302], sampling=SamplingParams(temperature=1.5, top_p=0.95, top_k=50, seed=7))
    expected, _ = await answer(both, request)
    first, handed = await answer(prefill, msgspec.structs.replace(request, phase="prefill"))
    decoding = msgspec.structs.replace(request, phase="decode", prior=PriorOutput(first), handoff=handed.handoff)
    assert first + (await answer(decode, decoding))[0] == expected
    other = msgspec.structs.replace(request, sampling=SamplingParams(temperature=1.5, seed=8))
    assert (await answer(both, other))[0] != expected


async def test_bias_penalties_and_min_tokens_change_the_answer_as_they_should(torch_opened: Opener) -> None:
    executor = await torch_opened()
    biased, _ = await answer(
        executor, make_request([300], sampling=SamplingParams(temperature=0.0, logit_bias={400: 100.0}))
    )
    assert biased == [400] * 8
    penalised = SamplingParams(temperature=0.0, logit_bias={400: 90.0, 401: 60.0}, presence_penalty=70.0)
    assert (await answer(executor, make_request([300], sampling=penalised)))[0][:2] == [400, 401]
    ends = SamplingParams(temperature=0.0, logit_bias={2: 100.0})
    stop = StopConditions(max_tokens=8, min_tokens=5)
    tokens, last = await answer(executor, make_request([300], sampling=ends, stop=stop))
    assert (len(tokens), last.reason, last.stop_token) == (5, "stop", 2)


async def test_stop_token_ids_end_the_answer(torch_opened: Opener) -> None:
    sampling = SamplingParams(temperature=0.0, logit_bias={400: 100.0})
    request = make_request([300], sampling=sampling, stop=StopConditions(max_tokens=8, token_ids=(400,)))
    assert (await answer(await torch_opened(), request))[1].stop_token == 400


async def test_logprobs_are_of_the_models_own_distribution(torch_opened: Opener) -> None:
    executor = await torch_opened()
    reference = torch.log_softmax(Reference(TINY_MODEL).logits([300, 301])[-1], -1)
    request = make_request([300, 301], sampling=SamplingParams(temperature=0.0, logprobs=3))
    async for output in generate(executor, request):
        assert output.logprobs is not None
        (entry,) = output.logprobs
        assert entry.logprob == pytest.approx(float(reference[entry.token_id]), abs=1e-4)
        assert [id_ for id_, _ in entry.top] == reference.topk(3).indices.tolist()
        break


async def test_sampled_tokens_follow_the_distribution() -> None:
    from dynserve.executors.torch.sampler import draw

    logits = torch.log(torch.tensor([0.1, 0.6, 0.3]))
    draws = [draw(logits, SamplingParams(seed=3), position) for position in range(4000)]
    assert [draws.count(i) / 4000 for i in range(3)] == pytest.approx([0.1, 0.6, 0.3], abs=0.03)
    assert draw(logits, SamplingParams(temperature=1e-38), 1) == 1  # the division overflows
    assert SamplingParams(temperature=1e-40).greedy
    assert {draw(logits, SamplingParams(seed=3, top_k=2), p) for p in range(200)} == {1, 2}
    assert {draw(logits, SamplingParams(seed=3, top_p=0.5), p) for p in range(200)} == {1}
    assert {draw(logits, SamplingParams(seed=3, min_p=0.4), p) for p in range(200)} == {1, 2}


async def test_an_engine_that_dies_fails_its_requests_so_that_others_can_run_them(
    torch_opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = await torch_opened()

    def broken(self: EngineSteps) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(EngineSteps, "plan", broken)
    with pytest.raises(WorkerLost, match="engine died"):
        await answer(executor, make_request([5, 6, 7]))
    with pytest.raises(EngineDied, match="out of memory"):  # whose exit code is 3
        await asyncio.shield(executor.failed)
    with pytest.raises(Unavailable):
        await answer(executor, make_request([5, 6, 7]))
