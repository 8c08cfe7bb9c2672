"""The numbers by which an autoscaler sizes a role, published in `/metrics`: KV blocks in use, waiting requests, and the
share of requests that miss the objective for their first token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import get_args

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dynserve.config import Role, mode_of
from dynserve.frontend.objective import WINDOW, FirstTokenObjective
from dynserve.frontend.reply import Peer


class ScalingCollector(Collector):
    """Collects the numbers of all roles at every scrape. Every frontend reports the same of the workers; the queue and the
    objective are its own."""

    def __init__(
        self, cluster: str, peers: Callable[[], Iterable[Peer]], queued: Callable[[], int],
        objective: FirstTokenObjective | None,
    ) -> None:  # fmt: skip
        self._cluster, self._peers, self._queued, self._objective = cluster, peers, queued, objective

    def collect(self) -> Iterator[Metric]:
        labels = ["cluster", "role"]
        occupancy = GaugeMetricFamily(
            "dynserve_role_kv_occupancy", "KV blocks in use, summed over workers, each from 0 to 1", labels=labels
        )
        waiting = GaugeMetricFamily(
            "dynserve_role_waiting_requests", "Requests that wait in the workers' queues", labels=labels
        )
        queued = GaugeMetricFamily(
            "dynserve_role_queued_requests", "Requests that wait in this frontend for a worker with room", labels=labels
        )
        in_queue = self._queued()
        for role in get_args(Role):
            loads = [p.load for p in self._peers() if p.usable and p.instance and p.instance.role == role and p.load]
            key = [self._cluster, mode_of(role)]
            used = sum(1 - load.free_blocks / load.total_blocks for load in loads if load.total_blocks)
            occupancy.add_metric(key, used)
            waiting.add_metric(key, sum(load.waiting for load in loads))
            queued.add_metric(key, in_queue)
        yield from (occupancy, waiting, queued)
        if self._objective is not None:
            missed = GaugeMetricFamily(
                "dynserve_ttft_slo_missed_ratio",
                f"Share of the last {WINDOW} s' requests whose first token came later than --ttft-slo-ms",
                labels=["cluster"],
            )
            missed.add_metric([self._cluster], self._objective.missed_ratio())
            yield missed
