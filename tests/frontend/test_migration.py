"""Answers whose workers are lost: other workers continue them, and the client receives the same bytes as ever."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from dynserve import Cluster
from dynserve.wire.link import Failed
from tests.conftest import MODEL, until
from tests.test_cluster import assert_all_freed

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Count from one to nine, in words."}]}
LONG: dict[str, Any] = {"max_tokens": 40, "ignore_eos": True}
SMALL: dict[str, Any] = {"num_blocks": 64}
SAMPLED: dict[str, Any] = {"temperature": 0.9, "seed": 11}
PENALTIES: dict[str, Any] = {"presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.2}
TOOL: dict[str, Any] = {
    "name": "add",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "string", "maxLength": 20}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": TOOL["parameters"], "strict": True}}
CALL: dict[str, Any] = {
    "tools": [{"type": "function", "function": TOOL | {"strict": True}}],
    "tool_choice": "required",
}


class Interrupting:
    """A client that ends the link of the worker which answers it after each of `at` body chunks, or, of an answer in one
    piece, of received tokens."""

    def __init__(self, cluster: Cluster, at: tuple[int, ...]) -> None:
        self._cluster, self._at, self._chunks = cluster, list(at), 0
        self.status, self.body = 0, b""

    async def post(self, path: str, body: dict[str, Any], request_id: str = "mine") -> bytes:
        head = [(b"x-request-id", request_id.encode()), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": path, "headers": head, "query_string": b"", "http_version": "1.1", "scheme": "http", "server": ("x", 1), "client": ("y", 1), "root_path": ""}  # fmt: skip
        parts = [json.dumps({"model": MODEL} | body).encode()]
        watching = asyncio.create_task(self._watch()) if not body.get("stream") else None

        async def receive() -> dict[str, Any]:
            if parts:
                return {"type": "http.request", "body": parts.pop()}
            await asyncio.Event().wait()
            raise AssertionError

        async with asyncio.timeout(30):
            await self._cluster.app(scope, receive, self._send)
        if watching is not None:
            watching.cancel()
        return self.body

    async def _send(self, message: Any) -> None:
        self.status = message.get("status", self.status)
        if message["type"] == "http.response.body" and message["body"]:
            self.body += message["body"]
            self._chunks += 1
            if self._at and self._chunks >= self._at[0]:
                del self._at[0]
                self._interrupt()

    async def _watch(self) -> None:
        peers = self._cluster.frontend.fleet.peers
        while self._at:
            tokens = sum(len(reply.tokens) for peer in peers.values() for reply in peer.replies.values())
            if tokens >= self._at[0]:
                del self._at[0]
                self._interrupt()
            await asyncio.sleep(0.001)

    def _interrupt(self) -> None:
        for peer in self._cluster.frontend.fleet.peers.values():
            if any(reply.tokens and not reply.channel._closed for reply in peer.replies.values()):
                assert peer.link is not None
                peer.link.abort("power failure")


def normalised(answer: bytes) -> str:
    """The answer without its times and its random names."""
    text = re.sub(r'"(created|created_at|completed_at)":\d+', r'"\1":0', answer.decode())
    return re.sub(r"(chatcmpl|cmpl|resp|msg|rs|fc|ctc|call)[-_][0-9a-f]+", r"\1-x", text)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": ("/v1/chat/completions", CHAT | LONG | {"temperature": 0}),
    "sampled": ("/v1/chat/completions", CHAT | LONG | SAMPLED),
    "top-p": ("/v1/completions", {"prompt": "one two three"} | LONG | SAMPLED | {"top_p": 0.8, "top_k": 40}),
    "penalties": ("/v1/chat/completions", CHAT | LONG | SAMPLED | PENALTIES),
    "min tokens": ("/v1/chat/completions", CHAT | SAMPLED | {"max_tokens": 40, "min_tokens": 30}),
    "logprobs": ("/v1/chat/completions", CHAT | LONG | SAMPLED | {"logprobs": True, "top_logprobs": 3}),
    "echo": (
        "/v1/completions",
        {"prompt": "one two three four", "echo": True, "logprobs": 2, "prompt_logprobs": 1} | LONG | SAMPLED,
    ),
    "usage": (
        "/v1/chat/completions",
        CHAT | LONG | SAMPLED | {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    ),
    "grammar": ("/v1/chat/completions", CHAT | SAMPLED | {"max_tokens": 60, "response_format": SCHEMA}),
    "tools": ("/v1/chat/completions", CHAT | SAMPLED | CALL | {"max_tokens": 60}),
    "responses": ("/v1/responses", {"input": "Count from one to nine.", "temperature": 0, "max_output_tokens": 40}),
    "messages": ("/v1/messages", CHAT | {"temperature": 0, "max_tokens": 40}),
}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("case", CASES)
async def test_the_client_of_a_lost_worker_receives_the_same_answer(case: str, stream: bool) -> None:
    path, body = CASES[case]
    body = body | {"stream": stream}
    if not stream:
        body.pop("stream_options", None)
    async with Cluster(prefill=2, decode=2, options={"local_prefill_tokens": 0}, engine=SMALL) as c:
        undisturbed = Interrupting(c, ())
        expected = normalised(await undisturbed.post(path, body))
        assert undisturbed.status == 200, expected
        for at in ((3,), (2, 7, 11)):
            client = Interrupting(c, at)
            answer = normalised(await client.post(path, body))
            assert client._at == [], "the answer was not interrupted"
            assert cached_aside(answer) == cached_aside(expected)
        await assert_all_freed(c)


def cached_aside(answer: str) -> str:
    """The answer without the cached tokens of its prompt, since the first one had none, and with numbers that a batch of
    another shape does not change."""
    answer = re.sub(r"-?\d+\.\d+(e-\d+)?", lambda number: f"{float(number[0]):.2f}", answer)
    return re.sub(r'"(cached_tokens|cache_read_input_tokens|input_tokens)":\d+', r'"\1":0', answer)


async def test_stop_strings_across_the_interruption_are_found() -> None:
    async with Cluster(aggregated=2, engine=SMALL) as c:
        ask = {"prompt": "one two three"} | LONG | SAMPLED
        whole = json.loads(await Interrupting(c, ()).post("/v1/completions", ask))["choices"][0]["text"]
        stop = whole[len(whole) // 2 - 3 : len(whole) // 2 + 3]
        expected = json.loads(await Interrupting(c, ()).post("/v1/completions", ask | {"stop": stop}))["choices"][0]
        assert expected["finish_reason"] == "stop" and whole.startswith(expected["text"])
        for at in range(1, 40, 4):
            client = Interrupting(c, (at,))
            found = json.loads(await client.post("/v1/completions", ask | {"stop": stop}))["choices"][0]
            assert found == expected
            if client._at:
                break  # the answer ended before
        assert at > 4
        await assert_all_freed(c)


async def test_each_of_several_answers_migrates_by_itself() -> None:
    async with Cluster(prefill=1, decode=2, options={"local_prefill_tokens": 0}, engine=SMALL) as c:
        body = CHAT | LONG | SAMPLED | {"n": 4}
        expected = normalised(await Interrupting(c, ()).post("/v1/chat/completions", body))
        client = Interrupting(c, (30, 60))
        assert cached_aside(normalised(await client.post("/v1/chat/completions", body))) == cached_aside(expected)
        assert client._at == []
        await assert_all_freed(c)


def slow(**how: Any) -> Cluster:
    return Cluster(**({"aggregated": 2, "executor": "simulated", "engine": {"step_ms": 10}} | how))


async def why(c: Cluster, request_id: str = "mine") -> Any:
    async with c.client() as client:
        return (await client.get(f"/v1/requests/{request_id}/why")).json()


async def test_the_record_and_the_metrics_name_each_migration() -> None:
    async with slow(options={"max_migrations": 2}) as c:
        answer = await Interrupting(c, (5, 20)).post("/v1/completions", {"prompt": "x", "stream": True} | LONG)
        assert answer.endswith(b"data: [DONE]\n\n") and answer.count(b'"finish_reason":"length"') == 1
        record = await why(c)
        first, second = record["migrations"]
        assert first["cause"] == second["cause"] == "worker_lost" and first["sampling"] == "continued"
        assert 0 < first["after_tokens"] < second["after_tokens"] < 40 and first["at_s"] < second["at_s"]
        assert record["placements"][0]["worker"] == first["from"]
        page = c.frontend.metrics_page().decode()
        assert 'dynserve_requests_migrated_total{cause="worker_lost"} 2.0' in page
        await assert_all_freed(c)


async def test_an_answer_migrates_no_more_often_than_allowed() -> None:
    async with slow(options={"max_migrations": 1}) as c:
        answer = await Interrupting(c, (5, 20)).post("/v1/completions", {"prompt": "x", "stream": True} | LONG)
        assert b'"code":"worker_lost"' in answer and b"[DONE]" not in answer
        assert len((await why(c))["migrations"]) == 1
        await assert_all_freed(c)


def running(c: Cluster) -> Any:
    return next((w for w in c.workers if w.executor.load().running), None)


async def test_a_request_during_which_two_engines_died_is_not_placed_again() -> None:
    async with slow(aggregated=3) as c, c.client() as client:
        body = {"model": MODEL, "prompt": "x"} | LONG | {"max_tokens": 200}
        asking = asyncio.create_task(client.post("/v1/completions", json=body, headers={"x-request-id": "mine"}))
        for deaths in (1, 2):
            await until(lambda: running(c) is not None and bool(running(c)._answers))
            await asyncio.sleep(0.1)
            worker = running(c)
            for answer in list(worker._answers.values()):  # as `Engine.fail` does, without the end of the worker
                answer.link.send(Failed(answer.request.stream, "engine_lost", "the worker's engine died"))
                answer.close()
            worker._answers.clear()
            decision = c.frontend.pipeline.decisions.get("mine")
            assert decision is not None
            await until(lambda n=deaths, d=decision: asking.done() or len(d.migrations) == n)  # type: ignore[misc]
        answer = await asking
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "poison_request"
        assert [m["cause"] for m in (await why(c))["migrations"]] == ["engine_lost"]
        assert "dynserve_poison_requests_total 1.0" in c.frontend.metrics_page().decode()
        await until(lambda: sum(w.executor.load().running for w in c.workers) == 0)


def drop(c: Cluster, role: str) -> Callable[[], None]:
    """Ends all links of a role, and refuses new ones until the returned function is called."""
    links = c.planes.links
    accepting = dict(links._listeners)
    for peer in list(c.frontend.fleet.peers.values()):
        if peer.instance is not None and peer.instance.role == role and peer.link is not None:
            links._listeners.clear()
            peer.link.abort("power failure")

    def restore() -> None:
        links._listeners.update(accepting)

    return restore


async def test_an_answer_waits_for_a_worker_to_come_back() -> None:
    async with slow(prefill=1, decode=1, aggregated=0, options={"role_grace_s": 60, "local_prefill_tokens": 0}) as c:
        async with c.client() as client:
            body = {"model": MODEL, "prompt": "x"} | LONG
            expected = (await client.post("/v1/completions", json=body)).json()["choices"]
            asking = asyncio.create_task(client.post("/v1/completions", json=body))
            await until(lambda: running(c) is not None and running(c).config.role == "decode")
            restore = drop(c, "decode")
            late = asyncio.create_task(client.post("/v1/completions", json=body))
            await asyncio.sleep(0.3)
            assert not asking.done() and not late.done()
            assert c.frontend.health()["queued"] == {MODEL: 1}
            restore()
            assert (await asking).json()["choices"] == (await late).json()["choices"] == expected
            await assert_all_freed(c)


async def test_an_answer_without_any_worker_left_ends_after_the_longest_wait() -> None:
    async with slow(aggregated=1, options={"max_queued_s": 0.3}) as c, c.client() as client:
        body = {"model": MODEL, "prompt": "x"} | LONG | {"max_tokens": 500}
        asking = asyncio.create_task(client.post("/v1/completions", json=body))
        await until(lambda: running(c) is not None)
        restore = drop(c, "aggregated")
        answer = await asking
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "no_worker"
        refused = await client.post("/v1/completions", json=body)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "no_worker"
        assert refused.headers["retry-after"]
        assert [reply for peer in c.frontend.fleet.peers.values() for reply in peer.replies] == []
        restore()


async def test_a_cancelled_request_does_not_wait_for_a_worker() -> None:
    async with slow(aggregated=1) as c, c.client() as client:
        body = {"model": MODEL, "prompt": "x"} | LONG | {"max_tokens": 500}
        asking = asyncio.create_task(client.post("/v1/completions", json=body))
        await until(lambda: running(c) is not None)
        restore = drop(c, "aggregated")
        await asyncio.sleep(0.05)
        asking.cancel()
        await until(lambda: c.frontend.gate.open_requests.count == 0)
        restore()


@pytest.mark.parametrize(("lost", "left"), [("decode", "prefill"), ("prefill", "decode")])
async def test_workers_of_one_role_stand_in_for_the_other(lost: str, left: str) -> None:
    options = {"role_grace_s": 0.2, "local_prefill_tokens": 0}
    async with slow(prefill=1, decode=1, aggregated=0, options=options) as c, c.client() as client:
        body = {"model": MODEL, "prompt": "x"} | LONG
        expected = (await client.post("/v1/completions", json=body)).json()["choices"]
        asking = asyncio.create_task(client.post("/v1/completions", json=body, headers={"x-request-id": "mine"}))
        await until(lambda: running(c) is not None and running(c).config.role == lost)
        restore = drop(c, lost)
        assert (await asking).json()["choices"] == expected
        last = (await why(c))["placements"][-1]
        assert last["worker"].startswith(left) and last["phase"] == "aggregated"
        assert (await client.post("/v1/completions", json=body)).json()["choices"] == expected
        (warning,) = (await client.get("/health")).json()["warnings"]
        assert f"{MODEL} has had no {lost} worker" in warning and "answer alone" in warning
        gauge = f'dynserve_role_missing{{model="{MODEL}",role="{lost}"}} 1.0'
        assert gauge in c.frontend.metrics_page().decode()
        restore()
        await until(lambda: c.frontend.fleet.lineup(MODEL).alone == ())
        assert (await client.get("/health")).json()["warnings"] == []
        assert gauge not in c.frontend.metrics_page().decode()
        assert (await client.post("/v1/completions", json=body)).json()["choices"] == expected
        await assert_all_freed(c)


async def test_a_worker_that_may_not_answer_alone_does_not_stand_in() -> None:
    options = {"role_grace_s": 0.1, "max_queued_s": 0.4}
    async with slow(prefill=1, aggregated=0, options=options) as c, c.client() as client:
        await c.add_worker("decode", stand_in=False)
        await until(lambda: c.frontend.fleet.serves(MODEL))
        restore = drop(c, "prefill")
        answer = await client.post("/v1/completions", json={"model": MODEL, "prompt": "x"} | LONG)
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "no_worker"
        (warning,) = (await client.get("/health")).json()["warnings"]
        assert "nobody answers its requests" in warning
        restore()
