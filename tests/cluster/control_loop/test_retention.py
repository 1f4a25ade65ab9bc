"""Which old generations are removed, and which files."""

import os
from dataclasses import replace
from pathlib import Path

from hpc_router.cluster.control_loop.retention import DAY_S, INTERVAL_S, MAX_REMOVED, MIN_AGE_S, Retention, expired
from hpc_router.cluster.control_loop.slots import Attempt, Observed, Slot
from hpc_router.cluster.launchers.interface import JobReport, JobState
from hpc_router.config.schema import ClusterConfig
from hpc_router.state.job_records import FailureReason, JobDir
from hpc_router.state.run_directory import RunDir
from tests.cluster.control_loop.support import MATH, ended, serving, waiting

NOW = 10_000_000.0
KEEP = ClusterConfig(keep_generations=5, keep_days=10)


def past(generation: int, *, age_s: float, slot: Slot = MATH) -> Attempt:
    return replace(ended(generation, FailureReason.DRAINED, at=NOW - age_s), slot=slot)


def generations(observed: Observed, cluster: ClusterConfig = KEEP) -> list[int]:
    return [attempt.generation for attempt in expired(observed, cluster, NOW)]


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def day_old(count: int) -> tuple[Attempt, ...]:
    return tuple(past(n, age_s=DAY_S + count - n) for n in range(1, count + 1))


def test_a_slot_keeps_its_newest_generations() -> None:
    assert generations({MATH: (*day_old(9), serving(10))}) == [1, 2, 3, 4]
    assert generations({MATH: (*day_old(5), serving(6))}) == []


def test_the_number_of_failures_that_count_is_kept() -> None:
    assert generations({MATH: (*day_old(9), serving(10))}, replace(KEEP, max_failures=8)) == [1]


def test_old_ones_go_however_few_they_are() -> None:
    ages = (11, 10, 9)
    attempts = tuple(past(n, age_s=days * DAY_S) for n, days in enumerate(ages, 1))
    assert generations({MATH: (*attempts, serving(4))}) == [1, 2]


def test_the_newest_ended_generation_stays_whatever_its_age() -> None:
    """The next number follows from the folders, and `why` explains the last end."""
    old = 100 * DAY_S
    assert generations({MATH: (past(7, age_s=old),)}) == []
    assert generations({MATH: (past(7, age_s=old), past(8, age_s=old))}) == [7]
    assert generations({MATH: (past(7, age_s=old), past(8, age_s=old), serving(9))}) == [7]
    claim = replace(waiting(9), submitted=False)
    assert generations({MATH: (past(7, age_s=old), past(8, age_s=old), claim)}) == [7]


def test_what_ended_within_the_hour_stays() -> None:
    attempts = [past(n, age_s=MIN_AGE_S - 1) for n in range(1, 20)]
    assert generations({MATH: (*attempts, serving(20))}) == []
    attempts[0] = past(1, age_s=MIN_AGE_S)
    assert generations({MATH: (*attempts, serving(20))}) == [1]


def test_the_folder_of_a_job_that_still_runs_stays() -> None:
    """Several replicas may share a job: its batch log is in the folder of the first."""
    other = Slot("math", "1")
    old = tuple(replace(attempt, job_id="7") for attempt in day_old(9)[:1]) + day_old(9)[1:]
    assert generations({MATH: (*old, serving(10))}) == [1, 2, 3, 4]
    sharing = replace(serving(1, slot=other), job_id="7")
    assert generations({MATH: (*old, serving(10)), other: (sharing,)}) == [2, 3, 4]
    ending = replace(sharing, report=JobReport(JobState.ENDING))
    assert generations({MATH: (*old, serving(10)), other: (ending,)}) == [2, 3, 4]


def written(run: RunDir, attempt: Attempt) -> None:
    assert attempt.exit is not None
    job = JobDir(run, attempt.replica)
    job.claim()
    job.write(attempt.exit)
    for name in ("7_batch.log", "7_0_log.out", "7_submitted.pkl"):
        (job.path / name).touch()
    for suffix in ("log", "log.1", "engine.log", "rank1.log", "rank1.engine.log.1", "worker2.log"):
        (run.logs / f"{attempt.replica}.{suffix}").touch()


def test_all_files_of_a_generation_are_removed(run: RunDir) -> None:
    attempts = tuple(past(n, age_s=11 * DAY_S) for n in range(1, 12))
    for attempt in attempts:
        written(run, attempt)
    (run.logs / "router-0.g1.log").touch()
    removed = Retention(run, KEEP).apply({MATH: attempts}, NOW)
    assert removed == [f"math-0.g{n}" for n in range(1, 11)]
    assert names(run.jobs) == ["math-0.g11"]
    assert {name.rpartition(".g")[2].partition(".")[0] for name in names(run.logs)} == {"1", "11"}
    assert [name for name in names(run.logs) if ".g1." in name] == ["router-0.g1.log"]


def test_a_call_is_bounded_and_repeated_after_a_while(run: RunDir) -> None:
    attempts = tuple(past(n, age_s=11 * DAY_S) for n in range(1, MAX_REMOVED + 12))
    for attempt in attempts:
        JobDir(run, attempt.replica).claim()
    clock = 0.0
    retention = Retention(run, KEEP, clock=lambda: clock)
    assert len(retention.apply({MATH: attempts}, NOW)) == MAX_REMOVED
    assert retention.apply({MATH: attempts[MAX_REMOVED:]}, NOW) == []
    clock = INTERVAL_S
    assert len(retention.apply({MATH: attempts[MAX_REMOVED:]}, NOW)) == 10
    assert names(run.jobs) == [attempts[-1].replica]


def test_a_removal_that_was_interrupted_is_completed(run: RunDir) -> None:
    (run.jobs / ".removed-math-0.g1").mkdir()
    Retention(run, KEEP).apply({}, NOW)
    assert names(run.jobs) == []


def test_rotated_events_have_an_age_limit(run: RunDir) -> None:
    older = run.path / "events.jsonl.1"
    for age_s, left in ((KEEP.keep_days * DAY_S - 1, True), (KEEP.keep_days * DAY_S, False)):
        older.touch()
        os.utime(older, (NOW - age_s, NOW - age_s))
        Retention(run, KEEP).apply({}, NOW)
        assert older.exists() is left
