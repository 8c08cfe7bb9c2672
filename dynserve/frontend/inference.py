"""`InferenceRequest`: one answer to be generated, with the hints for its placement."""

from __future__ import annotations

import msgspec

from dynserve.wire.requests import Generation, PriorOutput, Resumable


class RoutingHints(msgspec.Struct, frozen=True, kw_only=True):
    """The owner of a request, the hints for its placement, and the trace that it belongs to."""

    owner: str = ""  # name of the API key: only it can read the request's record
    cache_owner: str = ""  # requests of one owner reuse each other's cached prompts
    cache_salt: str = ""  # the owner and the client's own salt
    priority: int = 0  # higher ones are admitted first
    session: str = ""
    trace_headers: dict[str, str] = {}  # of W3C trace context
    instances: tuple[str, ...] = ()
    explain: bool = False


class InferenceRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A `Generation` of one model. `id` is the HTTP request's, with a number if that has several answers."""

    id: str
    model: str
    generation: Generation
    hints: RoutingHints = RoutingHints()
    in_flight_duplicate: bool = False  # the same prompt is in flight: its cached tokens cannot be predicted
    resumable: Resumable | None = None  # the client may come back for the rest of the stream
    prior: PriorOutput | None = None  # of a resumed answer: all output so far
