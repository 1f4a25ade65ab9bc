"""Decides whether and when a failed engine is started again. Callers pass the times and a random number."""

from dataclasses import dataclass
from typing import Final

from hpc_router import backoff
from hpc_router.state.job_records import PERMANENT, FailureReason

STABLE_S: Final = 60.0
"""Seconds for which an engine has to be ready to reset the count of consecutive failures."""
MAX_PAUSE_S: Final = 60.0


@dataclass(slots=True)
class RestartPolicy:
    """Decides about restarts by the number of failures in a row. `total`: number of all restarts so far."""

    max_in_a_row: int
    in_a_row: int = 0
    total: int = 0

    def after_failure(self, reason: FailureReason, *, ready_s: float, chance: float) -> float | None:
        """Returns the seconds to wait before the next start: 1, 2, 4, ...; None if the engine is not started again.

        `ready_s`: seconds for which the engine was ready; if at least STABLE_S, the wait is 1 again. `chance`: random
        number from 0 to 1 that shortens the wait by up to a half, so that replicas do not start together after a common
        failure.
        """
        if reason in PERMANENT:
            return None
        if ready_s >= STABLE_S:
            self.in_a_row = 0
        if self.in_a_row >= self.max_in_a_row:
            return None
        delay_s = backoff.pause_s(self.in_a_row, first_s=1.0, max_s=MAX_PAUSE_S) * (1 - chance / 2)
        self.in_a_row += 1
        self.total += 1
        return delay_s
