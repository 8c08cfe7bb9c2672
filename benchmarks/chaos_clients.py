"""The clients of `chaos.py`: each sends one planned request, and compares what it receives with what it must receive."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

from chaos_cluster import EOS, MODEL, REQUEST, VOCAB_SIZE, VOCABULARY, ChaosCluster, FrontendProcess
from chaos_plan import PlannedRequest

from dynserve.errors import Cancelled, DynserveError, NoAck, Overloaded, PoisonRequest, SlowClient, TimedOut
from dynserve.executors.scheduler import Sequence
from dynserve.executors.simulated import SimulatedStepper
from dynserve.frontend.inference import InferenceRequest, RoutingHints
from dynserve.frontend.pipeline import Run
from dynserve.frontend.reply import Record
from dynserve.frontend.response import ClientWatch
from dynserve.render.renderer import Renderer
from dynserve.server.exchange import ChunkWriter, Exchange
from dynserve.wire.link import Finished
from dynserve.wire.requests import (
    GenerateRequest,
    Generation,
    RenderOptions,
    SamplingParams,
    StopConditions,
    fields_of,
    unpack_tokens,
)


class Expected(NamedTuple):
    """What the client of a request receives when nothing fails."""

    data: bytes
    tokens: list[int]
    counts: tuple[int, int]  # of prompt and answer


class Call:
    """A planned request, with its answer: the simulated executor's tokens are a function of prompt and position."""

    def __init__(self, number: int, planned: PlannedRequest, cluster: ChaosCluster) -> None:
        self.planned, self._cluster = planned, cluster
        render = RenderOptions(
            kind="chat" if planned.seed % 2 else "completion", response_id=f"r{number}", model=MODEL, created=0,
            stream=planned.stream, logprobs=0 if planned.logprobs else None,
        )  # fmt: skip
        self._sampling = SamplingParams(
            temperature=planned.temperature, seed=planned.seed, logprobs=0 if planned.logprobs else None
        )
        self._tokens, self._sampled, self._end = self._answer(render)
        self.generation = self._generation(render, self._stop_strings())
        self.request = InferenceRequest(
            id=f"request-{number:02}", model=MODEL, generation=self.generation,
            hints=RoutingHints(cache_salt=planned.salt, session=planned.session, priority=planned.priority),
        )  # fmt: skip

    @cached_property
    def expected(self) -> Expected:
        generation = self.generation
        renderer = Renderer(generation.render, generation.stop, generation.prompt, VOCABULARY)
        data, tokens, reason, end = b"", [], "length" if self._end is None else "stop", self._end
        for token_id, logprob in zip(self._tokens, self._sampled, strict=True):
            tokens.append(token_id)
            data += renderer.push([token_id], [logprob] if self.planned.logprobs else None)
            if renderer.stopped:
                reason, end = "stop", None
                break
        last, usage = renderer.finish(reason, end)
        return Expected(data + last, tokens, (usage.prompt_tokens, usage.completion_tokens))

    def _generation(self, render: RenderOptions, strings: tuple[str, ...]) -> Generation:
        planned = self.planned
        stop = StopConditions(max_tokens=planned.max_tokens, ignore_eos=planned.ignore_eos, strings=strings)
        return Generation(prompt=planned.prompt, sampling=self._sampling, stop=stop, render=render)

    def _answer(self, render: RenderOptions) -> tuple[list[int], list[Any], int | None]:
        """All tokens up to the length or the end of the turn, their log-probabilities, and the token of that end."""
        request = GenerateRequest(
            **fields_of(self._generation(render, ())), id="", stream=0, reply_to="", model=MODEL, phase="aggregated",
            timeout_s=1.0, cache_salt=self.planned.salt,
        )  # fmt: skip
        args = self._cluster.args
        stepper = SimulatedStepper(args, VOCAB_SIZE, EOS)
        sequence = Sequence(0, request, args.kv_cache_config.tokens_per_block, EOS, 0.0)
        stop, length = request.stop, stepper._answer_length(sequence)
        number = stop.max_tokens if stop.ignore_eos else min(stop.max_tokens, length)
        sampled = stepper._tokens(sequence, number)
        end = min(EOS) if number < stop.max_tokens else None
        return [one.token_id for one in sampled], [one.logprob for one in sampled], end

    def _stop_strings(self) -> tuple[str, ...]:
        if self.planned.stop_at is None:
            return ()
        detokenizer = VOCABULARY.detokenizer(after=unpack_tokens(self.planned.prompt))
        text = detokenizer.push(self._tokens)
        first = self.planned.stop_at * len(text) // self.planned.max_tokens
        return (text[first : first + 5],) if text[first : first + 5] else ()


class WatchedExchange(Exchange):
    """An exchange whose client disconnects by `disconnect`."""

    disconnect: Callable[[], None] | None = None

    def on_disconnect(self, receive: object, callback: Callable[[], None]) -> Callable[[], None]:
        self.disconnect = callback

        def unsubscribe() -> None:
            self.disconnect = None

        return unsubscribe


class Client:
    """Sends one request to one frontend, as the HTTP response does (`frontend/response.py`), and judges the result."""

    def __init__(self, number: int, planned: PlannedRequest, cluster: ChaosCluster) -> None:
        self._call, self._planned, self._cluster = Call(number, planned, cluster), planned, cluster
        self._log, self._loop = cluster.log, cluster.loop
        self.name = self._call.request.id
        self._random = random.Random(f"{self.name} {cluster.plan.seed}")
        self._exchange = WatchedExchange(None)
        self._data = b""
        self._run: Run
        self._process: FrontendProcess
        self._disconnected = self._cancelled = self._finished = False
        self.outcome = ""  # `finished`, the name of an error's class, or who ended the request

    async def run(self, began: float) -> None:
        planned, cluster = self._planned, self._cluster
        await asyncio.sleep(max(0.0, began + planned.at - self._loop.time()))
        ready = [f for f in cluster.live_frontends() if f.ready]
        self._process = ready[int(planned.frontend * len(ready))]
        self._began = self._loop.time()
        self._log.add(self.name, "arrives at", self._process.name)
        sending = self._loop.create_task(self._send(), name=self.name)
        self._process.client_tasks[sending] = None
        timers = self._leave_later(sending)
        await asyncio.wait([sending])
        del self._process.client_tasks[sending]
        for timer in timers:
            timer.cancel()
        self._log.add(self.name, "ended:", self.outcome, len(self._run.tokens), "tokens,", len(self._data), "bytes")
        self._judge(sending)

    def _leave_later(self, sending: asyncio.Task[None]) -> list[asyncio.TimerHandle]:
        timers = []
        if self._planned.disconnects is not None:
            timers.append(self._loop.call_later(self._planned.disconnects, self._disconnect))
        if self._planned.cancelled is not None:
            timers.append(self._loop.call_later(self._planned.cancelled, self._cancel, sending))
        return timers

    def _disconnect(self) -> None:
        self._disconnected = True
        if self._exchange.disconnect is not None:
            self._log.add(self.name, "disconnects")
            self._exchange.disconnect()

    def _cancel(self, sending: asyncio.Task[None]) -> None:
        self._cancelled = True
        self._log.add(self.name, "is cancelled")
        sending.cancel()

    async def _send(self) -> None:
        frontend = self._process.frontend
        assert frontend is not None
        self._run = run = frontend.pipeline.run(self._call.request)
        REQUEST.set(self.name)
        try:
            with run:
                async with ClientWatch(self._exchange, _never, run.deadline, []) as watch:
                    watch.add(run)
                    if self._disconnected:
                        self._exchange.disconnect and self._exchange.disconnect()
                    await run.deliver(self._sink)
            self.outcome = "finished"
        except DynserveError as error:
            self._error = error
            self.outcome = type(error).__name__
        except asyncio.CancelledError:
            self.outcome = "cancelled" if self._cancelled else "frontend lost"
            raise

    async def _sink(self, burst: list[Record]) -> ChunkWriter | None:
        last, planned = burst[-1], self._planned
        tokens = sum(len(record.token_ids) for record in burst)
        self._log.add(self.name, "receives", len(burst), "records of", tokens, "tokens")
        if self._finished or self.outcome:
            self._complain("received a record after its end")
        self._finished = isinstance(last, Finished) and last.handoff is None
        if planned.slow and self._random.random() < planned.slow:
            await asyncio.sleep(self._random.uniform(0.0, 2.0))
        if planned.stream:
            self._data += b"".join([record.data for record in burst])
            return self._write if planned.direct else None
        if self._finished:
            self._data = last.data
        return _discard

    def _write(self, data: bytes) -> bool:
        if self._finished or self.outcome:
            self._complain("was written to after its end")
        if self._planned.slow and self._random.random() < self._planned.slow:
            return False
        self._log.add(self.name, "is written", len(data), "bytes")
        self._data += data
        return True

    # the judgement

    def _judge(self, sending: asyncio.Task[None]) -> None:
        if not self.outcome and not sending.cancelled() and (error := sending.exception()) is not None:
            self._complain(f"ended with {error!r}")
            return
        expected, tokens = self._call.expected, self._run.tokens
        if self.outcome == "finished":
            if tokens != expected.tokens:
                self._complain(f"has the tokens {tokens}, expected were {expected.tokens}")
            elif not self._right_data(expected):
                self._complain(f"received {self._data!r}, expected was {expected.data!r}")
            return
        if tokens != expected.tokens[: len(tokens)]:
            self._complain(f"failed after the tokens {tokens}, expected were the first of {expected.tokens}")
        if self._planned.stream and not expected.data.startswith(self._data):
            self._complain(f"failed after {self._data!r}, expected was the beginning of {expected.data!r}")
        if not self._explained():
            self._complain(f"failed without a cause: {self.outcome}: {getattr(self, '_error', '')}")

    def _right_data(self, expected: Expected) -> bool:
        if self._planned.stream:
            return self._data == expected.data
        # how many tokens were cached depends on the run
        found, wanted = json.loads(self._data), json.loads(expected.data)
        usage = found.pop("usage")
        del wanted["usage"]
        return bool(found == wanted) and (usage["prompt_tokens"], usage["completion_tokens"]) == expected.counts

    def _explained(self) -> bool:
        """Whether the planned client, the limits of the cluster, or a fault of a worker explains that the request failed."""
        if self.outcome in ("cancelled", "frontend lost"):
            return self._cancelled or self._process.dead
        error, options = self._error, self._cluster.plan.frontend_options
        waited = self._loop.time() - self._began + 0.001
        match error:
            case Cancelled():
                return self._disconnected
            case SlowClient():
                return int(options["max_stream_bytes"]) < 1 << 20
            case Overloaded():
                return options["max_queued"] < 9 or options["max_queued_s"] < 9 or self._small_queues
            case TimedOut() if not isinstance(error, NoAck):
                slow = self._planned.slow > 0 and options["max_stream_bytes"] < 1 << 20
                return slow or bool(options["request_timeout_s"] < 9 and waited >= options["request_timeout_s"])
            case PoisonRequest():
                return self._cluster.injected["engine death"] > 1
            case _:
                return self._by_touched_workers()

    @property
    def _small_queues(self) -> bool:
        return bool(self._cluster.plan.worker_options["max_queue"] < 9)

    def _by_touched_workers(self) -> bool:
        """Whether the request failed with workers that faults have touched: one of untouched workers had to be tried."""
        if self._small_queues:
            return True  # an untouched worker may have been busy
        needed = {"prefill", "decode"} & set(self._cluster.plan.roles) or {"aggregated"}
        return not needed <= {worker.role for worker in self._cluster.workers if not worker.touched}

    def _complain(self, what: str) -> None:
        self._cluster.violations.append(f"{self.name} {what}")


async def _never() -> Any:
    raise AssertionError("nothing is received from this client")


def _discard(data: bytes) -> bool:
    return True
