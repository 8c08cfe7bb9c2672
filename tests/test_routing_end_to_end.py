"""Routing through the whole of dynserve, on the in-memory planes."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest

from dynserve import Cluster, clock
from dynserve.config import TINY_MODEL
from dynserve.routing.policy import IndexState
from tests.conftest import MODEL, until
from tests.test_cluster import assert_all_freed

PROMPT = [300 + i % 50 for i in range(200)]


def cluster(**how: Any) -> Cluster:
    return Cluster(**({"prefill": 2, "decode": 2, "executor": "simulated", "engine": {"speed": 0}} | how))


def ask(prompt: Any = PROMPT, **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": prompt, "max_tokens": 4, "ignore_eos": True} | more


async def why(client: httpx.AsyncClient, answer: httpx.Response) -> dict[str, Any]:
    entry: dict[str, Any] = (await client.get(f"/v1/requests/{answer.headers['x-request-id']}/why")).json()
    return entry


async def indexed(c: Cluster, blocks: int = 1) -> None:
    await until(lambda: all(len(f.router.index) >= blocks for f in c.frontends))


@pytest.mark.parametrize("roles", [{"prefill": 2, "decode": 2}, {"prefill": 0, "decode": 0, "aggregated": 3}])
async def test_predicted_cached_tokens_equal_the_reported_ones_on_an_idle_cluster(roles: dict[str, int]) -> None:
    async with cluster(**roles) as c, c.client() as client:
        for length in (200, 200, 192, 193, 31, 400, 400, 224):
            answer = await client.post("/v1/completions", json=ask([300 + i % 50 for i in range(length)]))
            record = (await why(client, answer))["placements"][0]
            cached = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert record["predicted_cached_tokens"] == record["reported"]["cached_tokens"] == cached
            await until(lambda: all(t.index is IndexState.EXACT for t in c.frontend.router.targets.values()))
            await asyncio.sleep(0.05)
        assert set(c.frontend.pipeline.predictions.ratios().values()) == {1.0}


async def test_the_decision_record_contains_candidates_choice_and_measurements() -> None:
    async with cluster(engine={"step_ms": 1}) as c, c.client() as client:
        await client.post("/v1/completions", json=ask())
        await indexed(c)
        answer = await client.post("/v1/completions", json=ask(), headers={"x-request-id": "my-request"})
        entry = await why(client, answer)
        assert entry["request_id"] == "my-request" and entry["outcome"] == "finished" and entry["prompt_tokens"] == 200
        prefill, decode = entry["placements"]
        assert (prefill["phase"], decode["phase"], prefill["why"]) == ("prefill", "decode", "Kv")
        assert len(prefill["candidates"]) == 2
        won = next(x for x in prefill["candidates"] if x["worker"] == prefill["worker"])
        lost = next(x for x in prefill["candidates"] if x["worker"] != prefill["worker"])
        assert (won["overlap_blocks"], lost["overlap_blocks"], won["index"]) == (6, 0, "exact")
        assert prefill["runner_up"] == lost["worker"] and prefill["margin"] == lost["cost"] - won["cost"] > 0
        assert {"waiting_prefill_blocks", "decode_blocks", "requests", "index_age_s", "ramp"} <= won.keys()
        assert prefill["reported"]["cached_tokens"] == 192 and prefill["reported"]["prefill_s"] > 0
        assert decode["reported"]["transfer_s"] >= 0 and 0 < entry["ttft_s"] < entry["duration_s"]
        assert "300" not in json.dumps(entry["placements"])  # no token of the prompt


async def test_the_decision_record_comes_with_the_answer_if_requested() -> None:
    async with cluster() as c, c.client() as client:
        explain = {"x-dynserve-explain": "1"}
        unary = await client.post("/v1/completions", json=ask(), headers=explain)
        entry = json.loads(unary.headers["x-dynserve-explain"])
        assert entry["request_id"] == unary.headers["x-request-id"] and len(entry["placements"]) == 2
        assert entry["outcome"] == "finished" and entry["duration_s"] > 0
        streamed = await client.post("/v1/completions", json=ask(stream=True), headers=explain)
        *_, done, comment, rest = streamed.text.split("\n\n")
        assert done == "data: [DONE]" and comment.startswith(": explain {") and rest == ""
        assert json.loads(comment.removeprefix(": explain "))["placements"][0]["reported"]["cached_tokens"] >= 0
        plain = await client.post("/v1/completions", json=ask(stream=True))
        assert ": explain" not in plain.text and "x-dynserve-explain" not in plain.headers


async def test_unknown_and_old_requests_have_no_decision_record() -> None:
    async with cluster() as c, c.client() as client:
        answer = await client.get("/v1/requests/nobody/why")
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "request_not_found"
        c.frontend.pipeline.decisions._kept = 2
        ids = [(await client.post("/v1/completions", json=ask())).headers["x-request-id"] for _ in range(3)]
        assert [(await client.get(f"/v1/requests/{id_}/why")).status_code for id_ in ids] == [404, 200, 200]


@pytest.mark.parametrize("sharing", [True, False])
def test_two_frontends_that_place_simultaneously_do_not_overload_one_worker(sharing: bool) -> None:
    """The control run without sharing shows that the test can fail."""

    async def rounds_with_two_on_one_worker() -> int:
        engine = {"step_ms": 5, "prefill_us_per_token": 1000}
        async with cluster(prefill=4, decode=1, frontends=2, engine=engine, seed=3) as c:
            if not sharing:
                for frontend in c.frontends:
                    frontend.sharing._others.clear()
            await asyncio.sleep(30)
            clients = [
                httpx.AsyncClient(transport=httpx.ASGITransport(apps.app), base_url="http://x") for apps in c.apps
            ]
            prefills = [w for w in c.workers if w.config.role == "prefill"]
            crowded = 0
            for turn in range(10):
                asking = []
                for i in range(4):
                    prompt = [300 + (turn * 131 + i * 31 + j) % 1500 for j in range(400)]
                    asking.append(asyncio.create_task(clients[i % 2].post("/v1/completions", json=ask(prompt))))
                    await asyncio.sleep(0.005)
                crowded += max(len(w._answers) for w in prefills) > 1
                assert all(r.status_code == 200 for r in await asyncio.gather(*asking))
                await asyncio.sleep(0.1)
            for frontend in c.frontends:
                await until(lambda f=frontend: all(t.account.requests == 0 for t in f.router.targets.values()))  # type: ignore[misc]
            return crowded

    assert (clock.run(rounds_with_two_on_one_worker()) == 0) is sharing


def test_the_charges_of_a_frontend_that_fell_silent_are_removed() -> None:
    async def main() -> None:
        async with cluster(frontends=2, engine={"step_ms": 5}) as c:
            one, other = c.frontends
            await until(lambda: one.sharing.others == 1)
            charge = other.router.ledger.charge(c.workers[0].id, prefill_tokens=500)
            await until(lambda: one.router.ledger.account(c.workers[0].id).prefill_tokens == 500)
            other.sharing._others.clear()  # it sends nothing any more
            await until(lambda: one.router.ledger.account(c.workers[0].id).prefill_tokens == 0)
            charge.close()

    clock.run(main())


async def test_a_worker_with_another_block_size_is_refused_with_its_cause() -> None:
    async with cluster() as c, c.client() as client:
        odd = await c.add_worker("prefill", kv_block_size=16)
        await until(lambda: any(i["id"] == odd.id for i in c.frontend.health()["instances"]))
        (entry,) = [i for i in c.frontend.health()["instances"] if i["id"] == odd.id]
        assert entry["state"] == "refused: its block size is 16, the model's is 32"
        for _ in range(6):
            assert (await client.post("/v1/completions", json=ask())).status_code == 200
        assert not odd.counts["accepted"]


@pytest.mark.parametrize(
    ("change", "cause"), [("template", "its chat template renders"), ("tokenizer", "its tokenizer cuts")]
)
async def test_a_worker_with_another_template_or_tokenizer_is_refused(change: str, cause: str, tmp_path: Path) -> None:
    folder = tmp_path / MODEL
    folder.mkdir()
    for file in TINY_MODEL.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    if change == "template":
        config = json.loads((folder / "tokenizer_config.json").read_text())
        template = folder / "chat_template.jinja"
        source = template.read_text() if template.exists() else config.pop("chat_template")
        template.write_text(source.replace("user", "person") + " ")
    else:
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:100]
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    async with cluster() as c:
        odd = await c.add_worker("decode", model=folder)
        await until(lambda: any(i["id"] == odd.id for i in c.frontend.health()["instances"]))
        (entry,) = [i for i in c.frontend.health()["instances"] if i["id"] == odd.id]
        assert entry["state"].startswith(f"refused: {cause}")


async def test_a_worker_without_events_is_routed_to_by_the_prompts_sent_to_it() -> None:
    async with cluster(prefill=0, decode=0, aggregated=1) as c, c.client() as client:
        quiet = await c.add_worker("aggregated", kv_events=False)
        await until(lambda: sum(p.usable for p in c.frontend.fleet.peers.values()) == 2)
        states = {i["id"]: i["index"] for i in c.frontend.health()["instances"]}
        assert states == {c.workers[0].id: "exact", quiet.id: "approx"}
        page = c.frontend.metrics_page().decode()
        assert f'dynserve_index_state{{state="approx",worker="{quiet.id}"}} 1.0' in page
        router = c.frontend.router
        del router.targets[c.workers[0].id]
        c.frontend.fleet.peers[c.workers[0].id].problem = "taken out by the test"
        c.frontend.fleet._membership_changed()
        for expected in (0, 192):
            entry = await why(client, await client.post("/v1/completions", json=ask()))
            assert entry["placements"][0]["predicted_cached_tokens"] == expected
            assert entry["placements"][0]["reported"]["cached_tokens"] == expected
            assert entry["placements"][0]["candidates"][0]["index"] == "approx"


async def test_a_cache_that_contradicts_its_events_causes_a_drift_warning(caplog: pytest.LogCaptureFixture) -> None:
    async with cluster(prefill=0, decode=0, aggregated=1) as c, c.client() as client:
        worker = c.workers[0]
        long = [300 + i % 50 for i in range(2000)]
        await client.post("/v1/completions", json=ask(long))
        await indexed(c, 62)
        worker.executor._scheduler.blocks.clear()  # type: ignore[attr-defined]
        worker.executor._scheduler.blocks.drain_events()  # type: ignore[attr-defined]  # and no event is published
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                await client.post("/v1/completions", json=ask([*long[:1990], *range(400, 410)]))
                worker.executor._scheduler.blocks.clear()  # type: ignore[attr-defined]
                worker.executor._scheduler.blocks.drain_events()  # type: ignore[attr-defined]
        assert "CACHE_PREDICTION_DRIFT" in caplog.text and worker.id in caplog.text
        (entry,) = c.frontend.health()["instances"]
        assert entry["warnings"] == ["CACHE_PREDICTION_DRIFT"]
        assert f'predicted_ratio{{worker="{worker.id}"}} ' in c.frontend.metrics_page().decode()


def test_busy_workers_queue_requests_and_a_full_queue_sends_retry_after() -> None:
    async def main() -> None:
        options = {"busy_prefill_tokens": 300, "max_queued": 3, "max_queued_s": 20.0}
        engine = {"step_ms": 5, "prefill_us_per_token": 2000}
        async with cluster(prefill=2, decode=1, engine=engine, options=options) as c, c.client() as client:
            prompts = [[300 + (i * 97 + j) % 1500 for j in range(400)] for i in range(9)]
            asking = []
            for i, prompt in enumerate(prompts):
                headers = {"x-dynserve-priority": "9"} if i == 4 else {}
                asking.append(asyncio.create_task(client.post("/v1/completions", json=ask(prompt), headers=headers)))
                await asyncio.sleep(0.01)
            answers = await asyncio.gather(*asking)
            codes = [a.status_code for a in answers]
            # one on each prefill worker, three in the queue (the one of priority among them), the rest refused
            assert codes.count(200) == 5 and codes.count(429) == 4 and codes[4] == 200
            for answer in answers:
                if answer.status_code == 429:
                    assert answer.json()["error"]["code"] == "overloaded"
                    assert 1 <= int(answer.headers["retry-after"]) <= 60
            queued = [(await why(client, a))["queued_s"] for a in answers if a.status_code == 200]
            assert sum(q > 0.5 for q in queued) == 3
            assert (await why(client, answers[4]))["queued_s"] == min(q for q in queued if q > 0)
            assert b"dynserve_queue_seconds_count" in c.frontend.metrics_page()
            await assert_all_freed(c)

    clock.run(main())


async def test_a_client_that_disconnects_is_removed_from_the_queue() -> None:
    async with cluster(options={"busy_prefill_tokens": 1}, engine={"step_ms": 20}) as c, c.client() as client:
        charges = [c.frontend.router.ledger.charge(w.id, prefill_tokens=100) for w in c.workers]
        asking = asyncio.create_task(client.post("/v1/completions", json=ask()))
        await until(lambda: c.frontend.health()["queued"] == {MODEL: 1})
        asking.cancel()
        await until(lambda: c.frontend.health()["queued"] == {MODEL: 0})
        for charge in charges:
            charge.close()
        assert (await client.post("/v1/completions", json=ask())).status_code == 200
        await assert_all_freed(c)


async def test_short_remainders_are_prefilled_on_the_decode_worker() -> None:
    async with cluster(options={"local_prefill_tokens": 64, "local_prefill_toll": 0}) as c, c.client() as client:
        first = await client.post("/v1/completions", json=ask())
        await asyncio.sleep(0.1)
        again = await client.post("/v1/completions", json=ask([*PROMPT, 301, 302]))
        assert [p["phase"] for p in (await why(client, first))["placements"]] == ["prefill", "decode"]
        (placement,) = (await why(client, again))["placements"]
        assert placement["why"] == "local prefill" and placement["worker"].startswith("decode-")
        assert placement["reported"]["cached_tokens"] >= 192
        assert b"dynserve_local_prefills_total 1.0" in c.frontend.metrics_page()
        await assert_all_freed(c)


async def test_a_session_stays_on_its_worker_and_an_instance_can_be_named() -> None:
    async with cluster(prefill=0, decode=0, aggregated=4, router_mode="random") as c, c.client() as client:
        answers = [
            await client.post("/v1/completions", json=ask(), headers={"x-dynserve-session": "s"}) for _ in range(6)
        ]
        assert len({(await why(client, a))["placements"][0]["worker"] for a in answers}) == 1
    async with cluster(router_mode="direct") as c, c.client() as client:
        for named in c.workers[0], c.workers[1]:
            headers = {"x-dynserve-instance": f"{named.id}, {c.workers[3].id}"}
            answer = await client.post("/v1/completions", json=ask(), headers=headers)
            placed = [p["worker"] for p in (await why(client, answer))["placements"]]
            assert placed == [named.id, c.workers[3].id]
        missing = await client.post("/v1/completions", json=ask())
        assert missing.status_code == 400 and "x-dynserve-instance" in missing.json()["error"]["message"]
        unknown = await client.post("/v1/completions", json=ask(), headers={"x-dynserve-instance": "prefill-0"})
        assert unknown.status_code == 503
        await assert_all_freed(c)


@pytest.mark.parametrize("mode", ["kv", "round-robin", "random", "least-loaded", "power-of-two"])
async def test_every_router_mode_serves_requests(mode: Any) -> None:
    async with cluster(router_mode=mode) as c, c.client() as client:
        answers = await asyncio.gather(*(client.post("/v1/completions", json=ask()) for _ in range(20)))
        assert {a.status_code for a in answers} == {200}
        await assert_all_freed(c)


@pytest.mark.parametrize(
    ("headers", "says"),
    [
        ({"x-dynserve-priority": "high"}, "x-dynserve-priority"),
        ({"x-dynserve-session": "s" * 300}, "x-dynserve-session"),
    ],
)
async def test_an_error_names_the_invalid_header(headers: dict[str, str], says: str) -> None:
    async with cluster(prefill=1, decode=1) as c, c.client() as client:
        answer = await client.post("/v1/completions", json=ask(), headers=headers)
        assert answer.status_code == 400 and says in answer.json()["error"]["message"]


async def test_a_failed_local_prefill_is_retried_with_prefill_and_decode() -> None:
    options = {"local_prefill_tokens": 64, "local_prefill_toll": 0}
    async with cluster(options=options, decode=2, engine={"step_ms": 50}) as c, c.client() as client:
        await client.post("/v1/completions", json=ask())
        await asyncio.sleep(0.1)
        asking = asyncio.create_task(client.post("/v1/completions", json=ask([*PROMPT, 301])))
        await until(lambda: any(p.replies for p in c.frontend.fleet.peers.values()))
        (busy,) = [p for p in c.frontend.fleet.peers.values() if p.replies]
        assert busy.id.startswith("decode-") and busy.link is not None
        busy.link.abort("power failure")
        answer = await asking
        assert answer.status_code == 200
        placements = (await why(client, answer))["placements"]
        assert [p["phase"] for p in placements] == ["aggregated", "prefill", "decode"]
        assert placements[0]["failure"] == "worker_lost"
        await assert_all_freed(c)


async def test_the_record_of_a_request_id_with_a_slash_is_found() -> None:
    async with cluster() as c, c.client() as client:
        answer = await client.post("/v1/completions", json=ask(), headers={"x-request-id": "team/42"})
        assert (await why(client, answer))["request_id"] == "team/42"
