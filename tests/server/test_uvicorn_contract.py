"""The parts of uvicorn that `dynserve.server` extends or reads. A new minor version may rename any of them: then this test
names it, before a connection hangs."""

from __future__ import annotations

import asyncio
import inspect
from importlib.metadata import version
from typing import Any

import pytest
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

# called by the transport or the parser, and extended by ours
CALLBACKS = {
    "connection_made": ["transport"],
    "connection_lost": ["exc"],
    "data_received": ["data"],
    "on_message_begin": [],
    "on_header": ["name", "value"],
    "on_headers_complete": [],
    "on_body": ["body"],
    "on_message_complete": [],
    "on_response_complete": [],
    "pause_writing": [],
    "resume_writing": [],
    "send_400_response": ["msg"],
    "_unset_keepalive_if_required": [],
}
CONNECTION = {
    "cycle", "expect_100_continue", "flow", "headers", "loop", "parser", "pipeline", "scope", "timeout_keep_alive_task",
    "transport", "url",
}  # fmt: skip
CYCLE = {
    "body", "chunked_encoding", "default_headers", "disconnected", "flow", "keep_alive", "message_event", "more_body",
    "on_response", "response_complete", "response_started", "scope", "transport", "waiting_for_100_continue",
}  # fmt: skip
FLOW = {"pause_reading", "resume_reading", "write_paused"}


class _Transport(asyncio.Transport):
    def is_closing(self) -> bool:
        return False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def write(self, data: Any) -> None:
        pass

    def close(self) -> None:
        pass

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


async def _app(scope: Any, receive: Any, send: Any) -> None:
    await asyncio.Event().wait()


@pytest.fixture
async def connection() -> HttpToolsProtocol:
    config = uvicorn.Config(_app, log_config=None, access_log=False, lifespan="off", ws="none", proxy_headers=False)
    config.load()
    protocol = HttpToolsProtocol(config, ServerState(), {})
    protocol.connection_made(_Transport())
    protocol.data_received(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n")
    return protocol


def test_the_installed_version_is_the_supported_minor_version() -> None:
    assert version("uvicorn").split(".")[:2] == ["0", "54"]


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_callback_exists_with_the_parameters_that_dynserve_passes(name: str) -> None:
    found = inspect.signature(getattr(HttpToolsProtocol, name)).parameters
    assert [parameter for parameter in found if parameter != "self"] == CALLBACKS[name]


async def test_a_connection_has_the_attributes_that_dynserve_reads(connection: HttpToolsProtocol) -> None:
    assert vars(connection).keys() >= CONNECTION
    assert all(hasattr(connection.flow, name) for name in FLOW)
    assert not connection.pipeline
    await _end(connection)


async def test_a_request_in_progress_has_the_attributes_that_dynserve_reads(connection: HttpToolsProtocol) -> None:
    cycle = connection.cycle
    assert isinstance(cycle, RequestResponseCycle)
    assert vars(cycle).keys() >= CYCLE
    assert cycle.more_body and not cycle.body and not cycle.response_started and not cycle.response_complete
    connection.data_received(b"hi")
    assert bytes(cycle.body) == b"hi" and not cycle.more_body
    await _end(connection)


async def test_pipelined_requests_are_pairs_with_the_newest_first(connection: HttpToolsProtocol) -> None:
    connection.data_received(b"hi" + b"GET / HTTP/1.1\r\nhost: x\r\n\r\n" * 2)
    (newest, _), (older, _) = connection.pipeline
    assert connection.cycle is newest and older is not newest
    await _end(connection)


def test_status_lines_are_bytes_with_their_line_end() -> None:
    assert STATUS_LINE[200] == b"HTTP/1.1 200 OK\r\n"


async def _end(connection: HttpToolsProtocol) -> None:
    tasks = list(connection.tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    connection.connection_lost(None)
