"""From TensorRT-LLM's results to ours. It yields one and the same object whose lists grow, so a cursor says what is new."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dynserve.errors import DynserveError, HandoffMismatch, InternalError, TimedOut
from dynserve.executors.base import Output
from dynserve.executors.trtllm.request import wants_prompt
from dynserve.wire.requests import UNLIKELY, GenerateRequest, TokenLogprob, finite


class Cursor:
    """Reads one result. `stops` are the tokens that end an answer, the engine's end of turn first; `known` are tokens
    that the client has already and that the engine says again."""

    __slots__ = ("_again", "_entries", "_known", "_logprobs", "_prompt", "_request", "_seen", "_stops", "_top")

    def __init__(self, request: GenerateRequest, stops: Sequence[int], known: Sequence[int] = ()) -> None:
        self._request, self._stops, self._known = request, stops, list(known)
        self._seen = self._entries = 0
        self._again = bool(known)
        self._logprobs, self._top = request.sampling.logprobs is not None, request.sampling.logprobs or 0
        # whether those of the prompt are wanted, and still to come
        self._prompt = wants_prompt(request)

    def read(self, result: Any) -> Output | None:
        """What is new in the result, or None when nothing is.

        Raises:
            HandoffMismatch: the engine does not go on from the tokens that the client has.
        """
        output = result.outputs[0]
        tokens = output.token_ids
        if self._known and not self._skip(tokens):
            if output.finish_reason is None:
                return None
            raise HandoffMismatch("the engine ended before the tokens that the context phase gave")
        new = tokens[self._seen :]
        self._seen += len(new)
        reason = output.finish_reason
        if reason is not None:
            return self.last(output, new, reason)
        if not new:
            return None
        if self._request.stop.max_tokens == 0:  # the one that an engine computes at least
            return Output([], "length", self.logprobs(output, 0))
        return Output(new, None, self.logprobs(output, len(new)) if self._logprobs else None)

    def last(self, output: Any, new: list[int], reason: str) -> Output:
        """`new` are the tokens of the result's last response."""
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
        """Of the next `count` tokens, those of the prompt in front of the first."""
        if not self._logprobs:
            return None
        found: list[TokenLogprob] = []
        if self._prompt:
            self._prompt = False
            found = prompt_entries(self._request.prompt, output.prompt_logprobs, self._top)
        tokens, entries = output.token_ids, output.logprobs
        # a version may have none of the tokens that the context phase gave
        lacking = max(0, len(tokens) - len(entries)) if self._again else 0
        for at in range(self._entries, min(self._entries + count, len(entries) + lacking)):
            found.append(entry_of(tokens[at], entries[at - lacking], self._top))
        self._entries += count
        return found

    def _skip(self, tokens: list[int]) -> bool:
        """False while the engine has not said again what is known."""
        known = self._known
        if tokens[: len(known)] != known[: len(tokens)]:
            raise HandoffMismatch("the engine began with other tokens than the context phase gave")
        if len(tokens) < len(known):
            return False
        self._seen = self._entries = len(known)
        self._known = []
        return True


def read_context(result: Any, cursor: Cursor) -> Output | None:
    """The result of a context phase: its token and a hand-off, or, when that token ended the answer, all of it.

    Raises:
        RuntimeError: it is neither; the engine does not do what it promised.
    """
    if not result.finished:
        return None
    output, *others = result.outputs
    reason, params = output.finish_reason, output.disaggregated_params
    tokens = list(output.token_ids)
    if reason not in ("not_finished", "length"):
        return cursor.last(output, tokens, reason or "nothing said")
    if others or params is None or params.ctx_request_id is None:
        return Output(tokens, error=InternalError("the context phase left no hand-off that could be taken"))
    return Output(tokens, "handoff", cursor.logprobs(output, len(tokens)))


def note_costs(output: Output, result: Any, seconds: float) -> None:
    """What the prompt has cost. The engine tells times with its last response; until then `seconds` since it was asked is
    all that is known of the first token."""
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
    """One position: a dict of token id to `Logprob`, or a number in the engine's simple form."""
    if isinstance(entry, float):
        return TokenLogprob(token, finite(entry))
    mine = entry.get(token)
    value = finite(mine.logprob) if mine is not None else UNLIKELY
    if not top:
        return TokenLogprob(token, value)
    best = sorted(((id_, finite(found.logprob)) for id_, found in entry.items()), key=lambda pair: -pair[1])
    return TokenLogprob(token, value, best[:top])


def prompt_entries(prompt: bytes, entries: Sequence[Any], top: int) -> list[TokenLogprob]:
    """One entry per token of the prompt; the first, which nothing predicts, is without meaning.

    Versions differ in whether the list has a place for the first token. Where it has none, entry `i` is about token `i
    + 1`.
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
            return InternalError(f"the engine ended the request in an unexpected way: {reason}")
