"""The fleet: the known workers, their links, and the open streams of each.

A worker is used once discovery lists it and its link is up. It is lost when its link ends, and only then.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from dynserve.errors import WorkerLost, from_wire
from dynserve.frontend.kv_feed import KvFeeds
from dynserve.frontend.models import Model, Models, unpaired
from dynserve.frontend.reply import Peer, deliver_steps
from dynserve.log_limit import LimitedLog
from dynserve.routing.router import Router, RoutingTarget
from dynserve.tasks import OwnedTasks
from dynserve.transport.base import Change, FetchFile, Link, Put
from dynserve.wire import decoded, discovery, events
from dynserve.wire.discovery import WorkerInstance
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
    StepTokens,
    SubmitReply,
    Tokens,
    Welcome,
)  # fmt: skip
from dynserve.wire.requests import Accepted, Ack

log = logging.getLogger(__name__)
limited = LimitedLog(log)


class Fleet:
    """Workers by id, and the handler of all links.

    `on_ack` gets the acknowledgements of requests, by stream. `on_placeable` is called when a worker
    becomes a routing target.
    """

    def __init__(
        self,
        frontend_id: str,
        router: Router,
        fetch_file: FetchFile,
        tasks: OwnedTasks,
        *,
        on_ack: Callable[[int, Ack], None],
        on_placeable: Callable[[], None],
    ) -> None:
        self._id, self._router = frontend_id, router
        self._on_ack, self._on_placeable = on_ack, on_placeable
        self.peers: dict[str, Peer] = {}
        self._peer_of: dict[Link, Peer] = {}
        self._models = Models(fetch_file, tasks, self._model_loaded)
        self.models = self._models.by_name
        self._pools: dict[tuple[str, str], list[RoutingTarget]] = {}  # valid until a peer changes
        self._clock = asyncio.get_running_loop().time
        self.feeds = KvFeeds(router, self._request_snapshot, self._clock)

    # routing targets

    def targets(self, model: str, role: str) -> list[RoutingTarget]:
        """Workers of the model in this role that can be placed on now. The list must not be changed."""
        found = self._pools.get((model, role))
        if found is None:
            found = self._pools[model, role] = [
                p.target
                for p in self.peers.values()
                if p.usable and p.target and p.instance and p.instance.role == role and p.instance.card.serves(model)
            ]
        return found

    def paired(self, targets: list[RoutingTarget], worker: str) -> list[RoutingTarget]:
        """Returns the targets that can fetch a hand-off of `worker`; all targets if none can: they compute the prompt."""
        peer = self.peers.get(worker)
        if peer is None or peer.instance is None or not peer.instance.card.pairing:
            return targets
        pairing = peer.instance.card.pairing
        found = [t for t in targets if (p := self.peers[t.worker].instance) is not None and p.card.pairing == pairing]
        return found or targets

    def has_room(self, model: str) -> bool:
        """Whether a request could be placed on workers that are under their thresholds. True without workers, because then
        load is not the cause."""
        has_room = self._router.has_room
        prefill, decode = self.targets(model, "prefill"), self.targets(model, "decode")
        if prefill and decode:
            return any(has_room(t, "prefill") for t in prefill) and any(has_room(t, "decode") for t in decode)
        both = self.targets(model, "aggregated")
        return not both or any(has_room(t, "aggregated") for t in both)

    # models, by their names and those of their adapters

    def names(self) -> list[str]:
        adapters = {name for peer in self.peers.values() if peer.instance for name in peer.instance.card.adapters}
        return [*self.models, *sorted(adapters - self.models.keys())]

    def model(self, name: str) -> Model | None:
        """The model of that name, or the one that an adapter of that name belongs to."""
        return self.models.get(name) or self.models.get(self._base(name))

    def adapter(self, name: str) -> str:
        """Returns `name` if it is an adapter's, and an empty string if it is a model's."""
        return "" if name in self.models or self._base(name) == name else name

    def serves(self, model: str) -> bool:
        """Whether there are usable workers for every role that the model needs."""
        if self.model(model) is None:
            return False
        if self.targets(model, "aggregated"):
            return True
        return bool(self.targets(model, "prefill") and self.targets(model, "decode"))

    def _base(self, name: str) -> str:
        cards = (peer.instance.card for peer in self.peers.values() if peer.instance is not None)
        return next((card.model for card in cards if name in card.adapters), name)

    # discovery and events

    @property
    def settling(self) -> bool:
        """Whether any listed worker has no link yet, or a model that is still being loaded."""
        known = [peer for peer in self.peers.values() if peer.instance is not None and not peer.leaving]
        return any(not peer.linked or peer.problem == "loading" for peer in known)

    def discovered(self, change: Change) -> None:
        """Handles a worker's discovery entry that was added, changed or removed."""
        id_ = change.key.rsplit("/", 1)[-1]
        self._pools.clear()
        if isinstance(change, Put):
            instance = discovery.parse(change.key, change.value)
            if isinstance(instance, WorkerInstance):
                peer = self._peer(id_)
                peer.instance, peer.leaving = instance, False
                self._check(peer)
        elif (gone := self.peers.get(id_)) is not None:
            gone.leaving = True
            if gone.link is None:
                self._forget(gone)
            self._recheck_refused(gone)

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
        steps: list[StepTokens] = []
        for message in messages:
            if type(message) is StepTokens:
                steps.append(message)
                continue
            if steps:
                deliver_steps(peer.replies, steps)
                steps = []
            if type(message) is Tokens:
                if (reply := peer.replies.get(message.stream)) is not None:
                    reply.deliver(message)
            else:
                self._received_other(peer, message)
        if steps:
            deliver_steps(peer.replies, steps)

    def lost(self, link: Link, reason: str) -> None:
        peer = self._peer_of.pop(link, None)
        if peer is None:
            limited.warning("unknown", "link", "a link without a known worker ended: %r", reason[:200])
            return
        if peer.link is link:  # otherwise a newer link has replaced it
            self._lost(peer, reason)

    def _lost(self, peer: Peer, reason: str) -> None:
        log.info("worker %s was lost: %s", peer.id, reason)
        self._pools.clear()
        peer.link, peer.load, peer.target = None, None, None
        self.feeds.departed(peer.id)
        for reply in list(peer.replies.values()):
            reply.fail(WorkerLost(f"worker {peer.id} was lost: {reason}"))
        if peer.instance is None or peer.leaving:
            self._forget(peer)
        self._recheck_refused(peer)

    def _received_other(self, peer: Peer, message: FromWorker) -> None:
        match message:
            case Finished(stream=stream):
                if (reply := peer.replies.get(stream)) is not None:
                    reply.finish(message)
            case Failed(stream=stream, code=code, message=text, param=param):
                if (reply := peer.replies.pop(stream, None)) is not None:
                    reply.fail(from_wire(code, text, param))
            case SubmitReply(stream=stream, ack=ack):
                self._on_ack(stream, ack)
                if isinstance(ack, Accepted) and stream not in peer.replies and peer.link is not None:
                    peer.link.send(Cancel(stream))  # a duplicate of a request that has ended: its answer has no reader
            case HandoffDeclined(stream=stream):
                if (reply := peer.replies.get(stream)) is not None:
                    reply.handoff_declined = True
            case Snapshot():
                self.feeds.snapshot(peer.id, message)
            case _:
                pass  # a ping: its arrival is enough

    def _greet(self, link: Link, messages: list[FromWorker]) -> None:
        """Handles the first messages of a link. Aborts the link unless they begin with a valid Hello."""
        hello = messages[0]
        if not isinstance(hello, Hello):
            link.abort("did not say hello")
            return
        if hello.frontend_id != self._id:  # it dialled an earlier process on this port
            link.abort(f"expected frontend {hello.frontend_id[:100]}, found {self._id}")
            return
        if hello.version != VERSION:  # otherwise its messages could be misread
            link.abort(f"{hello.instance_id[:100]} speaks version {hello.version} of the link, this frontend {VERSION}")
            return
        known = self.peers.get(hello.instance_id)
        if known is not None and (old := known.link) is not None:
            self._lost(known, "replaced by a newer link")  # the worker has cancelled the streams of the old one
            old.abort("replaced by a newer link")
        peer = self._peer(hello.instance_id)
        peer.link = link
        self._peer_of[link] = peer
        link.send(Welcome(self._id))
        self.feeds.joined(peer.id, hello.epoch)
        if peer.instance is not None:
            self._check(peer)  # against the workers that are linked by now
        if len(messages) > 1:
            self.received(link, messages[1:])

    def _request_snapshot(self, worker: str, number: int) -> None:
        peer = self.peers.get(worker)
        if peer is not None and peer.link is not None:
            peer.link.send(SnapshotRequest(number))

    # membership

    def _peer(self, id_: str) -> Peer:
        peer = self.peers.get(id_)
        if peer is None:
            peer = self.peers[id_] = Peer(id_)
        return peer

    def _forget(self, peer: Peer) -> None:
        """Removes a worker, and its model if it was the last worker that serves it."""
        self.peers.pop(peer.id, None)
        if peer.instance is not None and not self._serving(peer.instance.card.model):
            self._models.forget(peer.instance.card.model)

    def _serving(self, model: str) -> list[WorkerInstance]:
        return [p.instance for p in self.peers.values() if p.instance is not None and p.instance.card.model == model]

    def _check(self, peer: Peer) -> None:
        """Compares a worker with its model and with the model's other workers, and admits it if it fits."""
        assert peer.instance is not None
        card = peer.instance.card
        if card.model not in self.models:
            peer.problem = "loading"
            self._models.load(card.model, lambda: self._serving(card.model))
            return
        cause = unpaired(peer, self.peers.values()) or self._models.mismatch(card)
        peer.problem = f"refused: {cause}" if cause else ""
        if cause:
            log.error("worker %s %s", peer.id, peer.problem)
        self._admit(peer)

    def _model_loaded(self, name: str) -> None:
        for peer in list(self.peers.values()):
            if peer.instance is not None and peer.instance.card.model == name:
                self._check(peer)

    def _recheck_refused(self, gone: Peer) -> None:
        """Checks refused workers again, because the removed worker may have been the reason."""
        if gone.instance is None:
            return
        for peer in list(self.peers.values()):
            if peer.instance is not None and peer.problem and peer.instance.card.model == gone.instance.card.model:
                self._check(peer)

    def _admit(self, peer: Peer) -> None:
        """Makes the peer a target once it is linked, described and without a problem."""
        self._pools.clear()
        if peer.target is None and peer.instance is not None and peer.linked and not peer.problem:
            card, now = peer.instance.card, self._clock()
            peer.target = self._router.join(peer.id, card.block_size, card.num_blocks, now, events=card.kv_events)
            self.feeds.placeable(peer.target)
            self._on_placeable()
