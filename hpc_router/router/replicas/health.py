"""Decides when a replica is ejected for failed probes or requests, and when it may return. No I/O; the caller passes
the time.

Several failed connections in a row eject a replica, and so do failed probes. Several error responses in a row exclude a
replica: it is ejected for a fixed time, which doubles with each exclusion. A replica is excluded only while at most a
share of the expert's replicas is excluded, and never if it is the last ready one, because an error that all replicas
give has another cause. `worker/attempt_review.py` decides whether an error is the fault of the replica or of the
request. Requests and probes both report `Incident`s.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from hpc_router import backoff

MAX_LATE_PROBES: Final = 3
"""Number of unanswered probes in a row that eject a replica. The network may be the cause of fewer. A silent external
endpoint is ejected only while other replicas serve its experts."""


class Incident(StrEnum):
    """An observed result of a request or a probe, good or bad, by which a replica's health is judged."""

    NO_CONNECTION = "no_connection"
    ERROR = "error"  # a request got a 5xx, or the connection broke before its first byte
    ANSWERED = "answered"  # a request succeeded after earlier ones had failed
    PROBE_OK = "probe_ok"  # the replica passed the challenge, whatever state it reported
    PROBE_LATE = "probe_late"  # no response within the timeout
    PROBE_UNANSWERED = "probe_unanswered"  # an external endpoint took the connection and was silent
    PROBE_FAILED = "probe_failed"  # connection refused, wrong identity, or an invalid response


class Verdict(StrEnum):
    """What the router does with the replica after an `Incident`."""

    KEEP = "keep"
    EJECT = "eject"  # the replica does not answer
    EXCLUDE = "exclude"  # the replica answers with errors, and the expert can spare it


@dataclass(frozen=True, slots=True)
class EjectionRules:
    """The configured limits for ejecting replicas.

    `connect_errors`, `request_errors`: number of failures in a row after which a replica is ejected. `exclusion_s`:
    duration in seconds of a replica's first exclusion; each further exclusion is twice as long, up to
    `max_exclusion_s`. `max_share`: largest share of an expert's replicas that may be excluded at the same time.
    """

    connect_errors: int
    request_errors: int
    exclusion_s: float
    max_exclusion_s: float
    max_share: float


@dataclass(slots=True)
class ReplicaHealth:
    """The numbers of failures in a row at one replica. Until the time `excluded_until`, the replica stays ejected even
    if it reports that it is ready."""

    connect_errors: int = 0
    request_errors: int = 0
    late_probes: int = 0
    failed_probes: int = 0
    exclusions: int = 0
    excluded_until: float = -math.inf

    def record(self, incident: Incident, *, now: float, rules: EjectionRules, spare: bool = False) -> Verdict:
        """Counts one incident at the replica and returns what to do with the replica. `now`: the time in seconds.
        `spare`: whether the expert can do without this replica (see `can_eject`)."""
        match incident:
            case Incident.ANSWERED:
                self.connect_errors = self.request_errors = 0
            case Incident.PROBE_OK:
                self.connect_errors = self.late_probes = self.failed_probes = 0
            case Incident.NO_CONNECTION:
                self.connect_errors += 1
                return Verdict.EJECT if self.connect_errors >= rules.connect_errors else Verdict.KEEP
            case Incident.PROBE_LATE | Incident.PROBE_UNANSWERED:
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
    """Returns whether an expert can do without one more of its replicas. `others`: for each other replica, (is ready,
    is excluded). `share`: maximum share of the replicas that may be excluded."""
    excluded = sum(is_excluded for _, is_excluded in others)
    return any(ready for ready, _ in others) and excluded + 1 <= share * (len(others) + 1)
