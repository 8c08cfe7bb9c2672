"""The whole of dynserve in one process: requests while workers, links and clients fail."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import msgspec
import pytest

from dynserve import Cluster
from dynserve.frontend.models import KEEP_RETIRED
from dynserve.transport.base import Deleted
from dynserve.transport.memory import MemoryLink
from dynserve.wire.link import VERSION, Hello, Welcome
from dynserve.wire.requests import Accepted
from tests.conftest import MODEL, make_request, until
from tests.transport.test_link import End

ASK: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "What is 3+4?"}]}


def cluster(**how: Any) -> Cluster:
    return Cluster(**({"prefill": 2, "decode": 2, "executor": "simulated", "engine": {"speed": 0}} | how))


def text_of(response: httpx.Response) -> str:
    lines = [line[6:] for line in response.text.split("\n\n") if line.startswith("data: {")]
    return "".join(c["delta"].get("content") or "" for line in lines for c in json.loads(line)["choices"])


async def assert_all_freed(c: Cluster) -> None:
    """Asserts that every block is free, no hand-off is open, nothing is charged, and the counters add up."""
    for worker in c.workers:
        await until(lambda w=worker: w.executor.load().free_blocks == w.executor.load().total_blocks)  # type: ignore[misc]
        assert worker.executor.load().open_handoffs == 0
        counts = worker.counts
        assert counts["accepted"] == counts["finished"] + counts["failed"] + counts["cancelled"]
    c.frontend.router.ledger.check()
    assert len(c.frontend.router.pending) == 0
    for peer in c.frontend.fleet.peers.values():
        own = c.frontend.router.ledger.account(peer.id).own
        assert (own.prefill_tokens, own.decode_tokens, own.requests) == (0, 0, 0)
        assert not peer.replies


async def test_the_tiny_model_adds_through_prefill_and_decode() -> None:
    async with Cluster(prefill=1, decode=1) as c, c.client() as client:
        unary = (await client.post("/v1/chat/completions", json=ASK)).json()
        assert unary["choices"][0]["message"]["content"] == "7"
        assert unary["choices"][0]["finish_reason"] == "stop"
        streamed = await client.post("/v1/chat/completions", json=ASK | {"stream": True})
        assert text_of(streamed) == "7" and streamed.text.endswith("data: [DONE]\n\n")
        assert c.workers[1].executor.counters()["kv_transfers_done_total"] == 2
        await assert_all_freed(c)


async def test_aggregated_workers_serve_when_there_are_no_pairs() -> None:
    async with Cluster(aggregated=1) as c, c.client() as client:
        body = (
            await client.post("/v1/completions", json={"model": MODEL, "prompt": "one, two, three,", "max_tokens": 6})
        ).json()
        assert body["choices"][0]["text"].startswith(" four")
        await assert_all_freed(c)


async def test_a_stop_string_at_the_first_token_needs_no_decode_worker() -> None:
    async with Cluster(prefill=1, decode=1) as c, c.client() as client:
        body = (await client.post("/v1/chat/completions", json=ASK | {"stop": "7"})).json()
        assert body["choices"][0]["message"]["content"] == "" and body["choices"][0]["finish_reason"] == "stop"
        await assert_all_freed(c)
        assert not c.workers[1].counts["accepted"]


async def test_a_repeated_prompt_is_routed_to_its_cache_and_reports_cached_tokens() -> None:
    async with cluster() as c, c.client() as client:
        ask = {"model": MODEL, "prompt": [300 + i % 50 for i in range(200)], "max_tokens": 4, "ignore_eos": True}
        first = (await client.post("/v1/completions", json=ask)).json()
        await until(lambda: len(c.frontend.router.index) > 0)
        second = (await client.post("/v1/completions", json=ask)).json()
        assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == 192
        assert first["choices"] == second["choices"]


async def test_a_client_that_disconnects_frees_everything() -> None:
    async with cluster(engine={"step_ms": 5, "prefill_us_per_token": 0}) as c:
        app, disconnected = c.app, asyncio.Event()

        async def receive() -> dict[str, Any]:
            if not sent:
                sent.append(1)
                return {
                    "type": "http.request",
                    "body": json.dumps(ASK | {"stream": True, "max_tokens": 4000, "ignore_eos": True}).encode(),
                }
            await disconnected.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            bodies.append(message)
            if len(bodies) > 4:
                disconnected.set()

        sent, bodies = list[int](), list[Any]()
        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": [], "query_string": b"", "http_version": "1.1", "scheme": "http", "server": ("x", 1), "client": ("y", 1), "root_path": ""}  # fmt: skip
        async with asyncio.timeout(10):
            await app(scope, receive, send)
        await assert_all_freed(c)
        assert sum(w.counts["cancelled"] for w in c.workers) == 1


async def test_requests_use_the_link_when_the_bus_is_down_or_too_small() -> None:
    async with cluster() as c, c.client() as client:
        c.planes.bus_up = False
        assert (await client.post("/v1/chat/completions", json=ASK)).status_code == 200
        c.planes.bus_up, c.planes.bus.max_payload = True, 10
        assert (await client.post("/v1/chat/completions", json=ASK)).status_code == 200
        await assert_all_freed(c)


async def test_a_request_survives_a_prefill_worker_that_dies_before_it_answers() -> None:
    async with cluster(engine={"step_ms": 200}) as c, c.client() as client:
        asking = asyncio.create_task(client.post("/v1/chat/completions", json=ASK | {"max_tokens": 2}))
        await until(lambda: any(p.replies for p in c.frontend.fleet.peers.values()))
        (busy,) = [p for p in c.frontend.fleet.peers.values() if p.replies]
        assert busy.link is not None
        busy.link.abort("power failure")
        assert (await asking).status_code == 200
        await assert_all_freed(c)


async def test_a_stream_whose_decode_worker_dies_without_migration_ends_with_an_error() -> None:
    async with cluster(engine={"step_ms": 20}, options={"max_migrations": 0}) as c, c.client() as client:
        asking = asyncio.create_task(
            client.post("/v1/chat/completions", json=ASK | {"stream": True, "max_tokens": 500, "ignore_eos": True})
        )
        decoding = [w for w in c.workers if w.config.role == "decode"]
        await until(lambda: any(w.executor.load().running for w in decoding))
        await asyncio.sleep(0.1)
        (busy,) = [
            p for p in c.frontend.fleet.peers.values() if p.replies and p.instance and p.instance.role == "decode"
        ]
        assert busy.link is not None
        busy.link.abort("power failure")
        text = (await asking).text
        assert '"code":"worker_lost"' in text and "[DONE]" not in text
        await assert_all_freed(c)


async def test_a_worker_whose_link_breaks_is_not_routed_to_until_it_reconnects() -> None:
    async with cluster() as c, c.client() as client:
        peer = next(p for p in c.frontend.fleet.peers.values() if p.instance and p.instance.role == "decode")
        assert isinstance(peer.link, MemoryLink)
        peer.link.abort("gone")
        assert peer.id not in [i["id"] for i in c.frontend.health()["instances"]]
        assert (await client.post("/v1/chat/completions", json=ASK)).status_code == 200
        await until(lambda: peer.usable)  # it dials again


async def test_500_requests_of_which_a_third_is_cancelled_free_everything() -> None:
    async with cluster(engine={"step_ms": 1, "prefill_us_per_token": 5, "num_blocks": 400}) as c, c.client() as client:
        prompts = [[300 + (i * j) % 1500 for j in range(1 + (i * 37) % 300)] for i in range(500)]
        gate = asyncio.Semaphore(48)
        outcomes: list[str] = []

        async def one(i: int) -> None:
            async with gate:
                ask = {
                    "model": MODEL,
                    "prompt": prompts[i],
                    "max_tokens": 1 + i % 30,
                    "stream": bool(i % 2),
                    "ignore_eos": True,
                }
                asking = asyncio.create_task(client.post("/v1/completions", json=ask))
                if i % 3 == 0:
                    await asyncio.sleep((i % 17) * 0.002)
                    asking.cancel()
                await asyncio.wait([asking])
                outcomes.append("cancelled" if asking.cancelled() else str(asking.result().status_code))

        await asyncio.gather(*(one(i) for i in range(500)))
        assert set(outcomes) <= {"200", "cancelled"} and outcomes.count("cancelled") > 50
        await assert_all_freed(c)
        page = c.frontend.metrics_page().decode()
        assert f'dynserve_requests_in_flight{{model="{MODEL}"}} 0.0' in page


async def test_a_worker_that_reconnects_ends_the_streams_of_its_old_link(caplog: pytest.LogCaptureFixture) -> None:
    alone = cluster(prefill=0, decode=0, aggregated=1, engine={"step_ms": 20}, options={"max_migrations": 0})
    async with alone as c, c.client() as client:
        asking = asyncio.create_task(
            client.post("/v1/chat/completions", json=ASK | {"stream": True, "max_tokens": 500, "ignore_eos": True})
        )
        await until(lambda: bool(c.workers[0].executor.load().running))
        await asyncio.sleep(0.1)
        worker, links = c.workers[0], c.planes.links
        old = c.frontend.fleet.peers[worker.id].link
        assert old is not None
        link = await links.dial(links.addresses[0], End())
        link.send(Hello(worker.id, worker.epoch, c.frontend.id))
        async with asyncio.timeout(5):
            assert '"code":"worker_lost"' in (await asking).text
        await until(lambda: old not in c.frontend.fleet._peer_of)
        assert "a link without a known worker" not in caplog.text  # the old link was known


async def test_a_frontend_whose_registration_is_lost_keeps_its_links() -> None:
    async with cluster(prefill=1, decode=1) as c, c.client() as client:
        registry = c.planes.registry
        (key,) = (key for key in registry.entries if "/frontend/" in key)
        links = [peer.link for peer in c.frontend.fleet.peers.values()]
        value = registry.lose(key)
        await asyncio.sleep(0.3)
        assert (await client.post("/v1/chat/completions", json=ASK)).status_code == 200
        registry.put(key, value)
        await asyncio.sleep(0.3)
        assert [peer.link for peer in c.frontend.fleet.peers.values()] == links
        assert not any(link is None or link.closed for link in links)


async def test_a_hello_to_another_frontend_is_refused() -> None:
    async with cluster(prefill=1, decode=1) as c:
        links = c.planes.links
        link = await links.dial(links.addresses[0], End())
        link.send(Hello(c.workers[0].id, 1, "frontend-of-yesterday"))
        await until(lambda: link.closed)
        assert len([i for i in c.frontend.health()["instances"] if i["state"] == "ready"]) == 2


async def test_a_worker_of_another_link_version_is_refused_with_both_versions(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with cluster(prefill=0, decode=0, aggregated=1) as c:
        links = c.planes.links
        link = await links.dial(links.addresses[0], End())
        link.send(Hello("of-yesterday", 1, c.frontend.id, VERSION - 1))
        await until(lambda: link.closed)
        assert "of-yesterday" not in c.frontend.fleet.peers
        assert f"of-yesterday speaks version {VERSION - 1} of the link, this frontend {VERSION}" in caplog.text


async def test_a_worker_disconnects_from_a_frontend_of_another_link_version(caplog: pytest.LogCaptureFixture) -> None:
    async with cluster(prefill=0, decode=0, aggregated=1) as c:
        (peer,) = c.frontend.fleet.peers.values()
        assert peer.link is not None
        link = peer.link
        link.send(Welcome(c.frontend.id, VERSION + 1))
        await until(lambda: link.closed)
        assert f"speaks version {VERSION + 1} of the link, this worker {VERSION}" in caplog.text


async def test_answers_of_one_token_leave_no_state_on_the_prefill_worker() -> None:
    async with cluster(prefill=1, decode=1) as c, c.client() as client:
        for _ in range(5):
            assert (await client.post("/v1/chat/completions", json=ASK | {"max_tokens": 1})).status_code == 200
        await assert_all_freed(c)
        assert not c.workers[0]._answers and not c.workers[0]._handed_off


async def test_a_late_duplicate_of_a_finished_request_is_not_run_again() -> None:
    async with cluster(prefill=0, decode=0, aggregated=1) as c, c.client() as client:
        worker = c.workers[0]
        assert (await client.post("/v1/chat/completions", json=ASK)).status_code == 200
        reply_to, stream = list(worker._done)[-1]
        late = make_request([1, 2], reply_to=reply_to, stream=stream)
        assert isinstance(worker.start(late), Accepted)
        assert worker.counts["accepted"] == 1 and not worker._answers


async def test_a_client_that_does_not_read_is_disconnected_and_frees_everything() -> None:
    async with cluster(engine={"step_ms": 1, "prefill_us_per_token": 0, "decode_us_per_sequence": 0}) as c:
        c.frontend.pipeline.limits = c.frontend.pipeline.limits._replace(max_stream_bytes=4000)
        body = json.dumps(ASK | {"stream": True, "max_tokens": 4000, "ignore_eos": True}).encode()
        sent, bodies = list[int](), list[Any]()

        async def receive() -> dict[str, Any]:
            if not sent:
                sent.append(1)
                return {"type": "http.request", "body": body}
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: Any) -> None:
            bodies.append(message)
            if len(bodies) > 4:
                await asyncio.Event().wait()  # a full socket

        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": [], "query_string": b"", "http_version": "1.1", "scheme": "http", "server": ("x", 1), "client": ("y", 1), "root_path": ""}  # fmt: skip
        async with asyncio.timeout(10):
            await c.app(scope, receive, send)
        await assert_all_freed(c)
        assert b"dynserve_slow_clients_cut_total 1.0" in c.frontend.metrics_page()


async def test_a_model_without_workers_stays_known_for_a_while() -> None:
    async with cluster(prefill=1, decode=1) as c:
        fleet = c.frontend.fleet
        model = fleet.models[MODEL]
        for peer in list(fleet.peers.values()):
            fleet.discovered(Deleted(f"x/{peer.id}"))
            assert peer.link is not None
            fleet.lost(peer.link, "test")
        assert fleet.peers == {} and not fleet.serves(MODEL)
        assert fleet.model(MODEL) is model  # its requests can be prepared
        model.card = msgspec.structs.replace(model.card, adapters=["french"])
        assert fleet.model("french") is model and fleet.adapter("french") == "french"
        fleet._models.expire(asyncio.get_running_loop().time() + KEEP_RETIRED + 1)
        assert fleet.models == {}


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", "/v1/chat/completions", b"{", 400, "invalid_request"),
        (
            "POST",
            "/v1/chat/completions",
            b'{"model": "nobody", "messages": [{"role": "user", "content": "x"}]}',
            404,
            "model_not_found",
        ),
        (
            "POST",
            "/v1/completions",
            json.dumps({"model": MODEL, "prompt": [5] * 9000}).encode(),
            400,
            "context_length_exceeded",
        ),
        ("GET", "/v1/nothing", b"", 404, "not_found"),
        ("GET", "/v1/completions", b"", 405, "invalid_request"),
        ("POST", "/v1/completions", b" " * (33 << 20), 413, "body_too_large"),
    ],
)
async def test_every_error_is_an_openai_error_object(
    method: str, path: str, body: bytes, status: int, code: str
) -> None:
    async with cluster(prefill=1, decode=1) as c, c.client() as client:
        response = await client.request(method, path, content=body)
        assert response.status_code == status
        assert response.json()["error"]["code"] == code


async def test_a_request_id_is_echoed_and_models_and_schema_are_served() -> None:
    async with cluster(prefill=1, decode=1) as c, c.client() as client:
        response = await client.post("/v1/chat/completions", json=ASK, headers={"x-request-id": "mine-1"})
        assert response.headers["x-request-id"] == "mine-1"
        assert [m["id"] for m in (await client.get("/v1/models")).json()["data"]] == [MODEL]
        assert (await client.get("/live")).status_code == (await client.get("/docs")).status_code == 200
        schema = (await client.get("/openapi.json")).json()["paths"]["/v1/chat/completions"]["post"]["requestBody"]
        assert "messages" in schema["content"]["application/json"]["schema"]["properties"]


async def test_without_a_decode_worker_the_model_is_not_served() -> None:
    async with cluster(prefill=1, decode=0, options={"max_queued_s": 0.2}) as c, c.client() as client:
        await until(lambda: bool(c.frontend.fleet.models))
        response = await client.post("/v1/chat/completions", json=ASK)
        assert response.status_code == 503 and response.headers["retry-after"]
        assert (await client.get("/v1/models")).json()["data"] == []
        assert (await client.get("/health")).status_code == 503


async def test_a_frontend_without_workers_answers_503_with_retry_after() -> None:
    async with cluster(prefill=0, decode=0, aggregated=1) as c, c.client() as client:
        c.frontend.fleet.models.clear()
        answer = await client.post("/v1/chat/completions", json=ASK)
        assert (
            answer.status_code == 503
            and answer.json()["error"]["code"] == "no_worker"
            and answer.headers["retry-after"]
        )
