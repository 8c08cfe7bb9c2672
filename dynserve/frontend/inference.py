"""`InferenceRequest`: one answer to be generated, with everything that places it."""

from __future__ import annotations

import msgspec

from dynserve.wire.requests import Generation


class RoutingHints(msgspec.Struct, frozen=True, kw_only=True):
    """Whose request it is, and how it is to be routed."""

    owner: str = ""  # name of the API key: nobody else sees the request's record
    cache_owner: str = ""  # requests of one owner may find each other's prompts in the caches
    cache_salt: str = ""  # the owner and the client's own salt
    priority: int = 0  # higher ones leave the frontend's queue first
    session: str = ""
    instances: tuple[str, ...] = ()
    explain: bool = False


class InferenceRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A `Generation` of one model. `id` is the HTTP request's, with a number where that has several answers."""

    id: str
    model: str
    generation: Generation
    hints: RoutingHints = RoutingHints()
    in_flight_duplicate: bool = False  # the same prompt is under way: its cached tokens cannot be predicted
