"""The limits of a key, and the isolation of keys from each other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from dynserve.cluster import Cluster
from dynserve.frontend.keys import digest_of
from dynserve.text.segments import Segments
from tests.conftest import MODEL, until
from tests.security.test_bodies import PREPROCESSOR

KEYS = {
    "ann": "concurrency=1 tpm=2000", "bob": "", "cy": "group=team", "dan": "group=team", "eve": "concurrency=3",
}  # fmt: skip
LONG = "some words that fill several blocks of the cache, so that it can be seen whether they were there before, " * 4


@asynccontextmanager
async def cluster(tmp_path: Path, **engine: Any) -> AsyncIterator[tuple[Cluster, httpx.AsyncClient]]:
    path = tmp_path / "keys"
    path.write_text("".join(f"{name} sha256:{digest_of(name).hex()} {rest}\n" for name, rest in KEYS.items()))
    made = Cluster(
        aggregated=1, executor="simulated", engine={"speed": 0} | engine, options={"api_keys_file": str(path)}
    )
    async with made as running, running.client() as client:
        yield running, client


async def ask(client: httpx.AsyncClient, key: str, path: str = "/v1/completions", **fields: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}", **fields.pop("headers", {})}
    body = {"model": MODEL, "prompt": "one two", "max_tokens": 4} | fields
    return await client.post(path, json=body, headers=headers)


def remaining(answer: httpx.Response) -> int:
    return int(answer.headers["x-ratelimit-remaining-tokens"])


async def test_a_key_has_no_more_concurrent_answers_than_its_limit(tmp_path: Path) -> None:
    async with cluster(tmp_path, step_ms=5, speed=1) as (c, client):
        most: dict[str, int] = {}

        async def watch() -> None:
            while True:
                load = c.workers[0].executor.load()
                most["running"] = max(most.get("running", 0), load.running + load.waiting)
                await asyncio.sleep(0.001)

        watching = asyncio.create_task(watch())
        for key, at_once in (("ann", 1), ("eve", 3), ("bob", 8)):
            most.clear()
            answer = await ask(client, key, n=8, temperature=1.0)
            assert answer.status_code == 200 and len(answer.json()["choices"]) == 8
            assert most["running"] == at_once, key
        running = asyncio.create_task(ask(client, "eve", n=2, max_tokens=200, ignore_eos=True))
        await until(lambda: c.frontend.gate.open_requests.count == 1)
        await until(lambda: c.workers[0].executor.load().running == 2)
        assert (await ask(client, "eve")).status_code == 200  # the third
        running.cancel()
        watching.cancel()
        await asyncio.gather(running, watching, return_exceptions=True)


async def test_one_request_cannot_exceed_the_tokens_per_minute_of_its_key(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (_, client):
        over = await ask(client, "ann", n=64, max_tokens=150, ignore_eos=True)
        assert over.status_code == 429 and "its limit is 2000 a minute" in over.json()["error"]["message"]
        within = await ask(client, "ann", n=4, max_tokens=150, ignore_eos=True)
        used = within.json()["usage"]["total_tokens"]
        assert within.status_code == 200 and 600 < used < 620
        rest = remaining(await ask(client, "ann", max_tokens=1, prompt="x"))
        assert 2000 - used - 60 < rest < 2000 - used + 100  # the quota has refilled a little by now
        chat = {
            "messages": [{"role": "user", "content": "Hello"}],
            "ignore_eos": True,
            "prompt": None,
            "max_tokens": None,
        }
        unbounded = await ask(client, "ann", "/v1/chat/completions", **chat)
        assert unbounded.status_code == 200 and unbounded.json()["usage"]["total_tokens"] <= 2000
        assert unbounded.json()["choices"][0]["finish_reason"] == "length"
        over = await ask(client, "ann", max_tokens=5)  # the tokens used beyond the charge are deducted afterwards
        assert over.status_code == 429 and int(over.headers["retry-after"]) > 5


async def test_unused_tokens_are_refunded_and_computed_ones_are_not(tmp_path: Path) -> None:
    async with cluster(tmp_path, step_ms=20, speed=1) as (c, client):
        pending = asyncio.create_task(
            ask(client, "ann", prompt=[7] * 300, max_tokens=1500, ignore_eos=True, stream=True)
        )
        await until(lambda: c.workers[0].executor.load().running == 1)
        pending.cancel()
        await asyncio.gather(pending, return_exceptions=True)
        await until(lambda: c.frontend.gate.open_requests.count == 0)
        rest = remaining(await ask(client, "ann", prompt="x", max_tokens=1))
        assert 1500 < rest < 1760  # its prompt is paid for, and some tokens
        wrong = await ask(client, "ann", prompt=[99999], max_tokens=100)
        assert wrong.status_code == 400
        assert remaining(await ask(client, "ann", prompt="x", max_tokens=1)) >= rest - 5


async def test_tokenizing_is_charged(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (_, client):
        for path in ("/tokenize", "/v1/messages/count_tokens"):
            fields = {"prompt": LONG} if path == "/tokenize" else {"messages": [{"role": "user", "content": LONG}]}
            before = remaining(await ask(client, "ann", prompt="x", max_tokens=1))
            assert (await ask(client, "ann", path, **fields)).status_code == 200
            assert remaining(await ask(client, "ann", prompt="x", max_tokens=1)) < before - 50, path
        assert (await ask(client, "ann", "/tokenize", prompt=LONG * 40)).status_code == 429


async def test_decision_records_are_visible_only_to_the_key_of_their_request(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (_, client):
        mine = {"x-request-id": "mine"}
        assert (await ask(client, "bob", headers=mine, prompt="one two three four")).status_code == 200

        async def why(key: str, id_: str = "mine") -> httpx.Response:
            return await client.get(f"/v1/requests/{id_}/why", headers={"authorization": f"Bearer {key}"})

        assert (await why("bob")).json()["prompt_tokens"] == 4
        assert (await why("eve")).status_code == 404 and (await why("nobody")).status_code == 401
        assert (await ask(client, "eve", headers=mine, prompt="x")).status_code == 200
        assert (await why("bob")).json()["prompt_tokens"] == 4 and (await why("eve")).json()["prompt_tokens"] == 1


async def test_cached_tokens_do_not_reveal_prompts_of_other_keys(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (_, client):

        async def cached(key: str, **fields: Any) -> int:
            usage = (await ask(client, key, prompt=LONG, max_tokens=1, **fields)).json()["usage"]
            return int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)

        assert await cached("bob") == 0
        assert await cached("bob") > 0
        assert await cached("eve") == 0
        assert await cached("cy") == 0
        assert await cached("dan") > 0  # of the same group
        for salt in ("key:bob", "key:bob\x1f", "group:team\x1f"):  # no key can use another key's salt
            assert await cached("eve", cache_salt=salt) == 0
        assert await cached("bob", cache_salt="own") == 0 and await cached("bob", cache_salt="own") > 0


def test_texts_that_another_key_has_sent_are_tokenised_again() -> None:
    segments = Segments(PREPROCESSOR.tokenizer)
    text = f"<|im_start|>user\n{LONG}<|im_end|>"
    expected = segments.encode(text, "key:bob")
    misses = segments.misses
    assert segments.encode(text, "key:bob") == expected and segments.misses == misses
    assert segments.encode(text, "key:eve") == expected and segments.misses > misses


@pytest.mark.parametrize("session", ["s", "key:bob\x1fs"])
async def test_sessions_of_different_keys_are_different_sessions(tmp_path: Path, session: str) -> None:
    async with cluster(tmp_path) as (c, client):
        await ask(client, "bob", headers={"x-dynserve-session": "s"})
        await ask(client, "eve", prompt_cache_key=session)
        assert len(c.frontend.router.sessions) == 2
