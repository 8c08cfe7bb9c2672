"""The formats of answers, one module per API."""

from __future__ import annotations

from dynserve.render.formats.base import Format
from dynserve.render.formats.chat import ChatFormat, CompletionFormat
from dynserve.render.formats.messages import MessageFormat
from dynserve.render.formats.responses import ResponsesFormat
from dynserve.wire.requests import RenderOptions


def make_format(render: RenderOptions) -> Format:
    match render.kind:
        case "chat":
            return ChatFormat(render)
        case "completion" | "embedding":
            return CompletionFormat(render)
        case "response":
            return ResponsesFormat(render)
        case "message":
            return MessageFormat(render)
