"""The messages of the link between one worker and one frontend.

A frame is a msgpack array of all messages that one side sends in one turn of its event loop. Messages are arrays with a
small integer in front (msgspec's array-like tagged structs). Most tokens travel in `StepTokens`, one message for all
sequences of an engine step; `Tokens` carries those that do not fit into its columns.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from dynserve.wire.events import KvEvents, LoadReport
from dynserve.wire.numbers import BlockHash, Count, Seconds, StreamId, TokenId
from dynserve.wire.requests import Ack, GenerateRequest, Handoff, TokenLogprob

VERSION = 4  # of the messages below; a new field at the end of a struct does not change it


class Usage(msgspec.Struct, frozen=True, array_like=True):
    """Token counts of a whole answer, over all phases, and the durations of this phase."""

    prompt_tokens: Count
    completion_tokens: Count
    cached_tokens: Count
    queue_s: Seconds = 0.0
    transfer_s: Seconds = 0.0
    prefill_s: Seconds = 0.0  # from the end of queueing to the first token
    reasoning_tokens: Count = 0  # the part of `completion_tokens` that was reasoning


# worker to frontend


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """The first message of a worker. `epoch`: changes with every start of the process. `frontend_id`: the expected peer."""

    instance_id: str
    epoch: Count
    frontend_id: str = ""
    version: Count = VERSION


class Tokens(msgspec.Struct, array_like=True, tag=2, gc=False):
    """New tokens of one stream, and the bytes to send to the client for them (maybe none: an incomplete character)."""

    stream: StreamId
    data: bytes
    token_ids: list[TokenId]
    logprobs: list[TokenLogprob] | None = None
    cached_tokens: Count = 0  # of the prompt, in the first message of an answer


class StepTokens(msgspec.Struct, array_like=True, tag=9, gc=False):
    """The usual result of an engine step: one token each of many streams, in three columns of equal length. `data`: the
    bytes to send to the client, as in `Tokens`."""

    streams: list[StreamId]
    token_ids: list[TokenId]
    data: list[bytes]


class Finished(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """The last message of a stream: last tokens, last bytes. With a hand-off the answer continues at a decode worker."""

    stream: StreamId
    data: bytes
    token_ids: list[TokenId]
    reason: str
    usage: Usage
    handoff: Handoff | None = None
    logprobs: list[TokenLogprob] | None = None


class Failed(msgspec.Struct, frozen=True, array_like=True, tag=4):
    stream: StreamId
    code: str
    message: str
    param: str | None = None  # the invalid field


class SubmitReply(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """The acknowledgement of a request, whichever transport carried it."""

    stream: StreamId
    ack: Ack


class Snapshot(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """A part of the worker's prefix index, valid once the part with `last` has arrived. Events after `event_id` apply on
    top. `request`: copied from the `SnapshotRequest`."""

    epoch: Count
    event_id: Annotated[int, msgspec.Meta(ge=-1)]
    hashes: list[BlockHash]
    last: bool
    request: Count = 0


class WorkerPing(msgspec.Struct, frozen=True, array_like=True, tag=7):
    pass


class HandoffDeclined(msgspec.Struct, frozen=True, array_like=True, tag=8):
    """A report that a decode stream starts without its hand-off, whose blocks are still allocated on the prefill worker."""

    stream: StreamId


class Leaving(msgspec.Struct, frozen=True, array_like=True, tag=10):
    """A report that the worker is stopping and accepts no requests. With `migrate`, it does not finish its streams: other
    workers are to continue them."""

    migrate: bool = False


class LinkLoad(msgspec.Struct, frozen=True, array_like=True, tag=11):
    """A load report for a frontend that NATS does not reach."""

    report: LoadReport


class LinkKvEvents(msgspec.Struct, frozen=True, array_like=True, tag=12):
    """KV events for a frontend that NATS does not reach. Their ids are those of the events over NATS."""

    batch: KvEvents


class Adopted(msgspec.Struct, frozen=True, array_like=True, tag=13):
    """The reply to `Adopt`: the answer that is kept, as a request with all its output, or None. It stays kept, too."""

    number: Count
    request: GenerateRequest | None = None


# frontend to worker


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag=21):
    """The first message of a frontend, in reply to `Hello`."""

    frontend_id: str
    version: int = VERSION
    ping_s: Seconds = 0.0  # a worker with nothing to send pings so often; 0: as often as it likes


class Cancel(msgspec.Struct, frozen=True, array_like=True, tag=22):
    """A request to stop the stream and to free the blocks of its hand-off, if any. No reply follows."""

    stream: StreamId


class Submit(msgspec.Struct, frozen=True, array_like=True, tag=23):
    """A request sent over the link as fallback: NATS is down, has no subscriber, timed out, or the request is too large."""

    request: GenerateRequest


class SnapshotRequest(msgspec.Struct, frozen=True, array_like=True, tag=24):
    request: Count = 0


class HandoffDone(msgspec.Struct, frozen=True, array_like=True, tag=26):
    """A report that the stream's hand-off is not needed any more: its decode worker has answered. No reply follows."""

    stream: StreamId


class EventsByLink(msgspec.Struct, frozen=True, array_like=True, tag=27):
    """A request to send load reports and KV events over the link, too, because NATS is down or silent; or to stop that."""

    wanted: bool


class Keep(msgspec.Struct, frozen=True, array_like=True, tag=28):
    """A resumable answer whose client has lost its connection, with all its output so far."""

    request: GenerateRequest


class Adopt(msgspec.Struct, frozen=True, array_like=True, tag=29):
    """A request for a resumable answer, whose client has come back."""

    number: Count
    owner: str
    request_id: str
    tag: str  # of the answer: see `answer_tag`


class FrontendPing(msgspec.Struct, frozen=True, array_like=True, tag=25):
    pass


FromWorker = (
    Hello | Tokens | StepTokens | Finished | Failed | SubmitReply | Snapshot | HandoffDeclined | WorkerPing | Leaving
    | LinkLoad | LinkKvEvents | Adopted
)  # fmt: skip
FromFrontend = Welcome | Cancel | Submit | SnapshotRequest | HandoffDone | EventsByLink | Keep | Adopt | FrontendPing

encode_into = msgspec.msgpack.Encoder().encode_into
decode_from_worker = msgspec.msgpack.Decoder(list[FromWorker]).decode
decode_from_frontend = msgspec.msgpack.Decoder(list[FromFrontend]).decode
