"""The edge: a generating request from HTTP to its response.

headers ──gate──▶ ChargedCall      body ──parse──▶ an API's request ──normalize──▶ NormalizedRequest
                      └──charged for it──▶ InferenceRequests ──▶ TokenResponse or FanOut, which runs them
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from dynserve.api import fields
from dynserve.api.body_bounds import BodyBounds
from dynserve.api.chat import ChatRequest
from dynserve.api.completions import CompletionRequest, EmbeddingRequest
from dynserve.api.messages import MessagesRequest
from dynserve.api.normalize import ApiRequest, Kind, NormalizedRequest, normalize
from dynserve.api.responses import ResponsesRequest
from dynserve.config import nearest
from dynserve.errors import BadRequest, ContextTooLong, DynserveError, InternalError, ModelNotFound, NoWorker
from dynserve.frontend.bodies import RequestBodies
from dynserve.frontend.error_responses import error_response
from dynserve.frontend.fanout import FanOut
from dynserve.frontend.frontend import Frontend
from dynserve.frontend.inference import InferenceRequest, RoutingHints
from dynserve.frontend.models import Model
from dynserve.frontend.rate_limits import ChargedCall
from dynserve.frontend.response import TokenResponse
from dynserve.frontend.resumption import wants_resumption
from dynserve.server.exchange import Exchange, exchange_of

log = logging.getLogger(__name__)

INLINE_BODY = 64 << 10  # bytes; a larger body is checked and parsed in a thread
INLINE_PREPARED = 16 << 10  # bytes; of a larger body the prompts are made in a thread, too
BYTES_PER_TOKEN = 8  # of a body, charged for each token of its text before that is counted
UNBOUNDED_ANSWER = 4096  # tokens, at most, that are charged for an answer without a bound of its length
MAX_SESSION = 256  # characters
# W3C trace context, with the length up to which each header is passed on, in characters
TRACE_HEADERS = (("traceparent", 128), ("tracestate", 512))
MAX_PRIORITY = 1_000
MAX_NAMED = 16  # unknown fields that a header names

R = TypeVar("R", bound=fields.Request)
T = TypeVar("T")


class Route(NamedTuple):
    """A generating route: the form of its body, and how that becomes a request of one of the three basic kinds."""

    form: type[Any]
    convert: Callable[[Any], tuple[ApiRequest, Kind, str]]  # the request, its kind, and its frame (see `normalize`)


ROUTES = {
    "/v1/chat/completions": Route(ChatRequest, lambda body: (body, "chat", "")),
    "/v1/completions": Route(CompletionRequest, lambda body: (body, "completion", "")),
    "/v1/embeddings": Route(EmbeddingRequest, lambda body: (body, "embedding", "")),
    "/v1/responses": Route(ResponsesRequest, lambda body: (body.chat(), "response", body.frame())),
    "/v1/messages": Route(MessagesRequest, lambda body: (body.chat(), "message", "")),
}


class Edge:
    """The parts that the routes of one frontend share."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend, self._config = frontend, frontend.config
        self._bounds = BodyBounds(self._config.max_body_values, self._config.max_prompt_ids)
        self.bodies = RequestBodies(self._config)
        self.threads = frontend.threads

    def admit(self, request: Request) -> ChargedCall:
        """Admits the request by its headers. Raises Unauthorized, RateLimited and Overloaded."""
        return self._frontend.gate.enter(exchange_of(request.scope).headers)

    async def parse(self, content: bytes | bytearray, form: type[R], convert: Callable[[R], T]) -> T:
        """Parses, checks and converts a body; a large one in a thread, so that it does not hold up the event loop.

        Raises:
            BadRequest: the body is not of this form, or has unknown fields where those are refused.
            BodyTooLarge: the body is over one of the bounds.
        """
        large = len(content) > INLINE_BODY

        def work() -> T:
            if large:
                self._bounds.check(content)
            request = fields.parsed(form, content)
            if self._config.strict_fields:
                request.refuse_unknown()
            return convert(request)

        return await self.threads.run(len(content), work) if large else work()

    def model(self, name: str) -> Model:
        """Returns the model of that name. Raises ModelNotFound, or NoWorker while no model at all is served."""
        fleet = self._frontend.fleet
        model = fleet.model(name)
        if model is None:
            names = fleet.names()
            if not names:  # it may be served in a moment, or elsewhere: a client may try again
                raise NoWorker("no model is served here yet")
            known = f"models: {', '.join(names)}{nearest(name[:200], names)}"
            raise ModelNotFound(f"The model {name[:200]!r} does not exist here; {known}", param="model")
        return model

    async def generate(self, request: Request, route: Route) -> Response:
        """Processes a generating request up to its response, which owns the charged call from then on."""
        exchange = exchange_of(request.scope)
        call = self._frontend.gate.enter(exchange.headers)
        try:
            content = self.bodies.small(exchange)
            if content is not None:
                return await self._respond(exchange, call, content, route)
            async with self.bodies.receive(request) as body:
                return await self._respond(exchange, call, body.content, route)
        except BaseException as error:
            if isinstance(error, ContextTooLong):  # finding that out took some tokenising
                call.keep_charge()
            call.close()
            if isinstance(error, DynserveError) or not isinstance(error, Exception):
                raise
            # answered by the same handler as all others: the connection and its headers stay in order
            log.exception("request %s failed", exchange.request_id)
            raise InternalError("internal error; the frontend's log has the details") from error

    async def _respond(
        self, exchange: Exchange, call: ChargedCall, content: bytes | bytearray, route: Route
    ) -> Response:
        call.charge(len(content) // BYTES_PER_TOKEN)
        body, (request, kind, frame) = await self.parse(content, route.form, lambda body: (body, route.convert(body)))
        model = self.model(request.model)
        work = partial(normalize, request, model.preprocessor, model.card, call.cache_owner, kind, frame)
        size = request.size() if len(content) <= INLINE_PREPARED else len(content)
        normalized = await self.threads.run(size, work)
        hints = routing_hints(exchange.headers, call, request)
        normalized = _charged(call, normalized, bounded=request.bounds_answer())
        requests = inference_requests(exchange.request_id, request.model, normalized, hints)
        if wants_resumption(exchange.headers):
            requests = [await self._frontend.resumption.prepare(requests[0], exchange.headers, call.name)]
        headers = call.headers() + unknown_fields_header(body.unknown + normalized.dropped)
        if not normalized.render.part:
            return TokenResponse(self._frontend.pipeline, requests[0], call, headers)
        return FanOut(self._frontend.pipeline, requests, call, headers, normalized, exchange.request_id)


class GenerationApp:
    """An ASGI app that serves the generating routes itself and passes all other requests to FastAPI, whose layers cost as
    much time as all the rest of a short request in a frontend."""

    def __init__(self, app: ASGIApp, edge: Edge) -> None:
        self._app, self._edge = app, edge

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = ROUTES.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if route is None:
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            response = await self._edge.generate(request, route)
        except DynserveError as error:
            response = error_response(request, error)
        await response(scope, receive, send)


def routing_hints(headers: Mapping[str, str], call: ChargedCall, request: ApiRequest) -> RoutingHints:
    """The routing hints of a request. The body's `priority` overrides the header's, the header's session the body's cache
    key. Raises BadRequest."""
    priority = request.priority
    if priority is None and (given := headers.get("x-dynserve-priority")):
        try:
            priority = int(given)
        except ValueError:
            raise BadRequest(f"x-dynserve-priority: {given!r} is not a whole number") from None
    if priority is not None:
        priority = max(-MAX_PRIORITY, min(MAX_PRIORITY, priority))
    session = headers.get("x-dynserve-session") or request.prompt_cache_key or ""
    if len(session) > MAX_SESSION:
        raise BadRequest(f"x-dynserve-session is longer than {MAX_SESSION} characters")
    instances = headers.get("x-dynserve-instance", "")
    return RoutingHints(
        owner=call.name,
        cache_owner=call.cache_owner,
        cache_salt=_of_owner(call.cache_owner, request.cache_salt or ""),
        priority=call.priority(priority),
        session=_of_owner(call.cache_owner, session) if session else "",
        instances=tuple(name for part in instances.split(",") if (name := part.strip())),
        trace_headers={
            name: value for name, limit in TRACE_HEADERS if 0 < len(value := headers.get(name, "")) <= limit
        },
        explain=headers.get("x-dynserve-explain", "") in ("1", "true"),
    )


def _of_owner(owner: str, name: str) -> str:
    """A name that no request of another owner can have; owners have no control characters in them."""
    return f"{owner}\x1f{name}" if owner else name


def inference_requests(
    id_: str, model: str, normalized: NormalizedRequest, hints: RoutingHints
) -> list[InferenceRequest]:
    """Returns one request per answer; several have numbered ids."""
    choices = normalized.choices
    if len(choices) == 1:
        return [InferenceRequest(id=id_, model=model, generation=choices[0], hints=hints)]
    return [
        InferenceRequest(
            id=f"{id_}/{number}",
            model=model,
            generation=choice,
            hints=hints,
            in_flight_duplicate=number > 0 and choice.prompt == choices[number - 1].prompt,
        )
        for number, choice in enumerate(choices)
    ]


def unknown_fields_header(unknown: Sequence[str]) -> list[tuple[str, str]]:
    """Returns a header that lists what is ignored, or no header if that is nothing."""
    if not unknown:
        return []
    names = [re.sub(r"[^\x20-\x7e]", "?", name[:64]) for name in unknown[:MAX_NAMED]]
    more = f" and {len(unknown) - MAX_NAMED} more" if len(unknown) > MAX_NAMED else ""
    return [("x-dynserve-warning", f"ignored: {', '.join(names)}{more}")]


def _charged(call: ChargedCall, normalized: NormalizedRequest, *, bounded: bool) -> NormalizedRequest:
    """Charges the request's key for all tokens that the request may use. Raises RateLimited.

    If the client has set no bound, answers end when the request has used its key's tokens of one minute. Most answers are
    far shorter: a part of these tokens is charged now, and the rest when it is known.
    """
    limit = call.tokens_per_minute
    if limit is None:
        return normalized
    count, answers = len(normalized.choices), normalized.max_answer_tokens
    if not bounded:
        normalized = normalized.limited(max(1, (limit - normalized.prompt_tokens) // count))
        answers = min(normalized.max_answer_tokens, min(UNBOUNDED_ANSWER, max(1, limit // 4)) * count)
    call.settle(0)
    call.charge(normalized.prompt_tokens + answers)
    return normalized
