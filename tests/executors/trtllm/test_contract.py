"""Nothing is used of TensorRT-LLM that the API's page does not list.

`tests/doubles/contract.json` is the page's tables as data. Here the executor goes through all its phases on the double while
every keyword that it passes and every attribute and key that it reads is written down, and compared with the tables.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from contextlib import AsyncExitStack
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from dynserve.errors import Unavailable
from dynserve.wire.requests import Grammar, SamplingParams, StopConditions
from tests.conftest import DOUBLES, make_request, until
from tests.executors.trtllm.test_executor import FRENCH, LONG, Opener, OutputSink, handed_over, prompt, run_request

CONTRACT: dict[str, Any] = json.loads((DOUBLES / "contract.json").read_text())
OURS = "dynserve.executors.trtllm"
# read on every version, and optional: the double of 1.2 has none of them
OPTIONAL = {
    ("row", "attentionDpRank"), ("stored", "lora_name"),
    ("LLM", "get_kv_cache_capacity"), ("_executor", "_fatal_error"), ("stored_block", "cache_salt"), ("stored_block", "mm_keys"),
}  # fmt: skip


class Used:
    """The keywords that the executor's code has passed and the names that it has read, as (kind, name)."""

    def __init__(self) -> None:
        self.passed: set[tuple[str, str]] = set()
        self.read: set[tuple[str, str]] = set()

    def watch_calls(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, kind: str) -> None:
        inner = getattr(owner, name)

        def call(*args: Any, **keywords: Any) -> Any:
            if _by_us():
                self.passed.update((kind, keyword) for keyword in keywords)
            return inner(*args, **keywords)

        if hasattr(inner, "__signature__"):
            call.__signature__ = inner.__signature__  # type: ignore[attr-defined]
        monkeypatch.setattr(owner, name, call)

    def watch_reads(self, monkeypatch: pytest.MonkeyPatch, cls: Any, kind: str) -> None:
        inner = cls.__getattribute__

        def read(target: Any, name: str) -> Any:
            if _by_us() and not name.startswith("__"):
                self.read.add((getattr(target, "_kind", kind) if kind == "" else kind, name))
            return inner(target, name)

        monkeypatch.setattr(cls, "__getattribute__", read)

    def row(self, found: dict[str, Any]) -> Row:
        row = Row(found)
        row.used = self
        return row


class Row(dict[str, Any]):
    """An event, a row of statistics, or a dict within one; it records the keys that are read from it."""

    used: Used

    @property
    def kind(self) -> str:
        if "event_id" in self:
            return "event"
        if (kind := dict.get(self, "type")) is not None:
            return str(kind)
        return "kvCacheStats" if "maxNumBlocks" in self else "row" if "iterLatencyMS" in self else "other"

    def __getitem__(self, key: str) -> Any:
        self._note(key)
        return dict.__getitem__(self, key)

    def get(self, key: str, default: Any = None) -> Any:
        self._note(key)
        return dict.get(self, key, default)

    def _note(self, key: str) -> None:
        if _by_us(3):
            self.used.read.add((self.kind, key))


def _by_us(depth: int = 2) -> bool:
    return str(sys._getframe(depth).f_globals.get("__name__", "")).startswith(OURS)


@pytest.fixture(params=[CONTRACT["pin"], CONTRACT["stable"]])
def version(request: pytest.FixtureRequest, trtllm_double: None, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TRTLLM_DOUBLE_VERSION", request.param)
    found: str = request.param
    return found


@pytest.fixture
def used(version: str, monkeypatch: pytest.MonkeyPatch) -> Used:
    package = import_module("tensorrt_llm")
    llm, result = import_module("tensorrt_llm.llmapi.llm"), import_module("tensorrt_llm.executor.result")
    used = Used()
    sampling, scheduling = (
        import_module("tensorrt_llm.sampling_params"),
        import_module("tensorrt_llm.scheduling_params"),
    )
    for kind, module in (
        ("SamplingParams", package), ("DisaggregatedParams", package), ("GuidedDecodingParams", sampling),
        ("SchedulingParams", scheduling),
    ):  # fmt: skip
        used.watch_calls(monkeypatch, getattr(module, kind), "__init__", kind)
    used.watch_calls(monkeypatch, llm.LLM, "generate_async", "generate_async")
    init = llm.LLM.__init__

    def made(self: Any, *args: Any, **keywords: Any) -> None:
        used.passed.update(("TorchLlmArgs", name) for name in keywords)
        for name, value in keywords.items():
            if isinstance(value, dict):
                used.passed.update((name, key) for key in value)
        init(self, *args, **keywords)

    monkeypatch.setattr(llm.LLM, "__init__", made)
    used.watch_reads(monkeypatch, llm.LLM, "LLM")
    used.watch_reads(monkeypatch, import_module("tensorrt_llm._proxy").Proxy, "_executor")
    used.watch_reads(monkeypatch, result.RequestOutput, "RequestOutput")
    used.watch_reads(monkeypatch, result.CompletionOutput, "CompletionOutput")
    used.watch_reads(monkeypatch, result._Bag, "metrics")
    used.watch_reads(monkeypatch, result.Logprob, "Logprob")
    following = result.IterationResult.__anext__

    async def recorded(self: Any) -> Any:
        return json.loads(json.dumps(await following(self)), object_hook=used.row)

    monkeypatch.setattr(result.IterationResult, "__anext__", recorded)
    return used


def allowed(version: str) -> tuple[set[tuple[str, str]], set[tuple[str, str]]]:
    """Returns the keywords and the names that this version has, by the tables."""
    gone = CONTRACT["not_in_1.2"] if version == CONTRACT["stable"] else {}

    def here(kind: str, names: Any) -> set[tuple[str, str]]:
        return {(kind, name) for name in names if name not in gone.get(kind, [])}

    passed: set[tuple[str, str]] = here("generate_async", CONTRACT["generate_async"])
    for kind, fields in (CONTRACT["dataclasses"] | CONTRACT["models"]).items():
        passed |= here(kind, fields)
    for block, kind in (("kv_cache_config", "KvCacheConfig"), ("cache_transceiver_config", "CacheTransceiverConfig")):
        passed |= {(block, name) for _, name in here(kind, CONTRACT["models"][kind])}
    passed |= {("telemetry_config", "disabled"), ("scheduler_config", "waiting_queue_policy")}
    passed |= {("lora_config", name) for _, name in here("LoraConfig", CONTRACT["models"]["LoraConfig"])}
    passed |= {("attention_dp_config", "kv_cache_routing_conversation_affinity")}
    read: set[tuple[str, str]] = here("Logprob", CONTRACT["dataclasses"]["Logprob"])
    for kind, names in (CONTRACT["members"] | CONTRACT["events"] | CONTRACT["stats"]).items():
        read |= here(kind, names)
    for kind in ("RequestPerfMetrics", "timing_metrics", "kv_cache_metrics"):
        read |= {("metrics", name) for name in CONTRACT["members"][kind]}
    return passed, read


async def everything(tmp_path: Path, version: str) -> None:
    """Runs every kind of request of the executor once."""
    adapter = tmp_path / "french"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(FRENCH)
    async with AsyncExitStack() as stack:
        opened = Opener(stack)
        engine: dict[str, Any] = {"config": {"lora_adapters": f"french={adapter}"}, "enable_iter_perf_stats": True}
        if version == CONTRACT["pin"]:
            engine["scheduler_config"] = {"waiting_queue_policy": "priority"}
            engine["attention_dp_config"] = {"kv_cache_routing_conversation_affinity": True}
        prefill, decode = await opened(**engine), await opened(**engine)
        samplings = [
            SamplingParams(temperature=0.7, top_p=0.9, top_k=5, min_p=0.01, seed=3, logprobs=2, presence_penalty=0.5),
            SamplingParams(temperature=0.0, frequency_penalty=0.1, repetition_penalty=1.1, logit_bias={5: 1.0}),
        ]
        for sampling in samplings:
            stop = StopConditions(max_tokens=6, min_tokens=2, token_ids=(9,))
            request = make_request(prompt(), sampling=sampling, stop=stop, adapter="french", cache_salt="s", priority=3,
                session="mine", trace_headers={"traceparent": "00-1-2-01"})  # fmt: skip
            await handed_over(prefill, decode, request)
        whole = SamplingParams(temperature=0.0, logprobs=1, prompt_logprobs=True)
        await run_request(decode, make_request(prompt(), sampling=whole))
        for grammar in (
            Grammar(kind="regex", text="[a-z]+"),
            Grammar(kind="json", text="{}"),
            Grammar(kind="grammar", text='root ::= "a"'),
        ):
            await run_request(decode, make_request(prompt(), grammar=grammar))
        ticket = decode.submit(make_request(prompt(), stop=LONG), sink := OutputSink())
        await until(lambda: bool(sink.outputs))
        decode.abort(ticket)
        await until(lambda: decode.describe()["engine"] == "idle")
        _, ticket = await run_request(prefill, make_request(prompt(), phase="prefill"))
        prefill.abort(ticket)
        await until(lambda: decode.counters()["engine_iterations_total"] > 0)
        with pytest.raises(Unavailable):
            decode.submit(make_request(prompt(), adapter="nobody"), OutputSink())
        parallel = await opened(config={"tensor_parallel_size": 2}, enable_attention_dp=True)
        await run_request(parallel.targets[1], make_request(prompt()))
        assert await decode._engine.alive()


async def test_every_keyword_and_name_that_is_used_is_in_the_tables(used: Used, version: str, tmp_path: Path) -> None:
    await everything(tmp_path, version)
    passed, read = allowed(version)
    assert used.passed <= passed, used.passed - passed
    assert used.read <= read | OPTIONAL, used.read - read - OPTIONAL
    # and the recording worked
    assert len(used.passed) > 40 and len(used.read) > 25
    assert {("DisaggregatedParams", "opaque_state"), ("generate_async", "cache_salt")} <= used.passed
    assert {("RequestOutput", "outputs"), ("CompletionOutput", "token_ids"), ("stored_block", "tokens")} <= used.read
    for newer in ("priority", "trace_headers", "conversation_params"):
        assert (("generate_async", newer) in used.passed) == (version == CONTRACT["pin"])


async def test_the_use_of_a_name_that_is_not_in_the_tables_is_detected(used: Used, version: str) -> None:
    package = import_module("tensorrt_llm")
    source = "def read(result):\n    return result.outputs[0].no_such_name\n"
    scope: dict[str, Any] = {"__name__": f"{OURS}.made_up"}
    exec(source, scope)
    llm = package.LLM("dynserve/local/tiny_model", skip_tokenizer_init=True)
    result = llm.generate_async([5], package.SamplingParams(end_id=-1, detokenize=False))
    with pytest.raises(AttributeError):
        scope["read"](result)
    assert ("CompletionOutput", "no_such_name") in used.read - allowed(version)[1]
    llm.shutdown()


def test_the_double_has_what_the_tables_list(version: str) -> None:
    gone = CONTRACT["not_in_1.2"] if version == CONTRACT["stable"] else {}
    for module, names in CONTRACT["imports"].items():
        found = import_module(module)
        for name in names:
            newer = ("EngineDeadError", "DEFAULT_REQUEST_PRIORITY", "ConversationParams")
            absent = version == CONTRACT["stable"] and name in newer
            assert hasattr(found, name) != absent, f"{module}.{name}"
    args = import_module("tensorrt_llm.llmapi.llm_args")
    for name, fields in CONTRACT["models"].items():
        older = CONTRACT["only_in_1.2"].get(name, {}).keys() if version == CONTRACT["stable"] else set()
        assert getattr(args, name).model_fields.keys() == fields.keys() - set(gone.get(name, [])) | older
    package = import_module("tensorrt_llm")
    for name in ("SamplingParams", "DisaggregatedParams"):
        found_fields = {field.name for field in dataclasses.fields(getattr(package, name))}
        assert found_fields == CONTRACT["dataclasses"][name].keys() - set(gone.get(name, []))


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda t: t.SamplingParams(top_k=-1), ValueError),
        (lambda t: t.SamplingParams(max_tokens=0), ValueError),
        (lambda t: t.SamplingParams(logit_bias={}), TypeError),
        (lambda t: t.SamplingParams(temperature=0.0, n=2), ValueError),
        (lambda t: t.DisaggregatedParams(request_type="both"), ValueError),
        (lambda t: t.LLM("dynserve/local/tiny_model", bad=1), ValueError),
        (lambda t: t.LLM("dynserve/local/tiny_model", kv_cache_config={"bad": 1}), ValueError),
        (lambda t: t.LLM("dynserve/local/tiny_model", pytorch_backend_config={}), ValueError),
        (lambda t: t.LLM("dynserve/local/tiny_model", cuda_graph_config={"enable_cuda_graph": True}), ValueError),
        (
            lambda t: t.LLM(
                "dynserve/local/tiny_model", cuda_graph_config={"batch_sizes": [1, 4], "max_batch_size": 8}
            ),
            ValueError,
        ),
        (lambda t: t.LLM("dynserve/local/tiny_model", tensor_parallel_size=99), RuntimeError),
    ],
)
def test_the_double_refuses_what_tensorrt_llm_refuses(trtllm_double: None, make: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        make(import_module("tensorrt_llm"))


async def test_getters_of_version_1_2_are_armed_by_the_first_request(
    trtllm_double: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRTLLM_DOUBLE_VERSION", "1.2.1")
    llm = import_module("tensorrt_llm").LLM("dynserve/local/tiny_model", skip_tokenizer_init=True)
    with pytest.raises(AssertionError, match="not properly instantiated"):
        llm.get_kv_cache_events_async(0)
    llm.shutdown()


async def test_the_double_has_the_quirks_of_tensorrt_llm(trtllm_double: None) -> None:
    package = import_module("tensorrt_llm")
    utils = import_module("tensorrt_llm.executor.utils")
    llm = package.LLM(
        "dynserve/local/tiny_model", skip_tokenizer_init=True, cache_transceiver_config={"backend": "NIXL"},
        max_num_tokens=64, enable_iter_perf_stats=True,
    )  # fmt: skip
    with pytest.raises(ValueError, match="end_id"):
        llm.generate_async([5], package.SamplingParams(detokenize=False))
    params = package.SamplingParams(end_id=-1, detokenize=False, max_tokens=5)
    with pytest.raises(utils.RequestError):
        llm.generate_async([5] * 65, params)
    with pytest.raises(ValueError, match="global id"):
        llm.generate_async([5], params, disaggregated_params=package.DisaggregatedParams(
            request_type="context_only", disagg_request_id=7))  # fmt: skip
    steps = [
        (id(step), len(step.outputs[0].token_ids)) async for step in llm.generate_async([5], params, streaming=True)
    ]
    assert len({number for number, _ in steps}) == 1 and [n for _, n in steps] == [1, 2, 3, 4, 5]
    context = package.DisaggregatedParams(request_type="context_only", disagg_request_id=1 << 41)
    result = await llm.generate_async([5], params, disaggregated_params=context)
    assert params.max_tokens == 1 and result.outputs[0].finish_reason == "not_finished"
    llm._executor._died(RuntimeError("killed"))
    for _ in range(2):
        with pytest.raises(utils.EngineDeadError, match="Engine has died: RuntimeError: killed"):
            llm.generate_async([5], params)


async def test_the_double_refuses_prefill_requests_without_a_transceiver(trtllm_double: None) -> None:
    package = import_module("tensorrt_llm")
    llm = package.LLM("dynserve/local/tiny_model", skip_tokenizer_init=True)
    params = package.SamplingParams(end_id=-1, detokenize=False)
    context = package.DisaggregatedParams(request_type="context_only", disagg_request_id=1 << 41)
    with pytest.raises(AssertionError, match="kv_cache_transceiver is disabled"):
        llm.generate_async([5], params, disaggregated_params=context)
