"""One answer: turns the executor's outputs into messages on the link. Runs once per token, so it only renders and sends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator

import msgspec

from dynserve.errors import DynserveError, InternalError, TimedOut
from dynserve.executors.base import Executor, Output
from dynserve.render.formats.embedding import embedding_item
from dynserve.render.renderer import REPLAYED, Renderer
from dynserve.text.detokenize import Vocabulary
from dynserve.transport.base import Link
from dynserve.wire.link import Failed, Finished, HandoffDeclined, Tokens, Usage
from dynserve.wire.requests import AnswerEnding, GenerateRequest, PriorOutput, TokenLogprob

log = logging.getLogger(__name__)

MISSED_AT_ONCE = 64 << 10  # bytes of missed events in one message


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
        self._replay: Iterator[bytes] | None = None  # of output that the client has, or lacks
        self._held: list[Output] = []  # until the replay is done
        self._missed = b""  # events that the client lacks
        after = None if request.resumable is None else request.resumable.after
        if request.prior is not None or after is not None:
            self._replay = self._renderer.replay_in_steps(request.prior or PriorOutput([]), after)

    def start(self, executor: Executor) -> None:
        """Submits the request. Raises CallerError for a request that cannot run."""
        self._executor, loop = executor, asyncio.get_running_loop()
        if self._known_ending is None:
            self.ticket = executor.submit(self.request, self._deliver)
        self._timer = loop.call_later(self.request.timeout_s, self._overdue)
        if self._replay is not None:
            self._replay_next()

    @property
    def _known_ending(self) -> AnswerEnding | None:
        """The end of a resumed answer of which nothing is missing but events."""
        return None if self.request.resumable is None else self.request.resumable.ending

    def _replay_next(self) -> None:
        """Replays some tokens, and the others later: a worker that continues many long answers must still answer pings."""
        if self._closed or self._replay is None:
            return
        events = next(self._replay, None)
        if events is not None:
            self._missed += events
            if len(self._missed) > MISSED_AT_ONCE:
                self._send_missed()
            if len(self.request.prior_tokens) < REPLAYED:  # it was the only step
                self._replay_next()
            else:
                asyncio.get_running_loop().call_soon(self._replay_next)
            return
        self._replay = None
        if self._known_ending is not None:
            asyncio.get_running_loop().call_soon(self._end_resumed, self._known_ending)
            return
        self._send_missed()
        held, self._held = self._held, []
        for output in held:
            self._deliver(output)

    def _send_missed(self) -> None:
        if self._missed:
            self.link.send(Tokens(self.request.stream, self._missed, []))
            self._missed = b""

    def kept(self) -> GenerateRequest:
        """Returns a resumable answer as a request with all output so far."""
        request, prior = self.request, self.request.prior or PriorOutput([])
        assert request.resumable is not None
        cached = self._renderer.cached_tokens if self._first is None else self._first.cached_tokens
        before = PriorOutput(prior.token_ids, prior.logprobs, prior.cached_tokens or cached)
        output = before.followed_by(self._tokens, self._logprobs)
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
        if self._replay is not None:
            self._held.append(output)
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
        if not self.request.prior_tokens:
            self._missed += self._renderer.push([], None)  # as its first and only output was
        last, usage = self._renderer.finish(ending.reason, ending.stop_token)
        self.link.send(Finished(self.request.stream, self._missed + last, [], ending.reason, usage))
        self._end("finished")

    def _finish(self, output: Output, data: bytes, reason: str) -> None:
        if self.request.resumable is not None:
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
