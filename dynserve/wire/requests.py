"""The request plane: one request to one chosen instance, and the acknowledgement that comes back.

A `GenerateRequest` is all that a worker needs; nothing below the frontend knows OpenAI's JSON.
"""

from __future__ import annotations

from array import array
from typing import Literal

import msgspec

Phase = Literal["aggregated", "prefill", "decode"]


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the next token is chosen. `temperature` 0 is greedy; `seed` is always set, so any worker draws the same."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None  # None: none; 0: of the sampled token; k: of the k likeliest as well

    @property
    def greedy(self) -> bool:
        # below this, dividing by the temperature overflows; the likeliest token is certain long before
        return self.temperature < 1e-5 or self.top_k == 1


class Stop(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """When the answer ends."""

    max_tokens: int
    min_tokens: int = 0
    strings: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_string: bool = False


class Render(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the client wants to see; the worker makes these bytes."""

    kind: Literal["chat", "completion"]
    response_id: str
    model: str
    created: int  # seconds since 1970
    stream: bool = False
    usage: bool = False  # a last chunk with the token counts
    logprobs: int | None = None
    skip_special_tokens: bool = True


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Natural-log probability of one sampled token, and of the likeliest tokens at its position, best first."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = []


class Prior(msgspec.Struct, frozen=True, omit_defaults=True):
    """What earlier phases of the same request already gave to the client."""

    token_ids: list[int]
    logprobs: list[TokenLogprob] = []
    cached_tokens: int = 0


class Handoff(msgspec.Struct, frozen=True, kw_only=True):
    """A finished prefill's KV cache, waiting on its owner for a decode worker to take it.

    `state` is the executor's own: for the torch executor the transceiver's address and memory layout, for
    TensorRT-LLM its `disaggregated_params`.
    """

    id: int
    owner: str  # instance id of the prefill worker
    request_id: str
    sequence_hash: int  # rolling hash over the whole prompt, salt included
    num_tokens: int
    num_bytes: int
    ttl_s: float  # from the moment the owner wrote this; clocks are not shared
    state: bytes


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="generate"):
    """`prompt` holds token ids as little-endian u32: compact, and the very bytes that block hashes are made of."""

    id: str
    stream: int  # names the answer on the link to `reply_to`; never reused by a frontend
    reply_to: str
    model: str
    phase: Phase
    prompt: bytes
    sampling: Sampling
    stop: Stop
    render: Render
    timeout_s: float
    cache_salt: str = ""
    prior: Prior | None = None
    handoff: Handoff | None = None


class Accepted(msgspec.Struct, frozen=True, tag="accepted"):
    pass


class Busy(msgspec.Struct, frozen=True, tag="busy"):
    """The queue is full; another worker may not be."""

    waiting: int


class Draining(msgspec.Struct, frozen=True, tag="draining"):
    """The worker is leaving."""


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """This worker cannot serve this request, now or later."""

    code: str
    message: str


Ack = Accepted | Busy | Draining | Refused

encode = msgspec.msgpack.Encoder().encode
decode_request = msgspec.msgpack.Decoder(GenerateRequest).decode
decode_ack = msgspec.msgpack.Decoder(Ack).decode


def pack_tokens(token_ids: list[int]) -> bytes:
    """Token ids as little-endian u32."""
    return array("I", token_ids).tobytes()


def unpack_tokens(packed: bytes) -> list[int]:
    return array("I", packed).tolist()


# `array("I")` writes the machine's own order and width; every machine that serves models has this one.
if array("I", [1]).tobytes() != b"\x01\x00\x00\x00":
    raise ImportError("dynserve needs a little-endian machine with 4-byte ints")
