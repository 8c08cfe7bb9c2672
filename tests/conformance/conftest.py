"""The server under test of the conformance suite: our own processes with the tiny model, or any other server.

    BASE_URL=http://host:port/v1 MODEL=name [API_KEY=…] python -m pytest tests/conformance

Cases that need an ability of the tiny model (it calls tools and adds) are skipped for other servers.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import anthropic
import httpx
import openai
import pytest

from tests.conftest import MODEL

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


class Target(NamedTuple):
    root: str  # without /v1
    model: str
    key: str
    ours: bool


@pytest.fixture(scope="session")
def target(request: pytest.FixtureRequest) -> Target:
    if base := os.environ.get("BASE_URL"):
        root = base.rstrip("/").removesuffix("/v1")
        return Target(root, os.environ.get("MODEL", MODEL), os.environ.get("API_KEY", "none"), ours=False)
    return Target(request.getfixturevalue("disaggregated").base, MODEL, "none", ours=True)


@pytest.fixture(autouse=True)
def _only_where_it_can_be(request: pytest.FixtureRequest, target: Target) -> None:
    if request.node.get_closest_marker("tiny_model") and not target.ours:
        pytest.skip("needs the tiny model")


@pytest.fixture
async def http(target: Target) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"authorization": f"Bearer {target.key}"}
    async with httpx.AsyncClient(base_url=target.root, headers=headers, timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture
async def client(target: Target) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{target.root}/v1", api_key=target.key, max_retries=0) as client:
        yield client


@pytest.fixture
async def claude(target: Target) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=target.root, api_key=target.key, max_retries=0) as client:
        yield client


def says(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]
