"""The models that workers serve: their tokenizers and templates, and which workers fit a model and each other."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from dynserve.errors import Unavailable
from dynserve.frontend.reply import Peer
from dynserve.tasks import Backoff, OwnedTasks
from dynserve.text.parity import difference, parity
from dynserve.text.preprocess import Preprocessor
from dynserve.transport.base import FetchFile
from dynserve.wire.discovery import Card, WorkerInstance, unlike

log = logging.getLogger(__name__)

_HANDING_OVER = ("prefill", "decode")
KEEP_RETIRED = 600.0  # seconds that a model without workers stays known


@dataclass(slots=True)
class Model:
    """A model that is served, as its first worker described it."""

    card: Card
    preprocessor: Preprocessor
    parity: dict[str, str]  # this frontend's own digests of the probe conversations


class Models:
    """Models by name. The first worker of a model defines its block size and files; later ones have to be like it.

    A model is `load`ed once, with the tokenizer and template of any of its workers. `on_loaded(name)` is called
    afterwards.
    """

    def __init__(self, fetch_file: FetchFile, tasks: OwnedTasks, on_loaded: Callable[[str], None]) -> None:
        self._fetch_file, self._tasks, self._on_loaded = fetch_file, tasks, on_loaded
        self.by_name: dict[str, Model] = {}
        self._loading: set[str] = set()
        self._retired: dict[str, float] = {}  # models without workers, and since when

    def load(self, name: str, workers: Callable[[], Sequence[WorkerInstance]]) -> None:
        """Begins to load a model, unless that is under way. `workers()` returns those that serve it now."""
        if name not in self._loading:
            self._loading.add(name)
            self._tasks.create_task(self._load(name, workers))

    def retire(self, name: str, now: float) -> None:
        """Notes that a model has no workers. It stays known, so that requests can be prepared while they wait for one."""
        if name in self.by_name:
            self._retired[name] = now

    def restore(self, card: Card) -> bool:
        """Whether the model of a worker's card is loaded. The first worker of a retired model may have other files: then it
        is not, and has to be loaded again."""
        model = self.by_name.get(card.model)
        if model is not None and self._retired.pop(card.model, None) is not None:
            if card.files == model.card.files:
                model.card = card
            else:
                model = None
                del self.by_name[card.model]
        return model is not None

    def expire(self, now: float) -> list[str]:
        """Removes the models that were retired long ago, and returns their names."""
        gone = [name for name, since in self._retired.items() if now - since > KEEP_RETIRED]
        for name in gone:
            del self._retired[name]
            self.by_name.pop(name, None)
        return gone

    def mismatch(self, card: Card) -> str | None:
        """Returns the reason why a worker with this card does not fit the loaded model, as a sentence; None if it fits."""
        model = self.by_name[card.model]
        if (found := difference(card.parity, model.parity)) is not None:
            return found
        if card.files != model.card.files:
            return f"its {_differing(card.files, model.card.files)} differs from that of the model's other workers"
        return None

    async def _load(self, name: str, workers: Callable[[], Sequence[WorkerInstance]]) -> None:
        backoff = Backoff(0.05, 2.0)
        try:
            while name not in self.by_name:
                candidates = workers()
                if not candidates:
                    return
                for instance in candidates:
                    if (model := await self._try(name, instance)) is not None:
                        self.by_name[name] = model
                        break
                else:
                    await asyncio.sleep(backoff.next())
        finally:
            self._loading.discard(name)
        log.info("model %s is loaded", name)
        self._on_loaded(name)

    async def _try(self, name: str, instance: WorkerInstance) -> Model | None:
        card = instance.card
        try:
            url = instance.files_url or instance.system_url
            files = {file: await self._fetch_file(url, digest) for file, digest in card.files.items()}
            preprocessor = await asyncio.to_thread(Preprocessor, files)
        except Unavailable as error:
            log.warning("model %s: %s", name, error)
            return None
        except Exception as error:
            log.error("model %s: its tokenizer or template cannot be used: %s", name, error)
            return None
        return Model(card, preprocessor, await asyncio.to_thread(parity, preprocessor, card.block_size))


def unpaired(peer: Peer, others: Iterable[Peer]) -> str | None:
    """Returns the reason why a worker cannot hand KV caches over to the usable workers, or fetch theirs; None if it can, or
    is alone. Hand-offs need workers of one kind. A kind with usable workers of both phases has precedence."""
    ours = peer.instance
    if ours is None or not ours.card.pairing or ours.role not in _HANDING_OVER:
        return None
    known = [other for other in others if other is not peer]
    for other in known:
        theirs = other.instance
        if theirs is None or not other.usable or theirs.role not in _HANDING_OVER:
            continue
        if theirs.card.model != ours.card.model or not _complete(theirs.card, known):
            continue
        if found := unlike(ours.card.pairing, theirs.card.pairing, "this worker", other.id):
            return f"it cannot hand over KV caches here: {found}"
    return None


def _complete(card: Card, peers: Iterable[Peer]) -> bool:
    """Whether this kind has usable workers for both phases. The last, departing workers of a kind exclude no others."""
    roles = {
        peer.instance.role
        for peer in peers
        if peer.usable
        and peer.instance is not None
        and (peer.instance.card.model, peer.instance.card.pairing) == (card.model, card.pairing)
    }
    return bool(card.pairing) and roles >= set(_HANDING_OVER)


def _differing(theirs: dict[str, str], ours: dict[str, str]) -> str:
    """The names of the files that differ."""
    return ", ".join(sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)))
