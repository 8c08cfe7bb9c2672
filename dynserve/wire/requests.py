"""The request plane: one request to one chosen instance, and its acknowledgement.

A `GenerateRequest` holds everything that a worker needs; workers never parse OpenAI's JSON.
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
    StreamId,
    Temperature,
    TokenId,
)

Phase = Literal["aggregated", "prefill", "decode"]
Pooling = Literal["mean", "last"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The sampling of tokens. `temperature` 0 is greedy. `seed` is always set, so all workers draw the same tokens."""

    temperature: Temperature = 1.0
    top_p: Fraction = 1.0
    top_k: Count = 0  # 0: all
    min_p: Fraction = 0.0
    seed: Count = 0
    presence_penalty: Shift = 0.0
    frequency_penalty: Shift = 0.0
    repetition_penalty: Factor = 1.0
    logit_bias: dict[TokenId, Shift] = {}
    logprobs: Count | None = None  # None: off; 0: only the sampled token; k: also the k likeliest tokens
    prompt_logprobs: bool = False  # also for the prompt's tokens, before those of the first sampled token

    @property
    def greedy(self) -> bool:
        # below this, division by the temperature overflows; the likeliest token is already certain at this value
        return self.temperature < 1e-5 or self.top_k == 1


class StopConditions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The conditions that end an answer."""

    max_tokens: Count
    min_tokens: Count = 0
    strings: tuple[str, ...] = ()
    token_ids: tuple[TokenId, ...] = ()
    ignore_eos: bool = False
    include_string: bool = False


class ReasoningTokens(msgspec.Struct, frozen=True, kw_only=True):
    """The token ids around a model's reasoning. `open`: the prompt has already opened the reasoning."""

    begin: TokenId
    end: TokenId
    open: bool


class Grammar(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A grammar that the answer follows, after the model's reasoning, if any.

    `text` is a JSON schema, a regular expression, an EBNF grammar with the rule `root`, or a structural tag (xgrammar's
    JSON description of tagged formats, which TensorRT-LLM accepts too). `rules` is the same with EBNF instead of JSON
    schemas, for engines with xgrammar, whose compiler of schemas drops some of their words; empty where there are none.
    """

    kind: Literal["json", "regex", "grammar", "structural_tag"]
    text: str
    rules: str = ""
    reasoning: ReasoningTokens | None = None


class ReasoningParsing(msgspec.Struct, frozen=True, kw_only=True):
    """The parser that separates reasoning from the answer. `open`: the prompt ends within reasoning."""

    parser: str
    open: bool = False


class ToolName(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A tool as the client knows it, where the model sees a function of another name or form. The input of a `custom` tool
    is a text."""

    name: str
    namespace: str = ""
    custom: bool = False


class ToolParsing(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The parser that converts text to tool calls. `enforced`: a grammar enforces the calls, so they can be streamed.
    `named`: the client has chosen the tool by name. `client_names`: tools by the names that the model uses."""

    parser: str
    names: tuple[str, ...]
    enforced: bool = False
    named: bool = False
    client_names: dict[str, ToolName] = {}


class RenderOptions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The options with which the worker renders the bytes of the answer."""

    kind: Literal["chat", "completion", "response", "message", "embedding"]
    response_id: str
    model: str
    created: Count  # seconds since 1970
    stream: bool = False
    usage: bool = False  # a last chunk with the token counts
    continuous_usage: bool = False  # the token counts so far in every chunk
    logprobs: Count | None = None
    skip_special_tokens: bool = True
    index: Count = 0
    part: bool = False  # one of several choices, which the frontend joins
    echo: bool = False  # the prompt's text first
    reasoning: ReasoningParsing | None = None
    tools: ToolParsing | None = None
    frame: str = ""  # JSON object: constant fields of a Responses answer
    event_ids: bool = False  # number the events of a stream
    dimensions: Count = 0  # of an embedding; 0: all
    base64: bool = False  # an embedding as base64 of little-endian float32


UNLIKELY = -9999.0  # for a log-probability that is missing, infinite or NaN; JSON has no infinity


def finite(logprob: float) -> float:
    """Returns a valid log-probability, or else `UNLIKELY`: one invalid number must not break the link for all requests."""
    return logprob if UNLIKELY <= logprob <= 1e6 else UNLIKELY


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """The natural-log probability of one sampled token, and of the likeliest tokens at its position, best first."""

    token_id: TokenId
    logprob: Logprob
    top: list[tuple[TokenId, Logprob]] = []


class PriorOutput(msgspec.Struct, frozen=True, omit_defaults=True):
    """The output of the same request that the client has already: of its prefill, or of workers that were lost."""

    token_ids: list[TokenId]
    logprobs: list[TokenLogprob] = []
    cached_tokens: Count = 0

    def followed_by(self, token_ids: list[TokenId], logprobs: list[TokenLogprob]) -> PriorOutput:
        """Returns this output and what has come after it."""
        return PriorOutput([*self.token_ids, *token_ids], [*self.logprobs, *logprobs], self.cached_tokens)


class AnswerEnding(msgspec.Struct, frozen=True, omit_defaults=True):
    """The end of an answer whose tokens are all known."""

    reason: str
    stop_token: TokenId | None = None


EventId = tuple[Count, Count]  # tokens of the answer up to an event of its stream, and the event's number among theirs


def answer_tag(response_id: str) -> str:
    """A name that tells answers apart which were asked for under one request id."""
    return response_id[-12:]


class Resumable(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The terms of an answer whose client may lose its connection and come back for the rest. It is kept for `keep_s`
    seconds, for requests of the same `owner` only."""

    keep_s: Seconds
    owner: str = ""
    after: EventId | None = None  # the client's last event: those after it are sent again
    ending: AnswerEnding | None = None  # nothing is missing but events


class Handoff(msgspec.Struct, frozen=True, kw_only=True):
    """The KV cache of a finished prefill, which its owner keeps for a decode worker.

    `state` depends on the executor: for the torch executor the transceiver's address and memory layout, for
    TensorRT-LLM its `disaggregated_params`.
    """

    id: BlockHash
    owner: str  # instance id of the prefill worker
    request_id: str
    sequence_hash: BlockHash  # rolling hash over all `num_tokens`, salt included
    num_tokens: Count  # of the prompt, and of the output that the prefill computed with it
    num_bytes: Count
    ttl_s: Seconds  # time to live, from the creation of this message; clocks are not shared
    state: bytes


class Generation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One answer to generate: its prompt, sampling, stop conditions, rendering and grammar.

    `prompt` holds token ids as little-endian u32: compact, and the exact input of block hashes.
    """

    prompt: bytes
    sampling: SamplingParams
    stop: StopConditions
    render: RenderOptions
    grammar: Grammar | None = None
    pooling: Pooling | None = None  # the answer is an embedding of the prompt

    def __post_init__(self) -> None:
        if len(self.prompt) % 4:
            raise ValueError(f"the prompt has {len(self.prompt)} bytes, which is not a multiple of 4 (u32 token ids)")

    @property
    def num_tokens(self) -> int:
        """The number of tokens of the prompt."""
        return len(self.prompt) // 4

    @property
    def needs_whole_prompt(self) -> bool:
        """Whether every position of the prompt must be computed, without the prefix cache."""
        return self.pooling is not None or self.sampling.prompt_logprobs


class GenerateRequest(Generation, frozen=True, kw_only=True, omit_defaults=True, tag="generate"):
    """A `Generation` for one worker and one phase."""

    id: str
    stream: StreamId  # identifies the answer on the link to `reply_to`; a frontend never reuses it
    reply_to: str
    model: str
    phase: Phase
    timeout_s: Seconds
    cache_salt: str = ""
    adapter: str = ""  # name of a LoRA adapter; empty: the model itself
    priority: int = 0  # higher goes first, where the engine has a priority queue
    session: str = ""  # requests of one session share their prefix, and may share a rank of the engine
    trace_headers: dict[str, str] = {}  # of W3C trace context, for the engine's own spans
    prior: PriorOutput | None = None
    handoff: Handoff | None = None
    resumable: Resumable | None = None

    @property
    def prior_tokens(self) -> list[TokenId]:
        """The output that the client has already."""
        return self.prior.token_ids if self.prior is not None else []

    def computed(self, num_tokens: int) -> bytes:
        """The first tokens of the prompt and its prior output, as little-endian u32."""
        more = num_tokens - self.num_tokens
        return self.prompt + pack_tokens(self.prior_tokens[:more]) if more > 0 else self.prompt


# Returns the fields of a `Generation`, from which a `GenerateRequest` is made.
fields_of = msgspec.structs.asdict


class Accepted(msgspec.Struct, frozen=True, tag="accepted"):
    pass


class Busy(msgspec.Struct, frozen=True, tag="busy"):
    """The worker's queue is full; another worker may accept the request."""

    waiting: Count


class Draining(msgspec.Struct, frozen=True, tag="draining"):
    """The worker is shutting down and accepts no requests."""


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The worker cannot serve this request, now or later."""

    code: str
    message: str
    param: str | None = None  # the invalid field


Ack = Accepted | Busy | Draining | Refused

encode = msgspec.msgpack.Encoder().encode
decode_request = msgspec.msgpack.Decoder(GenerateRequest).decode
decode_ack = msgspec.msgpack.Decoder(Ack).decode


def pack_tokens(token_ids: list[int]) -> bytes:
    """Returns token ids as little-endian u32."""
    return array("I", token_ids).tobytes()


def num_tokens(packed: bytes) -> int:
    return len(packed) // 4


def unpack_tokens(packed: bytes) -> list[int]:
    return array("I", packed).tolist()


# `array("I")` uses the machine's byte order and int width; the wire format needs little-endian and 4 bytes.
if array("I", [1]).tobytes() != b"\x01\x00\x00\x00":
    raise ImportError("dynserve needs a little-endian machine with 4-byte ints")
