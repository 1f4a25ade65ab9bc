"""Compares the measured figures with the limits that this router must keep."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hpc_router.bench.relay_cost.options import RelayCostOptions
from hpc_router.bench.relay_cost.rounds import RelayRounds
from hpc_router.bench.relay_cost.statistics import RoundSpread, across, ratio, slope_per_million, spread

SAME_COST = 1.25
"""Maximum ratio of the cost of classifying a long prompt to that of a short one. Up to this ratio, both costs count as
equal."""


@dataclass(frozen=True, slots=True)
class Check:
    """A limit of one figure: the median of `found`, the figure's spread, must be at most `limit`, or less than `limit`
    if `strict`. `met`: whether it is; None if the figure was not measured."""

    what: str
    limit: float
    unit: str
    found: RoundSpread | None
    strict: bool = False

    @property
    def met(self) -> bool | None:
        if self.found is None:
            return None
        return self.found.median < self.limit if self.strict else self.found.median <= self.limit


def checks(found: Mapping[str, RelayRounds], options: RelayCostOptions) -> list[Check]:
    router, agent = found.get("router"), found.get("router+agent")

    def between(above: str, name: str, below: str, other: str | None = None) -> RoundSpread | None:
        return across([(found.get(above), name), (found.get(below), other or name)], ratio)

    def extra(size: str) -> RoundSpread | None:
        return across([(router, f"short_{size}_auto_us"), (router, f"short_{size}_us")], operator.sub)

    def own(name: str) -> RoundSpread | None:
        return None if router is None else spread(router, name)

    n, rate = options.streams, options.rate
    return [
        *(
            Check(f"CPU per short request, against {name}", 1.0, "x", between("router", "short_200B_us", name), True)
            for name in ("vllm-router", "sglang-router")
        ),
        Check("CPU of classifying a prompt of 200 B", 60.0, "us", extra("200B")),
        Check("CPU of classifying a prompt of 2 KB", 200.0, "us", extra("2KB")),
        Check(
            "CPU of classifying a prompt of 200 KB, against one of 2 KB",
            SAME_COST,
            "x",
            across(
                [(router, f"short_{size}{kind}_us") for size in ("200KB", "2KB") for kind in ("_auto", "")],
                lambda long_auto, long, auto, named: ratio(long_auto - long, auto - named),
            ),
        ),
        Check(f"CPU per event at {n} x {rate:g}/s, against nginx", 1.2, "x", between("router", "stream_us", "nginx")),
        Check(f"hop p99 at {n} x {rate:g}/s", 10.0, "ms", own("stream_hop_ms_p99")),
        Check(f"hop p99 at {max(1, n // 2)} x {rate:g}/s", 5.0, "ms", own("stream_half_hop_ms_p99")),
        Check("requests and streams that failed", 0.0, "", _failed(router)),
        Check(f"private memory with {n} open streams", 100.0, "MiB", own("stream_private_mb")),
        Check("private memory, growth per million requests", 1.0, "MiB", _growth(router)),
        Check("CPU of a user's token, limits and class, per short request", 8.0, "us",
              across([(found.get("router-user"), "short_200B_us"), (router, "short_200B_us")], operator.sub)),
        Check("CPU of a user's token, limits and class, per event", 1.02, "x",
              between("router-user", "stream_us", "router")),
        Check("CPU per short request with two workers on one core, against one", 1.1, "x",
              between("router-2-workers", "short_200B_us", "router")),
        Check("CPU per event with two workers on one core, against one", 1.1, "x",
              between("router-2-workers", "stream_us", "router")),
        Check("CPU per short request through the agent, against one hop", 2.0, "x",
              between("router+agent", "short_200B_us", "router")),
        Check("CPU per event through the agent, against one hop", 2.0, "x",
              between("router+agent", "stream_lower_us", "router")),
        Check("requests and streams through the agent that failed", 0.0, "", _failed(agent)),
    ]  # fmt: skip


def to_json(all_of: Sequence[Check]) -> list[dict[str, object]]:
    return [
        {
            "what": check.what,
            "limit": check.limit,
            "strict": check.strict,
            "unit": check.unit,
            "median": None if check.found is None else check.found.median,
            "min": None if check.found is None else check.found.low,
            "max": None if check.found is None else check.found.high,
            "met": check.met,
        }
        for check in all_of
    ]


def _failed(measured: RelayRounds | None) -> RoundSpread | None:
    if measured is None or not (measured.rounds or measured.broken):
        return None
    return RoundSpread.of([float(measured.failed)])


def _growth(measured: RelayRounds | None) -> RoundSpread | None:
    if measured is None or not measured.soak:
        return None
    return RoundSpread.of([slope_per_million(measured.soak)])
