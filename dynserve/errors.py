"""Every error that a client, a peer or an operator can see, and its meaning to a client.

DynserveError
├── CallerError             the request is at fault; the same request will fail again
│   ├── BadRequest          400  a field is missing, malformed or not supported
│   ├── ContextTooLong      400  prompt and answer do not fit the model's context
│   ├── ModelNotFound       404  no such model here
│   ├── NotFound            404  no such thing here
│   │   └── RequestNotFound      a request of which nothing is remembered
│   ├── SlowBody            408  the body did not arrive in time
│   ├── BodyTooLarge        413  the body is over the limit
│   ├── Unauthorized        401  no API key, or none that is known
│   ├── RateLimited         429  the API key's own limit is reached
│   └── Cancelled           499  the caller went away or withdrew the request
├── ClusterError            the cluster could not serve it now; a retry may succeed
│   ├── NoWorker            503  nobody serves this model at the moment
│   ├── WorkerLost          503  the worker died or cut the link
│   ├── TimedOut            504  a deadline passed
│   │   └── NoAck                one worker did not acknowledge; another may
│   ├── Overloaded          429  every queue is full
│   └── Unavailable         503  a plane (NATS, etcd) or a peer cannot be reached
├── HandoffError            a KV cache could not be moved; the decode worker prefills itself
│   ├── HandoffMismatch          it belongs to another request, prompt or memory layout
│   ├── HandoffGone              delivered, expired or cancelled before
│   └── HandoffBroken            the transfer itself failed
├── InternalError           500  our fault
│   ├── SlowClient               the client reads too slowly; cut to bound memory
│   └── EngineDied               of a worker; exit code 3
└── ConfigError             a flag, file or environment variable; printed as one sentence, exit code 2
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar


class DynserveError(Exception):
    """Root of the tree. `code` travels on the wire, `status` is the HTTP status a client sees."""

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500
    kind: ClassVar[str] = "server_error"  # OpenAI's `error.type`
    retryable: ClassVar[bool] = False
    retry_after: int = 1  # seconds, for those that are
    exit_code: ClassVar[int] = 1  # of a process that ends with it

    def __init__(self, message: str = "", *, param: str | None = None) -> None:
        super().__init__(message or type(self).code)
        self.param = param


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


class SlowBody(CallerError):
    code, status = "request_timeout", 408


class BodyTooLarge(CallerError):
    code, status = "body_too_large", 413


class Unauthorized(CallerError):
    code, status = "invalid_api_key", 401


class RateLimited(CallerError):
    code, status, kind, retryable = "rate_limit_exceeded", 429, "rate_limit_error", True
    headers: tuple[tuple[str, str], ...] = ()  # that say more of the limit


class Cancelled(CallerError):
    code, status = "cancelled", 499


class ClusterError(DynserveError):
    code, status, retryable = "unavailable", 503, True


class NoWorker(ClusterError):
    code = "no_worker"


class WorkerLost(ClusterError):
    code = "worker_lost"


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


class EngineDied(InternalError):
    exit_code = 3


class ConfigError(DynserveError):
    code, exit_code = "config", 2


def _tree(root: type[DynserveError]) -> Iterator[type[DynserveError]]:
    # parents come last, so that a code which a parent shares with a child names the parent
    for child in root.__subclasses__():
        yield from _tree(child)
        yield child


_BY_CODE: dict[str, type[DynserveError]] = {cls.code: cls for cls in _tree(DynserveError)}


def from_wire(code: str, message: str, param: str | None = None) -> DynserveError:
    """The error that a peer reported; an unknown code is an internal error that names it."""
    cls = _BY_CODE.get(code)
    return cls(message, param=param) if cls else InternalError(f"{code}: {message}")


def error_object(error: DynserveError, *, anthropic: bool = False) -> dict[str, Any]:
    """OpenAI's error body; with Anthropic's names around and in it for the API that is Anthropic's."""
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
    """Foreign errors stop here: the first class of `table` that matches names ours; the cause is chained."""
    try:
        yield
    except tuple(table) as error:
        ours: type[DynserveError] = next(to for of, to in table.items() if isinstance(error, of))
        raise ours(f"{doing}: {str(error) or type(error).__name__}") from error
