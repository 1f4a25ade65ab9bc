"""When a replica is ejected for failed probes or requests, and when it may return. No I/O; clocks are arguments.

Rules: failed connections in a row eject, and so do failed probes. Errors in responses exclude a replica only after
several in a row, for a time that doubles, and only while the expert can spare it: at most a share of its replicas, and
never the last ready one, because an error that all replicas give is hardly their own fault. What counts as an error of
the replica and not of the request is decided in `worker/dispatcher.py`. Requests and probes both report `Incident`s.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from hpc_router import backoff

MAX_LATE_PROBES: Final = 3
"""Unanswered probes in a row that eject. Fewer may be the network's fault."""


class Incident(StrEnum):
    NO_CONNECTION = "no_connection"
    ERROR = "error"  # a request got a 5xx, or the connection broke before its first byte
    ANSWERED = "answered"  # a request succeeded
    PROBE_OK = "probe_ok"  # it passed the challenge, whatever state it reported
    PROBE_LATE = "probe_late"
    PROBE_FAILED = "probe_failed"


class Verdict(StrEnum):
    KEEP = "keep"
    EJECT = "eject"  # it does not answer
    EXCLUDE = "exclude"  # it answers with errors, and the expert can spare it


@dataclass(frozen=True, slots=True)
class EjectionRules:
    """`connect_errors`, `request_errors`: how many in a row eject. `exclusion_s`: first exclusion, in seconds; it
    doubles up to `max_exclusion_s`. `max_share`: of an expert's replicas that may be excluded at once."""

    connect_errors: int
    request_errors: int
    exclusion_s: float
    max_exclusion_s: float
    max_share: float


@dataclass(slots=True)
class ReplicaHealth:
    """Failures in a row at one replica. Until `excluded_until` its own report that it is ready is ignored."""

    connect_errors: int = 0
    request_errors: int = 0
    late_probes: int = 0
    failed_probes: int = 0
    exclusions: int = 0
    excluded_until: float = -math.inf

    def record(self, incident: Incident, *, now: float, rules: EjectionRules, spare: bool = False) -> Verdict:
        """Count one incident. `spare`: whether the expert can do without this replica (see `can_eject`)."""
        match incident:
            case Incident.ANSWERED:
                self.connect_errors = self.request_errors = 0
            case Incident.PROBE_OK:
                self.connect_errors = self.late_probes = self.failed_probes = 0
            case Incident.NO_CONNECTION:
                self.connect_errors += 1
                return Verdict.EJECT if self.connect_errors >= rules.connect_errors else Verdict.KEEP
            case Incident.PROBE_LATE:
                self.late_probes += 1
                self.failed_probes += 1
                return Verdict.EJECT if self.late_probes >= MAX_LATE_PROBES else Verdict.KEEP
            case Incident.PROBE_FAILED:
                self.failed_probes += 1
                return Verdict.EJECT
            case Incident.ERROR:
                self.request_errors += 1
                if self.request_errors >= rules.request_errors and spare and not self.is_excluded(now):
                    self._exclude(now, rules)
                    return Verdict.EXCLUDE
        return Verdict.KEEP

    def is_excluded(self, now: float) -> bool:
        return now < self.excluded_until

    def _exclude(self, now: float, rules: EjectionRules) -> None:
        if now - self.excluded_until > rules.max_exclusion_s:
            self.exclusions = 0  # the last exclusion is too long ago to count
        self.request_errors = 0
        self.excluded_until = now + backoff.pause_s(
            self.exclusions, first_s=rules.exclusion_s, max_s=rules.max_exclusion_s
        )
        self.exclusions += 1


def can_eject(*, others: Collection[tuple[bool, bool]], share: float) -> bool:
    """Whether an expert can spare one of its replicas. `others`: per other replica, (is ready, is excluded)."""
    excluded = sum(is_excluded for _, is_excluded in others)
    return any(ready for ready, _ in others) and excluded + 1 <= share * (len(others) + 1)
