"""A worker's links to all frontends: one is dialled for each frontend in discovery, and kept while it is connected."""

from __future__ import annotations

import asyncio
import logging

from dynserve.errors import Unavailable
from dynserve.tasks import Backoff, OwnedTasks
from dynserve.transport.base import Change, Deleted, Link, Links
from dynserve.wire import discovery
from dynserve.wire.discovery import FrontendInstance
from dynserve.wire.link import FromFrontend
from dynserve.worker.worker import Worker

log = logging.getLogger(__name__)

STEADY = 2.0  # seconds after which a link that ended is dialled again at once


class FrontendLink:
    """The link to one frontend, dialled again whenever it ends while `wanted` is set. Also the link's message handler."""

    def __init__(self, frontend: FrontendInstance, worker: Worker, links: Links) -> None:
        self.frontend, self._worker, self._links = frontend, worker, links
        self.wanted = True
        self._link: Link | None = None
        self._ended = asyncio.Event()

    async def keep(self) -> None:
        backoff, clock = Backoff(0.05, 1.0), asyncio.get_running_loop().time
        try:
            while self.wanted:
                began = clock()
                try:
                    self._link = await self._links.dial(self.frontend.link_address, self)
                except Unavailable as error:
                    log.debug("%s", error)
                else:
                    self._ended.clear()
                    self._worker.linked(self.frontend.id, self._link)
                    if not self._link.closed:
                        await self._ended.wait()
                    if clock() - began > STEADY:  # a link that is refused at once is dialled ever more slowly
                        backoff.reset()
                await asyncio.sleep(backoff.next())
        finally:
            if self._link is not None:
                self._link.close()

    def received(self, link: Link, messages: list[FromFrontend]) -> None:
        self._worker.received(self.frontend.id, link, messages)

    def lost(self, link: Link, reason: str) -> None:
        self._worker.unlinked(self.frontend.id, link, reason)
        self._ended.set()


class FrontendLinks:
    """A link to each frontend in discovery. A frontend that disappears from there keeps its link while it is connected:
    only its registration may have been lost, and its streams must not end for that."""

    def __init__(self, worker: Worker, links: Links, tasks: OwnedTasks) -> None:
        self._worker, self._links, self._tasks = worker, links, tasks
        self._kept: dict[str, tuple[FrontendLink, asyncio.Task[None]]] = {}  # by key in discovery

    def discovered(self, change: Change) -> None:
        link, task = self._kept.get(change.key, (None, None))
        if isinstance(change, Deleted):
            if link is not None:
                link.wanted = False
            return
        instance = discovery.parse(change.key, change.value)
        if not isinstance(instance, FrontendInstance):
            return
        if link is not None and task is not None and not task.done():
            if link.frontend.link_address == instance.link_address:
                link.wanted = True
                return
            task.cancel()
        self._kept = {key: kept for key, kept in self._kept.items() if not kept[1].done()}
        link = FrontendLink(instance, self._worker, self._links)
        self._kept[change.key] = link, self._tasks.create_task(link.keep())
