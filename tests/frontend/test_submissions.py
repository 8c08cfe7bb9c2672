"""The submission of requests: the transports, the acknowledgement, and the fallback when none arrives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from dynserve import Cluster
from dynserve.frontend import submissions
from dynserve.frontend.reply import Reply
from dynserve.transport.base import Handler
from dynserve.wire import requests
from dynserve.wire.requests import Ack, Busy, Draining, Refused
from dynserve.worker.worker import Worker
from tests.conftest import MODEL, until

ASK: dict[str, Any] = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 3, "ignore_eos": True}


def simulated(workers: int = 1, speed: float = 0, **options: Any) -> Cluster:
    return Cluster(aggregated=workers, executor="simulated", engine={"speed": speed}, options=options)


def handlers(c: Cluster) -> dict[str, Handler]:
    found: dict[str, Handler] = c.planes.bus.handlers
    return found


def accepted(c: Cluster) -> list[int]:
    return [worker.counts["accepted"] for worker in c.workers]


@pytest.fixture(autouse=True)
def short_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submissions, "ACK_TIMEOUT", 0.05)


async def test_without_a_subscriber_on_the_bus_a_request_uses_the_link_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submissions, "ACK_TIMEOUT", 60.0)
    async with simulated() as c, c.client() as client:
        handlers(c).clear()
        answer = await client.post("/v1/completions", json=ASK)
        assert answer.json()["usage"]["completion_tokens"] == 3 and accepted(c) == [1]
        assert not c.frontend.pipeline.submissions._open


async def test_a_request_that_the_bus_loses_uses_the_link_after_the_timeout() -> None:
    async with simulated() as c, c.client() as client:
        for subject in handlers(c):
            handlers(c)[subject] = lambda payload: None
        answer = await client.post("/v1/completions", json=ASK)
        assert answer.json()["usage"]["completion_tokens"] == 3 and accepted(c) == [1]
        assert "dynserve_requests_by_link_total 1.0" in (await client.get("/metrics")).text


async def test_a_request_received_by_both_transports_is_accepted_once() -> None:
    async with simulated() as c, c.client() as client:
        held = hold(c)
        answer = await client.post("/v1/completions", json=ASK)
        assert answer.json()["usage"]["completion_tokens"] == 3
        for late in held:
            late()
        await asyncio.sleep(0.05)
        assert accepted(c) == [1] and len(held) == 1


@pytest.mark.parametrize("ack", [Busy(7), Draining(), Refused("unavailable", "no link")])
async def test_a_refused_request_is_sent_to_another_worker(ack: Ack, monkeypatch: pytest.MonkeyPatch) -> None:
    async with simulated(2) as c, c.client() as client:
        refusing = c.workers[0]
        monkeypatch.setattr(refusing, "start", lambda request: ack)
        for _ in range(6):
            assert (await client.post("/v1/completions", json=ASK)).status_code == 200
        assert accepted(c) == [0, 6]
        assert all(not peer.replies for peer in c.frontend.fleet.peers.values())


async def test_a_workers_refusal_of_an_invalid_request_reaches_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    async with simulated(2) as c, c.client() as client:
        for worker in c.workers:
            monkeypatch.setattr(worker, "start", lambda request: Refused("invalid_request", "no such thing", "prompt"))
        answer = await client.post("/v1/completions", json=ASK)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "prompt"


async def test_a_worker_without_a_link_to_the_frontend_refuses_on_the_bus() -> None:
    async with simulated(2) as c, c.client() as client:
        one = c.workers[0]
        links, one._links = one._links, {}  # the frontend's side of it stands
        for _ in range(4):
            assert (await client.post("/v1/completions", json=ASK)).status_code == 200
        one._links = links
        assert accepted(c) == [0, 4]


async def test_without_an_acknowledgement_other_workers_are_tried_until_a_timeout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with simulated(2) as c, c.client() as client:
        silence(c, c.workers[0], monkeypatch)
        for _ in range(3):
            assert (await client.post("/v1/completions", json=ASK)).status_code == 200
        assert accepted(c) == [0, 3]
        silence(c, c.workers[1], monkeypatch)
        answer = await client.post("/v1/completions", json=ASK)
        assert answer.status_code == 504
        pipeline = c.frontend.pipeline.submissions
        await until(lambda: not pipeline._open and pipeline._timer is None)
        assert all(not peer.replies for peer in c.frontend.fleet.peers.values())


def silence(c: Cluster, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the worker ignore everything that it receives."""
    handlers(c)[worker.subject] = lambda payload: None
    monkeypatch.setattr(worker, "received", lambda frontend, link, messages: None)


async def test_an_invalid_or_unknown_acknowledgement_is_ignored() -> None:
    async with simulated() as c, c.client() as client:
        for subject in handlers(c):
            handlers(c)[subject] = lambda payload: b"\xc1 nonsense"
        answer = await client.post("/v1/completions", json=ASK)
        assert answer.status_code == 200 and accepted(c) == [1]
        c.frontend.pipeline.submissions.acknowledged(12345, requests.Accepted())  # of an unknown request


async def test_a_late_copy_of_a_refused_request_is_not_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with simulated(max_queued_s=0.05) as c, c.client() as client:
        worker, held = c.workers[0], hold(c)
        with monkeypatch.context() as patch:
            patch.setattr(worker, "start", lambda request: Busy(7))
            assert (await client.post("/v1/completions", json=ASK)).status_code == 429
        await asyncio.sleep(0.02)  # the frontend's messages about it are on their way
        assert len(held) == 1
        held[0]()
        await asyncio.sleep(0.02)
        assert accepted(c) == [0] and not worker.busy


async def test_a_late_copy_that_arrives_after_a_reconnect_is_cancelled() -> None:
    async with simulated(speed=1, max_queued_s=0.01) as c, c.client() as client:
        worker, held = c.workers[0], hold(c)
        pending = asyncio.create_task(client.post("/v1/completions", json=ASK | {"max_tokens": 1500}))
        await until(lambda: bool(held))
        next(iter(worker.links.values())).abort("cut")
        assert (await pending).status_code == 503
        await until(lambda: c.frontend.fleet.serves(MODEL))
        held[0]()
        assert accepted(c) == [1]
        await until(lambda: not worker.busy)
        assert worker.counts["cancelled"] == 1


@pytest.mark.parametrize("silent", [True, False])
async def test_a_reply_counts_as_refused_only_if_no_other_copy_is_in_flight(
    silent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with simulated(max_queued_s=0.05) as c, c.client() as client:
        replies: list[Reply] = []
        submit = c.frontend.pipeline.submissions.submit

        async def noted(reply: Reply, request: requests.GenerateRequest) -> None:
            replies.append(reply)
            await submit(reply, request)

        monkeypatch.setattr(c.frontend.pipeline.submissions, "submit", noted)
        monkeypatch.setattr(c.workers[0], "start", lambda request: Busy(7))
        if silent:
            hold(c)
        else:
            handlers(c).clear()  # the bus reports no subscriber: there is one copy
        assert (await client.post("/v1/completions", json=ASK)).status_code == 429
        assert replies[0].refused is not silent


def hold(c: Cluster) -> list[Callable[[], Any]]:
    """Returns the messages sent over the bus from now on; each is delivered when it is called."""
    held: list[Callable[[], Any]] = []
    for subject, handler in list(handlers(c).items()):

        def later(payload: bytes, handler: Handler = handler) -> None:
            held.append(lambda: handler(payload))

        handlers(c)[subject] = later
    return held


@pytest.mark.parametrize("sent", [True, False])
async def test_a_post_to_the_bus_that_never_returns_does_not_delay_the_request(
    sent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The post hangs after the request was sent, or before."""
    if sent:
        monkeypatch.setattr(submissions, "ACK_TIMEOUT", 60.0)  # it is acknowledged at once
    async with simulated() as c, c.client() as client:
        mailbox = c.frontend.pipeline.submissions._mailbox
        assert mailbox is not None
        post = mailbox.post

        async def hangs(subject: str, payload: bytes, number: int) -> None:
            if sent:
                await post(subject, payload, number)
            await asyncio.sleep(60)

        monkeypatch.setattr(mailbox, "post", hangs)
        answer = await client.post("/v1/completions", json=ASK)
        assert answer.json()["usage"]["completion_tokens"] == 3 and accepted(c) == [1]
        assert ("dynserve_requests_by_link_total 0.0" in (await client.get("/metrics")).text) is sent
