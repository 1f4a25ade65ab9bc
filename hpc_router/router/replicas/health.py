"""When a replica is taken out of use for what was met there, and when its word that it is ready counts again. No I/O.

Rules: a connection that cannot be made ejects at once or after so many in a row; so do probes that fail. Errors in its
answers eject only after several in a row, for a time that doubles, and only while it can be spared: a share of an
expert's replicas at most, never the last that is ready, because what all of them answer is hardly their own fault. What
counts as an error of a replica, and not of the request, is decided in `dispatch`. Whoever sees something tells it as an
`Incident`, requests and probes alike; clocks are arguments.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from hpc_router import backoff

PROBES_LATE: Final = 3
"""A probe that is not answered in time may be the network's fault; so many in a row are not."""


class Incident(StrEnum):
    NO_CONNECTION = "no_connection"
    ERROR = "error"  # a request got a 5xx, or the connection broke before its first byte
    ANSWERED = "answered"  # a request got what it wanted
    PROBE_OK = "probe_ok"  # it answers as itself, whatever it says
    PROBE_LATE = "probe_late"
    PROBE_FAILED = "probe_failed"


class Verdict(StrEnum):
    KEEP = "keep"
    EJECT = "eject"  # it does not answer
    EXCLUDE = "exclude"  # it answers with errors, and the others can do without it


@dataclass(frozen=True, slots=True)
class Rules:
    """`connections`, `errors`: so many in a row. `out_s`: how long errors keep it out the first time, `most_out_s` at
    most. `share` of an expert's replicas that may be out for errors."""

    connections: int
    errors: int
    out_s: float
    most_out_s: float
    share: float


@dataclass(slots=True)
class ReplicaHealth:
    """What has been met at one replica, in a row. `out_until`: before that its word does not count."""

    connections: int = 0
    errors: int = 0
    late: int = 0
    failed_probes: int = 0
    exclusions: int = 0
    out_until: float = -math.inf

    def note(self, incident: Incident, *, now: float, rules: Rules, spare: bool = False) -> Verdict:
        """`can_eject`: the others can do without it."""
        match incident:
            case Incident.ANSWERED:
                self.connections = self.errors = 0
            case Incident.PROBE_OK:
                self.connections = self.late = self.failed_probes = 0
            case Incident.NO_CONNECTION:
                self.connections += 1
                return Verdict.EJECT if self.connections >= rules.connections else Verdict.KEEP
            case Incident.PROBE_LATE:
                self.late += 1
                self.failed_probes += 1
                return Verdict.EJECT if self.late >= PROBES_LATE else Verdict.KEEP
            case Incident.PROBE_FAILED:
                self.failed_probes += 1
                return Verdict.EJECT
            case Incident.ERROR:
                self.errors += 1
                if self.errors >= rules.errors and spare and now >= self.out_until:
                    self._exclude(now, rules)
                    return Verdict.EXCLUDE
        return Verdict.KEEP

    def counts(self, now: float) -> bool:
        """Whether its word that it is ready does."""
        return now >= self.out_until

    def is_out(self, now: float) -> bool:
        return now < self.out_until

    def _exclude(self, now: float, rules: Rules) -> None:
        if now - self.out_until > rules.most_out_s:
            self.exclusions = 0  # long enough ago
        self.errors = 0
        self.out_until = now + backoff.pause_s(self.exclusions, first_s=rules.out_s, max_s=rules.most_out_s)
        self.exclusions += 1


def can_eject(*, others: Collection[tuple[bool, bool]], share: float) -> bool:
    """Whether an expert can do without one of its replicas. `others`: of each other one, whether it is ready and
    whether it is out for errors."""
    out = sum(is_out for _, is_out in others)
    return any(ready for ready, _ in others) and out + 1 <= share * (len(others) + 1)
