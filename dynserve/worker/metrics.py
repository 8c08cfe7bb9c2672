"""A worker's `/metrics` in Prometheus's format, read from the workers at each scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dynserve.worker.worker import Worker


class WorkerMetrics:
    """Reads the workers' plain counters at each scrape. The label `rank` distinguishes the workers of an engine with
    several KV caches."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, get_workers: Callable[[], Sequence[Worker]]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_WorkerCollector(get_workers))

    def render(self) -> bytes:
        return generate_latest(self._registry)


class _WorkerCollector(Collector):
    def __init__(self, get_workers: Callable[[], Sequence[Worker]]) -> None:
        self._get_workers = get_workers

    def collect(self) -> Iterator[Metric]:
        workers = self._get_workers()
        names, ranks = (["rank"], [[str(at)] for at in range(len(workers))]) if len(workers) > 1 else ([], [[]])
        ready = bool(workers) and all(worker.ready for worker in workers)
        yield GaugeMetricFamily("dynserve_worker_ready", "1 when registered", float(ready))
        if not workers:
            return
        requests = CounterMetricFamily("dynserve_worker_requests", "Requests by outcome", labels=["what", *names])
        for worker, rank in zip(workers, ranks, strict=True):
            for what in ("accepted", "finished", "failed", "cancelled", "refused"):
                requests.add_metric([what, *rank], worker.counts[what])
        yield requests
        loads = [worker.executor.load() for worker in workers]
        for name in loads[0].__struct_fields__:
            what = f"The engine's {name.replace('_', ' ')}"
            gauge = GaugeMetricFamily(f"dynserve_worker_{name}", what, labels=names)
            for load, rank in zip(loads, ranks, strict=True):
                gauge.add_metric(rank, getattr(load, name))
            yield gauge
        yield from self._counted([worker.executor.counters() for worker in workers], names, ranks)

    @staticmethod
    def _counted(counters: list[Mapping[str, float]], names: list[str], ranks: list[list[str]]) -> Iterator[Metric]:
        for name in sorted({name for one in counters for name in one}):
            total = name.endswith("_total")
            kind = CounterMetricFamily if total else GaugeMetricFamily
            what = "Counted by the engine" if total else "Measured by the engine"
            family = kind(f"dynserve_worker_{name.removesuffix('_total')}", what, labels=names)
            for one, rank in zip(counters, ranks, strict=True):
                family.add_metric(rank, one.get(name, 0.0))
            yield family
