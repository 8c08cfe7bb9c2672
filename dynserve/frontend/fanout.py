"""Several answers to one request: a list of prompts, `n` choices of one, embeddings of many texts.

Each answer is a request of its own to the cluster; here they are combined into one response. In a stream, chunks are sent
as they are made, each with its index; otherwise the answers are in order.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence

from starlette.types import Receive, Send

from dynserve.api.normalize import NormalizedRequest
from dynserve.errors import Cancelled, DynserveError
from dynserve.frontend.inference import InferenceRequest
from dynserve.frontend.pipeline import Pipeline, Run
from dynserve.frontend.rate_limits import ChargedCall
from dynserve.frontend.reply import Record
from dynserve.frontend.response import SSE, ClientWatch, TokenResponse
from dynserve.render.formats.chat import DONE, body_of, reindexed, usage_chunk
from dynserve.sse import to_json
from dynserve.wire.link import Usage

MAX_AT_ONCE = 64  # answers of one request that are being generated


class FanOut(TokenResponse):
    """The response to a normalised request with several answers."""

    def __init__(
        self, pipeline: Pipeline, requests: Sequence[InferenceRequest], call: ChargedCall,
        headers: Sequence[tuple[str, str]], normalized: NormalizedRequest, request_id: str,
    ) -> None:  # fmt: skip
        super().__init__(pipeline, requests[0], call, headers)
        self._requests, self._request_id = requests, request_id
        self._group, self._keep = normalized.group, normalized.keep
        self._results = [_ChoiceResult() for _ in requests]
        self._numbers: dict[Run, int] = {}
        self._sending = asyncio.Lock()

    async def _answer(self, receive: Receive, send: Send) -> None:
        at_once = self._call.acquire_slots(min(MAX_AT_ONCE, len(self._requests)))
        deadline = asyncio.get_running_loop().time() + self._pipeline.limits.timeout_s
        async with ClientWatch(self._exchange, receive, deadline, self._runs) as client:
            numbers = iter(range(len(self._requests)))  # shared by all tasks
            async with _first_error(), asyncio.TaskGroup() as group:
                for _ in range(at_once):
                    group.create_task(self._generate(numbers, deadline, client, send))
            await self._end(send)

    async def _generate(self, numbers: Iterator[int], deadline: float, client: ClientWatch, send: Send) -> None:
        """Generates one answer after the other, as long as there are any that no task has begun."""
        for number in numbers:
            with self._pipeline.run(self._requests[number], deadline) as run:
                self._numbers[run] = number
                client.add(run)
                await self._deliver(run, self._results[number], send)

    def _computed_prompt_tokens(self) -> int:
        groups = {self._numbers[run] // self._group for run in self._runs if self._was_computed(run)}
        return sum(self._requests[group * self._group].generation.num_tokens for group in groups)

    async def _deliver(self, run: Run, result: _ChoiceResult, send: Send) -> None:
        async def sink(burst: list[Record]) -> None:
            last = self._note(run, burst)
            for record in burst:
                result.note(record)
            if last is not None:
                result.usage, result.data = last.usage, last.data
            stream = self._request.generation.render.stream
            if stream and (data := b"".join([record.data for record in burst])):
                await self._send_chunk(data, send)

        await run.deliver(sink)

    async def _send_chunk(self, data: bytes, send: Send) -> None:
        async with self._sending:
            if not self._started:
                await self._start(200, SSE, send)
            await send({"type": "http.response.body", "body": data, "more_body": True})

    async def _end(self, send: Send) -> None:
        render, usage = self._request.generation.render, self._usage()
        if render.stream:
            last = (usage_chunk(render, usage) if render.usage else b"") + DONE
            await send({"type": "http.response.body", "body": last, "more_body": False})
        elif render.kind == "embedding":
            data = b",".join([result.data for result in self._results])
            counts = to_json({"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.prompt_tokens})
            head = b'{"object":"list","data":[' + data + b'],"model":' + to_json(render.model)
            await self._send_whole(200, head + b',"usage":' + counts + b"}", send, [])
        else:
            await self._send_whole(200, body_of(render, self._choices(), usage), send, [])

    def _choices(self) -> list[bytes]:
        """Returns the likeliest choices of each group, with new indexes."""
        if self._keep == self._group:
            return [result.data for result in self._results]
        chosen: list[bytes] = []
        for at in range(0, len(self._results), self._group):
            group = range(at, at + self._group)
            best = sorted(group, key=lambda i: -self._results[i].likelihood)[: self._keep]
            for old in best:
                chosen.append(reindexed(self._results[old].data, old, len(chosen)))
        return chosen

    def _usage(self) -> Usage:
        """The sum of all answers; the prompt of a group counts once."""
        usages = [result.usage for result in self._results]
        firsts = usages[:: self._group]
        return Usage(
            sum(u.prompt_tokens for u in firsts),
            sum(u.completion_tokens for u in usages),
            sum(u.cached_tokens for u in firsts),
            reasoning_tokens=sum(u.reasoning_tokens for u in usages),
        )


class _ChoiceResult:
    """The part of one answer that was received so far."""

    def __init__(self) -> None:
        self.data = b""
        self.usage = Usage(0, 0, 0)
        self._sum, self._count = 0.0, 0

    def note(self, record: Record) -> None:
        # logprobs of the prompt, if requested, come first
        count = len(record.token_ids)
        for entry in (record.logprobs or [])[-count:] if count else ():
            self._sum += entry.logprob
            self._count += 1

    @property
    def likelihood(self) -> float:
        """The mean log-probability of its tokens: longer answers are not less likely for being longer."""
        return self._sum / self._count if self._count else float("-inf")


@contextlib.asynccontextmanager
async def _first_error() -> AsyncIterator[None]:
    """Raises the most informative error of a group: the others are often only its consequences."""
    try:
        yield
    except BaseExceptionGroup as group:
        errors = list(_leaves(group))
        ours = [error for error in errors if isinstance(error, DynserveError) and not isinstance(error, Cancelled)]
        try:
            raise (ours or errors)[0] from None
        finally:
            del errors, ours  # the error refers to this frame: a reference cycle


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    found: list[BaseException] = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found
