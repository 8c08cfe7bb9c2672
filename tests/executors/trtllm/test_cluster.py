"""A whole cluster with TensorRT-LLM workers, in one process, on the double."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dynserve import Cluster
from dynserve.wire.requests import Accepted, GenerateRequest
from tests.conftest import MODEL, until
from tests.test_cluster import ASK, assert_all_freed

FRENCH = '{"r": 8, "target_modules": ["q_proj"], "bias": {"444": 1000.0}}'
ENGINE = {"cache_transceiver_config": {"backend": "NIXL"}, "kv_cache_config": {"max_tokens": 6400}}
# so that the blocks of a cancelled hand-off, which the engine keeps until then, are soon free
BRIEF = ENGINE | {"cache_transceiver_config": {"backend": "NIXL", "kv_transfer_timeout_ms": 3000}}

pytestmark = pytest.mark.usefixtures("trtllm_double")


def cluster(**how: Any) -> Cluster:
    return Cluster(**({"prefill": 1, "decode": 1, "executor": "trtllm", "engine": ENGINE} | how))


async def test_a_prefill_and_a_decode_worker_answer_and_count_hand_offs() -> None:
    async with cluster() as c, c.client() as client:
        for body in (ASK, ASK | {"n": 2}, ASK | {"logprobs": True, "top_logprobs": 3}):
            answer = (await client.post("/v1/chat/completions", json=body)).json()
            assert {choice["message"]["content"] for choice in answer["choices"]} == {"7"}
        form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": [3]}}}
        answer = (await client.post("/v1/chat/completions", json=ASK | {"response_format": form})).json()
        assert json.loads(answer["choices"][0]["message"]["content"]) == 3
        prefill, decode = c.workers
        await assert_all_freed(c)
        assert prefill.executor.counters()["handoffs_delivered_total"] == 5
        assert decode.executor.counters()["kv_transfers_done_total"] == 5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"cache_transceiver_config": {"backend": "NIXL", "transceiver_runtime": "CPP"}},
            "transceiver runtime is CPP on this worker and PYTHON on prefill-",
        ),
        (
            {"cache_transceiver_config": {"backend": "UCX"}},
            "transceiver backend is UCX on this worker and NIXL on prefill-",
        ),
        ({"kv_cache_config": {"dtype": "fp8"}}, "KV cache dtype is fp8 on this worker and bfloat16 on prefill-"),
        ({"kv_cache_config": {"tokens_per_block": 64}}, "tokens_per_block is 64 on this worker and 32 on prefill-"),
    ],
)
async def test_workers_that_cannot_hand_over_to_each_other_are_refused_with_both_values(
    change: dict[str, Any], said: str
) -> None:
    async with cluster() as c, c.client() as client:
        worker = await c.add_worker("decode", override_engine_args=json.dumps(ENGINE | change))
        peers = c.frontend.fleet.peers
        await until(lambda: worker.id in peers and peers[worker.id].problem not in ("", "loading"))
        assert said in peers[worker.id].problem
        assert (await client.post("/v1/chat/completions", json=ASK)).status_code == 200
        states = {i["id"]: i["state"] for i in (await client.get("/health")).json()["instances"]}
        assert states[worker.id].startswith("refused: it cannot hand over KV caches here")


async def test_a_worker_of_another_version_is_refused_until_the_others_depart(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    async with cluster() as c:
        for name in [name for name in sys.modules if name.split(".")[0] == "tensorrt_llm"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setenv("TRTLLM_DOUBLE_VERSION", "1.2.1")
        worker = await c.add_worker("decode", override_engine_args=json.dumps(ENGINE))
        peers = c.frontend.fleet.peers
        await until(lambda: "refused" in peers[worker.id].problem)
        assert "tensorrt_llm is 1.2.1 on this worker and 1.3.0rc29 on" in peers[worker.id].problem
        for old in c.workers[:2]:
            link = peers[old.id].link
            assert link is not None
            peers[old.id].leaving = True
            c.frontend.fleet.lost(link, "gone")
        await until(lambda: peers[worker.id].problem == "")
        link.abort("gone")


async def test_an_adapter_is_a_model_of_its_own_to_clients(tmp_path: Path) -> None:
    adapter = tmp_path / "french"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(FRENCH)
    async with cluster(prefill=0, decode=0, aggregated=1) as c, c.client() as client:
        await c.add_worker("aggregated", override_engine_args=json.dumps(ENGINE), lora_adapters=f"french={adapter}")
        fleet = c.frontend.fleet
        await until(lambda: len(fleet.targets("french", "aggregated")) == 1)
        assert len(fleet.targets(MODEL, "aggregated")) == 2
        models = (await client.get("/v1/models")).json()["data"]
        assert [(m["id"], m.get("parent")) for m in models] == [(MODEL, None), ("french", MODEL)]
        body = {"prompt": list(range(300, 370)), "max_tokens": 4, "ignore_eos": True, "temperature": 0}
        answers = [
            (await client.post("/v1/completions", json=body | {"model": name})).json()
            for name in (MODEL, "french", "french")
        ]
        assert answers[0]["choices"][0]["text"] != answers[1]["choices"][0]["text"] == answers[2]["choices"][0]["text"]
        assert [a["model"] for a in answers] == [MODEL, "french", "french"]
        cached = [a["usage"]["prompt_tokens_details"]["cached_tokens"] for a in answers]
        assert cached == [0, 0, 64], "an adapter's blocks are not the model's"
        missing = await client.post("/v1/completions", json=body | {"model": "frensh"})
        assert missing.status_code == 404 and "did you mean french?" in missing.json()["error"]["message"]


async def test_each_attention_dp_rank_is_routed_to_by_its_own_cache() -> None:
    engine = {"enable_attention_dp": True, "tensor_parallel_size": 2, "kv_cache_config": {"max_tokens": 3200}}
    async with cluster(prefill=0, decode=0, aggregated=1, engine=engine) as c, c.client() as client:
        first, second = (worker.id for worker in c.workers)
        assert (first[-2:], second[-2:], first[:-2]) == ("-0", "-1", second[:-2])
        prompts = [list(range(start, start + 100)) for start in range(300, 1900, 100)]

        async def ask(prompt: list[int]) -> tuple[str, int]:
            body = {"model": MODEL, "prompt": prompt, "max_tokens": 2}
            answer = await client.post("/v1/completions", json=body, headers={"x-dynserve-explain": "1"})
            why = json.loads(answer.headers["x-dynserve-decision"]) if "x-dynserve-decision" in answer.headers else None
            if why is None:
                why = (await client.get(f"/v1/requests/{answer.headers['x-request-id']}/why")).json()
            cached: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
            return why["placements"][0]["worker"], cached

        went = [await ask(prompt) for prompt in prompts]
        assert {worker for worker, _ in went} == {first, second}
        await until(lambda: len(c.frontend.router.index) == 48)
        assert [await ask(prompt) for prompt in prompts] == [(worker, 96) for worker, _ in went]


async def test_a_hand_off_that_no_decode_worker_can_accept_is_cancelled() -> None:
    other = json.dumps(BRIEF | {"kv_cache_config": {"max_tokens": 6400, "dtype": "fp8"}})
    async with cluster(prefill=0, decode=0, aggregated=1) as c, c.client() as client:
        prefill = await c.add_worker("prefill", override_engine_args=json.dumps(BRIEF))
        decode = await c.add_worker("decode", override_engine_args=other)
        await until(lambda: sum(peer.usable for peer in c.frontend.fleet.peers.values()) == 3)
        answer = (await client.post("/v1/chat/completions", json=ASK)).json()
        assert answer["choices"][0]["message"]["content"] == "7"
        await until(lambda: prefill.executor.load().open_handoffs == 0)
        assert prefill.executor.counters()["handoffs_cancelled_total"] == 1
        assert "handoffs_delivered_total" not in prefill.executor.counters()
        assert decode.executor.counters()["kv_transfers_failed_total"] == 1
        # a matching worker joins: hand-offs now go to it, and the other one is refused when it reconnects
        fitting = await c.add_worker("decode", override_engine_args=json.dumps(BRIEF))
        await until(lambda: len(c.frontend.fleet.targets(MODEL, "decode")) == 2)
        for _ in range(3):
            assert (await client.post("/v1/chat/completions", json=ASK | {"user": "x"})).status_code == 200
        assert fitting.executor.counters()["kv_transfers_done_total"] == 3
        peer = c.frontend.fleet.peers[decode.id]
        assert peer.link is not None
        peer.link.abort("a flap")
        await until(lambda: "refused" in peer.problem)
        await assert_all_freed(c)


async def test_after_a_lost_link_another_decode_worker_prefills_the_prompt_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with cluster(decode=2, engine=BRIEF) as c, c.client() as client:
        decoders = c.workers[1:]
        dead: list[str] = []

        def dying(worker: Any, take: Any) -> Any:
            def first_dies(request: Any) -> Any:
                if not dead and request.phase == "decode":
                    dead.append(worker.id)
                    link = c.frontend.fleet.peers[worker.id].link
                    assert link is not None
                    link.abort("power failure")
                    return Accepted()
                return take(request)

            return first_dies

        for worker in decoders:
            monkeypatch.setattr(worker, "start", dying(worker, worker.start))
        answer = await client.post("/v1/chat/completions", json=ASK)
        assert answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"] == "7"
        (other,) = (worker for worker in decoders if worker.id not in dead)
        assert other.executor.counters()["kv_transfers_failed_total"] == 1, "it has computed it"
        await assert_all_freed(c)
        assert c.workers[0].executor.counters()["handoffs_cancelled_total"] == 1


async def test_the_clients_trace_and_session_reach_the_workers_of_both_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    async with cluster() as c, c.client() as client:
        found: list[tuple[str, dict[str, str], str]] = []
        for worker in c.workers:

            def noting(request: GenerateRequest, start: Any = worker.start) -> Any:
                found.append((request.phase, request.trace_headers, request.session))
                return start(request)

            monkeypatch.setattr(worker, "start", noting)
        trace = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tracestate": "a=1"}
        headers = trace | {"x-dynserve-session": "mine"}
        assert (await client.post("/v1/chat/completions", json=ASK, headers=headers)).status_code == 200
        assert found == [("prefill", trace, "mine"), ("decode", trace, "mine")]
        too_long = {"traceparent": trace["traceparent"], "tracestate": "a=" + "1" * 600}
        assert (await client.post("/v1/chat/completions", json=ASK, headers=too_long)).status_code == 200
        assert found[2][1] == {"traceparent": trace["traceparent"]}


async def test_the_reason_for_missing_grammars_reaches_the_client() -> None:
    engine = ENGINE | {"speculative_config": {"decoding_type": "MTP"}}
    async with cluster(prefill=0, decode=0, aggregated=1, engine=engine) as c, c.client() as client:
        answer = await client.post("/v1/chat/completions", json=ASK | {"response_format": {"type": "json_object"}})
        assert answer.status_code == 400
        assert "cannot hold an answer to a grammar (the engine options have a speculative_config" in answer.text
        assert (await client.post("/v1/chat/completions", json=ASK)).status_code == 200
