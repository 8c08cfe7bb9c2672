"""The state that a hand-off carries from the context to the generation phase: TensorRT-LLM's `DisaggregatedParams`, as
msgpack.

`opaque_state` stays bytes; log-probabilities are objects there and triples here. `pairing` holds the properties that both
sides must share, because TensorRT-LLM's own messages carry no version.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from dynserve.errors import HandoffMismatch, translate
from dynserve.executors.trtllm.api import Api
from dynserve.wire import MALFORMED
from dynserve.wire.discovery import unlike
from dynserve.wire.requests import TokenLogprob

CONTEXT, GENERATION, BOTH = "context_only", "generation_only", "context_and_generation"


class _Plain(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of `DisaggregatedParams` with plain data; the others are for multimodal models, or are rebuilt."""

    disagg_request_id: int | None = None
    ctx_request_id: int | None = None
    first_gen_tokens: list[int] | None = None
    opaque_state: bytes | None = None
    draft_tokens: list[int] | None = None
    ctx_dp_rank: int | None = None
    ctx_info_endpoint: Any = None  # a string or strings; only the engine reads it


class _HandoffState(msgspec.Struct, frozen=True, kw_only=True):
    pairing: dict[str, str]
    plain: _Plain
    logprobs: list[list[tuple[int, float, int | None]]] | None = None


_LOGPROBS = "first_gen_log_probs"  # versions before 1.2.1 lack this field

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_HandoffState).decode
_NOT_OURS: dict[type[BaseException], Any] = dict.fromkeys(MALFORMED, HandoffMismatch)


def pack(params: Any, id_: int, pairing: Mapping[str, str], api: Api) -> bytes:
    """Encodes the params of a finished context phase. `id_` is its request id, which not every version returns."""
    found = {name: getattr(params, name) for name in _Plain.__struct_fields__ if name in api.handed_over}
    plain = _Plain(**(found | {"disagg_request_id": id_}))
    entries = params.first_gen_log_probs if _LOGPROBS in api.handed_over else None
    logprobs = [[(token, e.logprob, e.rank) for token, e in entry.items()] for entry in entries] if entries else None
    return _encode(_HandoffState(pairing=dict(pairing), plain=plain, logprobs=logprobs))


def unpack(state: bytes, pairing: Mapping[str, str], api: Api, known: Sequence[TokenLogprob] = ()) -> Any:
    """Returns params for the generation phase. `known` are the first tokens' log-probabilities, for versions without them.

    Raises:
        HandoffMismatch: the state is of another executor, or of one that differs; the message names both values.
    """
    with translate(_NOT_OURS, "the hand-off is not one of TensorRT-LLM's"):
        found = _decode(state)
    if difference := unlike(found.pairing, pairing, "prefill", "decode"):
        raise HandoffMismatch(difference)
    plain = {n: getattr(found.plain, n) for n in _Plain.__struct_fields__ if n in api.handed_over}
    logprobs = None
    if found.logprobs is not None:
        logprobs = [{id_: api.logprob(value, rank) for id_, value, rank in entry} for entry in found.logprobs]
    elif known:
        first = known[-len(found.plain.first_gen_tokens or ()) :]  # the prompt's entries may be in front
        logprobs = [_entry(one, api) for one in first]
    if _LOGPROBS in api.handed_over:
        plain[_LOGPROBS] = logprobs
    return api.disaggregated(request_type=GENERATION, **plain)


def _entry(known: TokenLogprob, api: Api) -> dict[int, Any]:
    found = {id_: api.logprob(value, rank) for rank, (id_, value) in enumerate(known.top, 1)}
    found.setdefault(known.token_id, api.logprob(known.logprob, None))
    return found
