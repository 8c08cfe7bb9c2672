"""The OpenAI server's HTTP apps and their routes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp

from dynserve.api import fields
from dynserve.api.messages import CountRequest
from dynserve.api.normalize import tokenize_prompts
from dynserve.api.tokenize import DetokenizeRequest, TokenizeRequest, detokenized, tokenized
from dynserve.errors import ContextTooLong, NoWorker, RequestNotFound
from dynserve.frontend.decisions import KEPT
from dynserve.frontend.edge import (
    BYTES_PER_TOKEN,
    INLINE_PREPARED,
    ROUTES,
    Edge,
    GenerationApp,
    Route,
    unknown_fields_header,
)
from dynserve.frontend.error_responses import add_error_handlers
from dynserve.frontend.frontend import Frontend
from dynserve.frontend.openapi import openapi_of
from dynserve.frontend.rate_limits import ChargedCall
from dynserve.server.exchange import exchange_of
from dynserve.version import VERSION
from dynserve.wire.requests import num_tokens

# headers that a web page may read
EXPOSED = ["x-request-id", "x-dynserve-warning", "x-dynserve-explain", "retry-after"]
EXPOSED += [f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in ("requests", "tokens")]


class Apps(NamedTuple):
    """`served` is the app for an ASGI server: the FastAPI `app`, with a shorter path for generating routes if possible.
    `system` has only the routes about this process, for a port of its own where several processes share one."""

    app: FastAPI
    served: ASGIApp
    system: FastAPI


def make_apps(frontend: Frontend) -> Apps:
    app = FastAPI(title="dynserve", summary="OpenAI-compatible serving of large language models")
    edge = Edge(frontend)
    add_error_handlers(app)
    _add_generation(app, edge)
    _add_text(app, edge)
    _add_state(app, frontend, edge)
    system = FastAPI(title="dynserve")
    add_error_handlers(system)
    _add_state(system, frontend, edge)
    origins = frontend.config.cors_origins
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=[origin.strip() for origin in origins.split(",")],
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=EXPOSED,
        )
        return Apps(app, app, system)  # CORS headers are FastAPI's to add
    return Apps(app, GenerationApp(app, edge), system)


def json_response(request: Request, body: Any, api_request: fields.Request | None = None) -> Response:
    """A response with a complete body, with the headers that every response has."""
    headers = {"x-request-id": exchange_of(request.scope).request_id}
    headers |= dict(unknown_fields_header(api_request.unknown if api_request else []))
    return Response(msgspec.json.encode(body), media_type="application/json", headers=headers)


def _add_generation(app: FastAPI, edge: Edge) -> None:
    def add(path: str, route: Route) -> None:
        async def generate(request: Request) -> Response:
            return await edge.generate(request, route)

        name = path.removeprefix("/v1/").replace("/", "_")
        app.add_api_route(path, generate, methods=["POST"], name=name, openapi_extra=openapi_of(route.form))

    for path, route in ROUTES.items():
        add(path, route)


def _add_text(app: FastAPI, edge: Edge) -> None:
    @app.post("/v1/messages/count_tokens", openapi_extra=openapi_of(CountRequest))
    async def count_tokens(request: Request) -> Response:
        with edge.admit(request) as call, charge_kept_when_too_long(call):
            async with edge.bodies.receive(request) as body:
                call.charge(len(body.content) // BYTES_PER_TOKEN)
                counted, chat = await edge.parse(body.content, CountRequest, lambda given: (given, given.chat()))
                model = edge.model(counted.model)
                found = await edge.threads.run(
                    chat.size() if len(body.content) <= INLINE_PREPARED else len(body.content),
                    lambda: tokenize_prompts(chat, model.preprocessor, model.card.max_seq_len, call.cache_owner),
                )
            count = num_tokens(found.prompts[0])
            call.settle(count)
            return json_response(request, {"input_tokens": count}, counted)

    @app.post("/tokenize", openapi_extra=openapi_of(TokenizeRequest))
    async def tokenize(request: Request) -> Response:
        with edge.admit(request) as call, charge_kept_when_too_long(call):
            async with edge.bodies.receive(request) as body:
                call.charge(len(body.content) // BYTES_PER_TOKEN)
                given = await edge.parse(body.content, TokenizeRequest, lambda given: given)
                model = edge.model(given.model)
                found = await edge.threads.run(
                    len(body.content),
                    lambda: tokenized(given, model.preprocessor, model.card.max_seq_len, call.cache_owner),
                )
            call.settle(found["count"])
            return json_response(request, found, given)

    @app.post("/detokenize", openapi_extra=openapi_of(DetokenizeRequest))
    async def detokenize(request: Request) -> Response:
        with edge.admit(request) as call, charge_kept_when_too_long(call):
            async with edge.bodies.receive(request) as body:
                given = await edge.parse(body.content, DetokenizeRequest, lambda given: given)
                preprocessor = edge.model(given.model).preprocessor
                call.charge(len(given.tokens))
                text = await edge.threads.run(len(body.content), lambda: detokenized(given, preprocessor))
                call.settle(len(given.tokens))
            return json_response(request, {"prompt": text}, given)


@contextmanager
def charge_kept_when_too_long(call: ChargedCall) -> Iterator[None]:
    """Keeps the charge of a text that is too long: finding that out took some tokenising."""
    try:
        yield
    except ContextTooLong:
        call.keep_charge()
        raise


def _add_state(app: FastAPI, frontend: Frontend, edge: Edge) -> None:
    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        edge.admit(request).close()
        served = [name for name in frontend.fleet.names() if frontend.fleet.serves(name)]
        return json_response(request, {"object": "list", "data": [_model_object(frontend, name) for name in served]})

    @app.get("/v1/models/{model:path}")
    async def model(request: Request, model: str) -> Response:
        edge.admit(request).close()
        edge.model(model)
        if not frontend.fleet.serves(model):
            raise NoWorker(f"no worker serves {model} at the moment")
        return json_response(request, _model_object(frontend, model))

    @app.get("/v1/requests/{request_id:path}/why")
    async def why(request: Request, request_id: str) -> Response:
        with edge.admit(request) as call:
            owner = call.name
        decisions = frontend.pipeline.decisions
        # of several answers the first
        decision = decisions.get(request_id, owner) or decisions.get(f"{request_id}/0", owner)
        if decision is None:
            raise RequestNotFound(f"no request {request_id!r} among the latest {KEPT:,} of this frontend")
        return json_response(request, decision.as_dict())

    @app.get("/health")
    async def health() -> JSONResponse:
        body = frontend.health()
        return JSONResponse(body, 200 if body["status"] == "healthy" else 503)

    @app.get("/live")
    async def live() -> dict[str, str]:
        return {"status": "live"}

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": VERSION}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(frontend.metrics_page(), media_type=frontend.metrics.content_type)


def _model_object(frontend: Frontend, name: str) -> dict[str, Any]:
    model = frontend.fleet.model(name)
    assert model is not None
    found: dict[str, Any] = {
        "id": name,
        "object": "model",
        "created": int(frontend.started_at or time.time()),
        "owned_by": "dynserve",
        "max_model_len": model.card.max_seq_len,
    }
    return found if name == model.card.model else found | {"parent": model.card.model}
