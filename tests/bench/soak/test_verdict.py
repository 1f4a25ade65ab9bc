"""Faults explain some failures and not others; growth is detected; each complaint is reported."""

from typing import Any

import numpy as np
import pytest

from hpc_router.bench.load.native.records import REQUEST, Error
from hpc_router.bench.soak.options import FaultTarget
from hpc_router.bench.soak.verdict import (
    REPLICA_GRACE_S,
    WORKER_GRACE_S,
    InjectedFault,
    Sample,
    complaints,
    failures,
    growth_checks,
)

S = 10**9
LABELS = ["math-0.g1", "math-1.g1"]
FAULTS = [
    InjectedFault(FaultTarget.REPLICA, "math-0.g1", 10 * S),
    InjectedFault(FaultTarget.WORKER, "worker 0", 20 * S),
]


def allowed(error: Error, *, begin: float, end: float, label: int = 1) -> str | None:
    rows = np.zeros(1, dtype=REQUEST)
    rows["error"], rows["label"], rows["status"] = error, label, 503
    rows["begin"], rows["end"] = int(begin * S), int(end * S)
    (one,) = failures("streams", rows, labels=LABELS, faults=FAULTS, begun_ns=0)
    return one.allowed


def test_a_stream_in_flight_on_a_killed_replica_may_end_in_an_error_event() -> None:
    event = Error.STREAM_ERROR
    assert allowed(event, begin=9, end=10.1) == "in flight on a killed replica"
    assert allowed(event, begin=9, end=10 + REPLICA_GRACE_S) is not None
    assert allowed(event, begin=9, end=10.001 + REPLICA_GRACE_S) is None
    assert allowed(event, begin=9, end=9.9) is None, "it failed before the kill"
    assert allowed(event, begin=10.2, end=10.3) is None, "it began after the kill"
    assert allowed(event, begin=9, end=10.1, label=2) is None, "on another replica"
    assert allowed(event, begin=9, end=10.1, label=0) is None, "its replica is not known"


@pytest.mark.parametrize("error", [Error.CUT, Error.UNFINISHED, Error.TIMEOUT, Error.HTTP_STATUS, Error.DISCONNECTED])
def test_other_errors_on_a_killed_replica_are_not_explained(error: Error) -> None:
    assert allowed(error, begin=9, end=10.1) is None


@pytest.mark.parametrize("error", [Error.CUT, Error.UNFINISHED, Error.DISCONNECTED])
def test_a_connection_of_a_killed_worker_may_break(error: Error) -> None:
    assert allowed(error, begin=19, end=20.1) == "connection of a killed worker"
    assert allowed(error, begin=19, end=20.001 + WORKER_GRACE_S) is None
    assert allowed(error, begin=20.2, end=20.3) is None


@pytest.mark.parametrize("error", [Error.CONNECT, Error.HTTP_STATUS, Error.STREAM_ERROR, Error.TIMEOUT])
def test_other_errors_with_a_killed_worker_are_not_explained(error: Error) -> None:
    assert allowed(error, begin=19, end=20.1) is None


def test_success_and_own_disconnects_are_not_failures() -> None:
    rows = np.zeros(3, dtype=REQUEST)
    rows["error"] = [Error.NONE, Error.STOPPED, Error.LEFT]
    assert failures("short", rows, labels=[], faults=[], begun_ns=0) == []


def sampled(*, grows_mb: float = 0.0, grows_fds: int = 0, workers: int = 2) -> list[Sample]:
    def at(second: int) -> Sample:
        rss = {f"worker {n}": 100.0 + grows_mb * second / 100 for n in range(workers)}
        fds = {f"worker {n}": 200 + grows_fds * second // 100 for n in range(workers)}
        return Sample(float(second), 8, 0, 0, rss, fds)

    return [at(second) for second in range(100)]


def test_growth_is_detected() -> None:
    assert [one.met for one in growth_checks(sampled(), seconds=100)] == [True, True]
    assert [one.met for one in growth_checks(sampled(grows_mb=30), seconds=100)] == [False, True]
    assert [one.met for one in growth_checks(sampled(grows_fds=300), seconds=100)] == [True, False]
    assert [one.met for one in growth_checks([], seconds=100)] == [None, None]


def test_samples_without_a_process_are_ignored() -> None:
    half = [*sampled(grows_mb=30)[:75], *sampled(workers=1)[75:]]
    assert growth_checks(half, seconds=100)[0].met is None


FINE: dict[str, Any] = {
    "unexplained": [], "missed": [], "gauges": {"g": 0.0}, "growth": [], "idle_fds": (60, 70), "answered": 5
}  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"missed": [(5.0, FaultTarget.WORKER)]}, "fault not injected: worker"),
        ({"gauges": {"waiting": 1.0}}, "not zero at the end: waiting = 1"),
        ({"gauges": None}, "does not respond"),
        ({"growth": growth_checks(sampled(grows_mb=30), seconds=100)}, "grew too much: memory"),
        ({"idle_fds": (60, 93)}, "descriptors left open: 60 before, 93"),
        ({"answered": 0}, "no request of a load succeeded"),
    ],
)
def test_each_complaint(wrong: dict[str, Any], message: str) -> None:
    assert complaints(**FINE) == []
    (found,) = complaints(**FINE | wrong)
    assert message in found
