"""What the replicas have answered of late, and which of them are sick though they are ready. No I/O, no clock.

Older answers count less and less. A replica is sick that answers more with errors than the others of its expert do, or
begins its answers much later than they do; with too few answers, or nobody to compare it with, nothing is said.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

HALF_LIFE_S: Final = 30.0
ENOUGH: Final = 10.0
ERROR_SHARE: Final = 0.05
WORSE_TIMES: Final = 2.0
"""Errors that the other replicas of an expert answer as often belong to the requests."""
SLOW_TIMES: Final = 3.0
SLOW_S: Final = 0.1
"""Slow is so many times what the others take, and so much longer at least."""

_NO_ERRORS: Final = frozenset({429, "busy", "starting", "draining"})
"""Causes of failovers that say nothing against a replica."""

Totals = Mapping[str, tuple[int, float, int]]
"""By replica: answers, the seconds to their first bytes together, errors."""


@dataclass(slots=True)
class ReplicaStats:
    answered: float = 0.0
    seconds: float = 0.0
    errors: float = 0.0
    _at: float = 0.0

    def add(self, answered: int, seconds: float, errors: int, *, now: float) -> None:
        left = 0.5 ** ((now - self._at) / HALF_LIFE_S)
        self._at = now
        self.answered = self.answered * left + answered
        self.seconds = self.seconds * left + seconds
        self.errors = self.errors * left + errors

    @property
    def first_byte_s(self) -> float | None:
        return self.seconds / self.answered if self.answered >= ENOUGH else None

    @property
    def error_share(self) -> float | None:
        seen = self.answered + self.errors
        return self.errors / seen if seen >= ENOUGH else None


def sickness(one: ReplicaStats, others: Sequence[ReplicaStats]) -> str | None:
    """In words. `others`: of the same expert."""
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


def totals(dumped: Mapping[str, Any]) -> dict[str, tuple[int, float, int]]:
    """Of what a worker has counted."""
    found: dict[str, tuple[int, float, int]] = {}
    for (_, replica), counts, seconds in dumped.get("first_byte", ()):
        answered, before_s, errors = found.get(replica, (0, 0.0, 0))
        found[replica] = answered + sum(counts), before_s + seconds, errors
    for (replica, cause), count in dumped.get("failovers", ()):
        if cause not in _NO_ERRORS:
            answered, seconds, errors = found.get(replica, (0, 0.0, 0))
            found[replica] = answered, seconds, errors + count
    return found


def newly(now: Totals, before: Totals) -> dict[str, tuple[int, float, int]]:
    """What has come since; nothing where a count was begun anew."""
    gained = {}
    for replica, (answered, seconds, errors) in now.items():
        then = before.get(replica, (0, 0.0, 0))
        more = (answered - then[0], seconds - then[1], errors - then[2])
        if min(more) >= 0 and any(more):
            gained[replica] = more
    return gained
