"""Between HTTP and the pipeline: headers and orders in, prompts out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.requests import Request

from dynserve.api.normalize import Order
from dynserve.errors import BadRequest
from dynserve.frontend.pipeline import Prompt
from dynserve.frontend.rate_limits import ChargedCall
from dynserve.frontend.request_headers import headers_of

INLINE_BODY = 64 << 10  # bytes; a larger body is looked at and parsed in a thread
INLINE_PREPARED = 16 << 10  # bytes; of a larger body the prompts are made in a thread, too
MAX_SESSION = 256  # characters
MAX_PRIORITY = 1_000
MAX_NAMED = 8  # unknown fields that a header names


@dataclass(frozen=True)
class Wishes:
    """What a request says of how it is to be routed."""

    priority: int
    session: str
    instances: tuple[str, ...]
    explain: bool
    key: str  # the name of the API key
    cache_owner: str


def wishes(request: Request, call: ChargedCall, priority: int | None, session: str | None) -> Wishes:
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
        priority=call.priority(priority),
        session=_of_owner(call.cache_owner, named_session) if named_session else "",
        key=call.name,
        cache_owner=call.cache_owner,
        instances=tuple(name for part in named.split(",") if (name := part.strip())),
        explain=headers.get("x-dynserve-explain", "") in ("1", "true"),
    )


def _of_owner(owner: str, name: str) -> str:
    """A name that no request of another owner can have; owners have no control characters in them."""
    return f"{owner}\x1f{name}" if owner else name


def prompts_of(order: Order, id_: str, model: str, salt: str | None, wished: Wishes) -> list[Prompt]:
    """One for each answer; several share a request id, and have numbers."""
    several = len(order.parts) > 1
    cache_salt = _of_owner(wished.cache_owner, salt or "")
    return [
        Prompt(
            id=f"{id_}/{number}" if several else id_,
            model=model,
            tokens=part.tokens,
            sampling=part.sampling,
            stop=part.stop,
            render=part.render,
            owner=wished.key,
            cache_salt=cache_salt,
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
