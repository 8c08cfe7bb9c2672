"""What the proxy and its engine say to each other: msgpack, four bytes of length in front."""

from __future__ import annotations

import socket
import struct
from typing import Any

import msgspec

from dynserve.wire.requests import GenerateRequest


class Setup(msgspec.Struct, tag=True):
    model: str
    executor: str
    options: dict[str, Any]
    ranks: int
    windows: list[int]
    attention_dp: bool
    stats: bool
    partial: bool
    v2: bool  # the second cache manager
    stream_interval: int
    token_hashes: bool  # blocks of events tell their salt
    appends_eos: bool


class Submit(msgspec.Struct, tag=True):
    id: int
    request: GenerateRequest
    rank: int
    salt: str
    lora: str
    streaming: bool
    end_id: int
    perf: bool
    lora_error: str = ""


class Abort(msgspec.Struct, tag=True):
    id: int
    early: bool


class Crash(msgspec.Struct, tag=True):
    """The end of the engine's event loop, in a process that lives on."""

    text: str


class Shutdown(msgspec.Struct, tag=True):
    pass


class Ready(msgspec.Struct, tag=True):
    num_blocks: int
    block_size: int
    max_seq_len: int
    error: str = ""


class Context(msgspec.Struct):
    state: bytes
    rank: int
    endpoint: str


class Response(msgspec.Struct, tag=True):
    id: int
    token_ids: list[int] = []
    logprobs: list[list[tuple[int, float, int]]] = []
    prompt_logprobs: list[list[tuple[int, float, int]]] = []
    finish_reason: str = ""
    stop_reason: int | None = None
    cached_tokens: int = -1
    disaggregated: Context | None = None
    times: list[float] | None = None
    blocks: tuple[int, int] = (0, 0)
    error: str = ""


class Rows(msgspec.Struct, tag=True):
    events: list[bytes] = []
    stats: list[bytes] = []


class Fatal(msgspec.Struct, tag=True):
    text: str


ToEngine = Setup | Submit | Abort | Crash | Shutdown
FromEngine = Ready | Response | Rows | Fatal

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(list[ToEngine]).decode
decode_from_engine = msgspec.msgpack.Decoder(list[FromEngine]).decode
_length = struct.Struct("<I")


def framed(messages: list[Any]) -> bytes:
    payload = encode(messages)
    return _length.pack(len(payload)) + payload


def read_frame(sock: socket.socket) -> bytes | None:
    """None at the end of the stream."""
    head = _exactly(sock, 4)
    return _exactly(sock, _length.unpack(head)[0]) if head is not None else None


def _exactly(sock: socket.socket, size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        try:
            got = sock.recv(size - len(data))
        except OSError:
            return None
        if not got:
            return None
        data += got
    return bytes(data)
