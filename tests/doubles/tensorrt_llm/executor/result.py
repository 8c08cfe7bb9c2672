"""Results: the same object is yielded at every step, and its lists grow."""

from __future__ import annotations

import asyncio
import datetime
import json
from collections import deque
from typing import Any

from .._contract import CONTRACT, OLD, VERSION, dataclass_of, here
from ..disaggregated_params import DisaggregatedParams
from .utils import RequestError

Logprob = dataclass_of("Logprob", kw_only=False, slots=True)


class _Bag:
    """An object with exactly the contract's attributes of its kind."""

    def __init__(self, kind: str, **values: Any) -> None:
        for name in here(kind, CONTRACT["members"][kind]):
            object.__setattr__(self, name, values.get(name))
        unknown = values.keys() - set(CONTRACT["members"][kind])
        assert not unknown, f"{kind} has no {unknown}"


class CompletionOutput:
    __slots__ = (
        "_seen", "additional_context_outputs", "additional_generation_outputs", "cumulative_logprob",
        "disaggregated_params", "finish_reason", "generation_logits", "index", "logprobs", "prompt_logprobs",
        "request_perf_metrics", "stop_reason", "text", "token_ids",
    )  # fmt: skip

    def __init__(self, index: int) -> None:
        self.index, self.text, self.cumulative_logprob = index, "", None
        self.token_ids: list[int] = []
        self.logprobs: list[Any] = []
        self.prompt_logprobs: list[Any] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.generation_logits = self.additional_context_outputs = self.additional_generation_outputs = None
        self.disaggregated_params: Any = None
        self.request_perf_metrics: Any = None
        self._seen = 0

    @property
    def length(self) -> int:
        return len(self.token_ids)

    @property
    def token_ids_diff(self) -> list[int]:
        return self.token_ids[self._seen :]


class GenerationResult:
    """`_proxy` puts responses in; the consumer's loop is woken once per frame, not once per response."""

    def __init__(self, proxy: Any, request_id: int, prompt: list[int], disaggregated: Any, streaming: bool) -> None:
        self._proxy, self.request_id, self.id = proxy, request_id, request_id
        self.prompt, self.prompt_token_ids = None, prompt
        self.outputs = [CompletionOutput(0)]
        self.context_logits = None
        self.finished = False
        self.cached_tokens = self.decoding_iter = 0
        self.avg_decoded_tokens_per_iter = None
        self.metrics_dict: dict[str, Any] = {}
        self._streaming = streaming
        self._given = disaggregated
        self.postprocessed = False  # by a process that counts no cached tokens
        self._responses: deque[Any] = deque()
        self._event = asyncio.Event()
        self._aborted = self._answered = False
        if not OLD:
            self.disaggregated_params = disaggregated
            self.error: str | None = None
            self.candidate_metrics = self.per_pos_drafted = self.per_pos_accepted = self.spec_dec_totals = None

    def abort(self) -> None:
        if self._proxy.closed:
            raise AttributeError("'NoneType' object has no attribute 'send'")  # as the real one after its shutdown
        self._aborted = True
        early = self._given is not None and self._given.request_type == "generation_only" and not self._answered
        self._proxy.abort(self.request_id, early)

    def aborted(self) -> bool:
        return self._aborted

    def __aiter__(self) -> GenerationResult:
        return self

    async def __anext__(self) -> GenerationResult:
        if self.finished:
            raise StopAsyncIteration
        while not self._responses:
            self._event.clear()
            await self._event.wait()
        self._take(self._responses.popleft())
        return self

    async def aresult(self) -> GenerationResult:
        while not self.finished:
            await self.__anext__()
        return self

    def __await__(self) -> Any:
        return self.aresult().__await__()

    def _take(self, response: Any) -> None:
        if isinstance(response, BaseException):
            raise response
        self._answered = True
        output = self.outputs[0]
        output._seen = len(output.token_ids)
        if response.error:
            self.finished = True
            if not OLD:
                self.error = response.error
            raise RequestError(response.error)
        output.token_ids += response.token_ids
        if response.logprobs:
            output.logprobs += [_logprobs(entry) for entry in response.logprobs]
        if VERSION == "1.2.1" and output.logprobs and len(output.logprobs) != len(output.token_ids):
            raise AssertionError("logprobs length: not one entry for each token")
        if response.prompt_logprobs:
            output.prompt_logprobs = [None, *(_logprobs(entry) for entry in response.prompt_logprobs[1:])]
        if response.cached_tokens >= 0 and not self.postprocessed:
            self.cached_tokens = response.cached_tokens
        self.decoding_iter += 1
        if response.finish_reason:
            self.finished = True
            output.finish_reason, output.stop_reason = response.finish_reason, response.stop_reason
            if response.times is not None:
                output.request_perf_metrics = _metrics(response)
            if response.disaggregated is not None:
                output.disaggregated_params = self._context_params(response)

    def _context_params(self, response: Any) -> Any:
        found = response.disaggregated
        logprobs = [_logprobs(entry) for entry in response.logprobs] if response.logprobs and not OLD else None
        values = {
            "request_type": "context_only",
            "disagg_request_id": None if OLD else self._given.disagg_request_id,
            "ctx_request_id": self._given.disagg_request_id or self.request_id,
            "first_gen_tokens": list(response.token_ids),
            "first_gen_log_probs": logprobs,
            "opaque_state": found.state,
            "draft_tokens": [],
            "ctx_dp_rank": found.rank,
            "ctx_info_endpoint": found.endpoint,
        }
        return DisaggregatedParams(**here("DisaggregatedParams", values))


RequestOutput = GenerationResult


def _logprobs(entry: list[tuple[int, float, int]]) -> dict[int, Any]:
    return {token: Logprob(logprob, rank) for token, logprob, rank in entry}


def _metrics(response: Any) -> Any:
    arrival, scheduled, first, last, transfer_start, transfer_end = (
        datetime.timedelta(seconds=s) for s in response.times
    )
    blocks = response.blocks
    return _Bag(
        "RequestPerfMetrics",
        timing_metrics=_Bag(
            "timing_metrics", arrival_time=arrival, first_scheduled_time=scheduled, first_token_time=first,
            last_token_time=last, kv_cache_transfer_start=transfer_start, kv_cache_transfer_end=transfer_end,
            kv_cache_size=0,
        ),
        kv_cache_metrics=_Bag(
            "kv_cache_metrics", num_total_allocated_blocks=sum(blocks), num_new_allocated_blocks=blocks[1],
            num_reused_blocks=blocks[0], num_missed_blocks=blocks[1],
            kv_cache_hit_rate=blocks[0] / sum(blocks) if sum(blocks) else 0.0,
        ),
    )  # fmt: skip


class IterationResult:
    """Rows of statistics or KV events. It is finished after `timeout` seconds without one; ask for another then."""

    def __init__(self, queue: deque[bytes], timeout: float | None) -> None:
        self._queue, self._timeout, self._done = queue, timeout, False

    def get_results(self) -> list[Any]:
        found = []
        while self._queue:
            found.append(json.loads(self._queue.popleft()))
        return found

    def __aiter__(self) -> IterationResult:
        return self

    async def __anext__(self) -> Any:
        if self._done:
            raise StopAsyncIteration
        waited = 0.0
        while not self._queue:
            if self._timeout is not None and waited >= self._timeout:
                self._done = True
                if not self._timeout and not OLD:
                    raise asyncio.QueueEmpty  # what callers of the real one catch for a timeout of nothing
                raise StopAsyncIteration
            await asyncio.sleep(0.005)
            waited += 0.005
        try:
            return json.loads(self._queue.popleft())
        except IndexError:  # dropped meanwhile
            raise StopAsyncIteration from None
