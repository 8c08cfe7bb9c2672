"""Streams that a client resumes after it has lost its connection, at the same frontend or another one."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dynserve import Cluster
from dynserve.config import TINY_MODEL
from dynserve.frontend.keys import digest_of
from dynserve.render.renderer import REPLAYED, Renderer
from dynserve.text.detokenize import Vocabulary
from dynserve.transport.memory import MemoryLink
from dynserve.wire.requests import Busy, GenerateRequest, PriorOutput, RenderOptions, Resumable, StopConditions
from dynserve.worker.kept_answers import KeptAnswers
from dynserve.worker.model_text import ModelText
from tests.conftest import MODEL, make_request, until
from tests.frontend.test_migration import CALL, CHAT, LONG, SAMPLED, SMALL
from tests.test_cluster import assert_all_freed

PATH = "/v1/chat/completions"
BODY: dict[str, Any] = CHAT | LONG | SAMPLED | {"stream": True, "stream_options": {"include_usage": True}}


class Stream:
    """One connection of a client. `after`: the number of events after which the client goes away."""

    def __init__(self, cluster: Cluster, frontend: int = 0) -> None:
        self._app = cluster.apps[frontend].app
        self.status, self.data = 0, b""
        self._gone = asyncio.Event()
        self._after = 1 << 30

    @property
    def events(self) -> list[tuple[str, str]]:
        """The complete events: id and content."""
        found = [event.partition("\n") for event in self.data.decode().split("\n\n")[:-1]]
        return [(head.removeprefix("id: "), content) for head, _, content in found]

    async def post(
        self, last: str = "", *, after: int = 1 << 30, path: str = PATH, body: dict[str, Any] = BODY, **headers: str
    ) -> Stream:
        self._after = after
        given = {"x-request-id": "mine", "x-dynserve-resumable": "1", "content-type": "application/json"}
        given |= ({"last-event-id": last} if last else {}) | {k.replace("_", "-"): v for k, v in headers.items()}
        head = [(name.encode(), value.encode()) for name, value in given.items()]
        scope = {"type": "http", "method": "POST", "path": path, "headers": head, "query_string": b"", "http_version": "1.1", "scheme": "http", "server": ("x", 1), "client": ("y", 1), "root_path": ""}  # fmt: skip
        parts = [json.dumps({"model": MODEL} | body).encode()]

        async def receive() -> dict[str, Any]:
            if parts:
                return {"type": "http.request", "body": parts.pop()}
            await self._gone.wait()
            return {"type": "http.disconnect"}

        async with asyncio.timeout(30):
            await self._app(scope, receive, self._send)
        return self

    async def _send(self, message: Any) -> None:
        self.status = message.get("status", self.status)
        if message["type"] == "http.response.body" and not self._gone.is_set():
            self.data += message["body"]
            if len(self.events) >= self._after:
                self.leave()

    def leave(self) -> None:
        self._gone.set()

    @property
    def error(self) -> Any:
        return json.loads(self.data)["error"]


def content(events: list[tuple[str, str]]) -> list[str]:
    """The events without ids, times and names."""
    text = "\n\n".join(event for _, event in events)
    text = re.sub(r'"(created|created_at|completed_at)":\d+', r'"\1":0', text)
    text = re.sub(r'"(cached_tokens|cache_read_input_tokens|input_tokens)":\d+', r'"\1":0', text)
    return re.sub(r"(chatcmpl|cmpl|resp|msg|rs|fc|ctc|call)[-_][0-9a-f]+", r"\1-x", text).split("\n\n")


def cluster(frontends: int = 1, **options: Any) -> Cluster:
    return Cluster(
        prefill=1, decode=2, engine=SMALL, frontends=frontends, options={"local_prefill_tokens": 0} | options
    )


CASES = {
    "chat": (PATH, BODY),
    "tools": (PATH, CHAT | SAMPLED | CALL | {"max_tokens": 60, "stream": True}),
    "responses": ("/v1/responses", {"input": "Count from one to nine.", "temperature": 0, "stream": True}),
    "messages": ("/v1/messages", CHAT | {"temperature": 0, "max_tokens": 40, "stream": True}),
}


@pytest.mark.parametrize("case", CASES)
async def test_a_resumed_stream_has_every_event_once(case: str) -> None:
    path, body = CASES[case]
    async with cluster(frontends=2) as c:
        whole = await Stream(c).post(path=path, body=body, x_request_id="undisturbed")
        assert whole.status == 200, whole.data
        number = len(whole.events)
        for first in sorted({1, 2, number // 3, number // 2, number - 1} - {0}):
            begun = await Stream(c).post(path=path, body=body, after=first)
            assert len(begun.events) >= first
            seen = begun.events[:first]  # the client has lost all after it
            rest = await Stream(c, frontend=1).post(seen[-1][0], path=path, body=body)
            assert rest.status == 200, rest.data
            events = [*seen, *rest.events]
            assert content(events) == content(whole.events)
            ids = [tuple(map(int, id_.split(".")[:2])) for id_, _ in events]
            assert ids == sorted(set(ids))
        for frontend in c.frontends:
            assert not any(peer.replies for peer in frontend.fleet.peers.values())
        await assert_all_freed(c)


async def test_a_stream_survives_its_frontend() -> None:
    async with cluster(frontends=2) as c:
        whole = await Stream(c).post(x_request_id="undisturbed")
        first, links = Stream(c), c.planes.links
        task = asyncio.create_task(first.post())
        await until(lambda: len(first.events) >= 5)
        address, accept = next(iter(links._listeners.items()))
        del links._listeners[address]  # nobody reaches the first frontend any more
        for peer in list(c.frontends[0].fleet.peers.values()):
            assert isinstance(peer.link, MemoryLink) and peer.link.peer is not None
            peer.link.mute = True  # it does not know that it is dead
            peer.link.peer.abort("the frontend's process died")
        await until(lambda: any(len(worker._kept) for worker in c.workers))
        seen = first.events[:5]
        rest = await Stream(c, frontend=1).post(seen[-1][0])
        assert content([*seen, *rest.events]) == content(whole.events)
        task.cancel()
        await asyncio.wait([task])
        links._listeners[address] = accept


async def test_a_connection_that_replaces_another_one_takes_its_stream_over() -> None:
    async with cluster() as c:
        whole = await Stream(c).post(x_request_id="undisturbed")
        old = Stream(c)
        task = asyncio.create_task(old.post())
        await until(lambda: len(old.events) >= 4)
        seen = old.events[:4]
        rest = await Stream(c).post(seen[-1][0])
        assert content([*seen, *rest.events]) == content(whole.events)
        async with asyncio.timeout(5):
            await task  # it has ended, without the rest
        assert len(old.events) < len(whole.events)
        await assert_all_freed(c)


async def test_a_stream_can_be_resumed_again_and_migrates_like_any_other() -> None:
    async with cluster() as c:
        whole = await Stream(c).post(x_request_id="undisturbed")
        events: list[tuple[str, str]] = []
        for _ in range(4):
            stream = await Stream(c).post(events[-1][0] if events else "", after=5)
            events += stream.events[:5]
        last = Stream(c)
        task = asyncio.create_task(last.post(events[-1][0]))
        await until(lambda: len(last.events) >= 3)
        for peer in c.frontend.fleet.peers.values():
            if any(reply.answering for reply in peer.replies.values()) and peer.link is not None:
                peer.link.abort("power failure")
        await task
        assert content([*events, *last.events]) == content(whole.events)
        await assert_all_freed(c)


async def test_a_stream_that_was_read_to_its_end_has_nothing_more() -> None:
    async with cluster() as c:
        whole = await Stream(c).post()
        rest = await Stream(c).post(whole.events[-1][0])
        assert rest.status == 200 and rest.events == []


async def test_what_cannot_be_resumed_is_a_clear_error() -> None:
    async with cluster(resume_s=0.3) as c:
        unary = await Stream(c).post(body=BODY | {"stream": False, "stream_options": None})
        assert unary.status == 400 and "needs a streamed request with one answer" in unary.error["message"]
        several = await Stream(c).post(body=BODY | {"n": 2})
        assert several.status == 400
        odd = await Stream(c).post("7.0")
        assert odd.status == 400 and "Last-Event-ID: '7.0' is not the id of an event" in odd.error["message"]
        unknown = await Stream(c).post("7.0.abc")
        assert unknown.status == 410 and unknown.error["code"] == "nothing_to_resume"
        begun = await Stream(c).post(after=3)
        await asyncio.sleep(0.6)
        late = await Stream(c).post(begun.events[-1][0])
        assert late.status == 410 and "was kept for 0.3 s" in late.error["message"]
        assert not any(len(worker._kept) for worker in c.workers)


async def test_streams_of_other_keys_cannot_be_resumed(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("".join(f"{name} sha256:{digest_of(name).hex()}\n" for name in ("one", "two")))
    async with cluster(api_keys_file=str(file)) as c:
        begun = await Stream(c).post(after=3, authorization="Bearer one")
        assert begun.status == 200
        last = begun.events[2][0]
        assert (await Stream(c).post(last, authorization="Bearer two")).status == 410
        assert (await Stream(c).post(last, authorization="Bearer one")).status == 200


def kept(id_: str, tokens: int, owner: str = "") -> GenerateRequest:
    return make_request([1, 2, 3], id=id_, prior=PriorOutput([9] * tokens), resumable=Resumable(owner=owner, keep_s=5))


async def test_kept_answers_have_a_bound_and_the_oldest_are_dropped_first() -> None:
    answers = KeptAnswers(2_000)
    for i in range(10):
        answers.keep(kept(f"a{i}", 300))
        assert answers.num_bytes <= 2_000
    assert answers.copy(("", "a0", "r")) is None
    last = answers.copy(("", "a9", "r"))
    assert last is not None and len(last.prior_tokens) == 300
    answers.keep(kept("huge", 5_000))
    assert answers.copy(("", "huge", "r")) is None
    answers.clear()
    assert (len(answers), answers.num_bytes) == (0, 0)


async def test_the_latest_state_of_an_answer_is_kept() -> None:
    answers = KeptAnswers(100_000)
    answers.keep(kept("a", 3))
    answers.keep(kept("a", 8))
    answers.keep(kept("a", 5))  # an earlier one that comes late
    answers.keep(kept("a", 2, owner="other"))
    found = answers.copy(("", "a", "r"))
    assert found is not None and len(found.prior_tokens) == 8 and len(answers) == 2
    assert answers.copy(("", "a", "r")) == found  # what continues it may fail
    answers.clear()


async def test_an_answer_is_not_continued_with_another_one_of_the_same_request_id() -> None:
    async with cluster() as c:
        first = await Stream(c).post(after=25)
        assert len(first.events) >= 25
        second = await Stream(c).post(body=BODY | {"seed": 99}, after=4)  # which begins anew
        seen = second.events[:4]
        rest = await Stream(c).post(seen[-1][0])
        whole = await Stream(c).post(body=BODY | {"seed": 99}, x_request_id="undisturbed")
        assert content([*seen, *rest.events]) == content(whole.events)


async def test_an_answer_whose_continuation_is_refused_can_be_resumed_later(monkeypatch: pytest.MonkeyPatch) -> None:
    async with cluster(max_queued_s=0.1) as c:
        whole = await Stream(c).post(x_request_id="undisturbed")
        begun = await Stream(c).post(after=5)
        last = begun.events[4][0]
        with monkeypatch.context() as busy:
            for worker in c.workers:
                busy.setattr(worker, "start", lambda request: Busy(7))
            refused = await Stream(c).post(last)
            assert refused.status == 429
        other = await Stream(c).post(last, body=BODY, path="/v1/completions")
        assert other.status == 400
        rest = await Stream(c).post(last)
        assert content([*begun.events[:5], *rest.events]) == content(whole.events)


async def test_a_long_answer_is_replayed_in_steps() -> None:
    tokens = [300 + i % 1000 for i in range(5_000)]
    render = RenderOptions(kind="completion", response_id="r", model=MODEL, created=0, stream=True)
    _, preprocessor = ModelText.read(TINY_MODEL)
    vocabulary = Vocabulary(preprocessor.tokenizer)
    renderer = Renderer(render, StopConditions(max_tokens=1), b"", vocabulary)
    steps = list(renderer.replay_in_steps(PriorOutput(tokens)))
    assert len(steps) == 5_000 // REPLAYED + 1 and not any(steps)
    numbered = msgspec.structs.replace(render, event_ids=True)
    first, again = (Renderer(numbered, StopConditions(max_tokens=1), b"", vocabulary) for _ in range(2))
    sent = b"".join(first.push([token], None) for token in tokens)
    assert again.replay(PriorOutput(tokens), (0, 0)) == sent
    assert first.finish("length") == again.finish("length")
