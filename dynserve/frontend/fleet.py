"""The fleet: which workers there are, which can be reached, and who waits for what from each.

A worker counts once two things are true: discovery knows it, and its link is up. The link alone decides when it is lost.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from dynserve.errors import Unavailable, WorkerLost, from_wire
from dynserve.frontend.kv_feed import KvFeeds
from dynserve.frontend.reply import Peer, pass_on
from dynserve.log_limit import LimitedLog
from dynserve.routing.router import Router, Target
from dynserve.tasks import Backoff, OwnedTasks
from dynserve.text.parity import difference, parity
from dynserve.text.preprocess import Preprocessor
from dynserve.transport.base import Change, FetchFile, Link, Put
from dynserve.wire import decoded, discovery, events
from dynserve.wire.discovery import Card, WorkerInstance, unlike
from dynserve.wire.link import (
    VERSION,
    Cancel,
    Failed,
    Finished,
    FromWorker,
    HandoffDeclined,
    Hello,
    Snapshot,
    SnapshotRequest,
    Step,
    SubmitReply,
    Tokens,
    Welcome,
)  # fmt: skip
from dynserve.wire.requests import Accepted, Ack

log = logging.getLogger(__name__)
limited = LimitedLog(log)

_HANDING_OVER = ("prefill", "decode")


@dataclass(slots=True)
class Model:
    """A model that is served, as its first worker described it."""

    card: Card
    preprocessor: Preprocessor
    parity: dict[str, str]  # what this frontend makes of the probes


class Fleet:
    """Peers by id, models by name. Also the link handler of all links."""

    def __init__(self, frontend_id: str, router: Router, fetch_file: FetchFile, tasks: OwnedTasks) -> None:
        self._id, self._router, self._fetch_file, self._tasks = frontend_id, router, fetch_file, tasks
        self.peers: dict[str, Peer] = {}
        self.models: dict[str, Model] = {}
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._peer_of: dict[Link, Peer] = {}
        self._pools: dict[tuple[str, str], list[Target]] = {}  # until something about a peer changes
        self._clock = asyncio.get_running_loop().time
        self.feeds = KvFeeds(router, self._ask_snapshot, self._clock)
        self.acknowledged: Callable[[int, Ack], None] = lambda stream, ack: None
        self.changed: Callable[[], None] = lambda: None  # called when a worker can be placed on that could not before

    def targets(self, model: str, role: str) -> list[Target]:
        """Workers of the model in this role that can be placed on now. The list must not be changed."""
        found = self._pools.get((model, role))
        if found is None:
            found = self._pools[model, role] = [
                p.target
                for p in self.peers.values()
                if p.usable and p.target and p.instance and p.instance.role == role and p.instance.card.serves(model)
            ]
        return found

    def names(self) -> list[str]:
        """Of models, and of their adapters."""
        adapters = {name for peer in self.peers.values() if peer.instance for name in peer.instance.card.adapters}
        return [*self.models, *sorted(adapters - self.models.keys())]

    def model(self, name: str) -> Model | None:
        """The model of that name, or the one that an adapter of that name belongs to."""
        return self.models.get(name) or self.models.get(self._base(name))

    def adapter(self, name: str) -> str:
        """The name itself where it is an adapter's; empty where it is a model's."""
        return "" if name in self.models or self._base(name) == name else name

    def serves(self, model: str) -> bool:
        """Every role that the model needs is there."""
        if self.model(model) is None:
            return False
        if self.targets(model, "prefill_and_decode"):
            return True
        return bool(self.targets(model, "prefill") and self.targets(model, "decode"))

    @property
    def settling(self) -> bool:
        """Workers are known that were not linked yet, or whose model is still being loaded."""
        known = [peer for peer in self.peers.values() if peer.instance is not None and not peer.leaving]
        return any(not peer.linked or peer.problem == "loading" for peer in known)

    def has_room(self, model: str) -> bool:
        """Whether a request could be placed on workers that are under their thresholds. True where there are none: then
        it is not load that is in the way."""
        has_room = self._router.has_room
        prefill, decode = self.targets(model, "prefill"), self.targets(model, "decode")
        if prefill and decode:
            return any(has_room(t, "prefill") for t in prefill) and any(has_room(t, "decode") for t in decode)
        both = self.targets(model, "prefill_and_decode")
        return not both or any(has_room(t, "aggregated") for t in both)

    def _base(self, name: str) -> str:
        cards = (peer.instance.card for peer in self.peers.values() if peer.instance is not None)
        return next((card.model for card in cards if name in card.adapters), name)

    # discovery

    def discovered(self, change: Change) -> None:
        """A worker's entry came, changed or went; those of frontends are not ours."""
        id_ = change.key.rsplit("/", 1)[-1]
        self._pools.clear()
        if isinstance(change, Put):
            instance = discovery.parse(change.key, change.value)
            if isinstance(instance, WorkerInstance):
                peer = self._peer(id_)
                peer.instance, peer.leaving = instance, False
                self._check(peer)
        elif (peer_ := self.peers.get(id_)) is not None:
            peer_.leaving = True
            if peer_.link is None:
                self._forget(peer_)
            self._look_again(peer_)

    def load_reported(self, payload: bytes) -> None:
        report = decoded(events.decode_load, payload, "a load report")
        if report is not None and (peer := self.peers.get(report.instance_id)) is not None:
            peer.load = report.load
            self.feeds.reported(peer.id, report.epoch, report.event_id)
            if peer.target is not None:
                self._router.ledger.reported(peer.id, report.load, peer.target.block_size)

    def kv_changed(self, payload: bytes) -> None:
        batch = decoded(events.decode_kv, payload, "KV events")
        if batch is not None:
            self.feeds.events(batch)

    # links

    def accept(self, link: Link) -> Fleet:
        return self

    def received(self, link: Link, messages: list[FromWorker]) -> None:
        peer = self._peer_of.get(link)
        if peer is None:
            self._greet(link, messages)
            return
        steps: list[Step] = []
        for message in messages:
            if type(message) is Step:
                steps.append(message)
                continue
            if steps:
                pass_on(peer.replies, steps)
                steps = []
            if type(message) is Tokens:
                if (reply := peer.replies.get(message.stream)) is not None:
                    reply.came(message)
            else:
                self._received_other(peer, message)
        if steps:
            pass_on(peer.replies, steps)

    def lost(self, link: Link, reason: str) -> None:
        peer = self._peer_of.pop(link, None)
        if peer is None:
            limited.warning("stranger", "link", "a link that no worker was known by ended: %r", reason[:200])
            return
        if peer.link is not link:
            return
        log.info("worker %s is gone: %s", peer.id, reason)
        self._pools.clear()
        peer.link, peer.load, peer.target = None, None, None
        self.feeds.left(peer.id)
        for reply in list(peer.replies.values()):
            reply.fail(WorkerLost(f"worker {peer.id} was lost: {reason}"))
        if peer.instance is None or peer.leaving:
            self._forget(peer)
        self._look_again(peer)

    def _received_other(self, peer: Peer, message: FromWorker) -> None:
        match message:
            case Finished(stream=stream):
                if (reply := peer.replies.get(stream)) is not None:
                    reply.tokens += message.token_ids
                    if message.handoff is None:  # nothing is left at the worker
                        del peer.replies[stream]
                    reply.put(message, 0)
                    reply.channel.close()
            case Failed(stream=stream, code=code, message=text, param=param):
                if (reply := peer.replies.pop(stream, None)) is not None:
                    reply.fail(from_wire(code, text, param))
            case SubmitReply(stream=stream, ack=ack):
                self.acknowledged(stream, ack)
                if isinstance(ack, Accepted) and stream not in peer.replies and peer.link is not None:
                    peer.link.send(Cancel(stream))  # a copy that came too late: nobody reads its answer
            case HandoffDeclined(stream=stream):
                if (reply := peer.replies.get(stream)) is not None:
                    reply.handoff_declined = True
            case Snapshot():
                self.feeds.snapshot(peer.id, message)
            case _:
                pass  # a ping has done its work by arriving

    def _greet(self, link: Link, messages: list[FromWorker]) -> None:
        hello = messages[0]
        if not isinstance(hello, Hello):
            link.abort("did not say hello")
            return
        if hello.frontend_id != self._id:  # it knows an earlier process that listened on this port
            link.abort(f"looked for {hello.frontend_id[:100]}, found {self._id}")
            return
        if hello.version != VERSION:  # told apart here, and not by what its messages happen to mean
            link.abort(f"{hello.instance_id[:100]} speaks version {hello.version} of the link, this frontend {VERSION}")
            return
        known = self.peers.get(hello.instance_id)
        if known is not None and (old := known.link) is not None:
            self.lost(old, "replaced by a newer link")  # the worker has dropped what it had for the old one
            old.abort("replaced by a newer link")
        peer = self._peer(hello.instance_id)
        peer.link = link
        self._peer_of[link] = peer
        link.send(Welcome(self._id))
        self.feeds.joined(peer.id, hello.epoch)
        if peer.instance is not None:
            self._check(peer)  # against those that are there by now
        if len(messages) > 1:
            self.received(link, messages[1:])

    def _ask_snapshot(self, worker: str, request: int) -> None:
        peer = self.peers.get(worker)
        if peer is not None and peer.link is not None:
            peer.link.send(SnapshotRequest(request))

    def _peer(self, id_: str) -> Peer:
        peer = self.peers.get(id_)
        if peer is None:
            peer = self.peers[id_] = Peer(id_)
        return peer

    def _forget(self, peer: Peer) -> None:
        """The last worker of a model takes the model's definition along: the next may bring another template."""
        self.peers.pop(peer.id, None)
        if peer.instance is not None:
            name = peer.instance.card.model
            if not any(p.instance is not None and p.instance.card.model == name for p in self.peers.values()):
                self.models.pop(name, None)

    # models

    def _check(self, peer: Peer) -> None:
        """Compares a worker with the model it joins: the model's first worker defines the block size, the files that this
        frontend has define what text means. Hand-offs need workers of one kind: those that are there already decide."""
        assert peer.instance is not None
        card = peer.instance.card
        model = self.models.get(card.model)
        if model is None:
            peer.problem = "loading"
            if card.model not in self._loading:
                self._loading[card.model] = self._tasks.create_task(self._load(card.model))
            return
        cause = self._unpaired(peer) or difference(card.parity, model.parity)
        if cause is None and card.files != model.card.files:
            cause = f"its {_differing(card.files, model.card.files)} differs from that of the model's other workers"
        peer.problem = f"refused: {cause}" if cause else ""
        if cause:
            log.error("worker %s %s", peer.id, peer.problem)
        self._let_in(peer)

    def _unpaired(self, peer: Peer) -> str | None:
        """Why it could not hand over to, or take over from, a worker that is routed to."""
        ours = peer.instance
        if ours is None or not ours.card.pairing or ours.role not in _HANDING_OVER:
            return None
        for other in self.peers.values():
            theirs = other.instance
            if other is peer or theirs is None or not other.usable or theirs.role not in _HANDING_OVER:
                continue
            if theirs.card.model != ours.card.model or not self._complete(theirs.card):
                continue
            if found := unlike(ours.card.pairing, theirs.card.pairing, "this worker", other.id):
                return f"it cannot hand over KV caches here: {found}"
        return None

    def _complete(self, card: Card) -> bool:
        """Whether workers of this kind are there for both phases: the last of a kind that is leaving keeps nobody out."""
        roles = {
            peer.instance.role
            for peer in self.peers.values()
            if peer.usable
            and peer.instance is not None
            and (peer.instance.card.model, peer.instance.card.pairing) == (card.model, card.pairing)
        }
        return bool(card.pairing) and roles >= set(_HANDING_OVER)

    def paired(self, targets: list[Target], worker: str) -> list[Target]:
        """Those that can take over from a worker; all of them when none can, and will have to compute."""
        peer = self.peers.get(worker)
        if peer is None or peer.instance is None or not peer.instance.card.pairing:
            return targets
        pairing = peer.instance.card.pairing
        found = [t for t in targets if (p := self.peers[t.worker].instance) is not None and p.card.pairing == pairing]
        return found or targets

    def _look_again(self, gone: Peer) -> None:
        """One that went may have been what kept others out."""
        if gone.instance is None:
            return
        for peer in list(self.peers.values()):
            if peer.instance is not None and peer.problem and peer.instance.card.model == gone.instance.card.model:
                self._check(peer)

    def _let_in(self, peer: Peer) -> None:
        """Makes the peer a target once it is linked, described and without a problem."""
        self._pools.clear()
        if peer.target is None and peer.instance is not None and peer.linked and not peer.problem:
            card, now = peer.instance.card, self._clock()
            peer.target = self._router.join(peer.id, card.block_size, card.num_blocks, now, events=card.kv_events)
            self.feeds.placeable(peer.target)
            self.changed()

    async def _load(self, name: str) -> None:
        """Fetches tokenizer and template from any worker of the model that answers."""
        backoff = Backoff(0.05, 2.0)
        try:
            while name not in self.models:
                waiting = [p.instance for p in self.peers.values() if p.instance and p.instance.card.model == name]
                if not waiting:
                    return
                for instance in waiting:
                    try:
                        files = {
                            file: await self._fetch_file(instance.system_url, digest)
                            for file, digest in instance.card.files.items()
                        }
                        preprocessor = await asyncio.to_thread(Preprocessor, files)
                    except Unavailable as error:
                        log.warning("model %s: %s", name, error)
                    except Exception as error:
                        log.error("model %s: its tokenizer or template cannot be used: %s", name, error)
                    else:
                        ours = await asyncio.to_thread(parity, preprocessor, instance.card.block_size)
                        self.models[name] = Model(instance.card, preprocessor, ours)
                        break
                else:
                    await asyncio.sleep(backoff.next())
            log.info("model %s is known", name)
            for peer in self.peers.values():
                if peer.instance is not None and peer.instance.card.model == name:
                    self._check(peer)
        finally:
            del self._loading[name]


def _differing(theirs: dict[str, str], ours: dict[str, str]) -> str:
    """Names of the files that are not the same."""
    return ", ".join(sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)))
