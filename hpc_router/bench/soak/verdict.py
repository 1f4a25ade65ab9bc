"""Judges a soak: which failures the faults explain, and whether memory and file descriptors grew. Pure functions.

A stream in flight on a killed replica may end in an error event, and a connection of a killed worker may break, both
shortly after the fault. No other failure is allowed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from hpc_router.bench.load.native.records import Error, Table
from hpc_router.bench.soak.options import FaultTarget

NS: Final = 1e9
WORKER_GRACE_S: Final = 2.0
"""Time in seconds after the kill of a worker in which its connections may break."""
REPLICA_GRACE_S: Final = 20.0
"""Time in seconds after the kill of a replica in which its streams may fail. The router may need that long to notice
the kill."""
BROKEN_CONNECTION: Final = frozenset({Error.DISCONNECTED, Error.CUT, Error.UNFINISHED})
GROWTH_SHARE: Final = 0.1
GROWTH_MB: Final = 10.0
FDS_GROWTH_SHARE: Final = 0.5
FDS_GROWTH: Final = 32
"""Allowed growth of memory and of file descriptors during the load: the larger of a share and an amount. Slow responses
keep connections open, so the number of descriptors follows the latency. Leaked descriptors are still open after the
load."""


@dataclass(frozen=True, slots=True)
class InjectedFault:
    """A process that was killed. `at_ns`: time of the kill (CLOCK_MONOTONIC)."""

    target: FaultTarget
    name: str
    at_ns: int


@dataclass(frozen=True, slots=True)
class FailedRequest:
    """A failed request. `kind`: name of the error, or the HTTP status. `allowed`: the fault that explains the failure;
    None if no fault does."""

    load: str
    at_s: float
    kind: str
    replica: str | None
    allowed: str | None

    @property
    def cause(self) -> str:
        return f"{self.load}: {self.kind}" + (f", {self.allowed}" if self.allowed else "")


def failures(
    load: str, requests: Table, *, labels: Sequence[str], faults: Sequence[InjectedFault], begun_ns: int
) -> list[FailedRequest]:
    """Returns the failed requests in `requests`, those of the load named `load`. Requests that the load generator ended
    itself do not count. `labels`: names of the replicas; a request's field `label` is the number of its replica in
    them, from 1. `begun_ns`: start of the load."""
    found = []
    for row in requests[requests["error"] != Error.NONE]:
        error, label = Error(int(row["error"])), int(row["label"])
        if error in (Error.LEFT, Error.STOPPED):
            continue
        replica = labels[label - 1] if 0 < label <= len(labels) else None
        kind = f"http {int(row['status'])}" if error is Error.HTTP_STATUS else error.name.lower().replace("_", " ")
        begin, end = int(row["begin"]), int(row["end"])
        explanation = _explanation(error, replica, begin, end, faults)
        found.append(FailedRequest(load, (end - begun_ns) / NS, kind, replica, explanation))
    return found


def _explanation(
    error: Error, replica: str | None, begin: int, end: int, faults: Sequence[InjectedFault]
) -> str | None:
    """Returns the fault that explains the error of a request, as text; None if no fault does. `begin`, `end`: when the
    request began and ended (ns). `replica`: the replica that it went to."""
    for fault in faults:
        after_s = (end - fault.at_ns) / NS
        if after_s < 0 or begin > fault.at_ns + 0.1 * NS:
            continue
        on_killed_replica = fault.target is FaultTarget.REPLICA and replica == fault.name
        if on_killed_replica and error is Error.STREAM_ERROR and after_s <= REPLICA_GRACE_S:
            return "in flight on a killed replica"
        if fault.target is FaultTarget.WORKER and error in BROKEN_CONNECTION and after_s <= WORKER_GRACE_S:
            return "connection of a killed worker"
    return None


@dataclass(frozen=True, slots=True)
class Sample:
    """The state of the router at one time. `ready`: number of ready replicas; None if the router did not respond.
    `rss_mb`, `fds`: resident memory (MiB) and number of file descriptors of each router process, by name."""

    at_s: float
    ready: int | None
    in_flight: int | None
    waiting: int | None
    rss_mb: Mapping[str, float]
    fds: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class GrowthCheck:
    """A comparison of one quantity, such as memory, early and late in the load. `most`: maximum permitted value of
    `late`. `met`: whether `late` is at most that; None if there are no samples."""

    what: str
    early: float
    late: float
    most: float
    met: bool | None


def growth_checks(samples: Sequence[Sample], *, seconds: float) -> list[GrowthCheck]:
    """Compares memory and file descriptors of all router processes after the warm-up and at the end of the load."""
    processes = max((len(sample.rss_mb) for sample in samples), default=0)
    samples = [sample for sample in samples if len(sample.rss_mb) == processes]  # skips samples that lack a process
    early = [sample for sample in samples if 0.2 * seconds <= sample.at_s < 0.45 * seconds]
    late = [sample for sample in samples if 0.75 * seconds <= sample.at_s <= seconds]
    return [
        _growth(
            "memory MiB",
            *([sum(s.rss_mb.values()) for s in part] for part in (early, late)),
            amount=GROWTH_MB,
            share=GROWTH_SHARE,
        ),
        _growth(
            "descriptors",
            *([float(sum(s.fds.values())) for s in part] for part in (early, late)),
            amount=FDS_GROWTH,
            share=FDS_GROWTH_SHARE,
        ),
    ]


def _growth(what: str, early: Sequence[float], late: Sequence[float], *, amount: float, share: float) -> GrowthCheck:
    if not early or not late:
        return GrowthCheck(what, 0.0, 0.0, 0.0, None)
    before, after = median(early), median(late)
    most = before + max(amount, share * before)
    return GrowthCheck(what, round(before, 1), round(after, 1), round(most, 1), after <= most)


def complaints(
    *,
    unexplained: Sequence[FailedRequest],
    missed: Sequence[tuple[float, FaultTarget]],
    gauges: Mapping[str, float] | None,
    growth: Sequence[GrowthCheck],
    idle_fds: tuple[int, int] | None,
    answered: int,
) -> list[str]:
    """Returns the reasons why the soak failed; empty if it passed.

    `unexplained`: failed requests that no fault explains. `missed`: faults that were not injected. `gauges`: counts of
    requests in the router after the load; None if the router did not respond. `idle_fds`: number of open descriptors
    before the load and after its end. `answered`: number of successful requests of the load that has the fewest.
    """
    found = [
        f"unexplained failure: {one.cause} ({one.replica or 'no replica'}, at {one.at_s:.1f} s)" for one in unexplained
    ]
    found += [f"fault not injected: {target} at {at:.0f} s" for at, target in missed]
    if gauges is None:
        found.append("the router does not respond at the end")
    else:
        found += [f"not zero at the end: {name} = {value:g}" for name, value in gauges.items() if value]
    found += [f"grew too much: {one.what}, from {one.early:g} to {one.late:g}" for one in growth if one.met is False]
    if idle_fds is not None and idle_fds[1] > idle_fds[0] + FDS_GROWTH:
        found.append(f"descriptors left open: {idle_fds[0]} before, {idle_fds[1]} at the end")
    if not answered:
        found.append("no request of a load succeeded")
    return found
