"""Formats the results of a soak as JSON, as Markdown and as a plot."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from hpc_router.bench.load.native.records import Error, Table
from hpc_router.bench.plot import Panel, svg
from hpc_router.bench.soak.options import FaultTarget, SoakOptions
from hpc_router.bench.soak.verdict import NS, FailedRequest, GrowthCheck, InjectedFault, Sample

SCHEMA: Final = 1


def jain(counts: Sequence[int]) -> float:
    """Returns Jain's fairness index of n counts: 1 if all are equal, 1/n if all but one are zero."""
    return sum(counts) ** 2 / (len(counts) * sum(count * count for count in counts))


@dataclass(frozen=True, slots=True)
class LoadSummary:
    """The requests of one load. `labels`: names of the replicas; a request's `label` is an index into them, from 1."""

    name: str
    requests: Table
    failures: Sequence[FailedRequest]
    begun_ns: int
    labels: Sequence[str] = ()

    @property
    def answered(self) -> int:
        return len(self._answered)

    @property
    def served(self) -> dict[str, Counter[str]]:
        """Returns for each expert the number of successful requests per slot, over all generations of the slot."""
        found: dict[str, Counter[str]] = {}
        for label, count in zip(*np.unique(self._answered["label"], return_counts=True), strict=True):
            if 0 < label <= len(self.labels):
                place = self.labels[label - 1].rpartition(".")[0]
                found.setdefault(place.rpartition("-")[0], Counter())[place] += int(count)
        return found

    @property
    def moved_share(self) -> float:
        """Returns the share of follow-up requests that left their conversation's usual replica, the one that answered
        most of the conversation's requests."""
        pairs, counts = np.unique(self._answered[["prompt", "label"]], return_counts=True)
        most: dict[int, int] = {}
        total: dict[int, int] = {}
        for pair, count in zip(pairs, counts, strict=True):
            prompt = int(pair["prompt"])
            most[prompt] = max(most.get(prompt, 0), int(count))
            total[prompt] = total.get(prompt, 0) + int(count)
        later = sum(count - 1 for count in total.values())
        return round(sum(total[prompt] - most[prompt] for prompt in total) / later, 4) if later else 0.0

    @property
    def _answered(self) -> Table:
        answered: Table = self.requests[self.requests["error"] == Error.NONE]
        return answered

    def to_json(self) -> dict[str, Any]:
        done = self._answered
        first = (done["first_byte"] - done["due"]) / 1e6
        shares = {f"first_byte_ms_p{p:g}": round(float(np.percentile(first, p)), 2) for p in (50, 90, 99, 99.9)}
        return {
            "requests": len(self.requests),
            "answered": self.answered,
            "events": int(self.requests["events"].sum()),
            "failed": dict(Counter(one.cause for one in self.failures)),
            "fairness": {expert: round(jain(list(by.values())), 4) for expert, by in self.served.items()},
            "moved_share": self.moved_share,
            **(shares if len(done) else {}),
        }


@dataclass(frozen=True, slots=True)
class SoakResults:
    """The results of a soak. `complaints`: reasons why it failed, empty if it passed. `idle_fds`: number of open
    descriptors before and after the load. `origin`: versions, hardware, git state, command and time."""

    options: SoakOptions
    parts: Sequence[LoadSummary]
    faults: Sequence[InjectedFault]
    samples: Sequence[Sample]
    growth: Sequence[GrowthCheck]
    gauges: Mapping[str, float] | None
    idle_fds: tuple[int, int] | None
    begun_ns: int
    complaints: Sequence[str]
    origin: Mapping[str, Any]

    @property
    def failed(self) -> bool:
        return bool(self.complaints)

    def seconds_of(self, fault: InjectedFault) -> float:
        """Returns the time of a fault in seconds from the start of the load."""
        return (fault.at_ns - self.begun_ns) / NS


def to_json(results: SoakResults) -> dict[str, Any]:
    options = results.options
    return {
        "schema": SCHEMA,
        "passed": not results.failed,
        "complaints": list(results.complaints),
        "options": {name: getattr(options, name) for name in ("seconds", "rate", "streams", "workers", "seed")},
        "loads": {part.name: part.to_json() for part in results.parts},
        "failures": [asdict(one) for part in results.parts for one in part.failures],
        "struck": [
            {"target": one.target.value, "name": one.name, "at_s": round(results.seconds_of(one), 3)}
            for one in results.faults
        ],
        "gauges_at_the_end": results.gauges,
        "descriptors_idle": None if results.idle_fds is None else dict(zip(("before", "after"), results.idle_fds)),  # noqa: B905
        "flat": [asdict(one) for one in results.growth],
        "samples": [asdict(one) for one in results.samples],
        "provenance": dict(results.origin),
    }


def markdown(results: SoakResults, *, plot: str) -> str:
    """Formats the results as Markdown. `plot`: file name of the plot."""
    options, counted = results.options, Counter(one.target for one in results.faults)
    killed = ", ".join(f"{counted[target]} x {target}" for target in FaultTarget if counted[target]) or "none"
    ready = [one.ready for one in results.samples if one.ready is not None]
    lines = [
        f"# Soak: {'passed' if not results.failed else 'FAILED'}",
        "",
        f"`{results.origin['command']}` at {results.origin['at']}, {results.origin['hardware']['cpus']} x "
        f"{results.origin['hardware']['cpu']}; simulated engines.",
        "",
        f"{options.seconds:g} s of {options.rate:g} short requests per second and {options.streams} streams through "
        f"{options.workers} workers; killed: {killed}.",
        "",
        "| load | requests | answered | failed | first byte p50 / p99 / p99.9 ms |",
        "|---|---|---|---|---|",
    ]
    for part in results.parts:
        summary = part.to_json()
        latency = " / ".join(f"{summary.get(f'first_byte_ms_p{p}', 0):g}" for p in ("50", "99", "99.9"))
        lines.append(
            f"| {part.name} | {summary['requests']} | {summary['answered']} | {len(part.failures)} | {latency} |"
        )
    causes = Counter((one.cause, one.allowed is not None) for part in results.parts for one in part.failures)
    if causes:
        lines += ["", "| failures | number | allowed |", "|---|---|---|"]
        lines += [
            f"| {cause} | {n} | {'yes' if allowed else '**no**'} |" for (cause, allowed), n in sorted(causes.items())
        ]
    lines += ["", "| growth | early | late | at most |", "|---|---|---|---|"]
    lines += [f"| {one.what} | {one.early:g} | {one.late:g} | {one.most:g} |" for one in results.growth]
    if ready:
        lines += ["", f"Replicas ready: {min(ready)} to {max(ready)}."]
    if results.complaints:
        lines += ["", "## Why it failed", "", *(f"- {one}" for one in results.complaints[:50])]
    return "\n".join([*lines, "", f"![over time]({plot})", ""])


def plot(results: SoakResults) -> str:
    seconds = results.options.seconds
    bins = np.arange(0, seconds + 1)
    rates: dict[str, list[tuple[float, float]]] = {}
    failed: dict[str, list[tuple[float, float]]] = {}
    for part in results.parts:
        ends = (part.requests["end"][part.requests["error"] == Error.NONE] - results.begun_ns) / NS
        rates[part.name] = _line(bins, np.histogram(ends, bins)[0])
        failed[part.name] = _line(bins, np.histogram([one.at_s for one in part.failures], bins)[0])
    samples = results.samples
    panels = [
        Panel("answered per second", rates),
        Panel("failed per second, allowed ones included", failed),
        Panel("replicas ready", {"ready": [(s.at_s, float(s.ready)) for s in samples if s.ready is not None]}),
        Panel(
            "requests in the router",
            {
                "in flight": [(s.at_s, float(s.in_flight)) for s in samples if s.in_flight is not None],
                "waiting": [(s.at_s, float(s.waiting)) for s in samples if s.waiting is not None],
            },
        ),
        Panel("memory, MiB resident", _by_process(samples, "rss_mb")),
        Panel("open descriptors", _by_process(samples, "fds")),
    ]
    marks: dict[str, list[float]] = {}
    for one in results.faults:
        marks.setdefault(f"{one.target} killed", []).append(results.seconds_of(one))
    return svg(f"soak, {results.origin['at']}", panels, length=seconds, marks=marks)


def _line(bins: Any, counts: Any) -> list[tuple[float, float]]:
    return [(float(at) + 0.5, float(count)) for at, count in zip(bins, counts, strict=False)]


def _by_process(samples: Sequence[Sample], what: str) -> dict[str, list[tuple[float, float]]]:
    lines: dict[str, list[tuple[float, float]]] = {}
    for sample in samples:
        for name, value in getattr(sample, what).items():
            lines.setdefault(name, []).append((sample.at_s, float(value)))
    return dict(sorted(lines.items()))
