"""Translates TensorRT-LLM's results to `Output`s. The engine yields one object whose lists grow, so a cursor keeps the
position up to which it has been read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dynserve.errors import DynserveError, HandoffMismatch, InternalError, TimedOut
from dynserve.executors.base import Output
from dynserve.executors.trtllm.request import wants_prompt
from dynserve.wire.requests import UNLIKELY, GenerateRequest, TokenLogprob, finite


class Cursor:
    """Reads one result. `stops` are the tokens that end an answer, the engine's end of turn first; `known` are tokens
    that the client has already and that the engine returns again."""

    __slots__ = ("_again", "_entries", "_known", "_logprobs", "_prompt", "_request", "_seen", "_stops", "_top")

    def __init__(self, request: GenerateRequest, stops: Sequence[int], known: Sequence[int] = ()) -> None:
        self._request, self._stops, self._known = request, stops, list(known)
        self._seen = self._entries = 0
        self._again = bool(known)
        self._logprobs, self._top = request.sampling.logprobs is not None, request.sampling.logprobs or 0
        # whether the prompt's log-probabilities are requested and not returned yet
        self._prompt = wants_prompt(request)

    def read(self, result: Any) -> Output | None:
        """Returns the new part of the result, or None.

        Raises:
            HandoffMismatch: the engine does not continue from the tokens that the client has.
        """
        output = result.outputs[0]
        tokens = output.token_ids
        if self._known and not self._skip(tokens):
            if output.finish_reason is None:
                return None
            raise HandoffMismatch("the engine ended before it returned the context phase's tokens")
        new = tokens[self._seen :]
        self._seen += len(new)
        reason = output.finish_reason
        if reason is not None:
            return self.last(output, new, reason)
        if not new:
            return None
        if self._request.stop.max_tokens == 0:  # an engine computes at least one token
            return Output([], "length", self.logprobs(output, 0))
        return Output(new, None, self.logprobs(output, len(new)) if self._logprobs else None)

    def last(self, output: Any, new: list[int], reason: str) -> Output:
        """Returns the last output. `new` are the tokens of the result's last response."""
        if self._request.stop.max_tokens == 0:
            return Output([], "length", self.logprobs(output, 0))
        stop: int | None = None
        if reason == "stop":
            # versions differ in whether the token that ended an answer is in it
            if new and new[-1] in self._stops:
                stop = new.pop()
            elif isinstance(output.stop_reason, int):
                stop = output.stop_reason
            else:
                stop = self._stops[0] if self._stops else None
        elif reason != "length":
            return Output(new, error=_failure(reason))
        return Output(new, reason, self.logprobs(output, len(new)), stop)

    def logprobs(self, output: Any, count: int) -> list[TokenLogprob] | None:
        """Returns the log-probabilities of the next `count` tokens, with the prompt's in front of the first."""
        if not self._logprobs:
            return None
        found: list[TokenLogprob] = []
        if self._prompt:
            self._prompt = False
            found = prompt_entries(self._request.prompt, output.prompt_logprobs, self._top)
        tokens, entries = output.token_ids, output.logprobs
        # some versions have no entries for the context phase's tokens
        lacking = max(0, len(tokens) - len(entries)) if self._again else 0
        for at in range(self._entries, min(self._entries + count, len(entries) + lacking)):
            found.append(entry_of(tokens[at], entries[at - lacking], self._top))
        self._entries += count
        return found

    def _skip(self, tokens: list[int]) -> bool:
        """Returns False until the engine has returned all known tokens again."""
        known = self._known
        if tokens[: len(known)] != known[: len(tokens)]:
            raise HandoffMismatch("the engine began with other tokens than the context phase's")
        if len(tokens) < len(known):
            return False
        self._seen = self._entries = len(known)
        self._known = []
        return True


def has_context(result: Any) -> bool:
    """Whether a context phase has ended with blocks that the engine keeps for a generation phase."""
    output = result.outputs[0]
    params = output.disaggregated_params
    return (
        output.finish_reason in ("not_finished", "length") and params is not None and params.ctx_request_id is not None
    )


def read_context(result: Any, cursor: Cursor) -> Output | None:
    """Returns the output of a context phase: its token with the reason `handoff`, or the whole answer when that token
    ended it, or an error when the engine returned no hand-off. None while the result is not finished.
    """
    if not result.finished:
        return None
    output, *others = result.outputs
    reason, params = output.finish_reason, output.disaggregated_params
    tokens = list(output.token_ids)
    if reason not in ("not_finished", "length"):
        return cursor.last(output, tokens, reason or "no reason")
    if others or params is None or params.ctx_request_id is None:
        return Output(tokens, error=InternalError("the context phase returned no usable hand-off"))
    return Output(tokens, "handoff", cursor.logprobs(output, len(tokens)))


def note_costs(output: Output, result: Any, seconds: float) -> None:
    """Sets the output's cached tokens and times. The engine reports times with its last response only; before that,
    `prefill_s` is `seconds`, the time since the request was submitted."""
    output.cached_tokens = result.cached_tokens or 0
    output.prefill_s = seconds
    metrics = result.outputs[0].request_perf_metrics
    if metrics is None or metrics.timing_metrics is None:
        return
    times = metrics.timing_metrics
    output.queue_s = max(0.0, (times.first_scheduled_time - times.arrival_time).total_seconds())
    output.transfer_s = max(0.0, (times.kv_cache_transfer_end - times.kv_cache_transfer_start).total_seconds())
    output.prefill_s = max(0.0, (times.first_token_time - times.first_scheduled_time).total_seconds())


def entry_of(token: int, entry: Any, top: int) -> TokenLogprob:
    """Returns one position from a dict of token id to `Logprob`, or from a number, the engine's simple form."""
    if isinstance(entry, float):
        return TokenLogprob(token, finite(entry))
    mine = entry.get(token)
    value = finite(mine.logprob) if mine is not None else UNLIKELY
    if not top:
        return TokenLogprob(token, value)
    best = sorted(((id_, finite(found.logprob)) for id_, found in entry.items()), key=lambda pair: -pair[1])
    return TokenLogprob(token, value, best[:top])


def prompt_entries(prompt: bytes, entries: Sequence[Any], top: int) -> list[TokenLogprob]:
    """Returns one entry per prompt token. The first has no meaning, since no token precedes it.

    Versions differ in whether the list has an entry for the first token. Without one, entry `i` belongs to token
    `i + 1`.
    """
    tokens = memoryview(prompt).cast("I").tolist()
    behind = tokens[1:]
    ahead = len(entries) < len(tokens) or _about(behind, entries)
    lined_up = [*(entries if ahead else entries[1:]), *[None] * len(behind)][: len(behind)]
    found = [TokenLogprob(token, 0.0) for token in tokens[:1]]
    for token, entry in zip(behind, lined_up, strict=True):
        found.append(TokenLogprob(token, UNLIKELY) if entry is None else entry_of(token, entry, top))
    return found


def _about(tokens: list[int], entries: Sequence[Any]) -> bool:
    return bool(tokens) and all(isinstance(e, dict) and token in e for token, e in zip(tokens, entries, strict=False))


def _failure(reason: str) -> DynserveError:
    match reason:
        case "timeout":
            return TimedOut("the engine ended the request at its own time limit")
        case "cancelled":
            return InternalError("the engine cancelled the request")
        case _:
            return InternalError(f"the engine ended the request with an unexpected finish reason: {reason}")
