"""Valid and invalid requests that schemathesis generates from the OpenAPI description.

    FUZZ_EXAMPLES=1300 python -m pytest tests/conformance/test_schema.py    # some 20,000 requests

Nothing may fail on our side, hang, or stay open. A dozen of each kind of request, right and wrong, are part of every run of the suite.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.config import SchemathesisConfig

from tests.conformance.conftest import Target

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "6"))
DEADLINE = 30.0  # seconds for one answer
SEEN: collections.Counter[tuple[str, int]] = collections.Counter()


@pytest.fixture(scope="module")
def schema(target: Target) -> Any:
    return schemathesis.openapi.from_url(f"{target.root}/openapi.json", config=SchemathesisConfig.from_dict({}))


@pytest.fixture(scope="module", autouse=True)
def _open_requests(target: Target) -> Iterator[None]:
    yield
    if target.ours:
        page = httpx.get(f"{target.root}/metrics", trust_env=False).text
        lines = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
        assert float(lines["dynserve_open_requests"]) == 0
        assert all(float(v) == 0 for k, v in lines.items() if k.startswith("dynserve_requests_in_flight{"))
        assert httpx.get(f"{target.root}/health", trust_env=False).status_code == 200
    for (operation, status), number in sorted(SEEN.items()):
        print(f"{operation:40} {status} {number:6}")
    print(f"{sum(SEEN.values())} requests")


OPERATIONS = (
    "POST /v1/chat/completions", "POST /v1/completions", "POST /v1/embeddings", "POST /v1/responses", "POST /v1/messages",
    "POST /v1/messages/count_tokens", "POST /tokenize", "POST /detokenize", "GET /v1/models", "GET /v1/models/{model}",
    "GET /v1/requests/{request_id}/why", "GET /health", "GET /live", "GET /metrics", "GET /version",
)  # fmt: skip


def test_every_route_is_described_and_fuzzed(schema: Any) -> None:
    assert sorted(_operations(schema)) == sorted(OPERATIONS)


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_generated_request_makes_the_server_fail(schema: Any, target: Target, operation: str, mode: Any) -> None:
    @settings(
        max_examples=EXAMPLES if operation.startswith("POST") else EXAMPLES // 10 + 1,
        deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck), database=None,
    )  # fmt: skip
    @given(case=_operations(schema)[operation].as_strategy(generation_mode=mode))
    def attempt(case: Any) -> None:
        if isinstance(case.body, dict):
            _aim(case.body, target.model, mode)
        _judge(operation, case.call(base_url=target.root, timeout=DEADLINE, headers=headers))

    headers = {"authorization": f"Bearer {target.key}"}
    try:
        attempt()
    except Unsatisfiable:
        pass  # this operation has no invalid request


def _operations(schema: Any) -> dict[str, Any]:
    found = [result.ok() for result in schema.get_all_operations()]
    return {f"{operation.method.upper()} {operation.path}": operation for operation in found}


def _judge(operation: str, response: Any) -> None:
    SEEN[operation, response.status_code] += 1
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        error = response.json()["error"]
        assert error["message"] and error["type"]
    elif "text/event-stream" in response.headers["content-type"]:
        assert response.text.endswith(("data: [DONE]\n\n", '"message_stop"}\n\n', "}\n\n"))


def _aim(body: dict[str, Any], model: str, mode: Any = GenerationMode.POSITIVE) -> None:
    """Points most requests at the served model and bounds their answers. In positive mode it also removes contradictions
    that a schema cannot express, so that many requests reach an answer."""
    if isinstance(body.get("model"), str) and (mode is GenerationMode.POSITIVE or len(body["model"]) % 8 < 7):
        body["model"] = model
    for field, most in (
        ("max_tokens", 12),
        ("max_completion_tokens", 12),
        ("max_output_tokens", 12),
        ("n", 3),
        ("best_of", 3),
    ):
        if isinstance(body.get(field), int | float) and body[field] > most:
            body[field] = most
    if body.get("max_tokens") is None and body.get("max_completion_tokens") is None and "messages" in body:
        body["max_tokens"] = 12
    if "input" in body and body.get("max_output_tokens") is None:
        body["max_output_tokens"] = 12
    if mode is GenerationMode.POSITIVE:
        _mend(body)


def _mend(body: dict[str, Any]) -> None:
    if body.get("stream_options"):
        body["stream"] = True
    for message in body.get("messages") or ():
        if message["role"] != "assistant":
            message.pop("tool_calls", None)
        for content in (message.get("content"), body.get("system")):
            for block in content if isinstance(content, list) else ():
                block.update(type="text", text=str(block.get("text")))
        if message.get("content") is None:
            message["content"] = "x"
    if body.get("messages"):
        body.pop("prompt", None)
        body["continue_final_message"] = False
    for field in ("prompt", "input"):
        if isinstance(body.get(field), str | list):
            body[field] = _prompts(body[field])
    if not body.get("tools") and "tool_choice" in body:
        del body["tool_choice"]
    grammars = [
        f for f in ("response_format", "guided_json", "guided_regex", "guided_grammar", "guided_choice") if body.get(f)
    ]
    for field in grammars if body.get("tool_choice") else grammars[1:]:
        del body[field]
    body.pop("logit_bias", None)


def _prompts(given: Any) -> Any:
    if isinstance(given, str):
        return given or "x"
    if not given:
        return "x"
    if isinstance(given[0], int):
        return [abs(id_) % 2048 for id_ in given]
    if isinstance(given[0], dict):
        return [
            item if item.get("role") and item.get("content") else {"role": "user", "content": "x"} for item in given
        ]
    return [_prompts(item) for item in given]
