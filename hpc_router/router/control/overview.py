"""Makes the body of `GET /overview`, which the dashboard and `hpc-router top` show: the router's state, and its traffic
over the last minute. It contains no prompt and no secret.

Rates and latencies come from the difference between two samples of the router's counters. A sample is taken only when
an overview is requested.
"""

import json
import os
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

from hpc_router.config.schema import Deployment
from hpc_router.router.metrics import LATENCY_BOUNDS_S, TOKEN_BOUNDS_S, Metrics
from hpc_router.router.replicas.replica import RoutingState
from hpc_router.router.settings import LIVE, value_at
from hpc_router.state.forecast import SCALED_TO_ZERO
from hpc_router.state.gpu_hours import Usage
from hpc_router.state.stamped_file import StampedFile

WINDOW_S: Final = 60.0
"""Length of the time in seconds over which rates and latencies are measured."""
SAMPLE_S: Final = 1.0
"""Minimum interval between two samples, in seconds. Requests for the overview within it get the same body."""
MAX_EVENTS: Final = 40
"""Number of events that the overview lists, the newest first."""
_EVENT_BYTES: Final = 2**15
_EVENT_KEYS: Final = ("at", "kind", "replica", "expert", "reason", "by")
_MAX_TEXT: Final = 300

Queues = Mapping[str, Mapping[str, float | None]]
"""The waiting requests of an expert by name of the class: `waiting`, their number, and `oldest_s`, for how many seconds
the oldest has waited; None if that is unknown or none waits."""
Requests = Mapping[tuple[str, str, str], int]
"""Number of answered requests by expert, reason of the route, and status."""


@dataclass(frozen=True, slots=True)
class CounterSample:
    """The values of the router's counters at one time. `first_byte`, `queued`, `token_time`: the histograms of these
    times, by expert, as one count per bucket."""

    at: float
    requests: Requests
    broken: Mapping[str, int]
    first_byte: Mapping[str, Sequence[int]]
    queued: Mapping[str, Sequence[int]]
    token_time: Mapping[str, Sequence[int]]

    @classmethod
    def of(cls, counted: Metrics, at: float) -> "CounterSample":
        requests = {(labels[0], labels[1], labels[2]): count for labels, count in counted.requests.items()}
        broken = {labels[0]: count for labels, count in counted.broken.items()}
        histograms = (counted.first_byte.totals(), counted.queued.totals(), counted.token_time.totals())
        return cls(at, requests, broken, *histograms)


EMPTY: Final = CounterSample(0.0, {}, {}, {}, {}, {})


@dataclass(slots=True)
class Traffic:
    """Rates and latencies over the last `WINDOW_S` seconds, from samples of the counters."""

    _samples: deque[CounterSample] = field(default_factory=deque)

    def add(self, sample: CounterSample) -> None:
        """Adds a sample. First drops all earlier samples if the last one is more than `WINDOW_S` old, or if a counter
        has become smaller because a worker's counts were lost."""
        if self._samples:
            before = self._samples[-1]
            if sample.at - before.at > WINDOW_S or _shrank(before, sample):
                self._samples.clear()
        self._samples.append(sample)
        while len(self._samples) > 2 and sample.at - self._samples[1].at >= WINDOW_S:
            self._samples.popleft()

    @property
    def window_s(self) -> float | None:
        """Time in seconds between the first and the last sample; None with one sample, whose rates are unknown."""
        elapsed_s = self._samples[-1].at - self._samples[0].at
        return elapsed_s or None

    def of_expert(self, expert: str) -> dict[str, Any]:
        """Returns the expert's request rates per second and latencies in seconds; None for an unknown value."""
        first, last = self._ends()
        answered = failed = 0
        for key, count in last.requests.items():
            if key[0] == expert:
                more = count - first.requests.get(key, 0)
                answered += more
                failed += more if key[2] >= "500" else 0
        failed += last.broken.get(expert, 0) - first.broken.get(expert, 0)
        return {
            "requests_per_s": self._per_s(answered),
            "failed_per_s": self._per_s(failed),
            "first_byte_s": _quantiles(first.first_byte.get(expert), last.first_byte.get(expert)),
            "queue_s": _quantiles(first.queued.get(expert), last.queued.get(expert)),
            "token_s": _quantiles(first.token_time.get(expert), last.token_time.get(expert), TOKEN_BOUNDS_S),
        }

    def routes(self) -> list[dict[str, Any]]:
        """Returns the number of requests by expert and by the reason why it was chosen, the largest number first. They
        are counted within the window; with only one sample, since the start of the router."""
        first, last = self._ends()
        counts: dict[tuple[str, str], int] = {}
        for key, count in last.requests.items():
            if more := count - first.requests.get(key, 0):
                counts[key[:2]] = counts.get(key[:2], 0) + more
        ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        return [{"expert": expert, "reason": reason, "requests": count} for (expert, reason), count in ordered]

    def _ends(self) -> tuple[CounterSample, CounterSample]:
        return (self._samples[0] if len(self._samples) > 1 else EMPTY), self._samples[-1]

    def _per_s(self, count: int) -> float | None:
        return None if self.window_s is None else round(count / self.window_s, 3)


def _shrank(before: CounterSample, now: CounterSample) -> bool:
    return any(now.requests.get(key, 0) < count for key, count in before.requests.items())


def _quantiles(
    before: Sequence[int] | None, now: Sequence[int] | None, bounds: Sequence[float] = LATENCY_BOUNDS_S
) -> dict[str, float] | None:
    """Returns the median and the 99th percentile in seconds of the values that were added to a histogram; None if there
    were none. `before`, `now`: the counts of its buckets before and after; `bounds`: the bounds of the buckets."""
    if now is None:
        return None
    added = [b - a for a, b in zip(before or [0] * len(now), now, strict=True)]
    if not any(added):
        return None
    return {"p50": _quantile(added, 0.5, bounds), "p99": _quantile(added, 0.99, bounds)}


def _quantile(counts: Sequence[int], share: float, bounds: Sequence[float]) -> float:
    """Returns the quantile `share` (0 to 1) in seconds of a histogram. Values count as evenly spread within a bucket,
    as in Prometheus's `histogram_quantile`; those above the last bound count as the last bound."""
    ranks = list(accumulate(counts))
    wanted = share * ranks[-1]
    at = bisect_left(ranks, wanted)
    if at >= len(bounds):
        return float(bounds[-1])
    low = bounds[at - 1] if at else 0.0
    below = ranks[at - 1] if at else 0
    return round(low + (bounds[at] - low) * (wanted - below) / counts[at], 4)


@dataclass(frozen=True, slots=True)
class RunFiles:
    """What the overview shows of files in the run directory. `events`: the last events of the run, the newest first;
    `usage`: the experts' use of GPU time, None if none was counted yet."""

    events: Sequence[Mapping[str, Any]] = ()
    usage: Usage | None = None


def read_run_files(events_jsonl: Path, usage: StampedFile[Usage]) -> RunFiles:
    """Returns what the overview shows of `events_jsonl` and of `usage`, which is `gpu_hours.json`; a missing or damaged
    file counts as empty. Raises OSError if the file system fails."""
    return RunFiles(_last_events(events_jsonl), usage.read())


def _last_events(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _EVENT_BYTES))
            lines = file.read(_EVENT_BYTES).split(b"\n")
    except FileNotFoundError:
        return []
    events = []
    for line in reversed(lines[1 if size > _EVENT_BYTES else 0 :]):  # the first line may have lost its start
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            events.append({key: _short(event.get(key)) for key in _EVENT_KEYS})
    return events[:MAX_EVENTS]


def _short(value: Any) -> Any:
    return value if value is None or isinstance(value, int | float) else str(value)[:_MAX_TEXT]


def overview(
    status: Mapping[str, Any],
    traffic: Traffic,
    files: RunFiles,
    deployment: Deployment,
    *,
    forecast: Mapping[str, Any],
    queues: Mapping[str, Queues],
    at: float,
) -> dict[str, Any]:
    """Returns the body of `GET /overview`. `status`: the body of `GET /status`; `forecast`: the content of
    `forecast.json`; `queues`: the waiting requests of each expert in `status`; `at`: Unix seconds."""
    coming = forecast.get("experts")
    expected = coming if isinstance(coming, dict) else {}
    used = {} if files.usage is None else files.usage.experts
    experts = [
        {
            "expert": name,
            **entry,
            **traffic.of_expert(name),
            "queues": queues[name],
            "expected": expected.get(name),
            "usage": used[name].to_json(at) if name in used else None,
        }
        for name, entry in status["experts"].items()
    ]
    handovers = _listed(forecast.get("handovers"))
    return {
        "at": round(at, 3),
        "window_s": None if traffic.window_s is None else round(traffic.window_s, 1),
        "attention": [*_router_problems(status["router"]), *_expert_problems(experts), *_handover_problems(handovers)],
        "router": status["router"],
        "policy": status["policy"],
        "experts": experts,
        "routes": traffic.routes(),
        "starting": _listed(forecast.get("starting")),
        "handovers": handovers,
        "events": list(files.events),
        "settings": dict(_settings(deployment)),
    }


def _router_problems(router: Mapping[str, Any]) -> Iterable[str]:
    if router["draining"]:
        yield "the router is draining"
    if router["settings_trouble"]:
        yield f"a change was not applied: {router['settings_trouble']}"
    if router["write_trouble"]:
        yield f"the run directory: {router['write_trouble']}"
    if router.get("share_trouble"):
        yield f"the router is not shared: {router['share_trouble']}"
    for failure in router["task_failures"]:
        yield f"the background task '{failure['task']}' failed: {failure['last_error'] or 'unknown error'}"


def _expert_problems(experts: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    seen = set()
    for one in experts:
        coming = one["expected"]
        if not one["ready"] and not (isinstance(coming, dict) and coming.get("reason") == SCALED_TO_ZERO):
            named = [coming.get("replica"), coming.get("reason") or "starting"] if isinstance(coming, dict) else []
            waits = f": {', '.join(filter(None, named))}" if named else ""
            yield f"{one['expert']} has no ready replica{waits}"
        if one["waiting"]:
            wait = "" if one["wait_s"] is None else f"; a new one waits for about {one['wait_s']:.1f} s"
            yield f"{one['expert']}: {one['waiting']} requests wait for a replica{_by_class(one['queues'])}{wait}"
        if one["failed_per_s"]:
            yield f"{one['expert']}: {one['failed_per_s']:.2g} failed requests per second"
        for replica in one["replicas"]:  # an engine with adapters serves several experts
            if replica["replica"] not in seen:
                seen.add(replica["replica"])
                yield from _replica_problems(replica)


def _by_class(queues: Queues) -> str:
    """Returns the number and the oldest wait of each class that waits: ` (3 interactive, the oldest for 1.2 s)`."""
    classes = [
        f"{queue['waiting']} {name}"
        + ("" if (oldest_s := queue["oldest_s"]) is None else f", the oldest for {oldest_s:.1f} s")
        for name, queue in queues.items()
        if queue["waiting"]
    ]
    return f" ({'; '.join(classes)})" if classes else ""


def _replica_problems(replica: Mapping[str, Any]) -> Iterable[str]:
    if replica["state"] == RoutingState.EJECTED:
        yield f"{replica['replica']} is ejected: {replica['trouble'] or 'unknown cause'}"
    if replica["sick"]:
        yield f"{replica['replica']} {replica['sick']}"
    if replica["silent"]:
        yield f"{replica['replica']} does not renew its record"


def _handover_problems(handovers: Sequence[Any]) -> Iterable[str]:
    for planned in handovers:
        if isinstance(planned, dict) and planned.get("late_s"):
            reason = f": {planned['reason']}" if planned.get("reason") else ""
            yield f"the successor of {planned.get('replica')} will be {planned['late_s']:.0f} s late{reason}"


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _settings(deployment: Deployment) -> Iterable[tuple[str, Any]]:
    """Yields the keys that `hpc-router set` can change, with their present values."""
    for key in LIVE:
        yield key, value_at(deployment, key)
