"""What the router counts, under the names of docs/metrics.md. Gauges are read from the live state when asked for."""

from collections.abc import Callable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from hpc_router.router.replicas import ReplicaTable, Standing

_LATENCY_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_DECISION_S: Final = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 5e-3)


class Metrics:
    def __init__(
        self, table: ReplicaTable, *, in_flight: Callable[[], int], registry_age_s: Callable[[], float]
    ) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "hpc_router_requests", "Requests answered.", ("expert", "reason", "status"), registry=registry
        )
        self.failovers = Counter(
            "hpc_router_failovers", "Attempts that failed and went elsewhere.", ("replica", "cause"), registry=registry
        )
        self.broken = Counter(
            "hpc_router_broken_responses",
            "Responses that failed after their first byte.",
            ("expert",),
            registry=registry,
        )
        self.cancelled = Counter(
            "hpc_router_cancelled_requests", "Requests whose client left.", ("phase",), registry=registry
        )
        self.first_byte = Histogram(
            "hpc_router_first_byte_seconds",
            "From the request's arrival to the first byte of its answer.",
            ("expert",),
            buckets=_LATENCY_S,
            registry=registry,
        )
        self.decision = Histogram(
            "hpc_router_decision_seconds", "What choosing an expert took.", buckets=_DECISION_S, registry=registry
        )
        registry.register(_LiveGauges(table, in_flight, registry_age_s))

    def exposition(self) -> bytes:
        return generate_latest(self._registry)


class _LiveGauges(Collector):
    def __init__(self, table: ReplicaTable, in_flight: Callable[[], int], registry_age_s: Callable[[], float]) -> None:
        self._table, self._in_flight, self._registry_age_s = table, in_flight, registry_age_s

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("hpc_router_requests_in_flight", "Requests being served.", self._in_flight())
        yield GaugeMetricFamily(
            "hpc_router_registry_age_seconds", "Since the registry was read.", self._registry_age_s()
        )
        load = GaugeMetricFamily(
            "hpc_router_replica_requests_in_flight", "Requests in flight on a replica.", labels=("replica",)
        )
        standing = GaugeMetricFamily(
            "hpc_router_replicas", "Replicas of an expert by standing.", labels=("expert", "standing")
        )
        waiting = GaugeMetricFamily(
            "hpc_router_requests_waiting", "Requests that wait for a replica of an expert.", labels=("expert",)
        )
        for replica in self._table.all():
            load.add_metric((replica.name,), replica.in_flight)
        for expert in sorted(self._table.experts()):
            waiting.add_metric((expert,), self._table.waiting(expert))
            for kind in Standing:
                standing.add_metric((expert, kind), sum(r.standing is kind for r in self._table.of(expert)))
        yield from (load, standing, waiting)
