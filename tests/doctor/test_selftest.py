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
from dynserve.doctor.selftest import engines, handoffs
from dynserve.doctor.selftest.fact import Row, judged
from dynserve.doctor.selftest.run import FACTS, selftest
from dynserve.executors.trtllm import engine, probes
from tests.conftest import DOUBLES

Patch = pytest.MonkeyPatch


def run(*flags: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dynserve", "doctor", "--trtllm-selftest", *flags]
    environment = os.environ | {"PYTHONPATH": str(DOUBLES)} | environ
    return subprocess.run(command, capture_output=True, text=True, timeout=150, env=environment)


@pytest.mark.parametrize("version", ["1.3.0rc29", "1.2.1"])
def test_everything_is_as_expected_on_an_engine_that_keeps_the_contract(version: str) -> None:
    done = run("--json", TRTLLM_DOUBLE_VERSION=version)
    found = json.loads(done.stdout)
    wrong = [fact for fact in found["facts"] if fact["state"] not in ("ok", "note")]
    if version == "1.2.1":
        assert wrong.pop()["found"].startswith("a dead engine of this version blocks its whole process")
    assert done.returncode == 0 and found["ok"] and not wrong, wrong
    names = [fact["name"] for fact in found["facts"]]
    assert {fact.name for fact in FACTS} <= set(names) and len(names) == len(set(names)) > 40


def test_without_tensorrt_llm_the_table_says_so() -> None:
    done = run(PYTHONPATH="")
    assert done.returncode == 1 and done.stdout.startswith("FAILED   the self-test")
    assert "needs TensorRT-LLM, which cannot be imported here" in done.stdout and "Traceback" not in done.stderr


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


def other_options(patch: Patch) -> None:
    fields = dict(module("llmapi").KvCacheConfig.model_fields)
    fields["brand_new"] = fields.pop("use_uvm")
    patch.setattr(module("llmapi").KvCacheConfig, "__pydantic_fields__", fields)


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
        patch.setattr(handoffs, "TRANSFER_MS", 1000)
        patch.setattr(handoffs, "SOON", 2.0)

    return plant


def aborts_ignored(patch: Patch) -> None:
    patch.setattr(module("_engine").Server, "_abort", lambda *_: None)
    patch.setattr(handoffs, "SOON", 0.1)


def silent_events(patch: Patch) -> None:
    patch.setattr(module("_engine").Rank, "_event", lambda *_: None)
    patch.setattr(probes, "EVENTS_TIMEOUT", 0.2)


def other_tokens_in_events(patch: Patch) -> None:
    rank = module("_engine").Rank
    inner = rank._block
    patch.setattr(rank, "_block", lambda self, name, tokens, salt: inner(self, name, [t + 1 for t in tokens], salt))
    patch.setattr(handoffs, "SOON", 0.5)


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
    patch.setattr(handoffs, "SOON", 0.2)


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


@pytest.mark.parametrize(
    ("plant", "group", "name", "found"),
    [
        (fewer_keywords, "api", "keywords of generate_async", "without cache_salt"),
        (other_options, "api", "options of kv_cache_config", "more: brand_new; fewer: use_uvm"),
        (no_start, "api", "a prefill engine", "TensorRT-LLM could not start: RuntimeError: Executor worker returned error"),
        (adapters_dropped, "adapters", "a decode engine with an adapter", "changes nothing"),
        (other_block_size, "limits", "block size", "64, not the options' 32"),
        (no_capacity, "limits", "size of the KV cache", "not known"),
        (tokens_changed, "requests", "a greedy prompt", "8 tokens, others twice"),
        (not_cumulative, "requests", "steps of a stream", "growing to 1 tokens"),
        (no_biases, "requests", "a bias", "tokens ["),
        (salts_ignored, "requests", "cached tokens with salts a, b, a", "none, some, some"),
        (refused_at_the_call, "requests", "a prompt over the context", "in ValueError, at the call"),
        (no_logprobs, "logprobs", "logprobs of sampled tokens", "0 entries, 0 beside"),
        (grammars_ignored, "grammars", "a grammar: regex", "answers '"),
        (grammars_ignored, "grammars", "an invalid grammar", "answers '"),
        (no_id, "hand-offs", "the result of a context phase", "context_only, 1 token, without id, open"),
        (state_lost, "hand-offs", "prefill here, decode there", "opaque_state is not what a context executor wrote"),
        (timeout(1), "blocks", "blocks of a cancelled hand-off", "not held, then free"),
        (timeout(600_000), "blocks", "blocks of a cancelled hand-off", "held, then still held"),
        (aborts_ignored, "blocks", "an aborted request", "still running"),
        (silent_events, "events", "KV events", "none"),
        (other_tokens_in_events, "events", "blocks of KV events", "0 of 3"),
        (events_lost, "events", "lost KV events", ""),
        (no_rows, "statistics", "rows of statistics", "no rows"),
        (refuses_canaries, "death", "a canary", "does not answer"),
        (unreported_death, "death", "an engine that is killed", "dead, by its silence"),
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
