"""The HTTP answer: a response that owns its request, from placement to the last byte.

Nothing is sent before the first record is there, so that an error before it has its own status. After it, an error is the
stream's last event, and the connection ends without `[DONE]`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dynserve.errors import CallerError, Cancelled, DynserveError, InternalError, TimedOut, error_object
from dynserve.frontend.pipeline import Pipeline, Prompt, Run
from dynserve.frontend.rate_limits import ChargedCall
from dynserve.frontend.reply import Record, Write
from dynserve.log_limit import LimitedLog
from dynserve.sse import event
from dynserve.tasks import Limit
from dynserve.wire.link import Finished

log = logging.getLogger(__name__)
limited = LimitedLog(log)

LAST_WORD = 1.0  # seconds that an error event may take to be sent

SSE = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
Headers = list[tuple[bytes, bytes]]
AtOnce = Callable[[Send, int, Headers, bytes], bool]  # status, headers, body: False where it has to be sent
Watch = Callable[[Callable[[], None]], Callable[[], None]]  # calls back when the client has left, until taken back


class TokenResponse(Response):
    """A streamed answer as server-sent events, or a unary one as JSON. `headers` come beside its own."""

    def __init__(
        self, pipeline: Pipeline, prompt: Prompt, call: ChargedCall, headers: Sequence[tuple[str, str]]
    ) -> None:
        # deliberately not Starlette's own start: there is no body to render
        self.background = None
        self._pipeline, self._prompt, self._call = pipeline, prompt, call
        self._request_id = prompt.id
        self._more: Headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
        self._clock = asyncio.get_running_loop().time
        self._began = self._clock()
        self._sent = False
        self._runs: list[Run] = []
        self._abort: Callable[[], None] | None = None
        self._chunks: Callable[[], Write | None] = _no_chunks
        self._watch: Watch | None = None
        self._at_once: AtOnce | None = None
        self._refused = False  # for the caller's fault
        self._made: dict[Run, int] = {}  # tokens of answers whose usage is known

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._abort, self._chunks = scope.get("dynserve.abort"), scope.get("dynserve.chunks", _no_chunks)
        self._watch, self._at_once = scope.get("dynserve.watch"), scope.get("dynserve.whole")
        try:
            await self._answer(receive, send)
        except Cancelled:
            log.debug("request %s: the client has left", self._prompt.id)
        except DynserveError as error:
            self._refused = isinstance(error, CallerError)
            await self._failed(error, send)
        except Exception:
            log.exception("request %s failed", self._prompt.id)
            await self._failed(InternalError("internal error; the frontend's log has the details"), send)
        finally:
            self._settle()

    async def _answer(self, receive: Receive, send: Send) -> None:
        with self._pipeline.answer(self._prompt) as run:
            async with UntilLeft(receive, self._watch, run.deadline, self._runs) as until:
                until.add(run)
                if self._prompt.render.stream:
                    await run.deliver(partial(self._stream, run, send))
                else:
                    await self._unary(run, send)

    async def _stream(self, run: Run, send: Send, burst: list[Record]) -> None:
        over = self._note(run, burst) is not None
        data = burst[0].data if len(burst) == 1 else b"".join([record.data for record in burst])
        if over and self._prompt.explain:
            data += b": explain " + run.explained() + b"\n\n"
        if data or over:
            if not self._sent:
                await self._start(200, SSE, send)
            await send({"type": "http.response.body", "body": data, "more_body": not over})
            run.write = run.write or self._chunks()

    async def _unary(self, run: Run, send: Send) -> None:
        body = b""

        async def sink(burst: list[Record]) -> None:
            nonlocal body
            self._note(run, burst)
            body = burst[-1].data

        run.write = _nothing  # until the end there is none
        await run.deliver(sink)
        explained = [(b"x-dynserve-explain", run.explained())] if self._prompt.explain else []
        await self._whole(200, body, send, explained)

    def _note(self, run: Run, burst: list[Record]) -> Finished | None:
        """The times and counts of the request, taken on the way. Gives the answer's last word, once it is there."""
        decision, last = run.decision, burst[-1]
        if decision.ttft_s is None:
            decision.ttft_s = self._clock() - self._began
            run.metrics.ttft.observe(decision.ttft_s)
        if not isinstance(last, Finished) or last.handoff is not None:
            return None
        run.metrics.duration.observe(self._clock() - self._began)
        run.metrics.prompt_tokens += last.usage.prompt_tokens
        run.metrics.output_tokens += last.usage.completion_tokens
        run.metrics.cached_tokens += last.usage.cached_tokens
        self._made[run] = last.usage.completion_tokens
        return last

    def _settle(self) -> None:
        """However it ended, what was computed is paid for; and what never began is not."""
        self._call.settle(self._computed_prompts() + sum(self._made.get(run, len(run.tokens)) for run in self._runs))
        self._call.close()

    def _computed_prompts(self) -> int:
        """Tokens of the prompts that were computed, each of them once."""
        return len(self._prompt.tokens) // 4 if any(map(self._was_computed, self._runs)) else 0

    def _was_computed(self, run: Run) -> bool:
        return bool(run.tokens) or (run.was_placed and not self._refused)

    async def _failed(self, error: DynserveError, send: Send) -> None:
        if not isinstance(error, CallerError):
            limited.warning("failed", error.code, "request %s failed: %s", self._prompt.id, error)
        body = msgspec.json.encode(error_object(error, anthropic=self._prompt.render.kind == "message"))
        try:
            async with asyncio.timeout(LAST_WORD):
                if self._sent:
                    await send({"type": "http.response.body", "body": event("error", body), "more_body": False})
                else:
                    retry = [(b"retry-after", str(error.retry_after).encode())] if error.retryable else []
                    await self._whole(error.status, body, send, retry)
        except TimeoutError:
            if self._abort is not None:  # it reads nothing: a closing that waits for it would never come
                self._abort()
                await asyncio.sleep(0)

    async def _whole(self, status: int, body: bytes, send: Send, more: Headers) -> None:
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *more]
        if self._at_once is not None and self._at_once(send, status, self._all(headers), body):
            self._sent = True
            return
        await self._start(status, headers, send)
        await send({"type": "http.response.body", "body": body, "more_body": False})

    async def _start(self, status: int, headers: Headers, send: Send) -> None:
        self._sent = True
        await send({"type": "http.response.start", "status": status, "headers": self._all(headers)})

    def _all(self, headers: Headers) -> Headers:
        return [*headers, *self._more, (b"x-request-id", self._request_id.encode("latin-1", "replace"))]


def _no_chunks() -> None:
    """A server other than ours has ASGI's way only."""


def _nothing(data: bytes) -> bool:
    return True


class UntilLeft:
    """The block ends when the client leaves, does not read, or the request's time is up. `watch` tells of the first;
    without one (a server other than ours) a task waits for it. `runs` are the request's answers, as far as they have
    begun; `add` adds one."""

    def __init__(self, receive: Receive, watch: Watch | None, deadline: float, runs: list[Run]) -> None:
        self._receive, self._watch, self._deadline, self._runs = receive, watch, deadline, runs
        self._left = False

    async def __aenter__(self) -> UntilLeft:
        self._unwatch = (
            self._watch(self._client_left)
            if self._watch is not None
            else _waiting_for(self._receive, self._client_left)
        )
        # sending waits for the client, so it has the request's own deadline, and ends early when the
        # client reads so little that its answer piles up
        self._limit = Limit(self._deadline)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._limit.__exit__(kind, error, trace)
        except TimeoutError:
            raise TimedOut("the client did not read its answer in time") from None
        finally:
            self._unwatch()
            del self._unwatch  # it knows this object, too: a reference cycle
            for run in self._runs:
                run.limit(None)

    def add(self, run: Run) -> None:
        """Raises Cancelled when the client has left already."""
        self._runs.append(run)
        run.limit(self._limit)
        if self._left:
            run.outcome = "cancelled"
            raise Cancelled("the client has left")

    def _client_left(self) -> None:
        self._left = True
        for run in self._runs:
            run.cancel(Cancelled("the client has left"))


def _waiting_for(receive: Receive, left: Callable[[], None]) -> Callable[[], None]:
    async def until_disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            left()

    waiting = asyncio.ensure_future(until_disconnect())
    waiting.add_done_callback(ended)

    def unwatch() -> None:
        waiting.cancel()

    return unwatch
