"""The load of an engine, read from the text of its metrics. No I/O."""

import contextlib
from dataclasses import dataclass
from typing import Final, Self

_RUNNING: Final = (b"vllm:num_requests_running",)
_WAITING: Final = (b"vllm:num_requests_waiting",)
_KV_USE: Final = (b"vllm:kv_cache_usage_perc", b"vllm:gpu_cache_usage_perc")  # the second: vLLM before 0.10
_HITS: Final = (b"vllm:prefix_cache_hits_total", b"vllm:gpu_prefix_cache_hits_total")
_QUERIES: Final = (b"vllm:prefix_cache_queries_total", b"vllm:gpu_prefix_cache_queries_total")

_GENERATED: Final = (b"vllm:generation_tokens_total",)


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """The load of one engine when its metrics were read last, the sum over its data-parallel parts. `running`,
    `waiting`: number of requests that the engine computes, and that wait in it. `kv_use`: share of the KV cache in use,
    0 to 1, the mean of the parts. `prefix_queries`: number of prompt tokens since the engine's start; `prefix_hits`:
    how many of them were in its prefix cache; `generated_tokens`: number of generated tokens since the engine's start.
    None: not in the metrics."""

    running: float | None = None
    waiting: float | None = None
    kv_use: float | None = None
    prefix_queries: float | None = None
    prefix_hits: float | None = None
    generated_tokens: float | None = None

    @classmethod
    def read(cls, text: bytes) -> Self | None:
        """Returns the load in `text`, an engine's metrics in Prometheus' format; None if it is not in them."""
        kv = _values(text, _KV_USE)
        load = cls(
            running=_sum(text, _RUNNING),
            waiting=_sum(text, _WAITING),
            kv_use=sum(kv) / len(kv) if kv else None,
            prefix_queries=_sum(text, _QUERIES),
            prefix_hits=_sum(text, _HITS),
            generated_tokens=_sum(text, _GENERATED),
        )
        return None if load == cls() else load


def _sum(text: bytes, names: tuple[bytes, ...]) -> float | None:
    values = _values(text, names)
    return sum(values) if values else None


def _values(text: bytes, names: tuple[bytes, ...]) -> list[float]:
    """Returns the values of all series of one metric: the first of `names` that occurs in `text`, since its name
    differs between versions of vLLM."""
    for name in names:
        values = []
        at = text.find(b"\n" + name) if not text.startswith(name) else 0
        while at >= 0:
            end = text.find(b"\n", at + 1)
            line = text[at : len(text) if end < 0 else end].strip()
            if line[len(name) : len(name) + 1] in (b"{", b" "):  # else the name of another metric
                with contextlib.suppress(ValueError):
                    values.append(float(line.rpartition(b" ")[2]))
            at = text.find(b"\n" + name, end) if end >= 0 else -1
        if values:
            return values
    return []
