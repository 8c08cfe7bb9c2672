"""Errors as HTTP responses: OpenAI's error object, or Anthropic's for the API that is Anthropic's."""

from __future__ import annotations

import logging

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from dynserve.errors import (
    BadRequest,
    DynserveError,
    InternalError,
    NotFound,
    Unauthorized,
    error_object,
)
from dynserve.server.exchange import exchange_of

log = logging.getLogger(__name__)

_ANTHROPIC_PATHS = ("/v1/messages", "/v1/messages/count_tokens")
_CLOSE = {"connection": "close"}  # the server closes the connection after an unexpected error


def error_response(request: Request, error: DynserveError) -> JSONResponse:
    """The response to a request that ended with `error`, with the headers for a client's retry."""
    headers = {"retry-after": str(error.retry_after)} if error.retryable else {}
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    headers |= dict(error.headers)
    return _json(request, error, error.status, headers)


def add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(DynserveError)
    async def ours(request: Request, error: DynserveError) -> JSONResponse:
        return error_response(request, error)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        sentence = f"{error.detail}: {request.method} {request.url.path}"
        kind = NotFound if error.status_code == 404 else BadRequest
        return _json(request, kind(sentence), error.status_code, dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return _json(request, InternalError("internal error; the frontend's log has the details"), 500, _CLOSE)


def _json(request: Request, error: DynserveError, status: int, headers: dict[str, str]) -> JSONResponse:
    body = error_object(error, anthropic=request.url.path in _ANTHROPIC_PATHS)
    return JSONResponse(body, status, headers={"x-request-id": exchange_of(request.scope).request_id} | headers)
