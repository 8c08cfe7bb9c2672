"""A request's headers and its id, looked up once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from secrets import token_hex

from starlette.requests import Request

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


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
        found = given if given and _REQUEST_ID.fullmatch(given) else token_hex(16)
        request.scope["dynserve.request_id"] = found
    return found
