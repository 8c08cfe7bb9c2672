"""One answer: turns the executor's outputs into messages on the link. Runs once per token, so it only renders and sends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import msgspec

from dynserve.errors import DynserveError, InternalError, TimedOut
from dynserve.executors.base import Executor, Output
from dynserve.render.formats.embedding import embedding_item
from dynserve.render.renderer import Renderer
from dynserve.text.detokenize import Vocabulary
from dynserve.transport.base import Link
from dynserve.wire.link import Failed, Finished, HandoffDeclined, Tokens, Usage
from dynserve.wire.requests import AnswerEnding, GenerateRequest, PriorOutput, TokenLogprob

log = logging.getLogger(__name__)


class Answer:
    """The answer to one request. Calls `ended(self, outcome)` once, with `finished`, `handed off` or `failed`; a cancelled
    answer is closed without that call."""

    def __init__(
        self, request: GenerateRequest, link: Link, vocabulary: Vocabulary, ended: Callable[[Answer, str], None]
    ) -> None:
        self.request, self.link = request, link
        self.ticket = 0  # set once the executor has accepted the request
        self._ended = ended
        self._closed = False
        self._first: Output | None = None  # has the cached tokens and times of the prompt
        self._renderer = Renderer(request.render, request.stop, request.prompt, vocabulary)
        self._tokens, self._logprobs = list[int](), list[TokenLogprob]()  # of a resumable answer: what was sent here
        self._ending: AnswerEnding | None = None
        self._missed = b""
        if request.prior is not None:
            after = None if request.resumable is None else request.resumable.after
            self._missed = self._renderer.replay(request.prior, after)

    def start(self, executor: Executor) -> None:
        """Submits the request. Raises CallerError for a request that cannot run."""
        self._executor, loop = executor, asyncio.get_running_loop()
        resumable = self.request.resumable
        if resumable is not None and resumable.ending is not None:
            loop.call_soon(self._end_resumed, resumable.ending)
        else:
            self.ticket = executor.submit(self.request, self._deliver)
            if self._missed:
                self.link.send(Tokens(self.request.stream, self._missed, []))
        self._timer = loop.call_later(self.request.timeout_s, self._overdue)

    def kept(self) -> GenerateRequest:
        """Returns a resumable answer as a request with all output so far."""
        request, prior = self.request, self.request.prior or PriorOutput([])
        assert request.resumable is not None
        cached = self._renderer.cached_tokens if self._first is None else self._first.cached_tokens
        output = PriorOutput(
            [*prior.token_ids, *self._tokens], [*prior.logprobs, *self._logprobs], prior.cached_tokens or cached
        )
        return msgspec.structs.replace(
            request, prior=output if output.token_ids else None, handoff=None,
            resumable=msgspec.structs.replace(request.resumable, after=None, ending=self._ending),
        )  # fmt: skip

    def close(self) -> None:
        """Stops sending. The executor drops the request and its hand-off, if there is one."""
        self._closed = True
        self._timer.cancel()
        self._executor.abort(self.ticket)

    def _overdue(self) -> None:
        self._fail(TimedOut("the request took longer than its time limit"))

    def _deliver(self, output: Output) -> None:
        if self._closed:
            return
        try:
            self._send(output)
        except Exception as error:
            log.exception("request %s cannot be rendered", self.request.id)
            self._fail(InternalError(f"rendering failed: {error!r}"))

    def _send(self, output: Output) -> None:
        if output.error is not None:
            self._fail(output.error)
            return
        if output.embedding:
            self._embedded(output)
            return
        cached = 0
        if self._first is None:
            self._first = output
            if output.handoff_declined:
                self.link.send(HandoffDeclined(self.request.stream))
            cached = output.cached_tokens if self.request.prior is None else 0
        data = self._renderer.push(output.token_ids, output.logprobs)
        if self.request.resumable is not None:
            self._tokens += output.token_ids
            self._logprobs += output.logprobs or ()
        if self._renderer.stopped:
            self._executor.abort(self.ticket)
            self._finish(output, data, "stop")
        elif output.reason is None:
            ids = output.token_ids
            if len(ids) == 1 and output.logprobs is None and not cached:
                self.link.send_token(self.request.stream, ids[0], data)
            else:
                self.link.send(Tokens(self.request.stream, data, ids, output.logprobs, cached))
        elif output.reason == "handoff":
            self._hand_off(output, data)
        else:
            self._finish(output, data, output.reason)

    def _end_resumed(self, ending: AnswerEnding) -> None:
        """Sends what is missing of an answer whose tokens are all known."""
        if self._closed:
            return
        self._ending = ending
        last, usage = self._renderer.finish(ending.reason, ending.stop_token)
        self.link.send(Finished(self.request.stream, self._missed + last, [], ending.reason, usage))
        self._end("finished")

    def _finish(self, output: Output, data: bytes, reason: str) -> None:
        self._ending = AnswerEnding(reason, output.stop_token)
        accounted = output if output.reason is not None or self._first is None else self._first
        if not self.request.prior:
            self._renderer.cached_tokens = accounted.cached_tokens
        last, usage = self._renderer.finish(reason, output.stop_token)
        usage = msgspec.structs.replace(
            usage, queue_s=accounted.queue_s, transfer_s=accounted.transfer_s, prefill_s=accounted.prefill_s
        )
        self.link.send(
            Finished(self.request.stream, data + last, output.token_ids, reason, usage, None, output.logprobs)
        )
        self._end("finished")

    def _embedded(self, output: Output) -> None:
        usage = Usage(self.request.num_tokens, 0, 0, output.queue_s, 0.0, output.prefill_s)
        item = embedding_item(self.request.render, output.embedding)
        self.link.send(Finished(self.request.stream, item, [], "stop", usage))
        self._end("finished")

    def _hand_off(self, output: Output, data: bytes) -> None:
        counted = (self.request.num_tokens, len(output.token_ids), output.cached_tokens)
        usage = Usage(*counted, output.queue_s, 0.0, output.prefill_s)
        self.link.send(
            Finished(self.request.stream, data, output.token_ids, "handoff", usage, output.handoff, output.logprobs)
        )
        self._end("handed off")

    def _fail(self, error: DynserveError) -> None:
        self._executor.abort(self.ticket)
        self.link.send(Failed(self.request.stream, error.code, str(error), error.param))
        self._end("failed")

    def _end(self, outcome: str) -> None:
        self._closed = True
        self._timer.cancel()
        self._ended(self, outcome)
