"""The link between one worker and one frontend: what each side says.

A frame is a msgpack array of messages: all that one side sends in one turn of its event loop. Messages are arrays with a
small integer in front (msgspec's array-like tagged structs). Most tokens travel in `StepTokens`, one message for all
sequences of an engine step; `Tokens` carries those that do not fit into its columns.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from dynserve.wire.numbers import BlockHash, Count, Seconds, TokenId
from dynserve.wire.requests import Ack, GenerateRequest, Handoff, TokenLogprob

VERSION = 3  # of what follows; a field at a struct's end does not change it


class Usage(msgspec.Struct, frozen=True, array_like=True):
    """Token counts of a whole answer, over all phases, and what this phase cost (seconds)."""

    prompt_tokens: Count
    completion_tokens: Count
    cached_tokens: Count
    queue_s: Seconds = 0.0
    transfer_s: Seconds = 0.0
    prefill_s: Seconds = 0.0  # from leaving the queue to the first token
    reasoning_tokens: Count = 0  # those of the completion that were a thought


# worker to frontend


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """First message of a worker. `epoch` changes with every start of the process; `frontend_id` is whom it looks for."""

    instance_id: str
    epoch: Count
    frontend_id: str = ""
    version: Count = VERSION


class Tokens(msgspec.Struct, array_like=True, tag=2, gc=False):
    """New tokens of one stream and the bytes that the client reads for them (maybe none: an unfinished character)."""

    stream: Count
    data: bytes
    token_ids: list[TokenId]
    logprobs: list[TokenLogprob] | None = None


class StepTokens(msgspec.Struct, array_like=True, tag=9, gc=False):
    """What an engine step mostly is: one token each of many streams, in three columns of one length. `data` is what the
    client reads for it, as in `Tokens`."""

    streams: list[Count]
    token_ids: list[TokenId]
    data: list[bytes]


class Finished(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """The stream's last message: last tokens, last bytes. With a hand-off the answer goes on at a decode worker."""

    stream: Count
    data: bytes
    token_ids: list[TokenId]
    reason: str
    usage: Usage
    handoff: Handoff | None = None
    logprobs: list[TokenLogprob] | None = None


class Failed(msgspec.Struct, frozen=True, array_like=True, tag=4):
    stream: Count
    code: str
    message: str
    param: str | None = None  # the field that is at fault


class SubmitReply(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """Acknowledges a request, whichever road it came by."""

    stream: Count
    ack: Ack


class Snapshot(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """A part of the worker's prefix index, valid once `last` is seen; events after `event_id` apply on top. `request` is
    that of the `SnapshotRequest` it answers."""

    epoch: Count
    event_id: Annotated[int, msgspec.Meta(ge=-1)]
    hashes: list[BlockHash]
    last: bool
    request: Count = 0


class WorkerPing(msgspec.Struct, frozen=True, array_like=True, tag=7):
    pass


class HandoffDeclined(msgspec.Struct, frozen=True, array_like=True, tag=8):
    """A decode stream begins without the hand-off that it was given: whoever left that one still holds its blocks."""

    stream: Count


# frontend to worker


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag=21):
    """First message of a frontend, in answer to `Hello`."""

    frontend_id: str
    version: int = VERSION


class Cancel(msgspec.Struct, frozen=True, array_like=True, tag=22):
    """Stop the stream, and give up a hand-off that it left behind. No answer follows."""

    stream: Count


class Submit(msgspec.Struct, frozen=True, array_like=True, tag=23):
    """A request on the spare road: NATS is down, found nobody or was silent, or the request is larger than it carries."""

    request: GenerateRequest


class SnapshotRequest(msgspec.Struct, frozen=True, array_like=True, tag=24):
    request: Count = 0


class HandoffDone(msgspec.Struct, frozen=True, array_like=True, tag=26):
    """The hand-off that the stream left has done its work: its decode worker has answered. No answer follows."""

    stream: Count


class FrontendPing(msgspec.Struct, frozen=True, array_like=True, tag=25):
    pass


FromWorker = Hello | Tokens | StepTokens | Finished | Failed | SubmitReply | Snapshot | HandoffDeclined | WorkerPing
FromFrontend = Welcome | Cancel | Submit | SnapshotRequest | HandoffDone | FrontendPing

encode_into = msgspec.msgpack.Encoder().encode_into
decode_from_worker = msgspec.msgpack.Decoder(list[FromWorker]).decode
decode_from_frontend = msgspec.msgpack.Decoder(list[FromFrontend]).decode
