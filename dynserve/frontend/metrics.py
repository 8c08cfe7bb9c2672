"""The frontend's `/metrics`, in Prometheus's format. Values are counted per request and read per scrape."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from itertools import accumulate

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from dynserve.frontend.objective import FirstTokenObjective

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class FrontendMetrics:
    """The metrics of one frontend. `accepted = finished + failed + cancelled + in flight` at every moment."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, objective: FirstTokenObjective | None = None) -> None:
        self._registry = CollectorRegistry()
        self._of: dict[str, ModelMetrics] = {}
        self._registry.register(_RequestCollector(self._of))
        self._objective = objective
        ours = self._registry
        self.refused = Counter(
            "dynserve_requests_refused", "Requests answered with an error at the edge", ["code"], registry=ours
        )
        self.replaced = Counter(
            "dynserve_requests_replaced", "Phases placed again after a worker was lost or full", registry=ours
        )
        self.migrated = Counter(
            "dynserve_requests_migrated", "Answers that another worker has continued, by the error that interrupted them",
            ["cause"], registry=ours,
        )  # fmt: skip
        self.suspicions = Counter(
            "dynserve_worker_suspicions", "Silences of workers over --suspect-s, by their end: returned (a false alarm), "
            "lost, relinked (a false alarm after it counted as lost)", ["end"], registry=ours,
        )  # fmt: skip
        self.poison = Counter(
            "dynserve_poison_requests", "Requests that ended because engines died while they ran them", registry=ours
        )
        self.slow_clients = Counter(
            "dynserve_slow_clients_cut", "Requests cut because their client did not read", registry=ours
        )
        self.link_fallbacks = Counter(
            "dynserve_requests_by_link", "Requests sent over the link, instead of NATS or after it", registry=ours
        )
        self.instances = Gauge("dynserve_instances", "Workers that can be routed to", ["role"], registry=ours)
        self.roles_missing = Gauge(
            "dynserve_role_missing", "1 for a role without workers for longer than --role-grace-s", ["model", "role"],
            registry=ours,
        )  # fmt: skip
        self.local_prefills = Counter(
            "dynserve_local_prefills", "Requests prefilled on the decode worker, without a hand-off", registry=ours
        )
        self.queued = Histogram(
            "dynserve_queue_seconds", "Wait of requests that found all workers busy", ["model"], buckets=_SECONDS,
            registry=ours,
        )  # fmt: skip
        self.queue_length = Gauge("dynserve_queue_length", "Requests that wait now", ["model"], registry=ours)
        self.frontends = Gauge(
            "dynserve_frontends", "Frontends that share their placements, including this one", registry=ours
        )
        self.index_state = Gauge(
            "dynserve_index_state", "1 for the current state of a worker's index", ["worker", "state"], registry=ours
        )
        self.index_bytes = Gauge("dynserve_index_bytes", "Memory of the prefix index, estimated", registry=ours)
        self.index_evicted = Gauge("dynserve_index_evicted_blocks", "Blocks evicted from the full index", registry=ours)
        self.resyncs = Gauge("dynserve_index_resyncs", "Snapshots requested", registry=ours)
        self.prediction_ratio = Gauge(
            "dynserve_cached_tokens_predicted_ratio", "Predicted by reported cached tokens, recently", ["worker"],
            registry=ours,
        )  # fmt: skip
        self.loop_lag = Histogram(
            "dynserve_event_loop_lag_seconds", "Lag of the event loop", buckets=_SECONDS, registry=ours
        )
        self.open_requests = Gauge(
            "dynserve_open_requests", "HTTP requests between their headers and their last byte", registry=ours
        )
        self.tokenised = Gauge(
            "dynserve_tokenised_characters", "Characters of conversations, tokenised anew or remembered",
            ["model", "what"], registry=ours,
        )  # fmt: skip
        self.index_blocks = Gauge("dynserve_index_blocks", "Distinct KV blocks in the prefix index", registry=ours)

    def of(self, model: str) -> ModelMetrics:
        """The metrics of one model."""
        found = self._of.get(model)
        if found is None:
            found = self._of[model] = ModelMetrics(self._objective)
        return found

    def add(self, collector: Collector) -> None:
        """Adds metrics that are read at every scrape."""
        self._registry.register(collector)

    def render(self) -> bytes:
        return generate_latest(self._registry)


class HistogramCounts:
    """The bucket counts and the sum of one histogram."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(_SECONDS) + 1)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(_SECONDS, seconds)] += 1
        self.total += seconds


class ModelMetrics:
    """The counts of one model's requests. They are plain numbers, used on the event loop only: the library's own counters
    lock and check at every call, which cost a twentieth of a short request."""

    __slots__ = (
        "accepted", "cached_tokens", "duration", "ended", "in_flight", "objective", "output_tokens", "prompt_tokens",
        "ttft",
    )  # fmt: skip

    def __init__(self, objective: FirstTokenObjective | None = None) -> None:
        self.objective = objective
        self.accepted = self.in_flight = self.prompt_tokens = self.output_tokens = self.cached_tokens = 0
        self.ended = dict.fromkeys(("finished", "failed", "cancelled"), 0)
        self.ttft, self.duration = HistogramCounts(), HistogramCounts()


class _RequestCollector(Collector):
    """Collects the counts of all models at every scrape."""

    def __init__(self, of: Mapping[str, ModelMetrics]) -> None:
        self._of = of

    def collect(self) -> Iterator[Metric]:
        model = ["model"]
        in_flight = GaugeMetricFamily("dynserve_requests_in_flight", "Requests being answered", labels=model)
        ended = CounterMetricFamily(
            "dynserve_requests_ended", "Requests by how they ended: finished, failed, cancelled",
            labels=["model", "outcome"],
        )  # fmt: skip
        for name, metrics in self._of.items():
            in_flight.add_metric([name], metrics.in_flight)
            for outcome, count in metrics.ended.items():
                ended.add_metric([name, outcome], count)
        yield from (in_flight, ended)
        for what, text in (
            ("requests_accepted", "Requests accepted"),
            ("prompt_tokens", "Prompt tokens"),
            ("output_tokens", "Generated tokens"),
            ("cached_tokens", "Prompt tokens found in a KV cache"),
        ):
            counter = CounterMetricFamily(f"dynserve_{what}", text, labels=model)
            for name, metrics in self._of.items():
                counter.add_metric([name], getattr(metrics, what.removeprefix("requests_")))
            yield counter
        yield self._histogram(
            "time_to_first_token",
            "From the request's body to its first token",
            {n: m.ttft for n, m in self._of.items()},
        )
        yield self._histogram(
            "request", "From the request's body to its last byte", {n: m.duration for n, m in self._of.items()}
        )

    @staticmethod
    def _histogram(what: str, text: str, spreads: Mapping[str, HistogramCounts]) -> Metric:
        family = HistogramMetricFamily(f"dynserve_{what}_seconds", text, labels=["model"])
        bounds = [*(str(float(bound)) for bound in _SECONDS), "+Inf"]
        for name, spread in spreads.items():
            family.add_metric([name], list(zip(bounds, accumulate(spread.counts), strict=True)), spread.total)
        return family
