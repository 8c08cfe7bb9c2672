"""`dynserve doctor --trtllm-selftest` on the double: everything is as expected, and a planted deviation of each kind is found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest

from dynserve.doctor.finding import DoctorConfig
from dynserve.doctor.selftest import engines, pair
from dynserve.doctor.selftest import run as run_module
from dynserve.doctor.selftest.fact import Row, judged
from dynserve.doctor.selftest.run import FACTS, selftest
from dynserve.executors.base import Output
from dynserve.executors.trtllm import engine, probes
from dynserve.wire.requests import TokenLogprob
from tests.conftest import DOUBLES

Patch = pytest.MonkeyPatch


def run(*flags: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dynserve", "doctor", "--trtllm-selftest", *flags]
    environment = os.environ | {"PYTHONPATH": str(DOUBLES)} | environ
    return subprocess.run(command, capture_output=True, text=True, timeout=150, env=environment)


@pytest.mark.parametrize("version", ["1.3.0rc29", "1.2.1"])
def test_everything_is_as_expected_on_an_engine_that_keeps_the_contract(version: str) -> None:
    done = run("--json", TRTLLM_DOUBLE_VERSION=version)
    *facts, summary = [json.loads(line) for line in done.stdout.splitlines()]
    wrong = [fact for fact in facts if fact["state"] not in ("ok", "note", "skip")]
    assert done.returncode == 0 and summary["ok"] and not wrong, wrong
    skipped = {fact["name"] for fact in facts if fact["state"] == "skip"}
    new = {f"the keyword {name}" for name in ("priority", "trace_headers", "conversation_params")}
    assert skipped == (set() if version == "1.3.0rc29" else new | {"a killed engine"})
    names = [fact["name"] for fact in facts]
    assert {fact.name for fact in FACTS} <= set(names) and len(names) == len(set(names)) > 40


def test_without_tensorrt_llm_the_table_says_so() -> None:
    done = run(PYTHONPATH="")
    assert done.returncode == 1 and done.stdout.startswith("FAILED   the self-test")
    assert "needs TensorRT-LLM, which cannot be imported here" in done.stdout and "Traceback" not in done.stderr


def test_the_users_options_win_over_those_of_the_self_test(tmp_path: Any) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text("max_batch_size: 3\ncache_transceiver_config: {backend: UCX}\n")
    given = DoctorConfig(extra_engine_args=str(file), override_engine_args='{"kv_cache_config": {"max_tokens": 640}}')
    made = json.loads(engines.config_of(given, "prefill", engines.PAIR_OPTIONS).override_engine_args or "")
    assert (made["max_batch_size"], made["max_seq_len"]) == (3, 1024)
    assert made["cache_transceiver_config"] == {"backend": "UCX", "kv_transfer_timeout_ms": 5000}
    assert made["kv_cache_config"] == {"free_gpu_memory_fraction": 0.3, "max_tokens": 640}


def test_answers_agree_if_they_differ_at_a_near_tie_only() -> None:
    answer = engines.Answer()
    answer(Output([5, 6], logprobs=[TokenLogprob(5, -0.5, [(5, -0.5), (9, -0.6)]), TokenLogprob(6, -0.1, [(6, -0.1)])]))
    assert answer.agrees([5, 6]) and answer.agrees([9, 7])
    assert not answer.agrees([5, 7]) and not answer.agrees([8, 6]) and not answer.agrees([5])


def test_a_row_is_a_line_with_what_was_expected_and_found() -> None:
    assert judged("a", "x", "x").state == "ok" and judged("a", "x", "y").state == "DIFFERS"
    assert judged("a", "", "y") == Row("note", "a", "(not known)", "y")
    assert judged("a", "", ("4", "5")) == Row("DIFFERS", "a", "4", "5")
    assert judged("a", "x", "y").line.split() == ["DIFFERS", "a", "x", "y"]


def module(name: str) -> Any:
    return import_module(f"tensorrt_llm.{name}" if name else "tensorrt_llm")


def fewer_keywords(patch: Patch) -> None:
    signature = module("llmapi.llm").LLM.generate_async.__signature__
    kept = [parameter for name, parameter in signature.parameters.items() if name != "cache_salt"]
    patch.setattr(module("llmapi.llm").LLM.generate_async, "__signature__", signature.replace(parameters=kept))


def no_start(patch: Patch) -> None:
    def refuse(self: Any) -> None:
        raise RuntimeError("Executor worker returned error: out of memory")

    patch.setattr(module("llmapi.llm").LLM, "_check_worker", refuse)


def adapters_dropped(patch: Patch) -> None:
    patch.setattr(module("llmapi.llm"), "_adapter", lambda _: {"r": 8})


def other_block_size(patch: Patch) -> None:
    patch.setattr(module("llmapi.llm").LLM, "_tokens_per_block", 64)


def tokens_changed(patch: Patch) -> None:
    result = module("executor.result").GenerationResult
    take, seen = result._take, []

    def change(self: Any, response: Any) -> None:
        seen.append(self)
        if not isinstance(response, BaseException) and response.token_ids:
            response.token_ids = [700 + len(seen) % 50 for _ in response.token_ids]
        take(self, response)

    patch.setattr(result, "_take", change)


def not_cumulative(patch: Patch) -> None:
    result = module("executor.result").GenerationResult
    take = result._take

    def forget(self: Any, response: Any) -> None:
        take(self, response)
        self.outputs[0].token_ids = self.outputs[0].token_ids[-1:]

    patch.setattr(result, "_take", forget)


def sampling(patch: Patch, **changes: Any) -> None:
    call = module("llmapi.llm")._Call
    inner = call._sampling

    def changed(self: Any, lora: str) -> Any:
        import msgspec

        return msgspec.structs.replace(inner(self, lora), **changes)

    patch.setattr(call, "_sampling", changed)


def no_biases(patch: Patch) -> None:
    sampling(patch, logit_bias={})


def no_logprobs(patch: Patch) -> None:
    sampling(patch, logprobs=None)


def no_prompt_logprobs(patch: Patch) -> None:
    patch.setattr(
        module("executor.result").CompletionOutput,
        "prompt_logprobs",
        property(lambda _: [], lambda *_: None),
        raising=False,
    )


def stops(patch: Patch, **changes: Any) -> None:
    call = module("llmapi.llm")._Call
    inner = call.message

    def changed(self: Any, *args: Any) -> Any:
        import msgspec

        made = inner(self, *args)
        stop = msgspec.structs.replace(made.request.stop, **changes)
        made.request = msgspec.structs.replace(made.request, stop=stop)
        return made

    patch.setattr(call, "message", changed)


def stop_tokens_ignored(patch: Patch) -> None:
    stops(patch, token_ids=())


def min_tokens_ignored(patch: Patch) -> None:
    stops(patch, min_tokens=0)


def no_times(patch: Patch) -> None:
    patch.setattr(module("executor.result"), "_metrics", lambda _: None)


def unhealthy(patch: Patch) -> None:
    patch.setattr(module("llmapi.llm").LLM, "_check_health", lambda _: False)


def keyword_refused(patch: Patch) -> None:
    call = module("llmapi.llm")._Call
    init = call.__init__

    def refuse(self: Any, *args: Any, **keywords: Any) -> None:
        if keywords.get("priority"):
            raise TypeError("unexpected keyword argument 'priority'")
        init(self, *args, **keywords)

    patch.setattr(call, "__init__", refuse)


def structural_tags_refused(patch: Patch) -> None:
    call = module("llmapi.llm")._Call
    inner = call._grammar

    def refuse(self: Any) -> Any:
        if self.params.guided_decoding is not None and self.params.guided_decoding.structural_tag is not None:
            raise ValueError("Unsupported guide type")
        return inner(self)

    patch.setattr(call, "_grammar", refuse)


def adapters_share_the_cache(patch: Patch) -> None:
    """The double tells adapters apart in its cache by their salt."""
    llm = module("llmapi.llm")
    patch.setattr(llm, "json", SharedSalts(llm.json))


class SharedSalts:
    """`json`, with which the double makes the salt of an adapter."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def dumps(self, value: Any, **keywords: Any) -> str:
        return "" if isinstance(value, list) and len(value) == 2 else str(self._inner.dumps(value, **keywords))


def dies_of_a_long_prompt(patch: Patch) -> None:
    server = module("_engine").Server
    inner = server._submit

    def submit(self: Any, message: Any) -> None:
        if message.request.num_tokens > 1024:
            self.say(module("_messages").Fatal("CUDA error"))
        else:
            inner(self, message)

    patch.setattr(server, "_submit", submit)


def slow_shutdown(patch: Patch) -> None:
    patch.setattr(run_module, "SHUTDOWN_S", 0.0)


def salts_ignored(patch: Patch) -> None:
    call = module("llmapi.llm")._Call
    init = call.__init__

    def forget(self: Any, *args: Any, **keywords: Any) -> None:
        init(self, *args, **keywords)
        self.salt = ""

    patch.setattr(call, "__init__", forget)


def refused_at_the_call(patch: Patch) -> None:
    llm = module("llmapi.llm").LLM
    inner = llm._start

    def early(self: Any, call: Any) -> Any:
        if len(call.prompt) >= self._executor.ready.max_seq_len:
            raise ValueError("the prompt is too long")
        return inner(self, call)

    patch.setattr(llm, "_start", early)


def grammars_ignored(patch: Patch) -> None:
    patch.setattr(module("llmapi.llm")._Call, "_grammar", lambda _: None)


def no_id(patch: Patch) -> None:
    result = module("executor.result").GenerationResult
    inner = result._context_params
    patch.setattr(result, "_context_params", lambda self, response: replace(inner(self, response), ctx_request_id=None))


def state_lost(patch: Patch) -> None:
    result = module("executor.result").GenerationResult
    inner = result._context_params
    patch.setattr(result, "_context_params", lambda self, response: replace(inner(self, response), opaque_state=b"?"))


def timeout(milliseconds: int) -> Callable[[Patch], None]:
    def plant(patch: Patch) -> None:
        llm = module("llmapi.llm").LLM
        inner = llm._setup

        def setup(self: Any) -> Any:
            made = inner(self)
            made.options["cache_transceiver_config"] = {"kv_transfer_timeout_ms": milliseconds}
            return made

        patch.setattr(llm, "_setup", setup)
        patch.setattr(pair, "TRANSFER_MS", 1000)
        patch.setattr(pair, "WAIT_S", 2.0)

    return plant


def aborts_ignored(patch: Patch) -> None:
    patch.setattr(module("_engine").Server, "_abort", lambda *_: None)
    patch.setattr(pair, "ABORT_TOKENS", 60)


def silent_events(patch: Patch) -> None:
    patch.setattr(module("_engine").Rank, "_event", lambda *_: None)
    patch.setattr(probes, "EVENTS_TIMEOUT", 0.2)


def other_tokens_in_events(patch: Patch) -> None:
    rank = module("_engine").Rank
    inner = rank._block
    patch.setattr(rank, "_block", lambda self, name, tokens, salt: inner(self, name, [t + 1 for t in tokens], salt))
    patch.setattr(pair, "WAIT_S", 0.5)


def events_lost(patch: Patch) -> None:
    rank = module("_engine").Rank
    inner = rank._event

    def skip(self: Any, data: Any, window: int) -> None:
        if data["type"] == "stored":
            self._ids += 1
        inner(self, data, window)

    patch.setattr(rank, "_event", skip)


def no_rows(patch: Patch) -> None:
    patch.setattr(module("_engine").Rank, "_row", lambda *_: None)
    patch.setattr(pair, "WAIT_S", 0.2)


def no_capacity(patch: Patch) -> None:
    patch.setattr(module("llmapi.llm").LLM, "get_kv_cache_capacity", lambda _: {})
    patch.setattr(engine, "ROWS_TIMEOUT", 0.3)
    no_rows(patch)


def refuses_canaries(patch: Patch) -> None:
    """After the start: a canary is the only prompt of three tokens."""
    server = module("_engine").Server
    inner, count = server._refusal, [0]

    def refuse(self: Any, message: Any) -> str:
        count[0] += message.request.num_tokens == 3
        refused = "no canaries" if message.request.num_tokens == 3 and count[0] > 2 else ""
        return refused or str(inner(self, message))

    patch.setattr(server, "_refusal", refuse)


def unreported_death(patch: Patch) -> None:
    patch.delenv("TLLM_WORKER_USE_SINGLE_PROCESS")
    patch.setenv("PYTHONPATH", str(DOUBLES))
    patch.setattr(module("_proxy").Proxy, "_died", lambda *_: None)
    patch.setattr(engines, "STALL_S", 0.5)
    patch.setattr(pair, "STALL_S", 0.5)


@pytest.mark.parametrize(
    ("plant", "group", "name", "found"),
    [
        (fewer_keywords, "api", "keywords of generate_async", "without cache_salt"),
        (no_start, "limits", "an aggregated engine", "TensorRT-LLM could not start: RuntimeError: Executor worker returned"),
        (no_capacity, "limits", "size of the KV cache", "not known"),
        (other_block_size, "limits", "block size", "64, not 32"),
        (unhealthy, "limits", "health", "_check_health False"),
        (tokens_changed, "requests", "a greedy prompt, twice", "8 tokens, different both times"),
        (not_cumulative, "requests", "steps of a stream", "growing to 1 tokens"),
        (stop_tokens_ignored, "requests", "a stop token", "length, the answer ends elsewhere"),
        (stop_tokens_ignored, "requests", "an end of turn", "length, 8 tokens"),
        (min_tokens_ignored, "requests", "an end of turn, min_tokens 3", "stop, 0 tokens"),
        (no_biases, "requests", "a bias", "tokens ["),
        (no_times, "requests", "times of a request", "missing"),
        (salts_ignored, "requests", "cached tokens with salts a, b, a", "none, some, some"),
        (keyword_refused, "requests", "the keyword priority", "unexpected keyword argument"),
        (no_logprobs, "logprobs", "logprobs 0", "0 entries, 0 other tokens"),
        (no_logprobs, "logprobs", "logprobs 2", "0 entries"),
        (no_prompt_logprobs, "logprobs", "logprobs of a prompt", "unknown"),
        (grammars_ignored, "grammars", "a grammar: regular expression", "answers '"),
        (structural_tags_refused, "grammars", "a grammar behind reasoning", "Unsupported guide type"),
        (slow_shutdown, "limits", "shutdown", "after 0 s"),
        (adapters_dropped, "adapters", "a decode engine with an adapter", "changes nothing"),
        (adapters_share_the_cache, "adapters", "an adapter after the model", "96 cached tokens"),
        (no_id, "hand-offs", "the result of a context phase", "context_only, 1 token, without id, not ended"),
        (state_lost, "hand-offs", "prefill here, decode there", "opaque_state is not what a context executor wrote"),
        (grammars_ignored, "hand-offs", "the same with a grammar", "answers '"),
        (no_logprobs, "hand-offs", "the same with logprobs", "the engine's result cannot be read"),
        (timeout(1), "blocks", "blocks of a cancelled hand-off", "not held, then free"),
        (timeout(600_000), "blocks", "blocks of a cancelled hand-off", "held, then still held"),
        (aborts_ignored, "blocks", "an aborted request", "length, after 60 tokens"),
        (silent_events, "events", "KV events", "none"),
        (other_tokens_in_events, "events", "blocks of KV events", "0 of 3"),
        (events_lost, "events", "lost KV events", ""),
        (no_rows, "statistics", "rows of statistics", "no rows"),
        (grammars_ignored, "refusals", "an invalid grammar", "answers '"),
        (refused_at_the_call, "refusals", "a prompt over the context", "in ValueError, at the call"),
        (dies_of_a_long_prompt, "refusals", "the engine after: a prompt over the context", "CUDA error"),
        (refuses_canaries, "death", "a canary", "does not answer"),
        (unreported_death, "death", "a killed engine", "dead, by its silence"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)  # fmt: skip
async def test_a_planted_deviation_is_found(
    trtllm_double: None, monkeypatch: Patch, plant: Callable[[Patch], None], group: str, name: str, found: str
) -> None:
    module("")
    plant(monkeypatch)
    rows = {row.name: row async for row in selftest(DoctorConfig(executor="trtllm"), {group})}
    assert rows[name].state in ("DIFFERS", "FAILED") and found in rows[name].found, rows[name]
