"""The request plane: one request to one chosen instance, and the acknowledgement that comes back.

A `GenerateRequest` is all that a worker needs; nothing below the frontend knows OpenAI's JSON.
"""

from __future__ import annotations

from array import array
from typing import Literal

import msgspec

from dynserve.wire.numbers import (
    BlockHash,
    Count,
    Factor,
    Fraction,
    Logprob,
    Seconds,
    Shift,
    Temperature,
    TokenId,
)

Phase = Literal["aggregated", "prefill", "decode"]
Pooling = Literal["mean", "last"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the next token is chosen. `temperature` 0 is greedy; `seed` is always set, so any worker draws the same."""

    temperature: Temperature = 1.0
    top_p: Fraction = 1.0
    top_k: Count = 0  # 0: all
    min_p: Fraction = 0.0
    seed: Count = 0
    presence_penalty: Shift = 0.0
    frequency_penalty: Shift = 0.0
    repetition_penalty: Factor = 1.0
    logit_bias: dict[TokenId, Shift] = {}
    logprobs: Count | None = None  # None: none; 0: of the sampled token; k: of the k likeliest as well
    prompt_logprobs: bool = False  # and of the prompt's tokens: they come in front of those of the first token

    @property
    def greedy(self) -> bool:
        # below this, dividing by the temperature overflows; the likeliest token is certain long before
        return self.temperature < 1e-5 or self.top_k == 1


class StopConditions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """When the answer ends."""

    max_tokens: Count
    min_tokens: Count = 0
    strings: tuple[str, ...] = ()
    token_ids: tuple[TokenId, ...] = ()
    ignore_eos: bool = False
    include_string: bool = False


class ReasoningTokens(msgspec.Struct, frozen=True, kw_only=True):
    """Token ids around what a model thinks before it answers; `open`: the prompt has begun a thought already."""

    begin: TokenId
    end: TokenId
    open: bool


class Grammar(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A grammar that the answer follows, from behind the model's thought where it has one.

    `text` is a JSON schema, a regular expression, an EBNF grammar with the rule `root`, or a structural tag (xgrammar's
    JSON description of tagged formats, which TensorRT-LLM takes too).
    """

    kind: Literal["json", "regex", "grammar", "structural_tag"]
    text: str
    reasoning: ReasoningTokens | None = None


class ReasoningParsing(msgspec.Struct, frozen=True, kw_only=True):
    """The parser that keeps thoughts out of the answer; `open`: the prompt ends within a thought."""

    parser: str
    open: bool = False


class ToolParsing(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The parser that makes tool calls of text. `enforced`: a grammar holds the calls, so they may be shown as they grow.
    `named`: the client has chosen the tool itself."""

    parser: str
    names: tuple[str, ...]
    enforced: bool = False
    named: bool = False


class RenderOptions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the client wants to see; the worker makes these bytes."""

    kind: Literal["chat", "completion", "response", "message", "embedding"]
    response_id: str
    model: str
    created: Count  # seconds since 1970
    stream: bool = False
    usage: bool = False  # a last chunk with the token counts
    continuous_usage: bool = False  # and counts so far in every chunk
    logprobs: Count | None = None
    skip_special_tokens: bool = True
    index: Count = 0
    part: bool = False  # one of several choices: the frontend makes what is around them
    echo: bool = False  # the prompt's text first
    reasoning: ReasoningParsing | None = None
    tools: ToolParsing | None = None
    frame: str = ""  # JSON object: constant fields of a Responses answer
    dimensions: Count = 0  # of an embedding; 0: all
    base64: bool = False  # an embedding as base64 of little-endian float32


UNLIKELY = -9999.0  # for a probability that an engine did not give, or gave as no number; JSON has no infinity


def finite(logprob: float) -> float:
    """The log-probability itself, where it is one: a model whose numbers overflow must not cost others their link."""
    return logprob if UNLIKELY <= logprob <= 1e6 else UNLIKELY


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Natural-log probability of one sampled token, and of the likeliest tokens at its position, best first."""

    token_id: TokenId
    logprob: Logprob
    top: list[tuple[TokenId, Logprob]] = []


class PriorOutput(msgspec.Struct, frozen=True, omit_defaults=True):
    """What earlier phases of the same request already gave to the client."""

    token_ids: list[TokenId]
    logprobs: list[TokenLogprob] = []
    cached_tokens: Count = 0


class Handoff(msgspec.Struct, frozen=True, kw_only=True):
    """A finished prefill's KV cache, waiting on its owner for a decode worker to take it.

    `state` is the executor's own: for the torch executor the transceiver's address and memory layout, for
    TensorRT-LLM its `disaggregated_params`.
    """

    id: BlockHash
    owner: str  # instance id of the prefill worker
    request_id: str
    sequence_hash: BlockHash  # rolling hash over the whole prompt, salt included
    num_tokens: Count
    num_bytes: Count
    ttl_s: Seconds  # from the moment the owner wrote this; clocks are not shared
    state: bytes


class Generation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One answer that is to be generated: its prompt, and how it is sampled, ended, constrained and rendered.

    `prompt` holds token ids as little-endian u32: compact, and the very bytes that block hashes are made of.
    """

    prompt: bytes
    sampling: SamplingParams
    stop: StopConditions
    render: RenderOptions
    grammar: Grammar | None = None
    pooling: Pooling | None = None  # the answer is an embedding of the prompt

    def __post_init__(self) -> None:
        if len(self.prompt) % 4:
            raise ValueError("the prompt is not made of 4-byte token ids")

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt) // 4

    @property
    def needs_whole_prompt(self) -> bool:
        """Whether every position of the prompt has to be computed, so that nothing of it may come from a cache."""
        return self.pooling is not None or self.sampling.prompt_logprobs


class GenerateRequest(Generation, frozen=True, kw_only=True, omit_defaults=True, tag="generate"):
    """A `Generation` on its way to one worker, for one phase."""

    id: str
    stream: Count  # names the answer on the link to `reply_to`; never reused by a frontend
    reply_to: str
    model: str
    phase: Phase
    timeout_s: Seconds
    cache_salt: str = ""
    adapter: str = ""  # name of a LoRA adapter; empty: the model itself
    priority: int = 0  # higher goes first, where the engine has a queue in order of priority
    prior: PriorOutput | None = None
    handoff: Handoff | None = None


# The fields of a `Generation`, for the request that carries it to a worker.
fields_of = msgspec.structs.asdict


class Accepted(msgspec.Struct, frozen=True, tag="accepted"):
    pass


class Busy(msgspec.Struct, frozen=True, tag="busy"):
    """The queue is full; another worker may not be."""

    waiting: Count


class Draining(msgspec.Struct, frozen=True, tag="draining"):
    """The worker is leaving."""


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """This worker cannot serve this request, now or later."""

    code: str
    message: str
    param: str | None = None  # the field that is at fault


Ack = Accepted | Busy | Draining | Refused

encode = msgspec.msgpack.Encoder().encode
decode_request = msgspec.msgpack.Decoder(GenerateRequest).decode
decode_ack = msgspec.msgpack.Decoder(Ack).decode


def pack_tokens(token_ids: list[int]) -> bytes:
    """Token ids as little-endian u32."""
    return array("I", token_ids).tobytes()


def num_tokens(packed: bytes) -> int:
    return len(packed) // 4


def unpack_tokens(packed: bytes) -> list[int]:
    return array("I", packed).tolist()


# `array("I")` writes the machine's own order and width; every machine that serves models has this one.
if array("I", [1]).tobytes() != b"\x01\x00\x00\x00":
    raise ImportError("dynserve needs a little-endian machine with 4-byte ints")
