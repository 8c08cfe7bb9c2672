"""All errors that a client, a peer or an operator can get, and their meaning to a client.

DynserveError
├── CallerError             the request is at fault; the same request will fail again
│   ├── BadRequest          400  a field is missing, malformed or not supported
│   ├── ContextTooLong      400  prompt and answer do not fit the model's context
│   ├── ModelNotFound       404  the model is not served here
│   ├── NotFound            404  the resource does not exist
│   │   ├── RequestNotFound      no record of the request is kept
│   │   └── NothingToResume 410  the rest of the stream is not kept, or not any more
│   ├── SlowBody            408  the body did not arrive in time
│   ├── BodyTooLarge        413  the body is over the limit
│   ├── UnsupportedMediaType 415 the body is not JSON, or has an unknown compression
│   ├── Unauthorized        401  the API key is missing or unknown
│   ├── RateLimited         429  the API key's own limit is reached
│   └── Cancelled           499  the caller disconnected or cancelled the request
├── ClusterError            the cluster could not serve it now; a retry may succeed
│   ├── NoWorker            503  no worker serves this model at the moment
│   ├── WorkerLost          503  the worker died, closed the link, fell silent or left
│   │   ├── WorkerLeft           the worker stops, and its answers continue elsewhere
│   │   └── EngineLost           the worker's engine died, perhaps of this request
│   ├── TimedOut            504  a deadline passed
│   │   └── NoAck                a worker did not acknowledge the request; another may
│   ├── Overloaded          429  every queue is full
│   └── Unavailable         503  a plane (NATS, etcd) or a peer cannot be reached
├── HandoffError            a KV cache could not be moved; the decode worker prefills itself
│   ├── HandoffMismatch          the hand-off belongs to another request, prompt or memory layout
│   ├── HandoffGone              the hand-off was delivered, has expired or was cancelled
│   └── HandoffBroken            the transfer itself failed
├── InternalError           500  a fault of dynserve or of an engine
│   ├── SlowClient               the client reads too slowly; aborted to bound memory
│   ├── PoisonRequest            two engines died while they ran the request
│   └── EngineDied               a worker's engine died; exit code 3
└── ConfigError             a flag, file or environment variable is wrong; printed as one sentence, exit code 2
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar


class DynserveError(Exception):
    """Base class of all errors. `code` is sent on the wire, `status` is the HTTP status of the response."""

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500
    kind: ClassVar[str] = "server_error"  # OpenAI's `error.type`
    retryable: ClassVar[bool] = False
    retry_after: int = 1  # seconds, for retryable errors
    exit_code: ClassVar[int] = 1  # of a process that ends with this error
    headers: tuple[tuple[str, str], ...] = ()  # of the HTTP response, with details

    def __init__(
        self, message: str = "", *, param: str | None = None, headers: tuple[tuple[str, str], ...] = ()
    ) -> None:
        super().__init__(message or type(self).code)
        self.param = param
        if headers:
            self.headers = headers


class CallerError(DynserveError):
    code, status, kind = "invalid_request", 400, "invalid_request_error"


class BadRequest(CallerError):
    pass


class ContextTooLong(CallerError):
    code = "context_length_exceeded"


class ModelNotFound(CallerError):
    code, status = "model_not_found", 404


class NotFound(CallerError):
    code, status = "not_found", 404


class RequestNotFound(NotFound):
    code = "request_not_found"


class NothingToResume(NotFound):
    code, status = "nothing_to_resume", 410


class SlowBody(CallerError):
    code, status = "request_timeout", 408


class BodyTooLarge(CallerError):
    code, status = "body_too_large", 413


class UnsupportedMediaType(CallerError):
    code, status = "unsupported_media_type", 415


class Unauthorized(CallerError):
    code, status = "invalid_api_key", 401


class RateLimited(CallerError):
    code, status, kind, retryable = "rate_limit_exceeded", 429, "rate_limit_error", True


class Cancelled(CallerError):
    code, status = "cancelled", 499


class ClusterError(DynserveError):
    code, status, retryable = "unavailable", 503, True


class NoWorker(ClusterError):
    code = "no_worker"


class WorkerLost(ClusterError):
    code = "worker_lost"


class WorkerLeft(WorkerLost):
    code = "worker_left"


class EngineLost(WorkerLost):
    code = "engine_lost"


class TimedOut(ClusterError):
    code, status = "timeout", 504


class NoAck(TimedOut):
    pass


class Overloaded(ClusterError):
    code, status, kind = "overloaded", 429, "rate_limit_error"


class Unavailable(ClusterError):
    code = "unavailable"


class HandoffError(DynserveError):
    code, retryable = "handoff_failed", True


class HandoffMismatch(HandoffError):
    code = "handoff_mismatch"


class HandoffGone(HandoffError):
    code = "handoff_gone"


class HandoffBroken(HandoffError):
    code = "handoff_broken"


class InternalError(DynserveError):
    pass


class SlowClient(InternalError):
    code = "slow_client"


class PoisonRequest(InternalError):
    code = "poison_request"


class EngineDied(InternalError):
    exit_code = 3


class ConfigError(DynserveError):
    code, exit_code = "config", 2


def _tree(root: type[DynserveError]) -> Iterator[type[DynserveError]]:
    # parents come last, so that a code that is shared by parent and child maps to the parent
    for child in root.__subclasses__():
        yield from _tree(child)
        yield child


_BY_CODE: dict[str, type[DynserveError]] = {cls.code: cls for cls in _tree(DynserveError)}


def from_wire(code: str, message: str, param: str | None = None) -> DynserveError:
    """Makes the error that a peer reported. An unknown code becomes an InternalError that names it."""
    cls = _BY_CODE.get(code)
    return cls(message, param=param) if cls else InternalError(f"{code}: {message}")


def error_object(error: DynserveError, *, anthropic: bool = False) -> dict[str, Any]:
    """Returns the error body of OpenAI's API, or, with `anthropic`, in the envelope and with the types of Anthropic's."""
    body = {"message": str(error), "type": error.kind, "param": error.param, "code": error.code}
    if not anthropic:
        return {"error": body}
    return {"type": "error", "error": body | {"type": _ANTHROPIC.get(error.status, "api_error")}}


_ANTHROPIC = {
    400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error",
}  # fmt: skip


@contextmanager
def translate(table: Mapping[type[BaseException], type[DynserveError]], doing: str) -> Iterator[None]:
    """Turns foreign errors into errors of this module: the first class of `table` that matches gives the type; the cause is
    chained."""
    try:
        yield
    except tuple(table) as error:
        ours: type[DynserveError] = next(to for of, to in table.items() if isinstance(error, of))
        raise ours(f"{doing}: {str(error) or type(error).__name__}") from error
