"""Whether a request fits into the rest of a replica's walltime. No I/O.

The expected duration of a request is its `max_tokens` times the expert's measured time per allowed token, or without
`max_tokens` the expert's measured duration; both are the 95th percentile of its last responses. Time is measured only
for experts whose replicas have a walltime.
"""

import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Final

from hpc_router.router.replicas.replica import Replica

SAMPLES: Final = 256
PERCENTILE: Final = 0.95
HORIZON_S: Final = 1800.0
"""Replicas with more than this left are long-lived for every request."""
_KEYS: Final = ("max_tokens", "max_completion_tokens", "max_output_tokens")


@dataclass(slots=True)
class _Samples:
    """Durations in seconds, and durations divided by `max_tokens`, of an expert's last responses."""

    duration_s: deque[float] = field(default_factory=lambda: deque(maxlen=SAMPLES))
    per_token_s: deque[float] = field(default_factory=lambda: deque(maxlen=SAMPLES))


@dataclass(slots=True)
class Lifetimes:
    """`expiring`: experts with a ready replica that ends within HORIZON_S, among several."""

    expiring: frozenset[str] = frozenset()
    _samples: dict[str, _Samples] = field(default_factory=dict)

    def refresh(self, replicas: Collection[Replica], *, now: float) -> None:
        """Find the experts that have replicas near their end. `now`: Unix seconds. Called about once per second."""
        self.expiring = frozenset(expert for r in replicas if left_s(r, now) < HORIZON_S for expert in r.record.serves)

    def ended(self, expert: str, elapsed_s: float, fields: dict[str, object]) -> None:
        """A response of the expert is complete."""
        samples = self._samples.setdefault(expert, _Samples())
        samples.duration_s.append(elapsed_s)
        if tokens := _max_tokens(fields):
            samples.per_token_s.append(elapsed_s / tokens)

    def expected_s(self, expert: str, fields: dict[str, object]) -> float:
        """The expected duration of a request; 0 without measurements."""
        samples = self._samples.get(expert)
        if samples is None:
            return 0.0
        tokens = _max_tokens(fields)
        if tokens and samples.per_token_s:
            return tokens * _percentile(samples.per_token_s)
        return _percentile(samples.duration_s)


def left_s(replica: Replica, now: float) -> float:
    """What is left of its walltime at `now` (Unix seconds)."""
    expires_at = replica.record.expires_at
    return float("inf") if expires_at is None else expires_at - now


def outliving(replicas: Sequence[Replica], needed_s: float) -> Sequence[Replica]:
    """Of the replicas with room those that live `needed_s` longer; if none does, the longest-lived one with room."""
    now = time.time()
    open_ = [replica for replica in replicas if replica.has_room]
    fitting = [replica for replica in open_ if left_s(replica, now) >= needed_s]
    return fitting or sorted(open_, key=lambda replica: left_s(replica, now))[-1:]


def _max_tokens(fields: dict[str, object]) -> int | None:
    value = next((value for key in _KEYS if (value := fields.get(key)) is not None), None)
    return value if type(value) is int and value > 0 else None


def _percentile(samples: Collection[float]) -> float:
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(PERCENTILE * len(ordered)))]
