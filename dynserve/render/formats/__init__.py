"""The bytes of answers, one module per API."""

from __future__ import annotations

from dynserve.render.formats.base import Format
from dynserve.render.formats.chat import ChatFormat, CompletionFormat
from dynserve.render.formats.messages import MessageFormat
from dynserve.render.formats.responses import ResponseFormat
from dynserve.wire.requests import Render


def make_format(render: Render) -> Format:
    match render.kind:
        case "chat":
            return ChatFormat(render)
        case "completion" | "embedding":
            return CompletionFormat(render)
        case "response":
            return ResponseFormat(render)
        case "message":
            return MessageFormat(render)
