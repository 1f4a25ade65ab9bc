"""Decides whether a request can end before a replica's walltime does. No I/O.

The expected duration of a request comes from the last responses of its expert. For a request with `max_tokens`, it is
`max_tokens` times the 95th percentile of (duration / `max_tokens`); otherwise, the 95th percentile of the durations.
Only experts whose replicas have a walltime are measured.
"""

import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from hpc_router.router.replicas.replica import Replica

SAMPLES: Final = 256
"""Number of responses per expert that the percentiles are computed from."""
PERCENTILE: Final = 0.95
HORIZON_S: Final = 1800.0
"""Remaining walltime in seconds above which a replica can take every request."""
MAX_TOKENS_KEYS: Final = ("max_tokens", "max_completion_tokens", "max_output_tokens")
"""The keys of a request body that limit the length of the response, the first ones first."""


@dataclass(slots=True)
class _Samples:
    """Of an expert's last responses, the durations in seconds, and the durations divided by the request's
    `max_tokens`."""

    duration_s: deque[float] = field(default_factory=lambda: deque(maxlen=SAMPLES))
    per_token_s: deque[float] = field(default_factory=lambda: deque(maxlen=SAMPLES))


@dataclass(slots=True)
class Lifetimes:
    """The measured durations of responses, by expert. `expiring`: the experts that have a ready replica whose walltime
    ends within `HORIZON_S`."""

    expiring: frozenset[str] = frozenset()
    _samples: dict[str, _Samples] = field(default_factory=dict)

    def refresh(self, replicas: Collection[Replica], *, now: float) -> None:
        """Recomputes `expiring` from `replicas`. `now`: Unix seconds. Called about once per second."""
        self.expiring = frozenset(expert for r in replicas if left_s(r, now) < HORIZON_S for expert in r.record.serves)

    def ended(self, expert: str, elapsed_s: float, fields: dict[str, object]) -> None:
        """Records that a complete response of the expert took `elapsed_s` seconds. `fields`: the request body."""
        samples = self._samples.setdefault(expert, _Samples())
        samples.duration_s.append(elapsed_s)
        if tokens := max_tokens_of(fields):
            samples.per_token_s.append(elapsed_s / tokens)

    def expected_s(self, expert: str, fields: dict[str, object]) -> float:
        """Returns the expected duration in seconds of a request with the body `fields`; 0 if the expert was not
        measured yet."""
        samples = self._samples.get(expert)
        if samples is None:
            return 0.0
        tokens = max_tokens_of(fields)
        if tokens and samples.per_token_s:
            return tokens * _percentile(samples.per_token_s)
        return _percentile(samples.duration_s)


def left_s(replica: Replica, now: float) -> float:
    """Returns the rest of the replica's walltime in seconds at `now` (Unix seconds); infinite if it has no walltime."""
    expires_at = replica.record.expires_at
    return float("inf") if expires_at is None else expires_at - now


def outliving(replicas: Sequence[Replica], needed_s: float) -> Sequence[Replica]:
    """Returns the replicas that have a free place and at least `needed_s` seconds of walltime left. If there is none,
    returns only the one with a free place whose walltime ends last."""
    now = time.time()
    open_ = [replica for replica in replicas if replica.has_room]
    fitting = [replica for replica in open_ if left_s(replica, now) >= needed_s]
    return fitting or sorted(open_, key=lambda replica: left_s(replica, now))[-1:]


def max_tokens_of(fields: Mapping[str, object]) -> int | None:
    """Returns the maximum length of the response that a request body states, in tokens; None without a valid one."""
    for key in MAX_TOKENS_KEYS:
        value = fields.get(key)
        if value is not None:
            return value if type(value) is int and value > 0 else None
    return None


def _percentile(samples: Collection[float]) -> float:
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(PERCENTILE * len(ordered)))]
