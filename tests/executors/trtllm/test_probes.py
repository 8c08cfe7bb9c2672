"""What an engine must prove before it serves."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dynserve.errors import ConfigError, InternalError
from dynserve.executors.trtllm import engine as engine_module
from dynserve.executors.trtllm import probes
from dynserve.executors.trtllm.arguments import llm_arguments
from dynserve.executors.trtllm.probes import FirstToken, difference
from dynserve.wire.events import KvEvent
from dynserve.wire.hashing import adapter_salt, rolling_hashes
from dynserve.wire.requests import Grammar, SamplingParams
from tests.conftest import make_request, until
from tests.executors.trtllm.test_executor import FRENCH, TRANSCEIVER, Opener, handed_over, prompt, run_request
from tests.executors.trtllm.test_kv_events import applied


@pytest.fixture
async def opened(trtllm_double: None) -> AsyncIterator[Opener]:
    async with AsyncExitStack() as stack:
        yield Opener(stack)


def adapter(tmp_path: Path, name: str, text: str = FRENCH) -> str:
    (tmp_path / name).mkdir()
    (tmp_path / name / "adapter_config.json").write_text(text)
    return f"{name}={tmp_path / name}"


@pytest.mark.parametrize("version", ["1.3.0rc29", "1.2.1"])
async def test_one_or_several_adapters_change_answers(
    opened: Opener, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str
) -> None:
    monkeypatch.setenv("TRTLLM_DOUBLE_VERSION", version)
    french = adapter(tmp_path, "french")
    german = adapter(tmp_path, "german", FRENCH.replace("444", "555").replace("8", "16"))
    alone = await opened(config={"lora_adapters": french})
    assert alone._engine.llm.args.lora_config.lora_dir == [str(tmp_path / "french")]
    both = await opened(config={"lora_adapters": f"{french},{german}"})
    found = both._engine.llm.args.lora_config
    assert (found.lora_target_modules, found.max_lora_rank, found.max_loras) == (["attn_k", "attn_q", "attn_v"], 16, 2)
    for executor, name, token in ((alone, "french", 444), (both, "french", 444), (both, "german", 555)):
        sink, _ = await run_request(executor, make_request(prompt(), adapter=name))
        assert sink.tokens == [token] * 8


async def test_an_adapter_that_changes_nothing_is_not_served(
    opened: Opener, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The engine says nothing when it drops adapters."""
    french = adapter(tmp_path, "french")

    def without_lora_config(*args: Any, **keywords: Any) -> Any:
        made = llm_arguments(*args, **keywords)
        del made.keywords["lora_config"]
        return made._replace(keywords=made.keywords | {"enable_lora": True})

    monkeypatch.setattr("dynserve.executors.trtllm.start.llm_arguments", without_lora_config)
    with pytest.raises(ConfigError, match="adapter 'french' .* changes nothing: the engine answers as the model"):
        await opened(config={"lora_adapters": french})
    monkeypatch.undo()


async def test_an_adapter_that_cannot_be_loaded_is_not_served(opened: Opener, tmp_path: Path) -> None:
    broken = adapter(tmp_path, "broken", '{"r": 8, "target_modules": ["q_proj"], "broken": true}')
    with pytest.raises(ConfigError, match="adapter 'broken' cannot be loaded from .*: Failed to load LoRA adapter"):
        await opened(config={"lora_adapters": broken})


def test_answers_differ_by_log_probabilities_or_by_tokens_that_are_no_near_tie() -> None:
    plain = FirstToken(5, {5: -0.5, 6: -0.6, 7: -3.0})
    assert difference(plain, plain) == 0.0
    assert difference(plain, FirstToken(5, {5: -0.5, 6: -0.35, 9: -2.0})) == pytest.approx(0.25)
    assert difference(plain, FirstToken(6, {5: -0.5, 6: -0.6, 7: -3.0})) == pytest.approx(0.1), "nearly as likely"
    assert difference(plain, FirstToken(9, {5: -0.5, 6: -0.6, 9: -0.1})) == pytest.approx(2.5)
    assert difference(FirstToken(5, {}), FirstToken(5, {})) == 0.0
    assert difference(FirstToken(5, {}), FirstToken(6, {})) == float("inf")


async def noisy(opened: Opener, monkeypatch: pytest.MonkeyPatch, adapter: str, noise: float) -> Any:
    """Opens an engine whose log-probabilities differ a little each time."""
    count, take = [0], probes._first_token

    async def shaken(*args: Any) -> FirstToken:
        found, count[0] = await take(*args), count[0] + 1
        return found._replace(
            logprobs={token: value + noise * (count[0] % 2) for token, value in found.logprobs.items()}
        )

    with monkeypatch.context() as patch:
        patch.setattr(probes, "_first_token", shaken)
        return await opened(config={"lora_adapters": adapter})


async def test_an_adapter_must_change_more_than_an_engines_own_noise(
    opened: Opener, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: Any
) -> None:
    assert await noisy(opened, monkeypatch, adapter(tmp_path, "french"), 0.01)
    assert "hardly more than the engine's own noise" not in caplog.text
    weak = adapter(tmp_path, "weak", '{"r": 8, "target_modules": ["q_proj"], "bias": {}}')
    with pytest.raises(ConfigError, match="adapter 'weak' .* changes nothing"):
        await noisy(opened, monkeypatch, weak, 0.01)


@pytest.mark.parametrize("what", ["events", "adapters"])
async def test_a_prompt_of_the_workers_own_that_fails_is_one_sentence(
    opened: Opener, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: str, caplog: Any
) -> None:
    server = __import__("tensorrt_llm._engine", fromlist=["Server"]).Server
    length = 129 if what == "events" else 16
    monkeypatch.setattr(server, "_refusal", lambda _, message: "no" if message.request.num_tokens == length else "")
    config = {"lora_adapters": adapter(tmp_path, "french")} if what == "adapters" else None
    if what == "events":
        executor = await opened()
        assert "reports no KV events: a prompt of 129 tokens failed: RequestError: no" in caplog.text
        assert not executor.limits.kv_events and executor._engine.streams is None
    else:
        with pytest.raises(InternalError, match="RequestError: no"):
            await opened(config=config)
    monkeypatch.undo()


async def test_an_engine_that_computes_no_chunks_gets_a_prompt_of_one_step(
    opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may turn chunked prefill off by itself, and its options do not show that."""
    server = __import__("tensorrt_llm._engine", fromlist=["Server"]).Server
    monkeypatch.setattr(server, "_refusal", lambda _, message: "no" if message.request.num_tokens > 100 else "")
    executor = await opened(max_num_tokens=100)
    assert executor.limits.kv_events
    monkeypatch.undo()


async def test_kv_events_of_any_rank_show_that_they_come(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine with placement of its own may compute a prompt on another rank."""
    llm = __import__("tensorrt_llm.llmapi.llm", fromlist=["_Call"])
    init = llm._Call.__init__

    def elsewhere(self: Any, *args: Any, **keywords: Any) -> None:
        init(self, *args, **keywords)
        if self.scheduling is not None:
            self.scheduling.attention_dp_rank = 1

    monkeypatch.setattr(llm._Call, "__init__", elsewhere)
    executor = await opened(config={"tensor_parallel_size": 2}, enable_attention_dp=True)
    assert executor.limits.kv_events
    monkeypatch.undo()


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("version", ["1.3.0rc29", "1.2.1"])
async def test_each_rank_has_blocks_whatever_the_engine_tells(
    opened: Opener, monkeypatch: pytest.MonkeyPatch, version: str, statistics: bool
) -> None:
    """Version 1.2 writes rows of the first rank only, and a capacity may be unknown: no load may be 0 of 0 blocks."""
    monkeypatch.setenv("TRTLLM_DOUBLE_VERSION", version)
    monkeypatch.setattr(engine_module, "ROWS_TIMEOUT", 2.0)
    llm = __import__("tensorrt_llm.llmapi.llm", fromlist=["LLM"]).LLM
    if version != "1.2.1":
        monkeypatch.setattr(llm, "get_kv_cache_capacity", lambda _: {})
    options = {"kv_cache_config": {"max_tokens": 3200}, "enable_iter_perf_stats": statistics}
    executor = await opened(config={"tensor_parallel_size": 2}, enable_attention_dp=True, **options)
    for target in executor.targets:
        assert (target.load().total_blocks, target.limits.num_blocks) == (100, 100)
    monkeypatch.undo()


@pytest.mark.parametrize("change", ["silent", "push"])
async def test_an_engine_without_kv_events_is_published_as_one(
    opened: Opener, monkeypatch: pytest.MonkeyPatch, change: str, caplog: Any
) -> None:
    """An engine turns block reuse off by itself for some models, and events are off in push mode."""
    monkeypatch.setattr(probes, "EVENTS_TIMEOUT", 0.3)
    llm = __import__("tensorrt_llm.llmapi.llm", fromlist=["LLM"]).LLM
    setup = llm._setup

    def without_reuse(self: Any) -> Any:
        made = setup(self)
        made.options["kv_cache_config"]["enable_block_reuse"] = False
        made.partial = False
        return made

    if change == "silent":
        monkeypatch.setattr(llm, "_setup", without_reuse)
        monkeypatch.setattr("tensorrt_llm._engine.Rank._event", lambda *_: None)
        executor = await opened()
        assert "the engine reports no KV events: none came within 0 s for a prompt of 129 tokens" in caplog.text
    else:
        cache = {"max_tokens": 6400, "kv_events_config": {"enable_kv_cache_events": True}}
        executor = await opened(kv_cache_config=cache)
        assert executor._engine.llm.args.kv_cache_config.kv_events_config.enable_kv_cache_events is False
    assert executor.limits.kv_events is (change == "push")
    assert executor.describe()["KV events"] == ("on" if change == "push" else "off")
    sink, _ = await run_request(executor, make_request(prompt()))
    assert len(sink.tokens) == 8
    monkeypatch.undo()


async def test_the_worker_publishes_the_block_size_that_the_engine_uses(opened: Opener, caplog: Any) -> None:
    """With `attn_backend: VANILLA` the engine's blocks hold as many tokens as one step."""
    found: list[KvEvent] = []
    executor = await opened(attn_backend="VANILLA", max_num_tokens=64)
    executor.listen_kv(found.extend)
    assert executor._engine.llm.args.kv_cache_config.tokens_per_block == 32, "the option stays what it was"
    assert executor.limits.block_size == 64 and executor.limits.pairing["tokens_per_block"] == "64"
    assert executor.limits.num_blocks == 100
    request = make_request(prompt(130))
    await run_request(executor, request)
    await until(lambda: applied(found) == set(rolling_hashes(request.prompt, 64)))
    other = await opened()
    first, rest = await handed_over(executor, other, msgspec.structs.replace(request, id="next"))
    assert "tokens_per_block is 64 on prefill and 32 on decode" in caplog.text and len(first.tokens + rest.tokens) == 8


@pytest.mark.parametrize("statistics", [True, False])
async def test_the_block_size_of_an_old_engine_is_found_in_its_statistics_or_events(
    opened: Opener, monkeypatch: pytest.MonkeyPatch, caplog: Any, statistics: bool
) -> None:
    monkeypatch.setenv("TRTLLM_DOUBLE_VERSION", "1.2.1")
    executor = await opened(attn_backend="VANILLA", max_num_tokens=64, enable_iter_perf_stats=statistics)
    assert executor.limits.block_size == 64
    assert "the engine uses KV blocks of 64 tokens, not of 32" in caplog.text
    found: list[KvEvent] = []
    executor.listen_kv(found.extend)
    request = make_request(prompt(130))
    await run_request(executor, request)
    await until(lambda: applied(found) == set(rolling_hashes(request.prompt, 64)))


async def test_the_probes_leave_no_blocks_in_the_index(opened: Opener, tmp_path: Path) -> None:
    found: list[KvEvent] = []
    executor = await opened(config={"lora_adapters": adapter(tmp_path, "french")})
    executor.listen_kv(found.extend)
    request = make_request(prompt(), adapter="french")
    await run_request(executor, request)
    await until(lambda: applied(found) == set(rolling_hashes(request.prompt, 32, adapter_salt("french", ""))))


@pytest.mark.parametrize("version", ["1.3.0rc29", "1.2.1", "1.2.0"])
async def test_every_role_starts_with_the_default_options_of_each_version(
    opened: Opener, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str
) -> None:
    monkeypatch.setenv("TRTLLM_DOUBLE_VERSION", version)
    engine: dict[str, Any] = {"cache_transceiver_config": TRANSCEIVER}
    prefill = await opened(config={"disaggregation_mode": "prefill"}, **engine)
    decode = await opened(config={"disaggregation_mode": "decode"}, **engine)
    sampling = SamplingParams(temperature=0.0, logprobs=2)
    request = make_request(prompt(), sampling=sampling, grammar=Grammar(kind="regex", text="[0-9]{6}"))
    first, rest = await handed_over(prefill, decode, request)
    assert len(first.logprobs + rest.logprobs) == len(first.tokens + rest.tokens) > 0
    assert decode.counters()["kv_transfers_done_total"] == 1
    assert prefill.limits.grammars
