"""Which replicas are degraded, by their recent answers."""

from collections.abc import Sequence

import pytest

from hpc_router.router.control.replica_stats import HALF_LIFE_S, ReplicaStats, degradation, increase, totals_by_replica
from hpc_router.router.metrics import Metrics


def seen(answered: int, *, each_s: float = 0.1, errors: int = 0) -> ReplicaStats:
    recent = ReplicaStats()
    recent.add(answered, answered * each_s, errors, now=100.0)
    return recent


@pytest.mark.parametrize(
    ("one", "others", "says"),
    [
        (seen(80, errors=20), [], "answers 20% of its requests with errors"),
        (seen(96, errors=4), [], None),
        (seen(80, errors=20), [seen(99, errors=1), seen(80, errors=20)], None),  # errors belong to the requests
        (seen(80, errors=20), [seen(91, errors=9)], "answers 20% of its requests with errors"),
        (seen(5, errors=4), [], None),  # too few to say
        (seen(50, each_s=1.0), [seen(50), seen(50)], "is slow: 1 s to the first byte, 0.1 s on the others"),
        (seen(50, each_s=0.31), [seen(50)], "is slow"),
        (seen(50, each_s=0.29), [seen(50)], None),
        (seen(50, each_s=0.09), [seen(50, each_s=0.001)], None),  # a tenth of a second more is nothing to speak of
        (seen(50, each_s=1.0), [], None),  # nobody to compare it with
        (seen(50, each_s=1.0), [seen(5)], None),
    ],
)
def test_which_replicas_are_degraded(one: ReplicaStats, others: Sequence[ReplicaStats], says: str | None) -> None:
    told = degradation(one, others)
    assert told == says if says is None else told is not None and told.startswith(says)


def test_old_counts_decay() -> None:
    recent = seen(80, errors=20)
    recent.add(100, 10.0, 0, now=100.0 + HALF_LIFE_S)
    assert recent.error_share == pytest.approx(10 / 150)
    recent.add(100, 10.0, 0, now=100.0 + 10 * HALF_LIFE_S)
    assert degradation(recent, []) is None


def test_the_totals_come_from_the_workers_metrics() -> None:
    """A 429 is no error; shown by expert alone; and a replica that is forgotten leaves its counts to its expert."""
    metrics = Metrics()
    for _ in range(3):
        metrics.first_byte.add(0.5, "math", "math-0.g1")
    metrics.failovers.add("math-0.g1", 500)
    metrics.failovers.add("math-0.g1", 429)
    metrics.failovers.add("math-0.g1", "UpstreamError")
    before = totals_by_replica(metrics.dump())
    assert before == {"math-0.g1": (3, 1.5, 2)}
    assert 'hpc_router_first_byte_seconds_count{expert="math"} 3.0' in metrics.exposition(()).decode()
    metrics.first_byte.add(0.25, "math", "math-0.g1")
    assert increase(totals_by_replica(metrics.dump()), before) == {"math-0.g1": (1, 0.25, 0)}
    metrics.forget(present=(), now=0.0)
    metrics.forget(present=(), now=601.0)
    text = metrics.exposition(()).decode()
    assert 'hpc_router_first_byte_seconds_count{expert="math"} 4.0' in text
    assert "math-0.g1" not in text
    assert increase(totals_by_replica(metrics.dump()), before) == {"": (4, 1.75, 0)}
