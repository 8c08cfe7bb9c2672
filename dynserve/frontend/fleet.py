"""The fleet: the known workers, their links, and the open streams of each.

A worker is used once discovery lists it and its link is up. It is lost when its link ends, and only then.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from dynserve.errors import WorkerLeft, WorkerLost, from_wire
from dynserve.frontend.kv_feed import KvFeeds
from dynserve.frontend.models import Model, Models, unpaired
from dynserve.frontend.reply import Peer, deliver_steps
from dynserve.frontend.roles import Lineup, RoleWatch
from dynserve.log_limit import LimitedLog
from dynserve.routing.router import Router, RoutingTarget
from dynserve.tasks import OwnedTasks, Signal
from dynserve.transport.base import Change, FetchFile, Link, Put
from dynserve.wire import decoded, discovery, events
from dynserve.wire.discovery import WorkerInstance
from dynserve.wire.events import LoadReport
from dynserve.wire.link import (
    VERSION,
    Adopted,
    Cancel,
    EventsByLink,
    Failed,
    Finished,
    FromWorker,
    HandoffDeclined,
    Hello,
    Leaving,
    LinkKvEvents,
    LinkLoad,
    Snapshot,
    SnapshotRequest,
    StepTokens,
    SubmitReply,
    Tokens,
    Welcome,
)  # fmt: skip
from dynserve.wire.requests import Accepted, Ack, GenerateRequest

log = logging.getLogger(__name__)
limited = LimitedLog(log)

STALE_LOAD = 5.0  # seconds after which a load report is not believed any more; workers send one every half second


class Patience(NamedTuple):
    """How long workers may be silent or away, in seconds: until nothing is placed on them, until they are lost, and until
    workers of the other role stand in for a role without any."""

    suspect_s: float
    silence_s: float
    role_grace_s: float


class Fleet:
    """Workers by id, and the handler of all links.

    `on_ack` gets the acknowledgements of requests, by stream. `on_change` is called when workers become, or cease to be,
    routing targets; `on_suspicion` with `returned`, `lost` or `relinked` when the suspicion of a silent worker ends.
    `on_adopted` gets workers' replies about resumable answers.
    """

    def __init__(
        self,
        frontend_id: str,
        router: Router,
        fetch_file: FetchFile,
        tasks: OwnedTasks,
        *,
        on_ack: Callable[[int, Ack], None],
        on_change: Callable[[], None],
        on_suspicion: Callable[[str], None],
        on_adopted: Callable[[int, GenerateRequest | None], None],
        patience: Patience,
    ) -> None:
        self._id, self._router = frontend_id, router
        self._on_ack, self._on_change, self._on_suspicion = on_ack, on_change, on_suspicion
        self._patience, self._on_adopted = patience, on_adopted
        self._by_link = False  # events are wanted over the links
        self.changed = Signal()  # notified with `on_change`
        self._roles = RoleWatch(patience.role_grace_s, self._membership_changed)
        self._lineups: dict[str, Lineup] = {}  # valid as long as `_pools`
        self._update_due = False
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

    def paired(self, targets: Sequence[RoutingTarget], worker: str) -> Sequence[RoutingTarget]:
        """Returns the targets that can fetch a hand-off of `worker`; all targets if none can: they compute the prompt."""
        peer = self.peers.get(worker)
        if peer is None or peer.instance is None or not peer.instance.card.pairing:
            return targets
        pairing = peer.instance.card.pairing
        found = [t for t in targets if (p := self.peers[t.worker].instance) is not None and p.card.pairing == pairing]
        return found or targets

    def lineup(self, model: str) -> Lineup:
        """The workers that answer requests of the model now."""
        found = self._lineups.get(model)
        if found is None:
            found = self._lineups[model] = self._line_up(model)
        return found

    def _line_up(self, model: str) -> Lineup:
        prefill, decode = self.targets(model, "prefill"), self.targets(model, "decode")
        if prefill and decode:
            return Lineup(prefill, decode)
        if both := self.targets(model, "aggregated"):
            return Lineup(alone=both, alone_role="aggregated")
        base = self.base(model)
        for role, missing, targets in (("decode", "prefill", decode), ("prefill", "decode", prefill)):
            if self._roles.overdue(base, missing) and (able := [t for t in targets if self._aggregates(t.worker)]):
                return Lineup(alone=able, alone_role=role)
        return Lineup()

    def _aggregates(self, worker: str) -> bool:
        instance = self.peers[worker].instance
        return instance is not None and instance.card.aggregates

    def has_room(self, model: str, unplaced: int, undecoded: int) -> bool:
        """Whether a request could run at once (see `admission.Capacity`)."""
        has_room, lineup = self._router.has_room, self.lineup(model)
        if lineup.alone:
            return has_room(lineup.alone, "aggregated", unplaced)
        return has_room(lineup.prefill, "prefill", unplaced) and has_room(lineup.decode, "decode", undecoded)

    def slots(self, model: str) -> int:
        """The number of answers that the model's workers generate at once."""
        return sum(t.slots for t in self.lineup(model).generating)

    # models, by their names and those of their adapters

    def names(self) -> list[str]:
        adapters = {name for peer in self.peers.values() if peer.instance for name in peer.instance.card.adapters}
        return [*self.models, *sorted(adapters - self.models.keys())]

    def model(self, name: str) -> Model | None:
        """The model of that name, or the one that an adapter of that name belongs to."""
        return self.models.get(name) or self.models.get(self.base(name))

    def adapter(self, name: str) -> str:
        """Returns `name` if it is an adapter's, and an empty string if it is a model's."""
        return "" if name in self.models or self.base(name) == name else name

    def serves(self, model: str) -> bool:
        """Whether there are usable workers that answer requests of the model."""
        return self.model(model) is not None and self.lineup(model).anyone

    def warnings(self) -> list[str]:
        """Returns what works only in part, as sentences."""
        return [
            f"{model} has had no {role} worker for {seconds:.0f} s; "
            + ("its other workers answer alone" if self.serves(model) else "nobody answers its requests")
            for (model, role), seconds in self.missing_roles().items()
        ]

    def missing_roles(self) -> dict[tuple[str, str], float]:
        """Returns for how long roles have had no worker, in seconds, by model and role: those that are missing for longer
        than the grace time, of models without workers that do not need them."""
        overdue = self._roles.overdue_roles()
        return {key: seconds for key, seconds in overdue.items() if not self.targets(key[0], "aggregated")}

    def base(self, name: str) -> str:
        """Returns the model that an adapter belongs to; the name itself if it is no adapter's."""
        if name in self.models:  # as of nearly all requests
            return name
        workers = (peer.instance.card for peer in self.peers.values() if peer.instance is not None)
        cards = (*workers, *(model.card for model in self.models.values()))  # of models without workers, too
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
        self._membership_changed()

    def load_reported(self, payload: bytes) -> None:
        report = decoded(events.decode_load, payload, "a load report")
        if report is not None:
            self._loaded(report)

    def _loaded(self, report: LoadReport) -> None:
        if (peer := self.peers.get(report.instance_id)) is not None and peer.linked:
            peer.load, peer.loaded_at = report.load, self._clock()
            self.feeds.reported(peer.id, report.epoch, report.event_id)
            if peer.target is not None:
                self._router.ledger.reported(peer.id, report.load, peer.target.block_size)
            self._on_change()  # other frontends' requests may have ended there

    def expire_loads(self) -> None:
        """Forgets load reports that no other has followed. Call it every few seconds."""
        for peer in self.peers.values():
            if peer.load is not None and self._clock() - peer.loaded_at > STALE_LOAD:
                peer.load = None
                self._router.ledger.forget_report(peer.id)

    def age_of_load(self, peer: Peer) -> float:
        """The time since the worker's last load report, in seconds."""
        return self._clock() - peer.loaded_at

    def request_events_by_link(self, wanted: bool) -> None:
        """Asks all workers to send load reports and KV events over their links, too, or not any more."""
        self._by_link = wanted
        for peer in self.peers.values():
            if peer.link is not None:
                peer.link.send(EventsByLink(wanted))

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
        if peer.suspected:
            self._on_suspicion("lost")
        peer.link, peer.load, peer.target = None, None, None
        self.feeds.departed(peer.id)
        for reply in list(peer.replies.values()):
            reply.fail(WorkerLost(f"worker {peer.id} was lost: {reason}"))
        if peer.instance is None or peer.leaving:
            self._forget(peer)
        self._recheck_refused(peer)
        self._membership_changed()

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
            case LinkLoad(report=report):
                self._loaded(report)
            case LinkKvEvents(batch=batch):
                self.feeds.events(batch)
            case Adopted(number=number, request=request):
                self._on_adopted(number, request)
            case Leaving(migrate=migrate):
                self._stopping(peer, migrate)
            case _:
                pass  # a ping: its arrival is enough

    def _stopping(self, peer: Peer, migrate: bool) -> None:
        """Handles a worker that stops: nothing is placed on it, and with `migrate` its answers continue elsewhere."""
        peer.stopping = True
        for reply in list(peer.replies.values()) if migrate else ():
            if reply.answering:
                reply.fail(WorkerLeft(f"worker {peer.id} stops"))
        self._membership_changed()

    def _suspicion(self, peer: Peer, suspected: bool) -> None:
        """Handles a worker that is silent for long, or is heard again."""
        peer.suspected = suspected
        if suspected:
            log.warning(
                "worker %s has been silent for %.1f s: it gets no new requests", peer.id, self._patience.suspect_s
            )
        else:
            self._on_suspicion("returned")
        self._membership_changed()

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
        if peer.suspected and peer.epoch == hello.epoch:
            self._on_suspicion("relinked")  # it was taken for lost, and had only been silent
        peer.link, peer.epoch, peer.suspected, peer.stopping = link, hello.epoch, False, False
        self._peer_of[link] = peer
        suspect_s, silence_s, _ = self._patience
        link.send(Welcome(self._id, ping_s=link.watch(suspect_s, silence_s, partial(self._suspicion, peer))))
        if self._by_link:
            link.send(EventsByLink(True))
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

    def _membership_changed(self) -> None:
        """Forgets everything that was derived from the peers, and soon wakes those that wait for one."""
        self._pools.clear()
        self._lineups.clear()
        if not self._update_due:  # many workers may change in one turn of the loop
            self._update_due = True
            asyncio.get_running_loop().call_soon(self._update_roles)

    def _update_roles(self) -> None:
        self._update_due = False
        present: dict[str, set[str]] = {}
        for peer in self.peers.values():
            if peer.usable and peer.instance is not None:
                present.setdefault(peer.instance.card.model, set()).add(peer.instance.role)
        self._roles.update(present)
        self.changed.notify()
        self._on_change()

    def _peer(self, id_: str) -> Peer:
        peer = self.peers.get(id_)
        if peer is None:
            peer = self.peers[id_] = Peer(id_)
        return peer

    def _forget(self, peer: Peer) -> None:
        """Removes a worker. A model without workers stays known for a while: its requests wait for one."""
        self.peers.pop(peer.id, None)
        if peer.instance is not None and not self._serving(peer.instance.card.model):
            self._models.retire(peer.instance.card.model, self._clock())

    def _serving(self, model: str) -> list[WorkerInstance]:
        return [p.instance for p in self.peers.values() if p.instance is not None and p.instance.card.model == model]

    def _check(self, peer: Peer) -> None:
        """Compares a worker with its model and with the model's other workers, and admits it if it fits."""
        assert peer.instance is not None
        card = peer.instance.card
        if not self._models.restore(card):
            peer.problem = "loading"
            self._models.load(card.model, lambda: self._serving(card.model))
            return
        cause = unpaired(peer, self.peers.values()) or self._models.mismatch(card)
        peer.problem = f"refused: {cause}" if cause else ""
        if cause:
            log.error("worker %s %s", peer.id, peer.problem)
        self._admit(peer)

    def expire_models(self) -> None:
        """Forgets models that have had no worker for long. Call it every few seconds."""
        for name in self._models.expire(self._clock()):
            self._roles.forget(name)

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
        if peer.target is None and peer.instance is not None and peer.linked and not peer.problem:
            card, now = peer.instance.card, self._clock()
            peer.target = self._router.join(
                peer.id, card.block_size, card.num_blocks, now, events=card.kv_events,
                slots=card.max_batch_size, max_num_tokens=card.max_num_tokens,
            )  # fmt: skip
            self.feeds.placeable(peer.target)
        self._membership_changed()
