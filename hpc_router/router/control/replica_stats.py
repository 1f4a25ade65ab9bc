"""Recent statistics of each replica, and which ready replicas are degraded. No I/O, no clock.

Counts decay with `HALF_LIFE_S`. A replica is degraded if its share of errors is higher than that of the expert's other
replicas, or its first bytes come much later. With too few answers, or no replica to compare it with, it is not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

HALF_LIFE_S: Final = 30.0
MIN_ANSWERS: Final = 10.0
ERROR_SHARE: Final = 0.05
WORSE_TIMES: Final = 2.0
"""Degraded from this multiple of the other replicas' error share; errors that all give are the requests' fault."""
SLOW_TIMES: Final = 3.0
SLOW_S: Final = 0.1
"""Slow: this many times the others' seconds to the first byte, and at least this many seconds more."""

_NO_ERRORS: Final = frozenset({429, "busy", "starting", "draining"})
"""Causes of failovers that are no errors of the replica."""

Totals = Mapping[str, tuple[int, float, int]]
"""By replica: answers, the sum of their seconds to the first byte, errors."""


@dataclass(slots=True)
class ReplicaStats:
    answered: float = 0.0
    seconds: float = 0.0
    errors: float = 0.0
    _at: float = 0.0

    def add(self, answered: int, seconds: float, errors: int, *, now: float) -> None:
        decay = 0.5 ** ((now - self._at) / HALF_LIFE_S)
        self._at = now
        self.answered = self.answered * decay + answered
        self.seconds = self.seconds * decay + seconds
        self.errors = self.errors * decay + errors

    @property
    def first_byte_s(self) -> float | None:
        return self.seconds / self.answered if self.answered >= MIN_ANSWERS else None

    @property
    def error_share(self) -> float | None:
        total = self.answered + self.errors
        return self.errors / total if total >= MIN_ANSWERS else None


def degradation(one: ReplicaStats, others: Sequence[ReplicaStats]) -> str | None:
    """What is wrong with it, as text; None if nothing. `others`: the other replicas of the same expert."""
    share, first_byte_s = one.error_share, one.first_byte_s
    their_shares = [other.error_share for other in others if other.error_share is not None]
    alone = not their_shares or (share or 0.0) >= WORSE_TIMES * median(their_shares)
    if share is not None and share >= ERROR_SHARE and alone:
        return f"answers {share:.0%} of its requests with errors"
    theirs = [other.first_byte_s for other in others if other.first_byte_s is not None]
    if first_byte_s is not None and theirs:
        usual_s = median(theirs)
        if first_byte_s > max(SLOW_TIMES * usual_s, usual_s + SLOW_S):
            return f"is slow: {first_byte_s:.2g} s to the first byte, {usual_s:.2g} s on the others"
    return None


def totals_by_replica(dumped: Mapping[str, Any]) -> dict[str, tuple[int, float, int]]:
    """From a worker's dumped metrics. The time before a request was sent to the replica is left out: it waited for a
    place, or another replica failed it."""
    by_replica: dict[str, tuple[int, float, int]] = {}
    for (_, replica), counts, seconds in dumped.get("first_byte", ()):
        answered, before_s, errors = by_replica.get(replica, (0, 0.0, 0))
        by_replica[replica] = answered + sum(counts), before_s + seconds, errors
    for (_, replica), _counts, seconds in dumped.get("before_attempt", ()):
        answered, first_byte_s, errors = by_replica.get(replica, (0, 0.0, 0))
        by_replica[replica] = answered, first_byte_s - seconds, errors
    for (replica, cause), count in dumped.get("failovers", ()):
        if cause not in _NO_ERRORS:
            answered, seconds, errors = by_replica.get(replica, (0, 0.0, 0))
            by_replica[replica] = answered, seconds, errors + count
    return by_replica


def increase(now: Totals, before: Totals) -> dict[str, tuple[int, float, int]]:
    """What was counted since `before`; nothing for a replica whose counts restarted at zero."""
    increases = {}
    for replica, (answered, seconds, errors) in now.items():
        then = before.get(replica, (0, 0.0, 0))
        more = (answered - then[0], seconds - then[1], errors - then[2])
        if min(more) >= 0 and any(more):
            increases[replica] = more
    return increases
