"""Which failures the strikes explain, and whether memory and descriptors stayed flat. Pure.

A stream that was in flight on a killed replica may end in an error event, and a connection of a killed worker may
break, both at that moment. Whatever else failed was not allowed to.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

from hpc_router.bench.load.native.records import Error, Table
from hpc_router.bench.soak.options import FaultTarget

NS: Final = 1e9
SOON_S: Final = 2.0
"""So soon after a worker's end its connections show it."""
LOST_S: Final = 20.0
"""So soon the streams of a replica end that nobody hears of any more; there is no other of its name."""
BROKEN: Final = frozenset({Error.DISCONNECTED, Error.CUT, Error.UNFINISHED})
MORE_SHARE: Final = 0.1
MORE_MB: Final = 10.0
MORE_FDS_SHARE: Final = 0.5
MORE_FDS: Final = 32
"""What is flat may end so far above where it began: the larger of the share and the amount. Under load descriptors
follow latency, as late answers keep connections; those that leak are still there when all is over."""


@dataclass(frozen=True, slots=True)
class Struck:
    """`at_ns`: CLOCK_MONOTONIC."""

    target: FaultTarget
    name: str
    at_ns: int


@dataclass(frozen=True, slots=True)
class FailedRequest:
    """`kind`: the error's name, with the status of an answer; `allowed`: why it may be; None: it may not."""

    load: str
    at_s: float
    kind: str
    replica: str | None
    allowed: str | None

    @property
    def cause(self) -> str:
        return f"{self.load}: {self.kind}" + (f", {self.allowed}" if self.allowed else "")


def failures(
    load: str, requests: Table, *, labels: Sequence[str], struck: Sequence[Struck], begun_ns: int
) -> list[FailedRequest]:
    """Of one load; `labels`: the replicas that its records number from one."""
    found = []
    for row in requests[requests["error"] != Error.NONE]:
        error, label = Error(int(row["error"])), int(row["label"])
        if error in (Error.LEFT, Error.STOPPED):
            continue
        replica = labels[label - 1] if 0 < label <= len(labels) else None
        kind = f"http {int(row['status'])}" if error is Error.HTTP_STATUS else error.name.lower().replace("_", " ")
        begin, end = int(row["begin"]), int(row["end"])
        why = _allowed(error, replica, begin, end, struck)
        found.append(FailedRequest(load, (end - begun_ns) / NS, kind, replica, why))
    return found


def _allowed(error: Error, replica: str | None, begin: int, end: int, struck: Sequence[Struck]) -> str | None:
    for strike in struck:
        after_s = (end - strike.at_ns) / NS
        if after_s < 0 or begin > strike.at_ns + 0.1 * NS:
            continue
        lost = strike.target is FaultTarget.REPLICA and replica == strike.name
        if lost and error is Error.STREAM_ERROR and after_s <= LOST_S:
            return "in flight on a killed replica"
        if strike.target is FaultTarget.WORKER and error in BROKEN and after_s <= SOON_S:
            return "connection of a killed worker"
    return None


@dataclass(frozen=True, slots=True)
class Sample:
    """What was seen at one moment. `ready`: replicas; None: the router did not answer. `rss_mb`, `fds`: of each of the
    router's processes, by name."""

    at_s: float
    ready: int | None
    in_flight: int | None
    waiting: int | None
    rss_mb: Mapping[str, float]
    fds: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Flat:
    """What a quantity was early and late in the load. `met` None: too little was seen."""

    what: str
    early: float
    late: float
    most: float
    met: bool | None


def flat(samples: Sequence[Sample], *, seconds: float) -> list[Flat]:
    """Memory and descriptors of the whole router: once warm, and at the end of the load."""
    whole = max((len(sample.rss_mb) for sample in samples), default=0)
    samples = [sample for sample in samples if len(sample.rss_mb) == whole]  # a process that is missing is no saving
    early = [sample for sample in samples if 0.2 * seconds <= sample.at_s < 0.45 * seconds]
    late = [sample for sample in samples if 0.75 * seconds <= sample.at_s <= seconds]
    return [
        _flat(
            "memory MiB",
            *([sum(s.rss_mb.values()) for s in part] for part in (early, late)),
            more=MORE_MB,
            share=MORE_SHARE,
        ),
        _flat(
            "descriptors",
            *([float(sum(s.fds.values())) for s in part] for part in (early, late)),
            more=MORE_FDS,
            share=MORE_FDS_SHARE,
        ),
    ]


def _flat(what: str, early: Sequence[float], late: Sequence[float], *, more: float, share: float) -> Flat:
    if not early or not late:
        return Flat(what, 0.0, 0.0, 0.0, None)
    before, after = median(early), median(late)
    most = before + max(more, share * before)
    return Flat(what, round(before, 1), round(after, 1), round(most, 1), after <= most)


def complaints(
    *,
    unexplained: Sequence[FailedRequest],
    missed: Sequence[tuple[float, FaultTarget]],
    gauges: Mapping[str, float] | None,
    flats: Sequence[Flat],
    idle_fds: tuple[int, int] | None,
    answered: int,
) -> list[str]:
    """Why the soak failed; nothing: it passed. `idle_fds`: before the load, and when all was over."""
    said = [
        f"not allowed to fail: {one.cause} ({one.replica or 'no replica'}, at {one.at_s:.1f} s)" for one in unexplained
    ]
    said += [f"nothing could be struck: {target} at {at:.0f} s" for at, target in missed]
    if gauges is None:
        said.append("the router does not answer any more")
    else:
        said += [f"not zero at the end: {name} = {value:g}" for name, value in gauges.items() if value]
    said += [f"not flat: {one.what}, {one.early:g} then {one.late:g}" for one in flats if one.met is False]
    if idle_fds is not None and idle_fds[1] > idle_fds[0] + MORE_FDS:
        said.append(f"descriptors left open: {idle_fds[0]} before, {idle_fds[1]} at the end")
    if not answered:
        said.append("nothing was answered")
    return said


def to_json(value: Any) -> Any:
    """Of the records above."""
    return {name: getattr(value, name) for name in value.__slots__}
