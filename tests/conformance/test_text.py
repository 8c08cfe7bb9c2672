"""Characters of every kind at every token boundary, and many streamed answers compared with unary ones."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import httpx
import pytest

from tests.conformance.conftest import Target

# emoji with modifiers and joiners, flags, CJK, combining marks, right-to-left, and what lies outside the BMP
TEXTS = [
    "👩‍👩‍👧‍👦 family 🇩🇪🇯🇵",
    "👍🏽👋🏿 skin",
    "你好，世界。こんにちは 안녕",
    "e\u0301 a\u0323\u0302 n\u0303 zalgo\u0336\u0337",
    "עברית العربية",
    "𝔘𝔫𝔦 𐍈 𒀀",
    "naïve “quotes” – dash…",
]


@pytest.mark.tiny_model
@pytest.mark.parametrize("text", TEXTS)
async def test_no_half_character_is_streamed(http: httpx.AsyncClient, target: Target, text: str) -> None:
    """The text itself is forced out of the model, token by token, by a grammar that allows nothing else."""
    body: dict[str, Any] = {"model": target.model, "prompt": "x", "guided_choice": [text], "max_tokens": 300}
    unary = (await http.post("/v1/completions", json=body)).json()["choices"][0]["text"]
    pieces = await streamed(http, body)
    assert unary == text == "".join(pieces)
    assert not any("\ufffd" in piece for piece in pieces) and len(pieces) > 1
    ids = (await http.post("/tokenize", json={"model": target.model, "prompt": text})).json()["tokens"]
    for cut in range(1, len(ids)):  # cut at any token: whole characters are shown, half a character only at the end
        cut_off = await streamed(http, body | {"max_tokens": cut})
        whole = "".join(cut_off)
        assert text.startswith(whole.rstrip("\ufffd")) and not any("\ufffd" in piece for piece in cut_off[:-1])


@pytest.mark.tiny_model
async def test_stream_and_unary_are_the_same_for_200_prompts_with_random_stops(
    http: httpx.AsyncClient, target: Target
) -> None:
    r = random.Random(11)
    questions = ["Count from {} to {}.", "What is {}+{}?", "Say: red {} dog {}", "Spell horse.", "Tell me a story."]
    gate = asyncio.Semaphore(16)

    async def one(number: int) -> None:
        async with gate:
            text = r.choice(questions).format(r.randint(0, 9), r.randint(10, 20))
            stops = ["".join(r.choices(", 123456789-abcdeorst", k=r.randint(1, 3))) for _ in range(r.randint(0, 4))]
            body: dict[str, Any] = {
                "model": target.model, "messages": [{"role": "user", "content": text}], "stop": stops, "seed": number,
                "temperature": r.choice([0, 1.2]), "max_tokens": r.randint(1, 40),
            }  # fmt: skip
            answer = (await http.post("/v1/chat/completions", json=body)).json()["choices"][0]
            chunks = await events(http, "/v1/chat/completions", body)
            said = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks)
            assert said == answer["message"]["content"], body
            assert chunks[-1]["choices"][0]["finish_reason"] == answer["finish_reason"]
            assert not any(stop in said for stop in stops)

    await asyncio.gather(*(one(number) for number in range(200)))


async def events(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> list[Any]:
    async with http.stream("POST", path, json=body | {"stream": True}) as answer:
        lines = [line[6:] async for line in answer.aiter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


async def streamed(http: httpx.AsyncClient, body: dict[str, Any]) -> list[str]:
    return [c["choices"][0]["text"] for c in await events(http, "/v1/completions", body) if c["choices"][0]["text"]]
