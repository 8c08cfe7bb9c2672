from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynserve.wire import MALFORMED, discovery, events, link, requests
from tests.conftest import make_request

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=50)


@given(TOKENS)
def test_packed_tokens_unpack_to_themselves(token_ids: list[int]) -> None:
    assert requests.unpack_tokens(requests.pack_tokens(token_ids)) == token_ids


@given(TOKENS, st.binary(max_size=50), st.integers(0, 2**63 - 1))
def test_link_frames_decode_to_what_was_sent(token_ids: list[int], data: bytes, stream: int) -> None:
    handoff = requests.Handoff(
        id=stream, owner="p", request_id="r", sequence_hash=2**64 - 1, num_tokens=1, num_bytes=2, ttl_s=1.5, state=data
    )
    sent = [
        link.Tokens(stream, data, token_ids, [requests.TokenLogprob(1, -0.5, [(2, -1.0)])]),
        link.StepTokens([stream] * len(token_ids), token_ids, [data] * len(token_ids)),
        link.Finished(stream, data, token_ids, "stop", link.Usage(1, 2, 3), handoff),
        link.Failed(stream, "code", "text"),
        link.SubmitReply(stream, requests.Busy(3)),
        link.Snapshot(1, 2, token_ids, True),
    ]
    frame = bytearray()
    link.encode_into(sent, frame, 0)
    assert link.decode_from_worker(frame) == sent


DECODERS: list[Any] = [
    link.decode_from_worker,
    link.decode_from_frontend,
    requests.decode_request,
    requests.decode_ack,
    events.decode_kv,
    events.decode_load,
    events.decode_shares,
    discovery.decode,
]
COUNTS = st.integers(0, 2**40)


@given(st.text(max_size=20), COUNTS, st.lists(st.integers(0, 2**64 - 1), max_size=20), st.booleans())
def test_events_decode_to_what_was_sent(name: str, count: int, hashes: list[int], whole: bool) -> None:
    kv = events.KvEvents(name, count, 1, [events.Stored(None, hashes), events.Removed(hashes), events.Cleared()])
    assert events.decode_kv(events.encode(kv)) == kv
    report = events.LoadReport(name, events.Load(1, 2, 3, 4, 5, count), count, count)
    assert events.decode_load(events.encode(report)) == report
    shares = events.Shares(name, whole, [events.Share(name, count, count, 1)])
    assert events.decode_shares(events.encode(shares)) == shares


@given(st.binary(max_size=200))
def test_invalid_bytes_raise_only_decode_errors(data: bytes) -> None:
    for decode in DECODERS:
        try:
            decode(data)
        except MALFORMED:
            pass


REQUEST = make_request(
    [1, 2, 3],
    prior=requests.PriorOutput([4], [requests.TokenLogprob(4, -1.0)], 2),
    grammar=requests.Grammar(kind="json", text="{}", reasoning=requests.ReasoningTokens(begin=1, end=2, open=True)),
    pooling="mean",
)
VALID = [
    requests.encode(REQUEST),
    events.encode(events.KvEvents("w", 1, 1, [events.Stored(None, [1, 2]), events.Cleared()])),
    events.encode(events.LoadReport("w", events.Load(1, 2, 3, 4, 5, 6), 7, 8)),
    msgspec.msgpack.encode([link.Hello("w", 1), link.Tokens(1, b"x", [1, 2]), link.Snapshot(1, 2, [3], True)]),
    msgspec.msgpack.encode([link.Submit(REQUEST), link.Cancel(3)]),
]


@given(
    st.sampled_from(VALID),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=6),
    st.integers(0, 400),
)
def test_corrupted_messages_are_decoded_or_refused(message: bytes, changes: list[tuple[int, int]], cut: int) -> None:
    broken = bytearray(message)
    for at, byte in changes:
        broken[at % len(broken)] = byte
    for decode in DECODERS:
        try:
            decode(bytes(broken[: len(broken) - cut]))
        except MALFORMED:
            pass


def test_a_prompt_of_half_a_token_is_refused() -> None:
    raw = msgspec.msgpack.decode(requests.encode(REQUEST))
    with pytest.raises(MALFORMED):
        requests.decode_request(msgspec.msgpack.encode(raw | {"prompt": b"abc"}))


def test_a_request_decodes_to_what_was_sent() -> None:
    request = make_request(
        [1, 2, 3], prior=requests.PriorOutput([4], [requests.TokenLogprob(4, -1.0)], 2), cache_salt="s"
    )
    assert requests.decode_request(requests.encode(request)) == request


def test_an_unknown_message_tag_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        link.decode_from_worker(msgspec.msgpack.encode([[99, 1]]))
