"""`Worker`: accepts requests from the planes, submits them to its executor, and publishes KV events and load."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from dynserve.addresses import advertised
from dynserve.config import WorkerConfig
from dynserve.errors import CallerError, Cancelled, ClusterError, DynserveError, InternalError, Unavailable
from dynserve.executors.base import Executor
from dynserve.model_files import digest, eos_token_ids
from dynserve.text.detokenize import Vocabulary
from dynserve.text.parity import parity
from dynserve.text.preprocess import Preprocessor
from dynserve.transport.base import Link, Planes
from dynserve.wire import MALFORMED, events, requests
from dynserve.wire.discovery import Card, WorkerInstance
from dynserve.wire.link import (
    VERSION,
    Adopt,
    Adopted,
    Cancel,
    EventsByLink,
    Failed,
    FromFrontend,
    HandoffDone,
    Hello,
    Keep,
    Leaving,
    LinkKvEvents,
    LinkLoad,
    SnapshotRequest,
    Submit,
    SubmitReply,
    Welcome,
)
from dynserve.wire.requests import Accepted, Ack, Busy, Draining, GenerateRequest, Refused
from dynserve.worker import loopback
from dynserve.worker.answer import Answer
from dynserve.worker.card import answer_parsers, pooling
from dynserve.worker.journal import KvJournal
from dynserve.worker.kept_answers import KeptAnswers, Key, key_of
from dynserve.worker.loopback import Loopback
from dynserve.worker.model_text import ModelText

log = logging.getLogger(__name__)

EVENTS_EVERY = 0.01  # seconds between published batches of KV events
LOAD_EVERY = 0.1  # seconds between load reports while the load changes
LOAD_AT_LEAST_EVERY = 0.5  # seconds
PUBLISH_TIMEOUT = 0.5  # seconds
MIGRATE_TIMEOUT = 5.0  # seconds for frontends to continue answers elsewhere, and for open hand-offs to end
MAX_DONE = 20_000  # ended requests that are remembered, so that a late copy of one is not run


class Worker:
    """Connects one executor with the planes: NATS, discovery and links. Requests arrive through `accept` (NATS) or over a
    link; both call `start`."""

    def __init__(
        self, config: WorkerConfig, executor: Executor, planes: Planes, instance_id: str, text: ModelText | None = None
    ) -> None:
        self.config, self.executor, self._planes = config, executor, planes
        self.id, self.epoch = instance_id, time.time_ns()
        self.counts: Counter[str] = Counter()  # accepted, finished, failed, cancelled, refused
        self.ready = False
        self.draining = False
        files, preprocessor = text or ModelText.read(Path(config.model_path))
        self.files = {digest(content): content for content in files.values()}
        self._file_digests = {name: digest(content) for name, content in files.items()}
        self._parity = parity(preprocessor, executor.limits.block_size)
        if fault := preprocessor.templates.fault:
            log.warning("chats are off for this model: its chat template cannot be used: %s", fault)
        _warn_of_surplus_ids(preprocessor, executor.limits.vocab_size)
        self._vocabulary = Vocabulary(preprocessor.tokenizer)
        self._tool_parser, self._reasoning_parser = answer_parsers(config, preprocessor.templates)
        self._answers: dict[tuple[str, int], Answer] = {}
        self._handed_off: dict[tuple[str, int], Answer] = {}  # until the frontend sends HandoffDone or Cancel
        self._done: dict[tuple[str, int], None] = {}  # the last `MAX_DONE`, oldest first
        self._links: dict[str, Link] = {}
        self._by_link: set[str] = set()  # frontends that want load reports and KV events over the link, too
        self._leaving = Leaving()
        self._kept = KeptAnswers(config.resume_bytes)
        self._new_events = asyncio.Event()
        self._journal = KvJournal(instance_id, self.epoch, self._new_events.set)
        if config.kv_events:
            executor.listen_kv(self._journal.add)

    def instance(self, system_url: str, files_url: str = "") -> WorkerInstance:
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
            grammars=limits.grammars,
            no_grammars=limits.no_grammars,
            pooling=pooling(self.config) if limits.embedding_size else "",
            embedding_size=limits.embedding_size,
            adapters=list(limits.adapters),
            pairing=dict(limits.pairing),
            single_use_handoffs=limits.single_use_handoffs,
            draws_by_position=limits.draws_by_position,
            max_num_tokens=limits.max_num_tokens,
            aggregates=self.config.stand_in,
        )
        return WorkerInstance(
            id=self.id,
            role=self.config.role,
            epoch=self.epoch,
            host=advertised(self.config.link_host, self.config.advertise_host),
            pid=os.getpid(),
            system_url=system_url,
            card=card,
            files_url=files_url,
        )

    @property
    def subject(self) -> str:
        return events.generate_subject(self.config.namespace, self.config.role, self.id)

    @property
    def busy(self) -> bool:
        return bool(self._answers) or self.executor.load().open_handoffs > 0

    @property
    def links(self) -> Mapping[str, Link]:
        return self._links

    # requests

    def accept(self, payload: bytes) -> bytes | None:
        """Handles a request from the bus. The acknowledgement goes over the link, like the answer; without a link to the
        frontend it is returned, as the bus's reply."""
        try:
            request = requests.decode_request(payload)
        except MALFORMED as error:
            return requests.encode(Refused(InternalError.code, f"the request cannot be decoded: {error}"))
        link = self._links.get(request.reply_to)
        if link is None:
            return requests.encode(self.start(request))
        link.send(SubmitReply(request.stream, self.start(request)))
        return None

    def start(self, request: GenerateRequest) -> Ack:
        """Starts the request, or returns why it cannot. A second copy of the same request is acknowledged but not run."""
        key = (request.reply_to, request.stream)
        if key in self._answers or key in self._handed_off or key in self._done:
            return Accepted()  # it came over NATS and the link, maybe long after it was cancelled
        if self.draining:
            return Draining()
        link = self._links.get(request.reply_to)
        if link is None:
            return Refused(Unavailable.code, f"no link to frontend {request.reply_to}")
        if request.model != self.config.model_name:
            return Refused(Unavailable.code, f"this worker serves {self.config.model_name}, not {request.model}")
        waiting = self.executor.load().waiting
        if waiting >= self._max_queue or len(self._answers) >= self._max_queue + self.executor.limits.max_batch_size:
            return Busy(waiting)
        try:
            answer = Answer(request, link, self._vocabulary, self._ended)
            answer.start(self.executor)
        except (CallerError, ClusterError, InternalError) as error:
            self.counts["refused"] += 1
            return Refused(error.code, str(error), error.param)
        except Exception as error:  # one request must never end the link that it came over
            log.exception("request %s cannot be started", request.id)
            self.counts["refused"] += 1
            return Refused(InternalError.code, f"the request cannot be started: {type(error).__name__}")
        self._answers[key] = answer
        self.counts["accepted"] += 1
        return Accepted()

    @property
    def _max_queue(self) -> int:
        return self.config.max_queue or self.executor.limits.max_batch_size

    def _cancel(self, key: tuple[str, int]) -> None:
        if (answer := self._answers.pop(key, None)) is not None:
            if answer.request.resumable is not None:  # its client may have lost the connection
                self._kept.keep(answer.kept())
            answer.close()
            self.counts["cancelled"] += 1
        elif (answer := self._handed_off.pop(key, None)) is not None:
            answer.close()  # cancels the hand-off, if it is still open
        self._note_done(key)

    def _handoff_done(self, key: tuple[str, int]) -> None:
        if (answer := self._handed_off.pop(key, None)) is not None:
            self.executor.handoff_done(answer.ticket)
            self._note_done(key)

    def _ended(self, answer: Answer, outcome: str) -> None:
        key = (answer.request.reply_to, answer.request.stream)
        if self._answers.pop(key, None) is not None:
            self.counts["finished" if outcome == "handed off" else outcome] += 1
        if outcome == "finished" and answer.request.resumable is not None:
            self._kept.keep(answer.kept())  # its last events may not have reached the client
        if outcome == "handed off":
            self._handed_off[key] = answer
        else:
            self._note_done(key)

    def _note_done(self, key: tuple[str, int]) -> None:
        self._done[key] = None
        if len(self._done) > MAX_DONE:
            del self._done[next(iter(self._done))]

    # resumable answers

    def _adopt(self, wanted: Key) -> GenerateRequest | None:
        """Returns an answer for a client that has come back. If it is still being generated, that ends here: it continues
        like one whose worker was lost."""
        for key, answer in (*self._answers.items(), *self._handed_off.items()):
            if key_of(answer.request) == wanted:
                text = "its client has come back for the rest over another connection"
                answer.link.send(Failed(answer.request.stream, Cancelled.code, text))
                self._kept.keep(answer.kept())
                self._cancel(key)
        return self._kept.copy(wanted)

    # links; `FrontendLink` dials them

    def linked(self, frontend_id: str, link: Link) -> None:
        """Called when a link to the frontend is connected: its requests can be answered from now on."""
        self._links[frontend_id] = link
        link.send(Hello(self.id, self.epoch, frontend_id))
        if self.draining:
            link.send(self._leaving)

    def received(self, frontend_id: str, link: Link, messages: list[FromFrontend]) -> None:
        for message in messages:
            match message:
                case Cancel(stream=stream):
                    self._cancel((frontend_id, stream))
                case HandoffDone(stream=stream):
                    self._handoff_done((frontend_id, stream))
                case Keep(request=request):
                    self._kept.keep(request)
                case Adopt(number=number, owner=owner, request_id=request_id, tag=tag):
                    link.send(Adopted(number, self._adopt((owner, request_id, tag))))
                case Submit(request=request):
                    link.send(SubmitReply(request.stream, self.start(request)))
                case SnapshotRequest(request=number):
                    for part in self._journal.snapshot(number):
                        link.send(part)
                case EventsByLink(wanted=wanted):
                    (self._by_link.add if wanted else self._by_link.discard)(frontend_id)
                case Welcome(version=version, ping_s=ping_s) if version == VERSION:
                    if ping_s:
                        link.ping_every(ping_s)
                case Welcome(version=version):
                    log.error(
                        "frontend %s speaks version %s of the link, this worker %s", frontend_id, version, VERSION
                    )
                    link.abort("speaks another version of the link")
                case _:
                    pass  # pings need no action

    def unlinked(self, frontend_id: str, link: Link, reason: str) -> None:
        """Called when the link has ended. Cancels the requests that are answered over it, and their hand-offs."""
        if self._links.get(frontend_id) is link:
            del self._links[frontend_id]
            self._by_link.discard(frontend_id)
            log.info("link to frontend %s ended: %s", frontend_id, reason)
            for key, answer in (*self._answers.items(), *self._handed_off.items()):
                if key[0] == frontend_id:
                    if answer.request.resumable is not None:
                        self._kept.keep(answer.kept())  # also that of a prefill whose decode has not begun
                    self._cancel(key)

    # loops

    async def publish_events(self) -> None:
        config = self.config
        subject = events.kv_subject(config.namespace, config.role, self.id)
        while True:
            await self._new_events.wait()
            self._new_events.clear()
            while (batch := self._journal.next_batch()) is not None:
                self._send_by_link(LinkKvEvents(batch))
                await self._publish(subject, events.encode(batch))  # frontends notice lost events by their ids
            await asyncio.sleep(EVENTS_EVERY)

    async def publish_load(self) -> None:
        config, loop = self.config, asyncio.get_running_loop()
        subject = events.load_subject(config.namespace, config.role, self.id)
        sent: events.Load | None = None
        due = 0.0
        while True:
            load = self.executor.load()
            if load != sent or loop.time() >= due:
                sent, due = load, loop.time() + LOAD_AT_LEAST_EVERY
                report = events.LoadReport(self.id, load, self.epoch, self._journal.published)
                self._send_by_link(LinkLoad(report))
                await self._publish(subject, events.encode(report))
            await asyncio.sleep(LOAD_EVERY)

    def _send_by_link(self, message: LinkLoad | LinkKvEvents) -> None:
        """Sends to the frontends that NATS does not reach: those that have said so, or all if it is down here."""
        for frontend_id in self._by_link if self._planes.bus.connected else self._links:
            if (link := self._links.get(frontend_id)) is not None:
                link.send(message)

    async def _publish(self, subject: str, payload: bytes) -> None:
        try:
            async with asyncio.timeout(PUBLISH_TIMEOUT):  # a silent server does not read what is sent to it
                await self._planes.bus.publish(subject, payload)
        except (DynserveError, TimeoutError) as error:
            log.debug("%s: nothing was published to %s: %s", self.id, subject, error)

    async def watch_engine(self) -> None:
        """Raises the engine's error when the engine has died."""
        await asyncio.shield(self.executor.failed)  # cancelling this task must not cancel the engine's future

    async def warm_up(self) -> None:
        """Sends a short request to this worker's own endpoint and waits for its answer, so that a ready worker is one that
        serves.

        Raises:
            InternalError: the request was not answered; the worker must not register.
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
            sampling=requests.SamplingParams(temperature=0.0),
            stop=requests.StopConditions(max_tokens=2, ignore_eos=True),
            render=requests.RenderOptions(
                kind="completion", response_id="warm-up", model=self.config.model_name, created=0
            ),
            timeout_s=loopback.TIMEOUT,
            cache_salt="warm-up",
        )
        try:
            await link.submit(self._planes.bus, self.subject, request)
        finally:
            del self._links[link.name]
            self.counts.clear()

    def leave(self, *, migrate: bool = False) -> None:
        """Refuses new requests from now on, and tells all frontends. With `migrate`, its answers continue elsewhere."""
        self.draining, self._leaving = True, Leaving(migrate)
        for link in self._links.values():
            link.send(self._leaving)

    async def drain(self) -> None:
        """Waits until the open requests have finished, up to the deadline or, in the mode `migrate`, not at all. Then the
        frontends continue the others elsewhere."""
        if self.config.drain_mode == "finish":
            await self._idle(self.config.drain_timeout_s)
        if self._answers:
            log.info("%d answers migrate to other workers", len(self._answers))
            self.leave(migrate=True)
        await self._idle(MIGRATE_TIMEOUT)
        if self.busy:
            log.warning(
                "%d requests and %d hand-offs did not end in time; they are dropped", len(self._answers),
                self.executor.load().open_handoffs,
            )  # fmt: skip

    def close(self) -> None:
        """Drops what is kept for clients that may come back."""
        self._kept.clear()

    async def _idle(self, timeout_s: float) -> None:
        """Returns when no request and no hand-off is open, at the latest after `timeout_s` seconds."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while self.busy and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)


def _warn_of_surplus_ids(preprocessor: Preprocessor, vocab_size: int) -> None:
    """Warns of token ids beyond the model's embedding rows. Prompts with such ids are refused, one by one."""
    highest = preprocessor.highest_id
    if highest >= vocab_size:
        log.warning(
            "the tokenizer has ids up to %d, the model only 0 to %d: prompts with ids beyond are refused",
            highest, vocab_size - 1,
        )  # fmt: skip
