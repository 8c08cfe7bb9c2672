"""The OpenAI server: routes, and every error as OpenAI's error object."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from dynserve.api import fields
from dynserve.api.body_bounds import BodyBounds
from dynserve.api.chat import ChatRequest
from dynserve.api.completions import CompletionRequest, EmbeddingRequest
from dynserve.api.messages import CountRequest, MessagesRequest
from dynserve.api.normalize import (
    Kind,
    Order,
    order_chat,
    order_completion,
    order_embedding,
    prepare_chat,
    prepare_prompts,
)  # fmt: skip
from dynserve.api.responses import ResponsesRequest
from dynserve.api.tokenize import DetokenizeRequest, TokenizeRequest, detokenized, tokenized
from dynserve.config import nearest
from dynserve.errors import (
    BadRequest,
    ContextTooLong,
    DynserveError,
    InternalError,
    ModelNotFound,
    NotFound,
    NoWorker,
    RateLimited,
    RequestNotFound,
    Unauthorized,
    error_object,
)
from dynserve.frontend.bodies import Bodies
from dynserve.frontend.decisions import KEPT
from dynserve.frontend.edge import (
    INLINE_BODY,
    INLINE_PREPARED,
    Wishes,
    prompts_of,
    warning_of,
    wishes,
)
from dynserve.frontend.fanout import FanOut
from dynserve.frontend.fleet import Model
from dynserve.frontend.frontend import Frontend
from dynserve.frontend.rate_limits import ChargedCall
from dynserve.frontend.request_headers import headers_of, request_id
from dynserve.frontend.response import TokenResponse
from dynserve.frontend.threads import INLINE_CHARACTERS

log = logging.getLogger(__name__)

# headers that a web page may read
EXPOSED = ["x-request-id", "x-dynserve-warning", "x-dynserve-explain", "retry-after"]
EXPOSED += [f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in ("requests", "tokens")]

R = TypeVar("R", bound=fields.Request)
T = TypeVar("T")
BYTES_CHARGED = 8  # of a body for each token of its text, before that is counted
UNBOUNDED_ANSWER = 4096  # tokens, at most, that are charged for an answer of which nobody knows how long it will be

Generating = ChatRequest | CompletionRequest | EmbeddingRequest


class Apps(NamedTuple):
    """`served` is what a server is to serve: the app, by a shorter way where there is one. `system` has only what tells of
    this process, for a port of its own where several share one."""

    app: FastAPI
    served: ASGIApp
    system: FastAPI


def make_apps(frontend: Frontend) -> Apps:
    app = FastAPI(title="dynserve", summary="OpenAI-compatible serving of large language models")
    config = frontend.config
    edge = _Edge(frontend)
    _add_errors(app)
    _add_generation(app, edge)
    _add_text(app, edge)
    _add_state(app, frontend, edge)
    system = FastAPI(title="dynserve")
    _add_errors(system)
    _add_state(system, frontend, edge)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=[origin.strip() for origin in config.cors_origins.split(",")],
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=EXPOSED,
        )
        return Apps(app, app, system)  # whose headers are FastAPI's to add
    return Apps(app, Direct(app, edge), system)


class _Edge:
    """What the routes share: who asks, what for, and the order that it comes to."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend, self.threads = frontend, frontend.threads
        self._config = config = frontend.config
        self._bounds = BodyBounds(config.max_body_values, config.max_prompt_ids)
        self.bodies = Bodies(config)

    def enter(self, request: Request) -> ChargedCall:
        request_id(request)
        return self._frontend.gate.enter(headers_of(request))

    async def parsed(self, content: bytes | bytearray, form: type[R], make: Callable[[R], T]) -> T:
        """`make` of the request, which a large body takes to a thread, too: neither holds up the event loop."""
        if len(content) <= INLINE_BODY:
            return make(self._request(content, form))

        def work() -> T:
            self._bounds.check(content)
            return make(self._request(content, form))

        return await self.threads.run(len(content), work)

    def _request(self, content: bytes | bytearray, form: type[R]) -> R:
        request = fields.parsed(form, content)
        if self._config.strict_fields:
            request.refuse_unknown()
        return request

    def model(self, name: str) -> Model:
        frontend = self._frontend
        model = frontend.pipeline.model(name)
        if model is None:
            models = frontend.fleet.names()
            if not models:  # it may be served in a moment, or elsewhere: a client may try again
                raise NoWorker("no model is served here yet")
            known = f"models: {', '.join(models)}{nearest(name[:200], models)}"
            raise ModelNotFound(f"The model {name[:200]!r} does not exist here; {known}", param="model")
        return model

    def serving(self, name: str) -> Model:
        model = self.model(name)
        if not self._frontend.fleet.serves(name):
            raise NoWorker(f"no worker serves {name} at the moment")
        return model

    @staticmethod
    def told(request: Request, body: Any, asked: fields.Request | None = None) -> Response:
        """An answer that is known at once."""
        headers = {"x-request-id": request_id(request)} | dict(warning_of(asked.unknown if asked else []))
        return Response(msgspec.json.encode(body), media_type="application/json", headers=headers)

    async def generate(
        self, request: Request, form: type[R], make: Callable[[R], tuple[Generating, Kind, str]]
    ) -> Response:
        """A whole request up to its response, which then owns the call."""
        call = self.enter(request)
        try:
            content = self.bodies.whole(request)
            if content is not None:
                given, asked, order = await self._ordered(call, content, form, make)
            else:
                async with self.bodies.body(request) as body:
                    given, asked, order = await self._ordered(call, body.content, form, make)
            session = None if isinstance(asked, EmbeddingRequest) else asked.prompt_cache_key
            wished = wishes(request, call, asked.priority, session)
            order = _charged(call, order, bounded=isinstance(asked, EmbeddingRequest) or bool(asked.answer_tokens()))
            return self._respond(request, call, given, asked, order, wished)
        except BaseException as error:
            if isinstance(error, ContextTooLong):  # to know that took some tokenising
                call.keep_charge()
            call.close()
            if isinstance(error, DynserveError) or not isinstance(error, Exception):
                raise
            # answered by the same handler as all others: the connection and its headers stay in order
            log.exception("request %s failed", request_id(request))
            raise InternalError("internal error; the frontend's log has the details") from error

    async def _ordered(
        self,
        call: ChargedCall,
        content: bytes | bytearray,
        form: type[R],
        make: Callable[[R], tuple[Generating, Kind, str]],
    ) -> tuple[R, Generating, Order]:
        """A body up to the order that it comes to; what takes long is done in threads."""
        call.charge(len(content) // BYTES_CHARGED)
        if len(content) <= INLINE_BODY:
            given = self._request(content, form)
            asked, kind, frame = make(given)
        else:
            given, (asked, kind, frame) = await self.parsed(content, form, lambda given: (given, make(given)))
        model = self.serving(asked.model)
        size = asked.size() if len(content) <= INLINE_PREPARED else len(content)
        if size <= INLINE_CHARACTERS:
            return given, asked, _order(asked, model, kind, frame, call.cache_owner)
        work = partial(_order, asked, model, kind, frame, call.cache_owner)
        return given, asked, await self.threads.run(size, work)

    def _respond(
        self,
        request: Request,
        call: ChargedCall,
        given: fields.Request,
        asked: Generating,
        order: Order,
        wished: Wishes,
    ) -> Response:
        salt = None if isinstance(asked, EmbeddingRequest) else asked.cache_salt
        id_ = request_id(request)
        prompts = prompts_of(order, id_, asked.model, salt, wished)
        headers = call.headers() + warning_of(given.unknown)
        pipeline = self._frontend.pipeline
        if not order.render.part:
            return TokenResponse(pipeline, prompts[0], call, headers)
        return FanOut(pipeline, prompts, call, headers, group=order.group, keep=order.keep, request_id=id_)


def _order(asked: Generating, model: Model, kind: Kind, frame: str, owner: str) -> Order:
    """`owner`: see `Segments.encode`."""
    preprocessor, card = model.preprocessor, model.card
    if isinstance(asked, ChatRequest):
        prepared = prepare_chat(asked, preprocessor, card.max_seq_len, owner)
        return order_chat(asked, prepared, card, preprocessor, kind, frame)
    prepared = prepare_prompts(asked, preprocessor, card.max_seq_len, owner)
    if isinstance(asked, EmbeddingRequest):
        return order_embedding(asked, prepared, card)
    return order_completion(asked, prepared, card, preprocessor)


def _charged(call: ChargedCall, order: Order, *, bounded: bool) -> Order:
    """Charges the request's key for all that the order can come to. Raises RateLimited.

    Where the client has set no bound, answers end when the request has taken what its key may take in a minute. Most of
    them are far shorter: a part of that is charged, and the rest when it is known.
    """
    limit = call.tokens_a_minute
    if limit is None:
        return order
    answers = order.answer_tokens
    if not bounded:
        order = order.limited(max(1, (limit - order.prompt_tokens) // len(order.parts)))
        answers = min(order.answer_tokens, min(UNBOUNDED_ANSWER, max(1, limit // 4)) * len(order.parts))
    call.settle(0)
    call.charge(order.prompt_tokens + answers)
    return order


class _Route(NamedTuple):
    form: type[Any]
    make: Callable[[Any], tuple[Generating, Kind, str]]


_GENERATING = {
    "/v1/chat/completions": _Route(ChatRequest, lambda asked: (asked, "chat", "")),
    "/v1/completions": _Route(CompletionRequest, lambda asked: (asked, "completion", "")),
    "/v1/embeddings": _Route(EmbeddingRequest, lambda asked: (asked, "embedding", "")),
    "/v1/responses": _Route(ResponsesRequest, lambda asked: (asked.chat(), "response", asked.frame())),
    "/v1/messages": _Route(MessagesRequest, lambda asked: (asked.chat(), "message", "")),
}


def _add_generation(app: FastAPI, edge: _Edge) -> None:
    def add(path: str, route: _Route) -> None:
        async def generate(request: Request) -> Response:
            return await edge.generate(request, route.form, route.make)

        name = path.removeprefix("/v1/").replace("/", "_")
        app.add_api_route(path, generate, methods=["POST"], name=name, openapi_extra=_schema_of(route.form))

    for path, route in _GENERATING.items():
        add(path, route)


class Direct:
    """The generating routes, straight from the server; all else through FastAPI. Its layers take as long as all that a
    short request needs of this frontend, and nothing of what they do is wanted here."""

    def __init__(self, app: FastAPI, edge: _Edge) -> None:
        self._app, self._edge = app, edge

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = _GENERATING.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if route is None:
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            response = await self._edge.generate(request, route.form, route.make)
        except DynserveError as error:
            response = _refusal(request, error)
        await response(scope, receive, send)


def _add_text(app: FastAPI, edge: _Edge) -> None:
    @app.post("/v1/messages/count_tokens", openapi_extra=_schema_of(CountRequest))
    async def count_tokens(request: Request) -> Response:
        with edge.enter(request) as call, kept_when_too_long(call):
            async with edge.bodies.body(request) as body:
                call.charge(len(body.content) // BYTES_CHARGED)
                asked, chat = await edge.parsed(body.content, CountRequest, lambda asked: (asked, asked.chat()))
                model = edge.model(asked.model)
                prepared = await edge.threads.run(
                    _size(body.content, chat),
                    lambda: prepare_chat(chat, model.preprocessor, model.card.max_seq_len, call.cache_owner),
                )
            call.settle(len(prepared.prompts[0]) // 4)
            return edge.told(request, {"input_tokens": len(prepared.prompts[0]) // 4}, asked)

    @app.post("/tokenize", openapi_extra=_schema_of(TokenizeRequest))
    async def tokenize(request: Request) -> Response:
        with edge.enter(request) as call, kept_when_too_long(call):
            async with edge.bodies.body(request) as body:
                call.charge(len(body.content) // BYTES_CHARGED)
                asked = await edge.parsed(body.content, TokenizeRequest, lambda asked: asked)
                model = edge.model(asked.model)
                found = await edge.threads.run(
                    len(body.content),
                    lambda: tokenized(asked, model.preprocessor, model.card.max_seq_len, call.cache_owner),
                )
            call.settle(found["count"])
            return edge.told(request, found, asked)

    @app.post("/detokenize", openapi_extra=_schema_of(DetokenizeRequest))
    async def detokenize(request: Request) -> Response:
        with edge.enter(request) as call, kept_when_too_long(call):
            async with edge.bodies.body(request) as body:
                asked = await edge.parsed(body.content, DetokenizeRequest, lambda asked: asked)
                preprocessor = edge.model(asked.model).preprocessor
                call.charge(len(asked.tokens))
                text = await edge.threads.run(len(body.content), lambda: detokenized(asked, preprocessor))
                call.settle(len(asked.tokens))
            return edge.told(request, {"prompt": text}, asked)


@contextmanager
def kept_when_too_long(call: ChargedCall) -> Iterator[None]:
    """To know that a text is too long took some tokenising, which is paid for."""
    try:
        yield
    except ContextTooLong:
        call.keep_charge()
        raise


def _size(content: bytes | bytearray, chat: ChatRequest) -> int:
    return chat.size() if len(content) <= INLINE_PREPARED else len(content)


def _add_state(app: FastAPI, frontend: Frontend, edge: _Edge) -> None:
    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        edge.enter(request).close()
        served = [name for name in frontend.fleet.names() if frontend.fleet.serves(name)]
        return edge.told(request, {"object": "list", "data": [_model_object(frontend, name) for name in served]})

    @app.get("/v1/models/{model:path}")
    async def model(request: Request, model: str) -> Response:
        edge.enter(request).close()
        edge.serving(model)
        return edge.told(request, _model_object(frontend, model))

    @app.get("/v1/requests/{request_id:path}/why")
    async def why(request: Request, request_id: str) -> Response:
        with edge.enter(request) as call:
            owner = call.name
        decisions = frontend.pipeline.decisions
        # of several answers the first
        decision = decisions.get(request_id, owner) or decisions.get(f"{request_id}/0", owner)
        if decision is None:
            raise RequestNotFound(f"no request {request_id!r} among the latest {KEPT:,} of this frontend")
        return edge.told(request, decision.told())

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


def _answer(request: Request, error: DynserveError, status: int, headers: dict[str, str]) -> JSONResponse:
    body = error_object(error, anthropic=request.url.path in _ANTHROPICS)
    return JSONResponse(body, status, headers={"x-request-id": request_id(request)} | headers)


def _refusal(request: Request, error: DynserveError) -> JSONResponse:
    headers = {"retry-after": str(error.retry_after)} if error.retryable else {}
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, RateLimited):
        headers |= dict(error.headers)
    return _answer(request, error, error.status, headers)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(DynserveError)
    async def ours(request: Request, error: DynserveError) -> JSONResponse:
        return _refusal(request, error)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        sentence = f"{error.detail}: {request.method} {request.url.path}"
        kind = NotFound if error.status_code == 404 else BadRequest
        return _answer(request, kind(sentence), error.status_code, dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return _answer(request, InternalError("internal error; the frontend's log has the details"), 500, _CLOSE)


_CLOSE = {"connection": "close"}  # the server gives up the connection after an error that nobody expected


_ANTHROPICS = ("/v1/messages", "/v1/messages/count_tokens")


def _schema_of(model: Any) -> dict[str, Any]:
    """For /openapi.json; the parsing itself is one call into pydantic."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    definitions = schema.pop("$defs", {})
    answers = {
        "200": {"description": "the answer", "content": {"application/json": {}, "text/event-stream": {}}},
        "default": {"description": "an error object", "content": {"application/json": {"schema": _ERROR}}},
    }
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": _inline(schema, definitions, ())}},
        },
        "responses": answers,
    }


_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def _inline(schema: Any, definitions: dict[str, Any], within: tuple[str, ...]) -> Any:
    """References replaced by what they name; one to itself becomes an object of any kind."""
    if isinstance(schema, list):
        return [_inline(item, definitions, within) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[-1]
        return {"type": "object"} if name in within else _inline(definitions[name], definitions, (*within, name))
    return {key: _inline(value, definitions, within) for key, value in schema.items()}


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
