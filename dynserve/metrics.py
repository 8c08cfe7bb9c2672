"""What `/metrics` says, in Prometheus's format. Counted per request and read per scrape: nothing here runs per token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from dynserve.worker.worker import Worker

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class FrontendMetrics:
    """`accepted = finished + failed + cancelled + in flight`, at every moment."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._of: dict[str, ModelMetrics] = {}
        ours = self._registry
        self.accepted = Counter("dynserve_requests_accepted", "Requests placed", ["model"], registry=ours)
        self.ended = Counter(
            "dynserve_requests_ended", "Requests by how they ended: finished, failed, cancelled", ["model", "outcome"],
            registry=ours,
        )  # fmt: skip
        self.refused = Counter(
            "dynserve_requests_refused", "Requests answered with an error at the edge", ["code"], registry=ours
        )
        self.in_flight = Gauge("dynserve_requests_in_flight", "Requests being answered", ["model"], registry=ours)
        self.ttft = Histogram(
            "dynserve_time_to_first_token_seconds", "From the request's body to its first token", ["model"],
            buckets=_SECONDS, registry=ours,
        )  # fmt: skip
        self.duration = Histogram(
            "dynserve_request_seconds", "From the request's body to its last byte", ["model"], buckets=_SECONDS,
            registry=ours,
        )  # fmt: skip
        self.prompt_tokens = Counter("dynserve_prompt_tokens", "Tokens read", ["model"], registry=ours)
        self.output_tokens = Counter("dynserve_output_tokens", "Tokens answered", ["model"], registry=ours)
        self.cached_tokens = Counter(
            "dynserve_cached_tokens", "Prompt tokens found in a KV cache", ["model"], registry=ours
        )
        self.replaced = Counter(
            "dynserve_requests_replaced", "Phases placed again after a worker was lost or full", registry=ours
        )
        self.slow_clients = Counter(
            "dynserve_slow_clients_cut", "Requests cut because their client did not read", registry=ours
        )
        self.spare_road = Counter(
            "dynserve_requests_by_link", "Requests sent over the link instead of NATS", registry=ours
        )
        self.instances = Gauge("dynserve_instances", "Workers that can be routed to", ["role"], registry=ours)
        self.local_prefills = Counter(
            "dynserve_local_prefills", "Requests prefilled on the decode worker, without a hand-off", registry=ours
        )
        self.queued = Histogram(
            "dynserve_queue_seconds", "Wait of requests that found all workers busy", ["model"], buckets=_SECONDS,
            registry=ours,
        )  # fmt: skip
        self.queue_length = Gauge("dynserve_queue_length", "Requests that wait now", ["model"], registry=ours)
        self.frontends = Gauge(
            "dynserve_frontends", "Frontends that share their placements, this one too", registry=ours
        )
        self.index_state = Gauge(
            "dynserve_index_state", "1 for the state that a worker's index is in", ["worker", "state"], registry=ours
        )
        self.index_bytes = Gauge("dynserve_index_bytes", "Memory of the prefix index, estimated", registry=ours)
        self.index_evicted = Gauge(
            "dynserve_index_evicted_blocks", "Blocks that left the index for want of room, so far", registry=ours
        )
        self.resyncs = Gauge("dynserve_index_resyncs", "Snapshots asked for, so far", registry=ours)
        self.prediction_ratio = Gauge(
            "dynserve_cached_tokens_predicted_ratio", "Predicted cached tokens per reported one, lately", ["worker"],
            registry=ours,
        )  # fmt: skip
        self.loop_lag = Histogram(
            "dynserve_event_loop_lag_seconds", "How late the event loop is", buckets=_SECONDS, registry=ours
        )
        self.open_requests = Gauge(
            "dynserve_open_requests", "HTTP requests between their headers and their last byte", registry=ours
        )
        self.tokenised = Gauge(
            "dynserve_tokenised_characters", "Characters of conversations by whether their tokens were remembered",
            ["model", "what"], registry=ours,
        )  # fmt: skip
        self.index_blocks = Gauge("dynserve_index_blocks", "Distinct KV blocks in the prefix index", registry=ours)

    def of(self, model: str) -> ModelMetrics:
        """Those of one model: to find a label's value takes longer than to count."""
        found = self._of.get(model)
        if found is None:
            found = self._of[model] = ModelMetrics(self, model)
        return found

    def render(self) -> bytes:
        return generate_latest(self._registry)


class ModelMetrics:
    """What is counted for every request."""

    def __init__(self, metrics: FrontendMetrics, model: str) -> None:
        self.accepted, self.in_flight = metrics.accepted.labels(model), metrics.in_flight.labels(model)
        self.ttft, self.duration = metrics.ttft.labels(model), metrics.duration.labels(model)
        self.prompt_tokens, self.output_tokens = (
            metrics.prompt_tokens.labels(model),
            metrics.output_tokens.labels(model),
        )
        self.cached_tokens = metrics.cached_tokens.labels(model)
        self.ended = {how: metrics.ended.labels(model, how) for how in ("finished", "failed", "cancelled")}


class WorkerMetrics:
    """Reads the workers when it is asked; they themselves only count in plain dicts. Those of several KV caches of one
    engine are told apart by the label `rank`."""

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
        requests = CounterMetricFamily(
            "dynserve_worker_requests", "Requests by what became of them", labels=["what", *names]
        )
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
