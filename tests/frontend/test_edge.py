"""Requests from their headers to their prompts, through a whole cluster in memory."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from dynserve.cluster import Cluster
from dynserve.frontend.edge import unknown_fields_header
from dynserve.frontend.keys import digest_of
from tests.conftest import MODEL, until

ASK = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
SECRET = "sk-dyn-one"


def cluster(engine: dict[str, Any] | None = None, **options: Any) -> Cluster:
    return Cluster(aggregated=2, executor="simulated", engine=engine or {"speed": 0}, options=options)


@pytest.fixture
def keys(tmp_path: Path) -> str:
    path = tmp_path / "keys"
    path.write_text(f"ann sha256:{digest_of(SECRET).hex()} rpm=5 tpm=300 concurrency=2\n")
    return str(path)


async def test_generating_routes_need_a_key_and_monitoring_routes_do_not(keys: str) -> None:
    async with cluster(api_keys_file=keys) as c, c.client() as client:
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens", "/tokenize", "/detokenize"):  # fmt: skip
            answer = await client.post(path, json=ASK)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        for path in ("/v1/models", f"/v1/models/{MODEL}", "/v1/requests/x/why"):
            assert (await client.get(path)).status_code == 401
        for path in ("/health", "/live", "/metrics", "/openapi.json"):
            assert (await client.get(path)).status_code == 200
        answer = await client.post("/v1/chat/completions", json=ASK, headers={"authorization": f"Bearer {SECRET}"})
        assert answer.status_code == 200 and answer.headers["x-ratelimit-remaining-requests"] == "4"
        claude = await client.post("/v1/messages", json=ASK, headers={"x-api-key": SECRET})
        assert claude.status_code == 200
        assert c.frontend.gate.open_requests.count == 0


async def test_a_key_over_its_limits_is_refused_with_retry_after(keys: str) -> None:
    headers = {"authorization": f"Bearer {SECRET}"}
    async with cluster({"step_ms": 30}, api_keys_file=keys) as c, c.client() as client:
        asking = [asyncio.create_task(client.post("/v1/chat/completions", json=ASK, headers=headers)) for _ in range(2)]
        await until(lambda: c.frontend.gate.open_requests.count == 2)
        third = await client.post("/v1/chat/completions", json=ASK, headers=headers)
        assert third.status_code == 429 and "answers in progress" in third.json()["error"]["message"]
        assert [(await task).status_code for task in asking] == [200, 200]
        for _ in range(3):
            await client.post("/v1/chat/completions", json=ASK, headers=headers)
        over = await client.post("/v1/chat/completions", json=ASK, headers=headers)
        assert over.status_code == 429 and over.json()["error"]["code"] == "rate_limit_exceeded"
        assert int(over.headers["retry-after"]) > 1 and over.json()["error"]["type"] == "rate_limit_error"


async def test_only_computed_tokens_are_charged_to_a_key(keys: str) -> None:
    headers = {"authorization": f"Bearer {SECRET}"}
    async with cluster({"step_ms": 5}, api_keys_file=keys) as c, c.client() as client:
        (usage,) = next(iter(c.frontend.gate._by_digest.values()))
        assert usage.tokens is not None
        bucket, now = usage.tokens, c.frontend.gate.clock()
        c.frontend.gate.clock = lambda: now  # the bucket is not refilled meanwhile

        def spent() -> float:
            return 300 - bucket.level(now)

        wrong = await client.post("/v1/chat/completions", json=ASK, headers=headers | {"x-dynserve-priority": "much"})
        assert wrong.status_code == 400 and spent() == pytest.approx(0, abs=0.5)
        done = await client.post("/v1/chat/completions", json=ASK, headers=headers)
        assert spent() == pytest.approx(done.json()["usage"]["total_tokens"], abs=1)
        before = spent()
        long = ASK | {"max_tokens": 200, "ignore_eos": True}
        leaving = asyncio.create_task(client.post("/v1/chat/completions", json=long, headers=headers))
        live = [w.executor._live for w in c.workers]  # type: ignore[attr-defined]
        await until(lambda: any(s.generated > 20 for sequences in live for s, _ in sequences.values()))
        await asyncio.sleep(0.05)
        leaving.cancel()
        await until(lambda: c.frontend.gate.open_requests.count == 0)
        assert spent() - before > 15  # the tokens generated before the client disconnected


async def test_decisions_of_several_answers_are_found_by_the_request_id() -> None:
    async with cluster() as c, c.client() as client:
        answer = await client.post("/v1/chat/completions", json=ASK | {"n": 3}, headers={"x-request-id": "mine"})
        assert answer.headers["x-request-id"] == "mine"
        assert (await client.get("/v1/requests/mine/why")).json()["request_id"] == "mine/0"
        assert (await client.get("/v1/requests/mine/2/why")).json()["request_id"] == "mine/2"


async def test_a_lost_worker_fails_a_request_of_several_answers_and_frees_its_blocks() -> None:
    async with cluster({"step_ms": 20}, max_migrations=0) as c, c.client() as client:
        body = ASK | {"n": 6, "max_tokens": 300, "ignore_eos": True, "stream": True}
        asking = asyncio.create_task(client.post("/v1/chat/completions", json=body))
        await until(lambda: sum(w.executor.load().running for w in c.workers) == 6)
        await asyncio.sleep(0.1)
        peer = next(p for p in c.frontend.fleet.peers.values() if p.replies)
        assert peer.link is not None
        peer.link.abort("power failure")
        text = (await asking).text
        assert "event: error\ndata: " in text and '"code":"worker_lost"' in text and "[DONE]" not in text
        await until(lambda: all(w.executor.load().free_blocks == w.executor.load().total_blocks for w in c.workers))
        page = c.frontend.metrics_page().decode()
        assert (
            f'dynserve_requests_in_flight{{model="{MODEL}"}} 0.0' in page and c.frontend.gate.open_requests.count == 0
        )


async def test_a_request_that_cannot_be_rendered_closes_no_link() -> None:
    async with cluster() as c, c.client() as client:
        body = '{{"model": "{}", "input": "x", "metadata": {{"a": NaN, "pad": "{}"}}}}'.format(MODEL, "x" * 1_200_000)
        answer = await client.post("/v1/responses", content=body)
        assert answer.status_code == 400 and "a number that JSON does not allow" in answer.json()["error"]["message"]
        assert all(peer.linked for peer in c.frontend.fleet.peers.values())


async def test_cached_tokens_are_reported_with_and_without_a_stop_string() -> None:
    async with Cluster(aggregated=1) as c, c.client() as client:
        ask = {"model": MODEL, "prompt": [300 + i % 50 for i in range(200)], "max_tokens": 40, "ignore_eos": True}
        whole = (await client.post("/v1/completions", json=ask)).json()["choices"][0]["text"]
        for stop in (None, whole[5:8]):
            answer = (await client.post("/v1/completions", json=ask | {"stop": stop})).json()
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 192


async def test_requests_with_the_same_prompt_cache_key_go_to_the_same_worker() -> None:
    async with cluster(router_mode="round-robin") as c, c.client() as client:
        for i in range(6):
            headers = {"x-request-id": f"r{i}"}
            await client.post("/v1/chat/completions", json=ASK | {"prompt_cache_key": "talk"}, headers=headers)
        placed = [(await client.get(f"/v1/requests/r{i}/why")).json()["placements"][0]["worker"] for i in range(6)]
        assert len(set(placed)) == 1


def test_unknown_fields_are_named_in_a_header_of_ascii_characters() -> None:
    assert unknown_fields_header([]) == []
    assert (
        unknown_fields_header(["a", "b\r\nset-cookie: x", "ü" * 200])[0][1]
        == f"ignored: a, b??set-cookie: x, {'?' * 64}"
    )
    assert unknown_fields_header([f"f{i}" for i in range(20)])[0][1].endswith("and 4 more")


async def test_an_internal_error_is_an_error_object_without_details(monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: Any) -> None:
        raise RuntimeError("secret details")

    async with cluster(cors_origins="*") as c, c.client() as client:
        monkeypatch.setattr("dynserve.frontend.edge.normalize", fault)
        answer = await client.post("/v1/chat/completions", json=ASK, headers={"origin": "https://a.example"})
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "internal_error"
        assert "secret" not in answer.text and answer.headers["access-control-allow-origin"] == "*"
        assert c.frontend.gate.open_requests.count == 0
