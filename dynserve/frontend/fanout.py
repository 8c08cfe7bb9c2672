"""Several answers to one request: a list of prompts, `n` choices of one, embeddings of many texts.

Each is a request of its own to the cluster; here they become one answer again. Streamed, their chunks come as they are
made, each with its index; otherwise in order.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence

from starlette.types import Receive, Send

from dynserve.errors import Cancelled, DynserveError
from dynserve.frontend.pipeline import Pipeline, Prompt, Run
from dynserve.frontend.rate_limits import ChargedCall
from dynserve.frontend.reply import Record
from dynserve.frontend.response import SSE, TokenResponse, UntilLeft
from dynserve.render.formats.chat import DONE, body_of, reindexed, usage_chunk
from dynserve.sse import to_json
from dynserve.wire.link import Usage

AT_ONCE = 64  # answers of one request that are being made


class FanOut(TokenResponse):
    """`group` prompts of the list are choices for the same prompt; the likeliest `keep` of them are shown."""

    def __init__(
        self, pipeline: Pipeline, prompts: Sequence[Prompt], call: ChargedCall, headers: Sequence[tuple[str, str]],
        *, group: int, keep: int, request_id: str,
    ) -> None:  # fmt: skip
        super().__init__(pipeline, prompts[0], call, headers)
        self._prompts, self._group, self._keep, self._request_id = prompts, group, keep, request_id
        self._answers = [_Answer() for _ in prompts]
        self._numbers: dict[Run, int] = {}
        self._sending = asyncio.Lock()

    async def _answer(self, receive: Receive, send: Send) -> None:
        at_once = self._call.take_slots(min(AT_ONCE, len(self._prompts)))
        deadline = asyncio.get_running_loop().time() + self._pipeline.timeout_s
        async with UntilLeft(receive, self._watch, deadline, self._runs) as until:
            waiting = iter(range(len(self._prompts)))  # which all tasks take from
            async with _first_error(), asyncio.TaskGroup() as group:
                for _ in range(at_once):
                    group.create_task(self._some(waiting, deadline, until, send))
            await self._end(send)

    async def _some(self, waiting: Iterator[int], deadline: float, until: UntilLeft, send: Send) -> None:
        """One answer after the other, as long as there are any that nobody has begun."""
        for number in waiting:
            with self._pipeline.answer(self._prompts[number], deadline) as run:
                self._numbers[run] = number
                until.add(run)
                await self._one(run, self._answers[number], send)

    def _computed_prompts(self) -> int:
        groups = {self._numbers[run] // self._group for run in self._runs if self._was_computed(run)}
        return sum(len(self._prompts[group * self._group].tokens) // 4 for group in groups)

    async def _one(self, run: Run, answer: _Answer, send: Send) -> None:
        async def sink(burst: list[Record]) -> None:
            last = self._note(run, burst)
            for record in burst:
                answer.note(record)
            if last is not None:
                answer.usage, answer.data = last.usage, last.data
            if self._prompt.render.stream and (data := b"".join([record.data for record in burst])):
                await self._chunk(data, send)

        await run.deliver(sink)

    async def _chunk(self, data: bytes, send: Send) -> None:
        async with self._sending:
            if not self._sent:
                await self._start(200, SSE, send)
            await send({"type": "http.response.body", "body": data, "more_body": True})

    async def _end(self, send: Send) -> None:
        render, usage = self._prompt.render, self._usage()
        if render.stream:
            last = (usage_chunk(render, usage) if render.usage else b"") + DONE
            await send({"type": "http.response.body", "body": last, "more_body": False})
        elif render.kind == "embedding":
            data = b",".join([answer.data for answer in self._answers])
            counts = to_json({"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.prompt_tokens})
            head = b'{"object":"list","data":[' + data + b'],"model":' + to_json(render.model)
            await self._whole(200, head + b',"usage":' + counts + b"}", send, [])
        else:
            await self._whole(200, body_of(render, self._choices(), usage), send, [])

    def _choices(self) -> list[bytes]:
        """Of each group the likeliest, numbered anew."""
        if self._keep == self._group:
            return [answer.data for answer in self._answers]
        chosen: list[bytes] = []
        for at in range(0, len(self._answers), self._group):
            group = range(at, at + self._group)
            best = sorted(group, key=lambda i: -self._answers[i].likelihood)[: self._keep]
            for old in best:
                chosen.append(reindexed(self._answers[old].data, old, len(chosen)))
        return chosen

    def _usage(self) -> Usage:
        """The prompt of a group counts once, all that was generated counts."""
        usages = [answer.usage for answer in self._answers]
        firsts = usages[:: self._group]
        return Usage(
            sum(u.prompt_tokens for u in firsts),
            sum(u.completion_tokens for u in usages),
            sum(u.cached_tokens for u in firsts),
            reasoning_tokens=sum(u.reasoning_tokens for u in usages),
        )


class _Answer:
    def __init__(self) -> None:
        self.data = b""
        self.usage = Usage(0, 0, 0)
        self._sum, self._count = 0.0, 0

    def note(self, record: Record) -> None:
        # where those of the prompt were asked for, they are in front
        count = len(record.token_ids)
        for entry in (record.logprobs or [])[-count:] if count else ():
            self._sum += entry.logprob
            self._count += 1

    @property
    def likelihood(self) -> float:
        """Mean log-probability of its tokens: longer answers are not less likely for being longer."""
        return self._sum / self._count if self._count else float("-inf")


@contextlib.asynccontextmanager
async def _first_error() -> AsyncIterator[None]:
    """Of the errors of a group the one that says most: the others were often only its consequence."""
    try:
        yield
    except BaseExceptionGroup as group:
        errors = list(_leaves(group))
        ours = [error for error in errors if isinstance(error, DynserveError) and not isinstance(error, Cancelled)]
        try:
            raise (ours or errors)[0] from None
        finally:
            del errors, ours  # the error knows this frame: a ring


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    found: list[BaseException] = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found
