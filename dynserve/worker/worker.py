"""`Worker`: takes requests from the planes, gives them to its executor, and tells the cluster what it holds.

`serving_worker` opens the parts in the order in which they depend on each other; leaving closes them in reverse.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex
from typing import cast

from dynserve.config import WorkerConfig
from dynserve.errors import CallerError, ClusterError, DynserveError, InternalError, Unavailable
from dynserve.executors.base import Executor
from dynserve.openai.detokenize import Vocabulary
from dynserve.openai.model_files import digest, eos_token_ids, read_model_files
from dynserve.openai.parity import parity
from dynserve.openai.prompt import Preprocessor
from dynserve.tasks import Backoff, OwnedTasks, task_group
from dynserve.transport.base import Change, Deleted, Link, Planes
from dynserve.wire import MALFORMED, discovery, events, requests
from dynserve.wire.discovery import Card, FrontendInstance, WorkerInstance
from dynserve.wire.link import (
    VERSION,
    Cancel,
    FromFrontend,
    Hello,
    SnapshotRequest,
    Submit,
    SubmitReply,
    Taken,
    Welcome,
)
from dynserve.wire.requests import Accepted, Ack, Busy, Draining, GenerateRequest, Refused
from dynserve.worker import loopback
from dynserve.worker.answer import Answer
from dynserve.worker.card import answer_parsers, pooling
from dynserve.worker.journal import Journal
from dynserve.worker.loopback import Loopback

log = logging.getLogger(__name__)

EVENTS_EVERY = 0.01  # seconds between published batches of KV events
LOAD_EVERY = 0.1  # seconds between load reports while the load changes
LOAD_AT_LEAST_EVERY = 0.5  # seconds
STEADY = 2.0  # seconds after which a link that ended is dialled again at once
MAX_DONE = 20_000  # ended requests that a late copy is compared with


class Worker:
    """One executor on the planes. Requests come in through `accept` (NATS) or over a link; both end in `take`."""

    def __init__(self, config: WorkerConfig, executor: Executor, planes: Planes, instance_id: str) -> None:
        self.config, self.executor, self._planes = config, executor, planes
        self.id, self.epoch = instance_id, time.time_ns()
        self.counts: Counter[str] = Counter()  # accepted, finished, failed, cancelled, refused
        self.ready = False
        self.draining = False
        files = read_model_files(Path(config.model_path))
        self.files = {digest(content): content for content in files.values()}
        self._file_digests = {name: digest(content) for name, content in files.items()}
        preprocessor = Preprocessor(files)
        self._parity = parity(preprocessor, executor.limits.block_size)
        _warn_of_surplus_ids(preprocessor, executor.limits.vocab_size)
        self._vocabulary = Vocabulary(preprocessor.tokenizer)
        self._tool_parser, self._reasoning_parser = answer_parsers(config, preprocessor.template)
        self._answers: dict[tuple[str, int], Answer] = {}
        self._handed_off: dict[tuple[str, int], Answer] = {}  # until the frontend says that it is done with them
        self._done: dict[tuple[str, int], None] = {}  # the latest that ended, oldest first
        self._links: dict[str, Link] = {}
        self._dials: dict[str, Dial] = {}
        self._new_events = asyncio.Event()
        self._journal = Journal(instance_id, self.epoch, self._new_events.set)
        if config.kv_events:
            executor.listen_kv(self._journal.add)

    def instance(self, system_url: str) -> WorkerInstance:
        limits = self.executor.limits
        card = Card(
            model=self.config.model_name,
            block_size=limits.block_size,
            max_seq_len=limits.max_seq_len,
            num_blocks=limits.num_blocks,
            max_batch_size=limits.max_batch_size,
            eos_token_ids=eos_token_ids(Path(self.config.model_path)),
            files=self._file_digests,
            kv_events=self.config.kv_events and limits.kv_events,
            parity=self._parity,
            tool_parser=self._tool_parser,
            reasoning_parser=self._reasoning_parser,
            guides=limits.guides,
            pooling=pooling(self.config) if limits.embedding_size else "",
            embedding_size=limits.embedding_size,
            adapters=list(limits.adapters),
            pairing=dict(limits.pairing),
            taken_once=limits.taken_once,
        )
        return WorkerInstance(
            id=self.id,
            role=self.config.disaggregation_mode,
            epoch=self.epoch,
            host=self.config.link_host,
            pid=os.getpid(),
            system_url=system_url,
            card=card,
        )

    @property
    def subject(self) -> str:
        return events.generate_subject(self.config.namespace, self.config.disaggregation_mode, self.id)

    @property
    def busy(self) -> bool:
        return bool(self._answers) or self.executor.load().open_handoffs > 0

    @property
    def links(self) -> Mapping[str, Link]:
        return self._links

    # requests

    def accept(self, payload: bytes) -> bytes | None:
        """The request plane's handler. The acknowledgement goes over the link, as the answer will; back over the bus where
        there is none."""
        try:
            request = requests.decode_request(payload)
        except MALFORMED as error:
            return requests.encode(Refused(InternalError.code, f"not a request of this version: {error}"))
        link = self._links.get(request.reply_to)
        if link is None:
            return requests.encode(self.take(request))
        link.send(SubmitReply(request.stream, self.take(request)))
        return None

    def take(self, request: GenerateRequest) -> Ack:
        """Starts the request, or says why not. Taking the same request twice is taking it once."""
        key = (request.reply_to, request.stream)
        if key in self._answers or key in self._handed_off or key in self._done:
            return Accepted()  # it came by both roads, maybe long after it was cancelled
        if self.draining:
            return Draining()
        link = self._links.get(request.reply_to)
        if link is None:
            return Refused(Unavailable.code, f"no link to frontend {request.reply_to}")
        if request.model != self.config.model_name:
            return Refused(Unavailable.code, f"this worker serves {self.config.model_name}, not {request.model}")
        waiting = self.executor.load().waiting
        if waiting >= self.config.max_queue or len(self._answers) >= self._most_answers:
            return Busy(waiting)
        try:
            answer = Answer(request, link, self._vocabulary, self._ended)
            answer.start(self.executor)
        except (CallerError, ClusterError, InternalError) as error:
            self.counts["refused"] += 1
            return Refused(error.code, str(error), error.param)
        except Exception as error:  # one request must never cost the link that it came by
            log.exception("request %s cannot be started", request.id)
            self.counts["refused"] += 1
            return Refused(InternalError.code, f"the request cannot be started: {type(error).__name__}")
        self._answers[key] = answer
        self.counts["accepted"] += 1
        return Accepted()

    @property
    def _most_answers(self) -> int:
        return self.config.max_queue + self.executor.limits.max_batch_size

    def _cancel(self, key: tuple[str, int]) -> None:
        if (answer := self._answers.pop(key, None)) is not None:
            answer.close()
            self.counts["cancelled"] += 1
        elif (answer := self._handed_off.pop(key, None)) is not None:
            answer.close()  # frees the hand-off, if it is still there
        self._note_done(key)

    def _taken(self, key: tuple[str, int]) -> None:
        if (answer := self._handed_off.pop(key, None)) is not None:
            self.executor.taken(answer.ticket)
            self._note_done(key)

    def _ended(self, answer: Answer, outcome: str) -> None:
        key = (answer.request.reply_to, answer.request.stream)
        if self._answers.pop(key, None) is not None:
            self.counts["finished" if outcome == "handed off" else outcome] += 1
        if outcome == "handed off":
            self._handed_off[key] = answer
        else:
            self._note_done(key)

    def _note_done(self, key: tuple[str, int]) -> None:
        self._done[key] = None
        if len(self._done) > MAX_DONE:
            del self._done[next(iter(self._done))]

    # links

    def received(self, link: Link, messages: list[FromFrontend]) -> None:
        frontend = next((id_ for id_, known in self._links.items() if known is link), None)
        if frontend is None:
            return
        for message in messages:
            match message:
                case Cancel(stream=stream):
                    self._cancel((frontend, stream))
                case Taken(stream=stream):
                    self._taken((frontend, stream))
                case Submit(request=request):
                    link.send(SubmitReply(request.stream, self.take(request)))
                case SnapshotRequest(request=number):
                    for part in self._journal.snapshot(number):
                        link.send(part)
                case Welcome(version=version) if version != VERSION:
                    log.error("frontend %s speaks version %s of the link, this worker %s", frontend, version, VERSION)
                    link.abort("speaks another version")
                case _:
                    pass  # pings and the welcome have done their work by arriving

    def lost(self, link: Link, reason: str) -> None:
        """The frontend is gone: so are those who wait for its answers."""
        for id_, known in list(self._links.items()):
            if known is link:
                del self._links[id_]
                log.info("link to frontend %s ended: %s", id_, reason)
                if (dial := self._dials.pop(id_, None)) is not None:
                    dial.lost.set()
                for key in [key for key in (*self._answers, *self._handed_off) if key[0] == id_]:
                    self._cancel(key)

    async def keep_link(self, dial: Dial) -> None:
        """Dials the frontend, again and again, while that is wanted."""
        frontend, backoff = dial.frontend, Backoff(0.05, 1.0)
        try:
            while dial.wanted:
                try:
                    link = await self._planes.links.dial(frontend.link_address, self)
                except Unavailable as error:
                    log.debug("%s", error)
                    await asyncio.sleep(backoff.next())
                    continue
                began = asyncio.get_running_loop().time()
                self._links[frontend.id] = link
                self._dials[frontend.id] = dial
                link.send(Hello(self.id, self.epoch, frontend.id))
                dial.lost.clear()
                if not link.closed:
                    await dial.lost.wait()
                if asyncio.get_running_loop().time() - began > STEADY:  # one that is turned away is not to hammer
                    backoff.reset()
                await asyncio.sleep(backoff.next())
        finally:
            if (link_ := self._links.get(frontend.id)) is not None:
                link_.close()

    # loops

    async def publish_events(self) -> None:
        config = self.config
        subject = events.kv_subject(config.namespace, config.disaggregation_mode, self.id)
        while True:
            await self._new_events.wait()
            self._new_events.clear()
            while (batch := self._journal.take()) is not None:
                await self._publish(subject, events.encode(batch))  # lost events are noticed by their ids
            await asyncio.sleep(EVENTS_EVERY)

    async def publish_load(self) -> None:
        config, loop = self.config, asyncio.get_running_loop()
        subject = events.load_subject(config.namespace, config.disaggregation_mode, self.id)
        said: events.Load | None = None
        due = 0.0
        while True:
            load = self.executor.load()
            if load != said or loop.time() >= due:
                said, due = load, loop.time() + LOAD_AT_LEAST_EVERY
                report = events.LoadReport(self.id, load, self.epoch, self._journal.published)
                await self._publish(subject, events.encode(report))
            await asyncio.sleep(LOAD_EVERY)

    async def _publish(self, subject: str, payload: bytes) -> None:
        try:
            await self._planes.bus.publish(subject, payload)
        except DynserveError as error:
            log.debug("%s", error)

    async def watch_engine(self) -> None:
        """Ends the worker with the engine's own error."""
        await asyncio.shield(self.executor.failed)  # the end of this task is not the engine's

    async def warm_up(self) -> None:
        """One short answer through this worker's own endpoint: from here on, ready means serving.

        Raises:
            InternalError: it did not work; the worker must not register.
        """
        link = Loopback()
        self._links[link.name] = cast(Link, link)
        request = GenerateRequest(
            id="warm-up",
            stream=0,
            reply_to=link.name,
            model=self.config.model_name,
            phase="aggregated",
            prompt=requests.pack_tokens([0]),
            sampling=requests.Sampling(temperature=0.0),
            stop=requests.Stop(max_tokens=2, ignore_eos=True),
            render=requests.Render(kind="completion", response_id="warm-up", model=self.config.model_name, created=0),
            timeout_s=loopback.TIMEOUT,
            cache_salt="warm-up",
        )
        try:
            await link.ask(self._planes.bus, self.subject, request)
        finally:
            del self._links[link.name]
            self.counts.clear()

    async def drain(self) -> None:
        """No new requests; those there are finish, or run into the deadline."""
        self.draining = True
        deadline = asyncio.get_running_loop().time() + self.config.drain_timeout_s
        while self.busy and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        if self.busy:
            log.warning("%d requests did not finish within %.0f s", len(self._answers), self.config.drain_timeout_s)


def _warn_of_surplus_ids(preprocessor: Preprocessor, vocab_size: int) -> None:
    """Prompts with ids that the model has no row for are refused, one by one."""
    highest = preprocessor.highest_id
    if highest >= vocab_size:
        log.warning(
            "the tokenizer has ids up to %d, the model only 0 to %d: prompts with ids beyond are refused",
            highest, vocab_size - 1,
        )  # fmt: skip


@dataclass(slots=True)
class Dial:
    """The intent to be linked to one frontend."""

    frontend: FrontendInstance
    wanted: bool = True
    task: asyncio.Task[None] | None = None
    lost: asyncio.Event = field(default_factory=asyncio.Event)


class _Frontends:
    """A link to each frontend that discovery knows. One that leaves discovery keeps its link for as long as that holds:
    its registration may have been lost, and its streams must not be lost with it."""

    def __init__(self, worker: Worker, tasks: OwnedTasks) -> None:
        self._worker, self._tasks = worker, tasks
        self._dials: dict[str, Dial] = {}

    def changed(self, change: Change) -> None:
        known = self._dials.get(change.key)
        if isinstance(change, Deleted):
            if known is not None:
                known.wanted = False
            return
        instance = discovery.parse(change.key, change.value)
        if not isinstance(instance, FrontendInstance):
            return
        if known is not None and known.task is not None and not known.task.done():
            if known.frontend.link_address == instance.link_address:
                known.wanted = True
                return
            known.task.cancel()
        self._dials = {key: dial for key, dial in self._dials.items() if dial.task is not None and not dial.task.done()}
        dial = self._dials[change.key] = Dial(instance)
        dial.task = self._tasks.create_task(self._worker.keep_link(dial))


@asynccontextmanager
async def serving_worker(
    config: WorkerConfig, executor: Executor, planes: Planes, instance_id: str, system_url: str
) -> AsyncIterator[Worker]:
    """A worker that serves: warmed up, registered, linked to every frontend. Leaving drains it first."""
    worker = Worker(config, executor, planes, instance_id)
    async with planes.bus.serve(worker.subject, worker.accept):
        await worker.warm_up()
        async with task_group() as tasks:
            tasks.create_task(worker.publish_events())
            tasks.create_task(worker.publish_load())
            tasks.create_task(worker.watch_engine())
            async with planes.registry.watch(discovery.frontends(config.namespace), _Frontends(worker, tasks).changed):
                instance = worker.instance(system_url)
                key = discovery.key(config.namespace, instance)
                async with planes.registry.register(key, discovery.encode(instance)) as registration:
                    await registration.registered.wait()
                    worker.ready = True
                    yield worker
                    worker.draining = True
                worker.ready = False
                await worker.drain()


def new_instance_id(role: str) -> str:
    """Readable in logs and unique: `prefill-1f6c0a52b9d3`."""
    return f"{role.replace('_', '-')}-{token_hex(6)}"


@asynccontextmanager
async def serving_targets(
    config: WorkerConfig, executor: Executor, planes: Planes, instance_id: str, system_url: str
) -> AsyncIterator[list[Worker]]:
    """A worker for each target of the executor: one, or several where an engine has several KV caches. Those leave
    together: while one drains, another must not be given anything new."""
    targets = executor.targets
    if len(targets) == 1:
        async with serving_worker(config, executor, planes, instance_id, system_url) as worker:
            yield [worker]
        return
    leave = asyncio.Event()
    async with task_group() as tasks:
        serving = []
        for at, target in enumerate(targets):
            ready: asyncio.Future[Worker] = asyncio.get_running_loop().create_future()
            one = serving_worker(config, target, planes, f"{instance_id}-{at}", system_url)
            serving.append((tasks.create_task(_serve_until(one, ready, leave)), ready))
        try:
            yield [await ready for _, ready in serving]
        finally:
            leave.set()
            await asyncio.wait([task for task, _ in serving])


async def _serve_until(
    opened: AbstractAsyncContextManager[Worker], ready: asyncio.Future[Worker], leave: asyncio.Event
) -> None:
    async with opened as worker:
        ready.set_result(worker)
        await leave.wait()
