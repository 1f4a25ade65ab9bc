"""The router's metrics, under the names of docs/metrics.md.

Each worker counts its own requests. When `/metrics` is requested, the control process adds up the counters and
histograms of all workers and reads the gauges from its own state.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from operator import add
from typing import Any, Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from hpc_router.router.replicas.fair_order import CLASSES
from hpc_router.router.replicas.replica import RoutingState
from hpc_router.router.replicas.table import ReplicaTable
from hpc_router.state.gpu_hours import GpuState, Usage

LATENCY_BOUNDS_S: Final = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 14400, 86400, 259200,
)  # fmt: skip
"""Bucket bounds in seconds. The last one exceeds the largest sum of `router.queue_timeout_s` and
`router.first_byte_timeout_s`."""
TOKEN_BOUNDS_S: Final = (
    0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 10,
)  # fmt: skip
"""Bucket bounds in seconds of the time between two tokens."""
KEEP_S: Final = 600.0
"""Time in seconds for which the series of a replica that has left are kept."""
_DECISION_S: Final = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 5e-3, 2.5e-2, 0.1, 1)


class CounterCollector(Collector):
    """A Prometheus counter without two costs of the library's own: a lock and a look-up by label values at each
    increment."""

    def __init__(self, name: str, text: str, labels: Sequence[str]) -> None:
        self._about = name, text, labels
        self._counts = defaultdict[tuple[object, ...], int](int)

    def labels(self) -> Collection[tuple[object, ...]]:
        return self._counts.keys()

    def drop(self, first: str) -> None:
        """Removes all series whose first label has the value `first`."""
        for labels in [labels for labels in self._counts if labels[0] == first]:
            del self._counts[labels]

    def add(self, *labels: object) -> None:
        self._counts[labels] += 1

    def add_many(self, count: int, *labels: object) -> None:
        self._counts[labels] += count

    def items(self) -> Iterator[tuple[tuple[str, ...], int]]:
        for labels, count in self._counts.items():
            yield tuple(map(str, labels)), count

    def dump(self) -> Any:
        return [[labels, count] for labels, count in self._counts.items()]

    def absorb(self, dumped: Any) -> None:
        for labels, count in dumped:
            self._counts[tuple(labels)] += count

    def collect(self) -> Iterator[Metric]:
        name, text, labels = self._about
        family = CounterMetricFamily(name, text, labels=labels)
        for values, count in self._counts.items():
            family.add_metric([str(value) for value in values], count)
        yield family


class HistogramCollector(Collector):
    """A Prometheus histogram without the locks of the library's own."""

    def __init__(self, name: str, text: str, labels: Sequence[str], *, bounds: Sequence[float]) -> None:
        """Creates a histogram. `bounds`: upper bounds of the buckets. `add` may get more label values than `labels` has
        names; the output for Prometheus is the sum over the additional ones."""
        self._about = name, text, labels
        self._bounds = bounds
        self._series: dict[tuple[str, ...], tuple[list[int], list[float]]] = {}  # counts, and a list with only the sum

    def add(self, value: float, *labels: str) -> None:
        counts, added = self._series.get(labels) or self._new_series(labels)
        counts[bisect_left(self._bounds, value)] += 1
        added[0] += value

    def add_many(self, values: Sequence[float], *labels: str) -> None:
        counts, added = self._series.get(labels) or self._new_series(labels)
        bounds = self._bounds
        for value in values:
            counts[bisect_left(bounds, value)] += 1
        added[0] += sum(values)

    def _new_series(self, labels: tuple[str, ...]) -> tuple[list[int], list[float]]:
        return self._series.setdefault(labels, ([0] * (len(self._bounds) + 1), [0.0]))

    def dump(self) -> Any:
        return [[labels, counts, added] for labels, (counts, (added,)) in self._series.items()]

    def absorb(self, dumped: Any) -> None:
        for labels, counts, added in dumped:
            key = tuple(labels)
            if (series := self._series.get(key)) is None:
                self._series[key] = list(counts), [added]
            else:
                series[0][:] = map(add, series[0], counts)
                series[1][0] += added

    def collect(self) -> Iterator[Metric]:
        name, text, labels = self._about
        family = HistogramMetricFamily(name, text, labels=labels)
        bounds = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        by_label: dict[tuple[str, ...], list[int]] = {}
        sums: dict[tuple[str, ...], float] = {}
        for values, (counts, (added,)) in self._series.items():
            key = values[: len(labels)]
            before = by_label.get(key)
            by_label[key] = counts if before is None else list(map(add, before, counts))
            sums[key] = sums.get(key, 0.0) + added
        for key, counts in by_label.items():
            family.add_metric(key, list(zip(bounds, accumulate(counts), strict=True)), sums[key])
        yield family

    def totals(self) -> dict[str, list[int]]:
        """Returns the counts of the buckets by the value of the first label, summed over the other labels."""
        totals: dict[str, list[int]] = {}
        for labels, (counts, _) in self._series.items():
            before = totals.get(labels[0])
            totals[labels[0]] = list(counts) if before is None else list(map(add, before, counts))
        return totals

    def fold(self, last: str) -> None:
        """Takes the series whose last label has the value `last`, and adds each to the one whose last label is empty
        and whose other labels are the same."""
        for labels in [labels for labels in self._series if labels[-1] == last]:
            counts, (added,) = self._series.pop(labels)
            self.absorb([[(*labels[:-1], ""), counts, added]])

    def last_labels(self) -> set[str]:
        return {labels[-1] for labels in self._series} - {""}


class Metrics:
    """The counters and histograms of one worker, or the sum over all workers. `settle` is called before they are read:
    it counts what was put off."""

    def __init__(self) -> None:
        self.settle: Callable[[], None] = lambda: None
        self.requests = CounterCollector(
            "hpc_router_requests", "Number of answered requests.", ("expert", "reason", "status")
        )
        self.failovers = CounterCollector(
            "hpc_router_failovers", "Failed attempts that were retried on another replica.", ("replica", "cause")
        )
        self.retries_refused = CounterCollector(
            "hpc_router_retries_refused", "Failed attempts that the retry budget did not allow to retry.", ()
        )
        self.broken = CounterCollector(
            "hpc_router_broken_responses", "Responses that failed after their first byte.", ("expert",)
        )
        self.cancelled = CounterCollector(
            "hpc_router_cancelled_requests", "Requests whose client disconnected.", ("phase",)
        )
        self.first_byte = HistogramCollector(
            "hpc_router_first_byte_seconds",
            "Time from the arrival of a request to the first byte of its response.",
            ("expert",),
            bounds=LATENCY_BOUNDS_S,
        )
        self.before_attempt = HistogramCollector(
            "hpc_router_before_attempt_seconds",
            "Time from the arrival of a request until it is sent to the replica that answers; not exposed.",
            (),
            bounds=(),
        )
        self.queued = HistogramCollector(
            "hpc_router_queue_seconds", "What requests waited that got a replica.", ("expert",), bounds=LATENCY_BOUNDS_S
        )
        self.cold_starts = CounterCollector(
            "hpc_router_cold_starts", "Requests whose expert had no ready replica.", ("expert", "outcome")
        )
        self.decision = HistogramCollector(
            "hpc_router_decision_seconds", "Time to choose an expert for a request.", (), bounds=_DECISION_S
        )
        self.decided = CounterCollector(
            "hpc_router_decisions", "Decisions of a classifier.", ("artefact", "cluster", "reason")
        )
        self.shadowed = CounterCollector(
            "hpc_router_shadow_decisions",
            "Decisions, by whether the shadow policy agrees.",
            ("artefact", "shadow", "agreed"),
        )
        self.task_failures = CounterCollector(
            "hpc_router_background_task_failures", "Background tasks that failed and were started again.", ("task",)
        )
        self.limit_refusals = CounterCollector(
            "hpc_router_limit_refusals", "Requests refused by a limit of their token.", ("limit",)
        )
        self.shed = CounterCollector(
            "hpc_router_requests_shed", "Requests of the lowest class that were refused under overload.", ("limit",)
        )
        self.tokens = CounterCollector(
            "hpc_router_tokens",
            "Generated tokens by the source of their number, and prompt tokens.",
            ("expert", "kind"),
        )
        self.token_time = HistogramCollector(
            "hpc_router_time_per_output_token_seconds",
            "Mean time between two tokens of a stream.",
            ("expert",),
            bounds=TOKEN_BOUNDS_S,
        )
        self.records_lost = CounterCollector(
            "hpc_router_records_lost", "Records of requests that could not be written.", ()
        )
        self._gone: dict[str, float] = {}  # replica that has left -> time at which that was noticed
        self._counted: dict[str, CounterCollector | HistogramCollector] = {
            name: each for name, each in vars(self).items() if isinstance(each, CounterCollector | HistogramCollector)
        }

    def forget(self, *, present: Collection[str], now: float) -> None:
        """Drops the series of replicas that have not been in `present` for more than `KEEP_S`. `now`: seconds of any
        clock, the same clock in all calls."""
        for name in {str(labels[0]) for labels in self.failovers.labels()} | self.first_byte.last_labels():
            if name in present:
                self._gone.pop(name, None)
            elif now - self._gone.setdefault(name, now) > KEEP_S:
                del self._gone[name]
                self.failovers.drop(name)
                self.first_byte.fold(name)
                self.before_attempt.fold(name)

    def dump(self) -> dict[str, Any]:
        """Returns all counts as JSON values."""
        self.settle()
        return {name: each.dump() for name, each in self._counted.items()}

    def absorb(self, dumped: Mapping[str, Any]) -> None:
        """Adds the counts of another process, as returned by its `dump`."""
        for name, each in self._counted.items():
            each.absorb(dumped.get(name, ()))

    def exposition(self, gauges: Iterable[Metric]) -> bytes:
        """Returns the counts and `gauges` in the text format of Prometheus."""
        counted = (
            family for each in self._counted.values() if each is not self.before_attempt for family in each.collect()
        )
        return text_of((*counted, *gauges))


def departures(dumped: Mapping[str, Any]) -> dict[str, int]:
    """Returns how many requests have left each expert's queue for a replica, from the result of `Metrics.dump`."""
    return {labels[0]: sum(counts) for labels, counts, _ in dumped.get("queued", ())}


def text_of(families: Iterable[Metric]) -> bytes:
    """Returns metrics in Prometheus' text format 0.0.4, with the same result as the Prometheus library. The library
    checks every name and label again for each sample, which would take most of the time of a scrape."""
    lines = []
    for family in families:
        name = f"{family.name}_total" if family.type == "counter" else family.name
        about = family.documentation.replace("\\", r"\\").replace("\n", r"\n")
        lines.append(f"# HELP {name} {about}\n# TYPE {name} {family.type}\n")
        for sample in family.samples:
            lines.append(f"{sample.name}{_label_text(tuple(sample.labels.items()))} {_number(sample.value)}\n")
    return "".join(lines).encode()


@lru_cache(maxsize=2**13)
def _label_text(labels: tuple[tuple[str, str], ...]) -> str:
    """Returns the labels of a sample as text. Most series are the same at each scrape, so the texts are cached."""
    text = ",".join([f'{label}="{_escaped(value)}"' for label, value in sorted(labels)])
    return f"{{{text}}}" if text else ""


def _number(value: float) -> str:
    """Returns the number as `floatToGoString` does, which formats only numbers from a million on differently."""
    if -1e6 < value < 1e6:
        return repr(float(value))
    return str(floatToGoString(value))  # type: ignore[no-untyped-call]


def _escaped(value: str) -> str:
    if "\\" in value or "\n" in value or '"' in value:
        return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
    return value


def gauges(
    table: ReplicaTable, *, in_flight: int, max_in_flight: int, registry_age_s: float, workers: int
) -> Iterator[Metric]:
    gauge = GaugeMetricFamily
    yield gauge("hpc_router_requests_in_flight", "Requests being served.", in_flight)
    yield gauge(
        "hpc_router_requests_bound", "Maximum number of requests that are served at the same time.", max_in_flight
    )
    yield gauge("hpc_router_registry_age_seconds", "Time since the registry was last read.", registry_age_s)
    yield gauge("hpc_router_workers", "Number of workers that serve.", workers)
    text = "Requests in flight on a replica."
    load = gauge("hpc_router_replica_requests_in_flight", text, labels=("replica",))
    text = "Maximum number of requests in flight on a replica."
    capacity = gauge("hpc_router_replica_capacity", text, labels=("replica",))
    text = "Requests in flight on all replicas of an expert."
    expert_load = gauge("hpc_router_expert_requests_in_flight", text, labels=("expert",))
    text = "Maximum number of requests in flight on all replicas of an expert."
    expert_bound = gauge("hpc_router_expert_requests_bound", text, labels=("expert",))
    text = "Maximum number of requests that wait for a replica of an expert."
    waiting_bound = gauge("hpc_router_requests_waiting_bound", text, labels=("expert",))
    states = gauge("hpc_router_replicas", "Replicas of an expert by state.", labels=("expert", "standing"))
    text = "Requests that wait for a replica of an expert."
    waiting = gauge("hpc_router_requests_waiting", text, labels=("expert",))
    text = "Requests of a class that wait for a replica of an expert."
    class_waiting = gauge("hpc_router_class_requests_waiting", text, labels=("expert", "class"))
    table.refresh_peer_counts(table.all())
    for replica in table.all():
        load.add_metric((replica.name,), replica.load)
        capacity.add_metric((replica.name,), replica.capacity)
    for expert in sorted(table.experts()):
        waiting.add_metric((expert,), table.waiting(expert))
        for of in CLASSES:
            class_waiting.add_metric((expert, of.label), table.class_waiting(expert, of))
        waiting_bound.add_metric((expert,), table.bounds.waiting)
        expert_load.add_metric((expert,), table.load(expert))
        if expert in table.bounds.in_flight:
            expert_bound.add_metric((expert,), table.bounds.in_flight[expert])
        for state in RoutingState:
            states.add_metric((expert, state), sum(r.state is state for r in table.of(expert)))
    yield from (load, capacity, expert_load, expert_bound, states, waiting, waiting_bound, class_waiting)


def usage_metrics(usage: Usage | None) -> Iterator[Metric]:
    """Yields the metrics of the experts' GPU time, as counted by the control loop; none if `usage` is None."""
    gpu_s = CounterMetricFamily(
        "hpc_router_gpu_seconds", "GPU time of the jobs of an expert.", labels=("expert", "state")
    )
    last = GaugeMetricFamily(
        "hpc_router_last_request_timestamp_seconds", "Time of the last request for an expert.", labels=("expert",)
    )
    for name, used in sorted(usage.experts.items() if usage is not None else ()):
        for state in GpuState:
            gpu_s.add_metric((name, state), used.gpu_s.get(state, 0.0))
        if used.last_request_at is not None:
            last.add_metric((name,), used.last_request_at)
    yield from (gpu_s, last)
