"""The engine's counters and its `/metrics`. Metrics have vLLM's names, or `hpc_router_sim_*` where vLLM has no such
metric.

The counters are plain numbers, so a token costs one addition. Prometheus reads them through a collector when it
scrapes. Each engine has its own registry, so several engines can run in one process.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


class RequestPhase(StrEnum):
    """The phase in which a request was when it was aborted."""

    QUEUED = "queued"
    BEFORE_FIRST_TOKEN = "before_first_token"
    GENERATING = "generating"  # a response in one body, of which nothing was sent yet
    STREAMING = "streaming"


class Outcome(StrEnum):
    """The outcome of a request, with the values of vLLM's `finished_reason`."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(slots=True)
class RequestCounts:
    """The counters of one engine."""

    running: int = 0
    waiting: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    aborted: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)


class EngineMetrics(Collector):
    """The collector that formats the counters of one engine."""

    def __init__(
        self,
        counts: RequestCounts,
        *,
        model: str,
        capacity: int | None,
        steps: Callable[[], tuple[float, float]] | None = None,
    ) -> None:
        self._counts, self._model, self._capacity, self._steps = counts, model, capacity, steps
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def render(self) -> bytes:
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        counts = self._counts
        yield self._gauge("vllm:num_requests_running", "Requests being computed.", value=counts.running)
        yield self._gauge("vllm:num_requests_waiting", "Requests waiting for a place.", value=counts.waiting)
        share = counts.running / self._capacity if self._capacity else 0.0
        yield self._gauge("vllm:kv_cache_usage_perc", "Simulated: running requests / capacity; 1 is full.", value=share)
        yield self._counter("vllm:prompt_tokens", "Prompt tokens processed.", value=counts.prompt_tokens)
        yield self._counter("vllm:generation_tokens", "Tokens generated.", value=counts.generation_tokens)
        yield self._by_label(
            "vllm:request_success", "Requests ended.", label="finished_reason", names=Outcome, values=counts.finished
        )
        yield self._by_label(
            "hpc_router_sim_aborted_requests",
            "Clients that left.",
            label="phase",
            names=RequestPhase,
            values=counts.aborted,
        )
        if self._steps is not None:
            step_s, lost_s = self._steps()
            yield self._counter(
                "hpc_router_sim_step_seconds", "Predicted duration of all steps in seconds.", value=step_s
            )
            yield self._counter(
                "hpc_router_sim_lost_seconds", "Seconds of delay that later steps did not make up.", value=lost_s
            )
        yield self._by_label(
            "hpc_router_sim_faults", "Faults injected.", label="kind", names=sorted(counts.faults), values=counts.faults
        )

    def _gauge(self, name: str, text: str, *, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=["engine", "model_name"])
        family.add_metric(["0", self._model], value)
        return family

    def _counter(self, name: str, text: str, *, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=["engine", "model_name"])
        family.add_metric(["0", self._model], value)
        return family

    def _by_label(self, name: str, text: str, *, label: str, names: Iterable[str], values: Mapping[str, int]) -> Metric:
        family = CounterMetricFamily(name, text, labels=["engine", "model_name", label])
        for key in names:
            family.add_metric(["0", self._model, key], values.get(key, 0))
        return family
