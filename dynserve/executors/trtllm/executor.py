"""The TensorRT-LLM executor. An engine has one per attention-DP rank, because each rank has its own KV cache and routers
choose among ranks. Without attention DP it has one.

A request is a call of `generate_async` and a task that reads its results:

    prefill     context_only: one token, then a hand-off, which is open until its decode worker has answered
    decode      generation_only: continues from the first token; after a failed transfer the prompt is computed here, once
    aggregated  no params, or context_and_generation where the engine has a transceiver
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from dynserve.config import WorkerConfig
from dynserve.errors import (
    BadRequest,
    ContextTooLong,
    DynserveError,
    EngineLost,
    HandoffBroken,
    HandoffError,
    HandoffMismatch,
    InternalError,
    Unavailable,
)
from dynserve.executors.base import Executor, ExecutorLimits, KvListener, Output, OutputSink, check_request
from dynserve.executors.handoff import HandoffEnd, HandoffTable, belongs
from dynserve.executors.trtllm import state
from dynserve.executors.trtllm.answer import Cursor, has_context, note_costs, read_context
from dynserve.executors.trtllm.arguments import TRANSFER_TIMEOUT_MS
from dynserve.executors.trtllm.engine import LOOP_CRASHED, TrtllmEngine
from dynserve.executors.trtllm.engine_request import EngineRequest, Kind, Progress
from dynserve.executors.trtllm.in_flight import InFlight
from dynserve.executors.trtllm.request import Adapter, ends_of, keywords_of, prompt_of, salt_of, sampling_of, terms_of
from dynserve.executors.trtllm.stats import FRESH, Stats
from dynserve.model_files import eos_token_ids, model_limits
from dynserve.wire.events import KvEvent, Load
from dynserve.wire.requests import GenerateRequest

log = logging.getLogger(__name__)

TRANSFER_GRACE = 5.0  # seconds beyond the engine's own time limit of a transfer
ABORT_TIMEOUT = 30.0  # seconds for an aborted request to end
TOO_LONG = "default_max_tokens"  # in the engine's refusal of a prompt that does not fit in its context or its cache


class TrtllmExecutor:
    """One rank's `Executor`."""

    def __init__(
        self, engine: TrtllmEngine, config: WorkerConfig, instance_id: str, rank: int, no_grammars: str = ""
    ) -> None:
        self._engine, self._loop, self._rank = engine, asyncio.get_running_loop(), rank
        args, folder = engine.llm.args, Path(config.model_path)
        vocab_size, context = model_limits(folder)
        self._eos = tuple(eos_token_ids(folder))
        within = rank if engine.ranks > 1 else None
        self._terms = terms_of(engine.api, args, config.adapters, self._eos, vocab_size, within)
        self._context_length: int = args.max_seq_len or context
        self._no_grammars = no_grammars
        self.stats = Stats(
            engine.total_blocks, args.max_batch_size, engine.block_size, engine.ranks, args.max_num_tokens, engine.parts
        )
        timeout_ms = getattr(args.cache_transceiver_config, "kv_transfer_timeout_ms", None)
        self._in_flight = InFlight(timeout_ms / 1000 if timeout_ms else None)
        self._handoffs = HandoffTable(instance_id, (timeout_ms or TRANSFER_TIMEOUT_MS) / 1000, self._handoff_ended)
        self._tickets = count(1)
        self._calls: dict[int, EngineRequest] = {}  # by ticket, those whose outputs are still wanted
        self._transfers: Counter[str] = Counter()
        self._kv_listener: KvListener | None = None
        self._said: set[str] = set()  # warnings that are logged once

    @property
    def engine(self) -> TrtllmEngine:
        """The engine of this rank and the others."""
        return self._engine

    @property
    def max_seq_len(self) -> int:
        """The longest prompt with its answer, in tokens: the engine limits its context to what its KV cache holds."""
        return min(self._context_length, self._engine.capacity or self._context_length)

    @property
    def max_prompt(self) -> int:
        """The longest prompt that the engine computes here, in tokens."""
        return min(self.max_seq_len - 2, self._max_prompt() or self.max_seq_len)

    @property
    def limits(self) -> ExecutorLimits:
        engine, args, blocks = self._engine, self._engine.llm.args, self._total_blocks
        return ExecutorLimits(
            engine.block_size, blocks, self.max_seq_len, args.max_batch_size, self._terms.vocab_size,
            grammars=not self._no_grammars, no_grammars=self._no_grammars, adapters=tuple(self._terms.adapters),
            kv_events=engine.has_kv_events, pairing=engine.pairing, single_use_handoffs=True,
            max_num_tokens=args.max_num_tokens or 0,
        )  # fmt: skip

    @property
    def failed(self) -> asyncio.Future[None]:
        return self._engine.failed

    @property
    def targets(self) -> Sequence[Executor]:
        return self._engine.targets

    def load(self) -> Load:
        return self.stats.load(self._in_flight.counts, len(self._handoffs), self._total_blocks, self._loop.time())

    @property
    def _total_blocks(self) -> int:
        return self.stats.total_blocks or self._engine.total_blocks or self._engine.guessed_blocks

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        return self._terms.adapters

    def counters(self) -> Mapping[str, float]:
        gaps, orphans = self._engine.losses(self._rank)
        return {
            **{f"handoffs_{how}_total": number for how, number in self._handoffs.ended.items()},
            **{f"kv_transfers_{what}_total": number for what, number in self._transfers.items()},
            "kv_event_gaps_total": gaps,
            "kv_event_orphans_total": orphans,
            **self.stats.counters(),
        }

    def describe(self) -> Mapping[str, str]:
        found = {"engine": self._status(), "KV events": "on" if self._engine.has_kv_events else "off"}
        if self._no_grammars:
            found["grammars"] = f"off: {self._no_grammars}"
        return {**found, **self._engine.pairing}

    def _status(self) -> str:
        if self.failed.done():
            return "dead"
        if not self._in_flight.live:
            return "idle"
        return "busy" if self._engine.silence <= FRESH else "silent"

    def listen_kv(self, listener: KvListener) -> None:
        self._kv_listener = listener

    def kv_changed(self, events: list[KvEvent]) -> None:
        if self._kv_listener is not None:
            self._kv_listener(events)

    # requests in

    def submit(self, request: GenerateRequest, sink: OutputSink) -> int:
        if self.failed.done():
            raise Unavailable("the engine is dead")
        check_request(request, self.limits, None if request.phase == "decode" else self._max_prompt())
        if request.phase == "prefill" and not self._engine.disaggregates:
            raise InternalError("this worker has no cache transceiver: it cannot hand over a prefill")
        ticket, began = next(self._tickets), self._loop.time()
        params = self._adopt_handoff(request) if request.phase == "decode" else None
        if params is not None and request.handoff is not None:
            call = EngineRequest(request, Kind.GENERATION, sink, began)
            self._start(ticket, call, params)
            limit = request.handoff.ttl_s + TRANSFER_GRACE
            call.timer = self._loop.call_later(limit, self._transfer_overdue, ticket, call, limit)
        elif request.phase == "prefill" and self._can_hand_over(request):
            call = EngineRequest(request, Kind.CONTEXT, sink, began)
            context = self._params(state.CONTEXT)
            call.handoff_id = context.disagg_request_id
            self._start(ticket, call, context)
        else:
            self._start(ticket, EngineRequest(request, Kind.WHOLE, sink, began), self._params(state.BOTH))
        return ticket

    def abort(self, ticket: int) -> None:
        if self._handoffs.cancel(ticket):
            return
        if (call := self._calls.pop(ticket, None)) is not None:
            self._abandon(call)

    def handoff_done(self, ticket: int) -> None:
        self._handoffs.deliver(ticket)

    def engine_died(self, *, crashed: bool) -> None:
        """Fails all requests with EngineLost, so that other workers continue them. `crashed`: an exception has ended the
        engine's loop. A grammar that was about to begin may be its cause, and is not sent on."""
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.stop_timer()
            sink, call.sink = call.sink, None
            suspected = crashed and call.request.grammar is not None and call.progress is Progress.SUBMITTED
            error = InternalError("the engine crashed at this grammar, or beside it") if suspected else None
            if sink is not None:
                sink(Output([], error=error or EngineLost("the worker's engine died")))
        self._handoffs.cancel_all()  # a dead engine cannot send their KV blocks

    def close(self) -> None:
        self._handoffs.cancel_all()
        for ticket in list(self._calls):
            self.abort(ticket)
        self._in_flight.close()

    def _max_prompt(self) -> int | None:
        """Returns the upper bound of a prompt, in tokens, where prompts are not computed in chunks."""
        args = self._engine.llm.args
        return None if args.enable_chunked_prefill else args.max_num_tokens

    @staticmethod
    def _can_hand_over(request: GenerateRequest) -> bool:
        """Whether a context phase suffices: more than one token is missing, and no grammar must see the prior output."""
        prior = len(request.prior_tokens)
        return request.stop.max_tokens - prior > 1 and not (prior and request.grammar is not None)

    def _adopt_handoff(self, request: GenerateRequest) -> Any:
        """Returns the context phase's params, or None when they cannot be used and the prompt is computed here."""
        handoff, engine = request.handoff, self._engine
        try:
            if handoff is None or not engine.disaggregates:
                raise HandoffMismatch("the request has no hand-off, or this worker no cache transceiver")
            if not belongs(handoff, request):
                raise HandoffMismatch(f"hand-off {handoff.id} belongs to another request or prompt")
            known = request.prior.logprobs if request.prior is not None else []
            params = state.unpack(handoff.state, engine.pairing, engine.api, known)
            if params.disagg_request_id != handoff.id:
                raise HandoffMismatch(f"hand-off {handoff.id} carries the state of {params.disagg_request_id}")
        except HandoffError as error:
            self._note_failure(request, error)
            return None
        return params

    def _params(self, kind: str) -> Any:
        if not self._engine.disaggregates:
            return None
        return self._engine.api.disaggregated(request_type=kind, disagg_request_id=next(self._engine.ids))

    def _start(self, ticket: int, call: EngineRequest, params: Any) -> None:
        """Passes the request to the engine.

        Raises:
            CallerError: the engine refuses the request.
            Unavailable: the engine is dead, or the prompt is too long to be computed here.
            InternalError: the engine failed in another way.
        """
        request = call.request
        prior, done = request.prior_tokens, self._appended(call)
        prompt, again = prompt_of(request, prior=done), prior[done:]
        max_tokens = max(1, min(request.stop.max_tokens - done, self.max_seq_len - len(prompt)))
        if call.declines_handoff and len(prompt) > (self._max_prompt() or len(prompt)):
            raise Unavailable("the hand-off was declined, and the prompt is too long to be prefilled here")
        end, others = ends_of(request, self._eos)
        call.cursor = Cursor(request, [end, *others] if end >= 0 else others, again)
        min_tokens = max(0, request.stop.min_tokens - done)
        self._note_unusual(call)
        try:
            most = 1 if call.kind is Kind.CONTEXT else max_tokens
            call.result = self._generate(prompt, params, call, most, min_tokens)
        except DynserveError:
            self._engine.forget_apart(call.apart)
            raise
        self._calls[ticket] = call
        self._in_flight.started(call)
        call.task = self._engine.tasks.create_task(self._consume(ticket, call))

    @staticmethod
    def _appended(call: EngineRequest) -> int:
        """Returns how many prior tokens are appended to the prompt. The engine generates the others again, and they are
        compared with the client's and skipped: the token after a hand-off, and with a grammar, which must see the answer
        from its start, all of them."""
        request = call.request
        if call.kind is Kind.GENERATION and request.handoff is not None:
            return request.handoff.num_tokens - request.num_tokens
        return 0 if call.kind is Kind.WHOLE and request.grammar is not None else len(request.prior_tokens)

    def _generate(self, prompt: list[int], params: Any, call: EngineRequest, max_tokens: int, min_tokens: int) -> Any:
        engine, request = self._engine, call.request
        try:
            sampling = sampling_of(request, self._terms, max_tokens=max_tokens, min_tokens=min_tokens)
            keywords = keywords_of(request, self._terms, params)
            return engine.llm.generate_async(prompt, sampling, streaming=call.kind is not Kind.CONTEXT, **keywords)
        except DynserveError:
            raise
        except (engine.api.request_error, ValueError, NotImplementedError) as error:
            if LOOP_CRASHED in str(error):
                engine.die(str(error))
                raise Unavailable("the engine is dead") from error
            raise (_too_long(request, error) if TOO_LONG in str(error) else BadRequest(str(error))) from error
        except Exception as error:
            if engine.api.engine_dead is not None and isinstance(error, engine.api.engine_dead):
                engine.die(str(error))
                raise Unavailable("the engine is dead") from error
            raise InternalError(f"the engine refused a request: {type(error).__name__}: {error}") from error

    def _note_unusual(self, call: EngineRequest) -> None:
        """Says once what the engine does not do for a request, and keeps its blocks apart from those of other prompts."""
        engine, request = self._engine, call.request
        if salt_of(request) or request.adapter:
            call.apart = engine.note_apart(request.prompt, adapter=bool(request.adapter))
            if engine.streams is not None and not engine.streams.names_salts:
                self._warn_once(
                    "this engine's KV events name no salts: requests with a salt or an adapter are not routed by cached "
                    "prefixes"
                )
        if request.priority and not self._terms.priorities:
            self._warn_once(
                "priorities of requests are not passed to the engine, which ignores them unless its options say "
                "scheduler_config: {waiting_queue_policy: priority}"
            )

    def _warn_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            log.warning("%s", text)

    # answers out

    async def _consume(self, ticket: int, call: EngineRequest) -> None:
        """Reads a request's results to the end. An error becomes the request's last output; it is not raised, since that
        would end the task group."""
        engine, result, note_sign_of_life = self._engine, call.result, self._engine.note_sign_of_life
        try:
            async for _ in result:
                note_sign_of_life()
                if call.progress in (Progress.SUBMITTED, Progress.ABANDONED):
                    self._note_first_response(call)
                if call.sink is not None:
                    self._give(ticket, call)
            self._note_unfetched(ticket, call)
        except asyncio.CancelledError:
            if call.can_abort:
                engine.abort(result)
            raise
        except engine.api.request_error as error:
            self._request_failed(ticket, call, error)
        except Exception as error:
            await self._engine_failed(ticket, call, error)
        finally:
            self._in_flight.ended(call)
            engine.forget_apart(call.apart)
            call.stop_timer()

    def _note_first_response(self, call: EngineRequest) -> None:
        self._in_flight.answered(call)
        if call.progress is Progress.ABANDONED:
            call.progress = Progress.ABORTED
            self._engine.abort(call.result)
            return
        call.progress = Progress.ANSWERING
        call.stop_timer()
        if call.kind is Kind.GENERATION:
            self._transfers["done"] += 1

    def _give(self, ticket: int, call: EngineRequest) -> None:
        sink = call.sink
        try:
            output = self._output(ticket, call)
        except HandoffMismatch as error:
            self._stop_computing(ticket, call)
            self._compute_here(ticket, call, error)
            return
        except Exception as error:  # an unreadable result is an error of this executor, for this request only
            log.exception("request %s: its result cannot be read", call.request.id)
            self._stop_computing(ticket, call)
            self._fail(ticket, call, InternalError(f"the engine's result cannot be read: {type(error).__name__}"))
            return
        if output is None or sink is None:
            return
        if output.reason is not None or output.error is not None:
            self._calls.pop(ticket, None)
            call.sink = None
        try:
            sink(output)
        except Exception:  # an error of one request must not count as the engine's
            log.exception("request %s: its output could not be delivered", call.request.id)
            self.abort(ticket)

    def _output(self, ticket: int, call: EngineRequest) -> Output | None:
        """Returns the new output for the client, or None."""
        output = read_context(call.result, call.cursor) if call.kind is Kind.CONTEXT else call.cursor.read(call.result)
        if output is None:
            return None
        first = not call.has_output
        if output.reason != "handoff" and output.error is None:
            over = call.generated + len(output.token_ids) - call.request.stop.max_tokens
            if over > 0 or (over == 0 and output.reason is None):
                self._end_here(ticket, call, output, over)
        if first or output.reason is not None:
            note_costs(output, call.result, self._loop.time() - call.began)
        output.handoff_declined = first and call.declines_handoff
        call.generated += len(output.token_ids)
        self._in_flight.grew(call, len(output.token_ids))
        if output.reason == "handoff":
            self._hand_over(ticket, call, output)
        return output

    def _end_here(self, ticket: int, call: EngineRequest, output: Output, over: int) -> None:
        """Ends the answer at max_tokens. An engine that does not count the context phase's token yields `over` too many."""
        if over:
            del output.token_ids[-over:]
            if output.logprobs is not None:
                del output.logprobs[-over:]
        output.reason = "length"
        self._stop_computing(ticket, call)

    def _hand_over(self, ticket: int, call: EngineRequest, output: Output) -> None:
        params = call.result.outputs[0].disaggregated_params
        request = call.request
        packed = state.pack(params, call.handoff_id, self._engine.pairing, self._engine.api)
        output.handoff = self._handoffs.open(ticket, request, [], 0, packed, id_=call.handoff_id)
        self._in_flight.hold(ticket, output.handoff.num_tokens)
        call.handed_over = True

    def _note_unfetched(self, ticket: int, call: EngineRequest) -> None:
        """Counts the blocks of a context phase that has ended in the engine after it was aborted here."""
        if call.kind is Kind.CONTEXT and not call.handed_over and has_context(call.result):
            self._in_flight.hold(ticket, call.request.num_tokens + len(call.request.prior_tokens))
            self._in_flight.release(ticket, fetched=False)

    def _handoff_ended(self, ticket: int, how: HandoffEnd) -> None:
        self._in_flight.release(ticket, fetched=how is HandoffEnd.DELIVERED)

    # what goes wrong

    async def _engine_failed(self, ticket: int, call: EngineRequest, error: Exception) -> None:
        """Handles an error of unknown cause. A dead engine has reported its end, or generates no token any more: then all
        its requests may be retried on other workers. Otherwise only this one fails, since its retries could crash one
        worker after another."""
        engine = self._engine
        dead = engine.api.engine_dead
        if (dead is not None and isinstance(error, dead)) or not await engine.alive():
            engine.die(f"{type(error).__name__}: {error}")
            return
        log.error("request %s: its result ended with %s: %s", call.request.id, type(error).__name__, error)
        self._fail(ticket, call, InternalError(f"the engine's result ended with an error: {type(error).__name__}"))

    def _request_failed(self, ticket: int, call: EngineRequest, error: Exception) -> None:
        if LOOP_CRASHED in str(error):
            self._engine.die(str(error))
            return
        if call.progress is Progress.SUBMITTED and TOO_LONG in str(error):
            self._fail(ticket, call, _too_long(call.request, error))
            return
        if call.kind is Kind.GENERATION and not call.has_output:
            self._compute_here(ticket, call, HandoffBroken(str(error)))
            return
        if call.request.grammar is not None and call.progress is Progress.SUBMITTED:
            self._fail(ticket, call, BadRequest(str(error), param="response_format"))
        else:
            self._fail(ticket, call, InternalError(f"the engine failed the request: {error}"))

    def _transfer_overdue(self, ticket: int, call: EngineRequest, seconds: float) -> None:
        if self._calls.get(ticket) is call:
            self._abandon(call, keep_sink=True)
            self._compute_here(ticket, call, HandoffBroken(f"no token arrived within {seconds:.0f} s"))

    def _compute_here(self, ticket: int, call: EngineRequest, error: HandoffError) -> None:
        """Computes the prompt here after a failed transfer: once, and only before this worker has sent a token."""
        sink, call.sink = call.sink, None
        if sink is None:
            return
        if call.kind is Kind.WHOLE or call.has_output:
            call.sink = sink
            self._fail(ticket, call, error)
            return
        self._note_failure(call.request, error)
        again = EngineRequest(call.request, Kind.WHOLE, sink, call.began)
        try:
            self._start(ticket, again, self._params(state.BOTH))
        except DynserveError as failure:
            self._fail(ticket, again, failure)

    def _fail(self, ticket: int, call: EngineRequest, error: DynserveError) -> None:
        self._calls.pop(ticket, None)
        sink, call.sink = call.sink, None
        if sink is not None:
            sink(Output([], error=error))

    def _note_failure(self, request: GenerateRequest, error: HandoffError) -> None:
        self._transfers["failed"] += 1
        log.warning("request %s: %s; prefilling here instead", request.id, error)

    # ending

    def _stop_computing(self, ticket: int, call: EngineRequest) -> None:
        """Aborts the request in the engine, unless it has ended there. Its sink still receives an output."""
        if not call.result.finished:
            self._calls.pop(ticket, None)
            self._abandon(call, keep_sink=True)

    def _abandon(self, call: EngineRequest, *, keep_sink: bool = False) -> None:
        """Aborts the request in the engine, now or once `Progress` allows it. Its task is cancelled if it does not end in
        time."""
        if not keep_sink:
            call.sink = None
        call.stop_timer()
        limit, handoff = ABORT_TIMEOUT, call.request.handoff
        if call.can_abort:
            call.progress = Progress.ABORTED
            self._engine.abort(call.result)
        else:
            call.progress = Progress.ABANDONED
            if handoff is not None:  # the engine responds after its own time limit of a transfer
                limit = handoff.ttl_s + TRANSFER_GRACE
        call.timer = self._loop.call_later(limit, call.task.cancel)


def _too_long(request: GenerateRequest, error: Exception) -> ContextTooLong:
    return ContextTooLong(f"{request.num_tokens} tokens leave no room for an answer in the engine's context: {error}")
