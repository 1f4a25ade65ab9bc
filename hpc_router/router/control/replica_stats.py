"""Recent statistics of each replica, and which ready replicas are degraded. No I/O, no clock.

Counts decay with the half-life `HALF_LIFE_S`. A replica is degraded if its share of errors is higher than that of the
expert's other replicas, or if its responses begin much later than theirs. It is not called degraded if it has too few
responses. It is not called slow if no other replica of the expert has enough responses to compare with.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

HALF_LIFE_S: Final = 30.0
"""Half-life of the counts in seconds."""
MIN_ANSWERS: Final = 10.0
"""Minimum number of (decayed) responses for a statistic."""
ERROR_SHARE: Final = 0.05
"""Share of errors from which a replica can be degraded."""
WORSE_TIMES: Final = 2.0
"""Multiple of the other replicas' share of errors from which a replica is degraded. Errors that all replicas give are
the fault of the requests."""
SLOW_TIMES: Final = 3.0
SLOW_S: Final = 0.1
"""A replica is slow if its first byte takes more than `SLOW_TIMES` times as long as on the others, and more than
`SLOW_S` seconds longer."""

_NO_ERRORS: Final = frozenset({429, "busy", "starting", "draining"})
"""Causes of failovers that are not errors of the replica."""

Totals = Mapping[str, tuple[int, float, int]]
"""By replica: number of responses, sum of their seconds to the first byte, number of errors."""


@dataclass(slots=True)
class ReplicaStats:
    """The decayed counts of one replica's responses and errors. `seconds`: sum of the times to the first byte."""

    answered: float = 0.0
    seconds: float = 0.0
    errors: float = 0.0
    _at: float = 0.0

    def add(self, answered: int, seconds: float, errors: int, *, now: float) -> None:
        """Adds counts at the time `now`: `answered` responses, `seconds`, the sum of their times to the first byte, and
        `errors`. Before that, the older counts decay until `now`."""
        decay = 0.5 ** ((now - self._at) / HALF_LIFE_S)
        self._at = now
        self.answered = self.answered * decay + answered
        self.seconds = self.seconds * decay + seconds
        self.errors = self.errors * decay + errors

    @property
    def first_byte_s(self) -> float | None:
        """Mean time in seconds to the first byte; None if there were too few responses."""
        return self.seconds / self.answered if self.answered >= MIN_ANSWERS else None

    @property
    def error_share(self) -> float | None:
        """Share of errors among the responses; None if there were too few responses."""
        total = self.answered + self.errors
        return self.errors / total if total >= MIN_ANSWERS else None


def degradation(one: ReplicaStats, others: Sequence[ReplicaStats]) -> str | None:
    """Returns a text that says why the replica `one` is degraded; None if it is not. `others`: the other replicas of
    the same expert."""
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
    """Returns, by replica, the number of responses, the sum of their times to the first byte in seconds, and the number
    of errors. `dumped`: a worker's metrics. A time begins when the request was sent to this replica, so that waiting in
    a queue and earlier attempts on other replicas are not part of it."""
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
    """Returns, by replica, how much the three totals of `totals_by_replica` have grown from `before` to `now`. Leaves
    out a replica whose totals have not changed, or have become smaller because counting started again."""
    increases = {}
    for replica, (answered, seconds, errors) in now.items():
        then = before.get(replica, (0, 0.0, 0))
        more = (answered - then[0], seconds - then[1], errors - then[2])
        if min(more) >= 0 and any(more):
            increases[replica] = more
    return increases
