"""The OpenAI server: routes, and every error as OpenAI's error object."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from concurrent.futures import Executor as Pool
from secrets import token_hex
from typing import TYPE_CHECKING, Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from dynserve.errors import (
    BadRequest,
    Cancelled,
    DynserveError,
    InternalError,
    ModelNotFound,
    NoWorker,
    Overloaded,
    TimedOut,
)
from dynserve.frontend.decisions import KEPT
from dynserve.frontend.pipeline import Prompt
from dynserve.frontend.response import TokenResponse, error_object
from dynserve.openai.prompt import Preprocessor
from dynserve.openai.protocol import ChatRequest, CompletionRequest, parse_chat, parse_completion
from dynserve.wire.requests import pack_tokens

if TYPE_CHECKING:
    from dynserve.frontend.frontend import Frontend

log = logging.getLogger(__name__)

INLINE_CHARACTERS = 4_000  # a longer prompt is tokenised in a thread: it would hold up every stream
MAX_BODY = 32 << 20  # bytes
MAX_TOKENISING = 64  # long prompts that are being tokenised or wait for it
EDGE_TIMEOUT = 60.0  # seconds for the body to arrive, and for a prompt to be tokenised
MAX_SESSION = 256  # characters
MAX_PRIORITY = 1_000
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's own default for /v1/completions

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


def make_app(frontend: Frontend, pool: Pool) -> FastAPI:
    app = FastAPI(title="dynserve", summary="OpenAI-compatible serving of large language models")
    _add_errors(app)

    @app.post("/v1/chat/completions", openapi_extra=_body_of(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        return await answer(request, parse_chat(await _body(request)), "chat")

    @app.post("/v1/completions", openapi_extra=_body_of(CompletionRequest))
    async def completions(request: Request) -> Response:
        return await answer(request, parse_completion(await _body(request)), "completion")

    async def answer(
        request: Request, asked: ChatRequest | CompletionRequest, kind: Literal["chat", "completion"]
    ) -> Response:
        model = frontend.pipeline.model(asked.model)
        if model is None:
            raise _unknown_model(frontend, asked.model)
        if not frontend.fleet.serves(asked.model):
            raise NoWorker(f"no worker serves {asked.model} at the moment")
        if asked.prompt_size() > INLINE_CHARACTERS:
            ids = await tokenise(asked, model.preprocessor)
        else:
            ids = asked.prompt_ids(model.preprocessor)
        logprobs = asked.wanted_logprobs()
        default_tokens = DEFAULT_COMPLETION_TOKENS if kind == "completion" else None
        prompt = Prompt(
            id=_request_id(request),
            model=asked.model,
            tokens=pack_tokens(ids),
            sampling=asked.sampling(model.preprocessor.defaults, logprobs),
            stop=asked.stops(len(ids), model.card.max_seq_len, default_tokens),
            render=asked.render(kind, logprobs),
            cache_salt=asked.cache_salt or "",
            **_wishes(request, asked.priority),
        )
        return TokenResponse(frontend.pipeline, prompt)

    waiting = 0

    async def tokenise(asked: ChatRequest | CompletionRequest, preprocessor: Preprocessor) -> list[int]:
        nonlocal waiting
        if waiting >= MAX_TOKENISING:
            raise Overloaded(f"{waiting} long prompts are being tokenised; try again soon")
        waiting += 1
        try:
            async with asyncio.timeout(EDGE_TIMEOUT):
                return await asyncio.get_running_loop().run_in_executor(pool, asked.prompt_ids, preprocessor)
        except TimeoutError:
            raise TimedOut(f"the prompt was not tokenised within {EDGE_TIMEOUT:.0f} s") from None
        finally:
            waiting -= 1

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        served = [name for name in frontend.fleet.models if frontend.fleet.serves(name)]
        return {"object": "list", "data": [_model_object(frontend, name) for name in served]}

    @app.get("/v1/requests/{request_id:path}/why")
    async def why(request_id: str) -> dict[str, Any]:
        decision = frontend.pipeline.decisions.get(request_id)
        if decision is None:
            raise NoSuchRequest(f"no request {request_id!r} among the latest {KEPT:,} of this frontend")
        return decision.told()

    @app.get("/health")
    async def health() -> JSONResponse:
        body = frontend.health()
        return JSONResponse(body, 200 if body["status"] == "healthy" else 503)

    @app.get("/live")
    async def live() -> dict[str, str]:
        return {"status": "live"}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(frontend.metrics_page(), media_type=frontend.metrics.content_type)

    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(DynserveError)
    async def ours(request: Request, error: DynserveError) -> JSONResponse:
        headers = {"retry-after": str(error.retry_after)} if error.retryable else None
        return JSONResponse(error_object(error), error.status, headers=headers)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        ours = BadRequest(f"{error.detail}: {request.method} {request.url.path}")
        return JSONResponse(error_object(ours), error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return JSONResponse(error_object(InternalError("internal error; the frontend's log has the details")), 500)


async def _body(request: Request) -> bytes:
    """Raises BadRequest for a body over the limit, before all of it is read."""
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(EDGE_TIMEOUT):
            async for part in request.stream():
                size += len(part)
                if size > MAX_BODY:
                    raise BodyTooLarge(f"the body is larger than {MAX_BODY >> 20} MiB")
                parts.append(part)
    except TimeoutError:
        raise BadRequest(f"the body did not arrive within {EDGE_TIMEOUT:.0f} s") from None
    except ClientDisconnect:
        raise Cancelled("the client left before its request was complete") from None
    return b"".join(parts)


class BodyTooLarge(BadRequest):
    code, status = "body_too_large", 413


class NoSuchRequest(BadRequest):
    code, status = "request_not_found", 404


def _wishes(request: Request, priority: int | None) -> dict[str, Any]:
    """What the headers say of how the request is to be routed; the body's `priority` wins over the header's."""
    headers = request.headers
    if priority is None and (given := headers.get("x-dynserve-priority")):
        try:
            priority = int(given)
        except ValueError:
            raise BadRequest(f"x-dynserve-priority: {given!r} is not a whole number") from None
    session = headers.get("x-dynserve-session", "")
    if len(session) > MAX_SESSION:
        raise BadRequest(f"x-dynserve-session is longer than {MAX_SESSION} characters")
    named = headers.get("x-dynserve-instance", "")
    return {
        "priority": max(-MAX_PRIORITY, min(MAX_PRIORITY, priority or 0)),
        "session": session,
        "instances": tuple(name for part in named.split(",") if (name := part.strip())),
        "explain": headers.get("x-dynserve-explain", "") in ("1", "true"),
    }


def _body_of(model: Any) -> dict[str, Any]:
    """The schema for /openapi.json; the parsing itself is one call into pydantic."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    definitions = schema.pop("$defs", {})
    inlined = _inline(schema, definitions)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": inlined}}}}


def _inline(schema: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(schema, list):
        return [_inline(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inline(definitions[schema["$ref"].rsplit("/", 1)[-1]], definitions)
    return {key: _inline(value, definitions) for key, value in schema.items()}


def _request_id(request: Request) -> str:
    given = request.headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else token_hex(16)


def _unknown_model(frontend: Frontend, name: str) -> ModelNotFound:
    known = ", ".join(frontend.fleet.models) or "none yet"
    return ModelNotFound(f"The model {name!r} does not exist here; models: {known}", param="model")


def _model_object(frontend: Frontend, name: str) -> dict[str, Any]:
    card = frontend.fleet.models[name].card
    return {
        "id": name,
        "object": "model",
        "created": int(frontend.started_at or time.time()),
        "owned_by": "dynserve",
        "max_model_len": card.max_seq_len,
    }
