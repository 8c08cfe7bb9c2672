"""Between HTTP and the pipeline: bodies and headers in, prompts out."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor as Pool
from dataclasses import dataclass
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request

from dynserve.config import FrontendConfig
from dynserve.errors import BadRequest, BodyTooLarge, CallerError, Cancelled, Overloaded, TimedOut
from dynserve.frontend.access import Visit
from dynserve.frontend.pipeline import Prompt
from dynserve.openai.order import Order
from dynserve.randomness import random_hex

INLINE_CHARACTERS = 4_000  # a longer prompt is tokenised in a thread: it would hold up every stream
MAX_TOKENISING = 64  # long prompts that are being tokenised or wait for it
TOKENISE_TIMEOUT = 60.0  # seconds
MAX_SESSION = 256  # characters
MAX_PRIORITY = 1_000
MAX_NAMED = 8  # unknown fields that a header names

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
T = TypeVar("T")


async def body_of(request: Request, config: FrontendConfig) -> bytes:
    """Raises BodyTooLarge for a body over the limit, before all of it is read; SlowBody for one that does not come."""
    ready = request.scope.get("dynserve.body")
    if ready is not None and (whole := ready()) is not None and len(whole) <= config.max_body_bytes:
        found: bytes = whole
        return found
    parts: list[bytes] = []
    announced = headers_of(request).get("content-length", "")
    size = int(announced) if announced.isdecimal() else 0
    if size > config.max_body_bytes:
        raise BodyTooLarge(f"the body is larger than {config.max_body_bytes:,} bytes")
    size = 0
    try:
        async with asyncio.timeout(config.receive_timeout_s):
            async for part in request.stream():
                size += len(part)
                if size > config.max_body_bytes:
                    raise BodyTooLarge(f"the body is larger than {config.max_body_bytes:,} bytes")
                parts.append(part)
    except TimeoutError:
        raise SlowBody(f"the body did not arrive within {config.receive_timeout_s:.0f} s") from None
    except ClientDisconnect:
        raise Cancelled("the client left before its request was complete") from None
    return b"".join(parts)


class SlowBody(CallerError):
    code, status = "request_timeout", 408


def headers_of(request: Request) -> Mapping[str, str]:
    """By lower-case name, the first of several; looked up, where Starlette's are searched."""
    found: dict[str, str] | None = request.scope.get("dynserve.headers")
    if found is None:
        found = {name.decode("latin-1"): value.decode("latin-1") for name, value in reversed(request.scope["headers"])}
        request.scope["dynserve.headers"] = found
    return found


def request_id(request: Request) -> str:
    """The client's own, where it has the form of one; the same for every call with the same request."""
    found: str | None = request.scope.get("dynserve.request_id")
    if found is None:
        given = headers_of(request).get("x-request-id", "")
        found = given if given and _REQUEST_ID.fullmatch(given) else random_hex()
        request.scope["dynserve.request_id"] = found
    return found


class Threads:
    """Work on long prompts, off the event loop; bounded in threads, in what waits, and in time."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._waiting = 0

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """`work()`, here and now when the prompt has few characters.

        Raises:
            Overloaded, TimedOut: too many long prompts are there already, or it took too long.
        """
        if size <= INLINE_CHARACTERS:
            return work()
        if self._waiting >= MAX_TOKENISING:
            raise Overloaded(f"{self._waiting} long prompts are being tokenised; try again soon")
        self._waiting += 1
        try:
            async with asyncio.timeout(TOKENISE_TIMEOUT):
                return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        except TimeoutError:
            raise TimedOut(f"the prompt was not tokenised within {TOKENISE_TIMEOUT:.0f} s") from None
        finally:
            self._waiting -= 1


@dataclass(frozen=True)
class Wishes:
    """What a request says of how it is to be routed."""

    priority: int
    session: str
    instances: tuple[str, ...]
    explain: bool


def wishes(request: Request, visit: Visit, priority: int | None, session: str | None) -> Wishes:
    """The body's `priority` wins over the header's, the header's session over the body's cache key. Raises BadRequest."""
    headers = headers_of(request)
    if priority is None and (given := headers.get("x-dynserve-priority")):
        try:
            priority = int(given)
        except ValueError:
            raise BadRequest(f"x-dynserve-priority: {given!r} is not a whole number") from None
    if priority is not None:
        priority = max(-MAX_PRIORITY, min(MAX_PRIORITY, priority))
    named_session = headers.get("x-dynserve-session") or session or ""
    if len(named_session) > MAX_SESSION:
        raise BadRequest(f"x-dynserve-session is longer than {MAX_SESSION} characters")
    named = headers.get("x-dynserve-instance", "")
    return Wishes(
        priority=visit.priority(priority),
        session=named_session,
        instances=tuple(name for part in named.split(",") if (name := part.strip())),
        explain=headers.get("x-dynserve-explain", "") in ("1", "true"),
    )


def prompts_of(order: Order, id_: str, model: str, salt: str | None, wished: Wishes) -> list[Prompt]:
    """One for each answer; several share a request id, and have numbers."""
    several = len(order.parts) > 1
    return [
        Prompt(
            id=f"{id_}/{number}" if several else id_,
            model=model,
            tokens=part.tokens,
            sampling=part.sampling,
            stop=part.stop,
            render=part.render,
            cache_salt=salt or "",
            priority=wished.priority,
            session=wished.session,
            instances=wished.instances,
            explain=wished.explain and not several,
            guide=part.guide,
            pool=part.pool,
            twin=number > 0 and part.tokens == order.parts[number - 1].tokens,
        )
        for number, part in enumerate(order.parts)
    ]


def warning_of(unknown: Sequence[str]) -> list[tuple[str, str]]:
    """A header that names fields which were ignored."""
    if not unknown:
        return []
    names = [re.sub(r"[^\x21-\x7e]", "?", name[:64]) for name in unknown[:MAX_NAMED]]
    more = f" and {len(unknown) - MAX_NAMED} more" if len(unknown) > MAX_NAMED else ""
    return [("x-dynserve-warning", f"ignored unknown fields: {', '.join(names)}{more}")]
