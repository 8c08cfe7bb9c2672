"""The HTTP response that owns its request, from placement to the last byte.

Nothing is sent before the first record is there, so that an error before it has its own status. After it, an error is the
stream's last event, and the connection ends without `[DONE]`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dynserve.errors import CallerError, Cancelled, DynserveError, InternalError, TimedOut, error_object
from dynserve.frontend.inference import InferenceRequest
from dynserve.frontend.pipeline import Pipeline, Run
from dynserve.frontend.rate_limits import ChargedCall
from dynserve.frontend.reply import Record
from dynserve.log_limit import LimitedLog
from dynserve.server.exchange import ChunkWriter, Exchange, Headers, exchange_of
from dynserve.sse import event
from dynserve.tasks import Limit
from dynserve.wire.link import Finished

log = logging.getLogger(__name__)
limited = LimitedLog(log)

LAST_NUMBER = 2**31 - 1  # of an event
ERROR_TIMEOUT = 1.0  # seconds that an error event may take to be sent

SSE = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class TokenResponse(Response):
    """A streamed answer as server-sent events, or a unary one as JSON. `headers` are sent in addition to its own."""

    def __init__(
        self, pipeline: Pipeline, request: InferenceRequest, call: ChargedCall, headers: Sequence[tuple[str, str]]
    ) -> None:
        # Starlette's constructor is not called: there is no body to render
        self.background = None
        self._pipeline, self._request, self._call = pipeline, request, call
        self._request_id = request.id
        self._extra: Headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
        self._clock = asyncio.get_running_loop().time
        self._began = self._clock()
        self._started = False
        self._runs: list[Run] = []
        self._exchange: Exchange
        self._writer: ChunkWriter | None = None
        self._refused = False  # because of an error of the caller
        self._generated: dict[Run, int] = {}  # tokens of answers whose usage is known

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._exchange = exchange_of(scope)
        try:
            await self._answer(receive, send)
        except Cancelled:
            log.debug("request %s: the client has disconnected", self._request.id)
        except DynserveError as error:
            self._refused = isinstance(error, CallerError)
            await self._send_error(error, send)
        except Exception:
            log.exception("request %s failed", self._request.id)
            await self._send_error(InternalError("internal error; the frontend's log has the details"), send)
        finally:
            self._settle()

    async def _answer(self, receive: Receive, send: Send) -> None:
        with self._pipeline.run(self._request) as run:
            async with ClientWatch(self._exchange, receive, run.deadline, self._runs) as client:
                client.add(run)
                if self._request.generation.render.stream:
                    await run.deliver(partial(self._send_burst, run, send))
                else:
                    await self._send_unary(run, send)

    async def _send_burst(self, run: Run, send: Send, burst: list[Record]) -> ChunkWriter | None:
        ended = self._note(run, burst) is not None
        data = burst[0].data if len(burst) == 1 else b"".join([record.data for record in burst])
        if ended and self._request.hints.explain:
            data += b": explain " + run.finish_decision() + b"\n\n"
        if data or ended:
            if not self._started:
                await self._start(200, SSE, send)
            await send({"type": "http.response.body", "body": data, "more_body": not ended})
            if self._writer is None:
                self._writer = self._exchange.chunk_writer()
        return self._writer

    async def _send_unary(self, run: Run, send: Send) -> None:
        body = b""

        async def sink(burst: list[Record]) -> ChunkWriter:
            nonlocal body
            self._note(run, burst)
            body = burst[-1].data
            return _discard  # before the last record nothing is sent

        await run.deliver(sink)
        explained = [(b"x-dynserve-explain", run.finish_decision())] if self._request.hints.explain else []
        await self._send_whole(200, body, send, explained)

    def _note(self, run: Run, burst: list[Record]) -> Finished | None:
        """Records the request's times and counts. Returns the answer's last record, if it is in the burst."""
        decision, last = run.decision, burst[-1]
        if decision.ttft_s is None and not self._resumed_tokens:
            decision.ttft_s = self._clock() - self._began
            run.metrics.ttft.observe(decision.ttft_s)
            run.note_first_token()
            if run.metrics.objective is not None:
                run.metrics.objective.observe(decision.ttft_s)
        if not isinstance(last, Finished) or last.handoff is not None:
            return None
        run.metrics.duration.observe(self._clock() - self._began)
        run.metrics.prompt_tokens += last.usage.prompt_tokens
        run.metrics.output_tokens += last.usage.completion_tokens
        run.metrics.cached_tokens += last.usage.cached_tokens
        self._generated[run] = last.usage.completion_tokens - self._resumed_tokens
        return last

    def _settle(self) -> None:
        """Charges the key for all that was computed, however the request ended, and for nothing that never began."""
        for run in self._runs:
            objective = run.metrics.objective
            if objective is not None and run.decision.ttft_s is None and not self._refused:
                objective.gave_up(self._clock() - self._began)
        generated = sum(self._generated.get(run, len(run.tokens)) for run in self._runs)
        self._call.settle(self._computed_prompt_tokens() + generated)
        self._call.close()

    def _computed_prompt_tokens(self) -> int:
        """Tokens of the prompts that were computed, each prompt once. A resumed answer's prompt is charged already."""
        if self._resumed_tokens:
            return 0
        return self._request.generation.num_tokens if any(map(self._was_computed, self._runs)) else 0

    @property
    def _resumed_tokens(self) -> int:
        return len(self._request.prior.token_ids) if self._request.prior is not None else 0

    def _was_computed(self, run: Run) -> bool:
        return bool(run.tokens) or (run.was_placed and not self._refused)

    async def _send_error(self, error: DynserveError, send: Send) -> None:
        if not isinstance(error, CallerError):
            limited.warning("failed", error.code, "request %s failed: %s", self._request.id, error)
        anthropic = self._request.generation.render.kind == "message"
        body = msgspec.json.encode(error_object(error, anthropic=anthropic))
        data = self._failed(error) if self._request.generation.render.kind == "response" else event("error", body)
        try:
            async with asyncio.timeout(ERROR_TIMEOUT):
                if self._started:
                    await send({"type": "http.response.body", "body": data, "more_body": False})
                else:
                    retry = [(b"retry-after", str(error.retry_after).encode())] if error.retryable else []
                    await self._send_whole(error.status, body, send, retry)
        except TimeoutError:  # the client reads nothing: closing would wait for it without end
            self._exchange.abort()
            await asyncio.sleep(0)

    def _failed(self, error: DynserveError) -> bytes:
        """The last event of a Responses stream that has failed. The worker numbers the events; this one comes after all."""
        response: dict[str, Any] = {"id": self._request.generation.render.response_id, "object": "response"}
        response |= {"status": "failed", "error": {"code": error.code, "message": str(error)}}
        data = {"type": "response.failed", "sequence_number": LAST_NUMBER, "response": response}
        return event("response.failed", msgspec.json.encode(data))

    async def _send_whole(self, status: int, body: bytes, send: Send, extra: Headers) -> None:
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *extra]
        if self._exchange.respond(send, status, self._with_common(headers), body):
            self._started = True
            return
        await self._start(status, headers, send)
        await send({"type": "http.response.body", "body": body, "more_body": False})

    async def _start(self, status: int, headers: Headers, send: Send) -> None:
        self._started = True
        await send({"type": "http.response.start", "status": status, "headers": self._with_common(headers)})

    def _with_common(self, headers: Headers) -> Headers:
        return [*headers, *self._extra, (b"x-request-id", self._request_id.encode("latin-1", "replace"))]


def _discard(data: bytes) -> bool:
    return True


class ClientWatch:
    """A block that ends when the client disconnects or does not read, or the request times out.

    `runs` are those of the request's answers that have begun; `add` adds one.
    """

    __slots__ = ("_deadline", "_disconnected", "_exchange", "_limit", "_receive", "_runs", "_unsubscribe")

    def __init__(self, exchange: Exchange, receive: Receive, deadline: float, runs: list[Run]) -> None:
        self._exchange, self._receive, self._deadline, self._runs = exchange, receive, deadline, runs
        self._disconnected = False

    async def __aenter__(self) -> ClientWatch:
        self._unsubscribe = self._exchange.on_disconnect(self._receive, self._on_disconnect)
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
            self._unsubscribe()
            del self._unsubscribe  # it refers to this object, too: a reference cycle
            for run in self._runs:
                run.limit_sending(None)

    def add(self, run: Run) -> None:
        """Raises Cancelled when the client has disconnected already."""
        self._runs.append(run)
        run.limit_sending(self._limit)
        if self._disconnected:
            run.outcome = "cancelled"
            raise Cancelled("the client has disconnected")

    def _on_disconnect(self) -> None:
        self._disconnected = True
        for run in self._runs:
            run.cancel(Cancelled("the client has disconnected"))
