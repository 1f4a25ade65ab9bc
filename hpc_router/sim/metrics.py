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

from hpc_router.sim.kv_cache import BlockPool


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
        pool: BlockPool,
        steps: Callable[[], tuple[float, float]] | None = None,
    ) -> None:
        self._counts, self._model, self._pool, self._steps = counts, model, pool, steps
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def render(self) -> bytes:
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        counts = self._counts
        yield self._gauge("vllm:num_requests_running", "Requests being computed.", value=counts.running)
        yield self._gauge("vllm:num_requests_waiting", "Requests waiting for a place.", value=counts.waiting)
        pool = self._pool
        yield self._gauge("vllm:kv_cache_usage_perc", "Blocks in use, 1 is full.", value=pool.used / pool.total)
        yield self._cache_config()
        yield self._counter("vllm:prefix_cache_queries", "Tokens looked up in the prefix cache.", value=pool.queries)
        yield self._counter("vllm:prefix_cache_hits", "Tokens found in the prefix cache.", value=pool.hits)
        yield self._counter("vllm:prompt_tokens_cached", "Prompt tokens that were not computed.", value=pool.hits)
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

    def _cache_config(self) -> Metric:
        pool = self._pool
        labels = {
            "block_size": str(pool.block_size),
            "enable_prefix_caching": str(pool.caching),
            "engine": "0",
            "num_gpu_blocks": str(pool.total + 1),
        }
        family = GaugeMetricFamily("vllm:cache_config_info", "The KV cache.", labels=list(labels))
        family.add_metric(list(labels.values()), 1)
        return family

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
