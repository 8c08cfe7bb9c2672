"""What a hand-off carries from the context phase to the generation phase: TensorRT-LLM's `DisaggregatedParams`, as msgpack.

`opaque_state` is bytes and stays bytes; log-probabilities are objects there and triples here. Beside them stands what both
sides must have in common, because TensorRT-LLM's own messages carry no version.
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
    """Of `DisaggregatedParams`, what is plain data; the rest belongs to multimodal models, or is rebuilt."""

    disagg_request_id: int | None = None
    ctx_request_id: int | None = None
    first_gen_tokens: list[int] | None = None
    opaque_state: bytes | None = None
    draft_tokens: list[int] | None = None
    ctx_dp_rank: int | None = None
    ctx_info_endpoint: Any = None  # text, or texts; the engine's own


class _HandoffState(msgspec.Struct, frozen=True, kw_only=True):
    pairing: dict[str, str]
    plain: _Plain
    logprobs: list[list[tuple[int, float, int | None]]] | None = None


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_HandoffState).decode
_NOT_OURS: dict[type[BaseException], Any] = dict.fromkeys(MALFORMED, HandoffMismatch)


def pack(params: Any, id_: int, pairing: Mapping[str, str], api: Api) -> bytes:
    """The params that a context phase has left. `id_` is what it was given: not every version says it again."""
    found = {name: getattr(params, name) for name in _Plain.__struct_fields__ if name in api.handed_over}
    plain = _Plain(**(found | {"disagg_request_id": id_}))
    entries = params.first_gen_log_probs
    logprobs = [[(token, e.logprob, e.rank) for token, e in entry.items()] for entry in entries] if entries else None
    return _encode(_HandoffState(pairing=dict(pairing), plain=plain, logprobs=logprobs))


def unpack(state: bytes, pairing: Mapping[str, str], api: Api, known: Sequence[TokenLogprob] = ()) -> Any:
    """Params for the generation phase. `known` are log-probabilities of the first tokens, for versions that leave them out.

    Raises:
        HandoffMismatch: it was made by another executor, or by one that differs; the text names both values.
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
        first = known[-len(found.plain.first_gen_tokens or ()) :]  # a prompt's own may be in front
        logprobs = [_entry(one, api) for one in first]
    return api.disaggregated(request_type=GENERATION, first_gen_log_probs=logprobs, **plain)


def _entry(known: TokenLogprob, api: Api) -> dict[int, Any]:
    found = {id_: api.logprob(value, rank) for rank, (id_, value) in enumerate(known.top, 1)}
    found.setdefault(known.token_id, api.logprob(known.logprob, None))
    return found
