"""The faults of `chaos.py`, injected into a running cluster when its plan says so."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from chaos_cluster import ChaosCluster, WorkerProcess
from chaos_plan import Fault
from chaos_planes import FaultyLink, Process

P = TypeVar("P", bound=Process)


class Faults:
    """Injects the faults of a plan."""

    def __init__(self, cluster: ChaosCluster) -> None:
        self._cluster, self._planes = cluster, cluster.planes
        self._inject: dict[str, Callable[[Fault], str]] = {
            "worker death": self._worker_death, "worker machine off": self._worker_death,
            "worker freeze": self._worker_freeze, "engine death": self._engine_death,
            "worker drain": self._worker_drain, "worker join": self._worker_join,
            "link cut": self._link_cut, "link silent": self._link_silent,
            "frontend death": self._frontend_death, "frontend machine off": self._frontend_death,
            "frontend join": self._frontend_join,
            "bus silent": self._bus_silent, "bus down": self._bus_down, "bus lossy": self._bus_lossy,
            "registry loss": self._registry_loss, "registry down": self._registry_down,
            "handoffs lost": self._handoffs_lost, "transfers fail": self._transfers_fail,
            "cache cleared": self._cache_cleared,
        }  # fmt: skip

    async def run(self, began: float) -> None:
        """Injects all faults in their time, and returns after the last."""
        cluster = self._cluster
        for fault in cluster.plan.faults:
            await asyncio.sleep(max(0.0, began + fault.at - cluster.loop.time()))
            hit = self._inject[fault.kind](fault)
            cluster.log.add("FAULT", fault.kind, f"for {fault.seconds:.3f} s:", hit or "nothing to hit")
            if hit:
                cluster.injected[fault.kind] += 1

    def _worker(self, fault: Fault, *, touch: bool = True) -> WorkerProcess | None:
        worker = _chosen(self._cluster.live_workers(), fault)
        if worker is not None and touch:
            worker.touched = True
        return worker

    def _worker_death(self, fault: Fault) -> str:
        if (worker := self._worker(fault)) is None:
            return ""
        worker.die(silent=fault.kind == "worker machine off")
        worker.task.cancel()
        return worker.name

    def _worker_freeze(self, fault: Fault) -> str:
        if (worker := self._worker(fault)) is None:
            return ""
        worker.freeze(fault.seconds)
        return worker.name

    def _engine_death(self, fault: Fault) -> str:
        if (worker := self._worker(fault)) is None:
            return ""
        worker.engine.fail(RuntimeError("a fault"))
        return worker.name

    def _worker_drain(self, fault: Fault) -> str:
        if (worker := self._worker(fault)) is None:
            return ""
        worker.leave.set()
        return worker.name

    def _worker_join(self, fault: Fault) -> str:
        roles = list(dict.fromkeys(self._cluster.plan.roles))
        worker = self._cluster.add_worker(roles[int(fault.target * len(roles))])
        worker.touched = True  # nobody may rely on it: it may join during an outage
        return worker.name

    def _link(self, fault: Fault) -> FaultyLink | None:
        """A link of a worker, which a fault touches."""
        worker = self._worker(fault)
        links = [link for link in worker.links if not link.closed] if worker is not None else []
        return links[int(fault.degree * len(links))] if links else None

    def _link_cut(self, fault: Fault) -> str:
        if (link := self._link(fault)) is None:
            return ""
        link.abort("a fault")
        return f"{link.process.name} to {link.other.name}"

    def _link_silent(self, fault: Fault) -> str:
        if (link := self._link(fault)) is None:
            return ""
        link.silence()
        if link.peer is not None:
            link.peer.silence()
        return f"{link.process.name} to {link.other.name}"

    def _frontend_death(self, fault: Fault) -> str:
        ready = [f for f in self._cluster.live_frontends() if f.ready]
        if len(ready) < 2:
            return ""
        frontend = ready[int(fault.target * len(ready))]
        frontend.die(silent=fault.kind == "frontend machine off")
        for task in (*frontend.client_tasks, frontend.task):
            task.cancel()
        return frontend.name

    def _frontend_join(self, fault: Fault) -> str:
        return self._cluster.add_frontend().name

    def _bus_silent(self, fault: Fault) -> str:
        return self._switch(fault, self._planes.bus, "silent", True, False)

    def _bus_down(self, fault: Fault) -> str:
        return self._switch(fault, self._planes.bus, "connected", False, True)

    def _bus_lossy(self, fault: Fault) -> str:
        lost, late = 0.6 * fault.target, 0.6 * fault.degree
        self._switch(fault, self._planes.bus, "late", late, 0.0)
        return self._switch(fault, self._planes.bus, "lost", lost, 0.0) and f"{lost:.2f} lost, {late:.2f} late"

    def _registry_down(self, fault: Fault) -> str:
        return self._switch(fault, self._planes.registry, "up", False, True)

    def _switch(self, fault: Fault, plane: object, name: str, value: object, afterwards: object) -> str:
        setattr(plane, name, value)
        self._cluster.loop.call_later(fault.seconds, setattr, plane, name, afterwards)
        return f"{name} = {value}"

    def _registry_loss(self, fault: Fault) -> str:
        registry = self._planes.registry
        keys = [key for key in registry.entries if (owner := registry.owners.get(key)) and not owner.dead]
        if not keys:
            return ""
        first = int(fault.target * len(keys))
        lost = keys if fault.degree > 0.7 else keys[first : first + 1]
        for key in lost:
            owner = registry.owners[key]
            if isinstance(owner, WorkerProcess):
                owner.touched = True
            registry.take(key, fault.seconds)
        return ", ".join(registry.owners[key].name for key in lost)

    def _handoffs_lost(self, fault: Fault) -> str:
        holding = [w for w in self._cluster.live_workers() if len(w.engine.handoffs)]
        if (worker := _chosen(holding, fault)) is None:
            return ""
        number = len(worker.engine.handoffs)
        worker.engine.handoffs.cancel_all()
        return f"{number} of {worker.name}"

    def _transfers_fail(self, fault: Fault) -> str:
        if (worker := self._worker(fault, touch=False)) is None:
            return ""
        worker.fetch_fails_until = self._cluster.loop.time() + fault.seconds
        return worker.name

    def _cache_cleared(self, fault: Fault) -> str:
        if (worker := self._worker(fault, touch=False)) is None:
            return ""
        worker.engine._steps.post(worker.engine._scheduler.blocks.clear)
        return worker.name


def _chosen(processes: list[P], fault: Fault) -> P | None:
    return processes[int(fault.target * len(processes))] if processes else None
