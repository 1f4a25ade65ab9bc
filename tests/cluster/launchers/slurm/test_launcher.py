"""The state of a Slurm job, from its own files and from a snapshot of the queue."""

import os
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest

from hpc_router.cluster.launchers.interface import JobState
from hpc_router.cluster.launchers.slurm.launcher import MIN_MISSED_ANSWERS, SETTLE_S, SlurmLauncher
from hpc_router.cluster.launchers.slurm.pending_reasons import explain_pending
from hpc_router.cluster.launchers.slurm.squeue import Queue, QueuedJob, QueueSnapshot
from hpc_router.config.schema import Deployment
from hpc_router.state.job_reader import JobReader
from hpc_router.state.job_records import (
    Ended,
    Exit,
    FailureReason,
    JobDir,
    JobInfo,
    Process,
    Runner,
    Stop,
    Submitter,
    start_ticks,
)
from hpc_router.state.run_directory import RunDir, make_run

NOW = time.time()


class FixedQueue(Queue):
    """A queue with a fixed snapshot."""

    def __init__(self, run: RunDir, jobs: dict[str, QueuedJob], asked_at: float = NOW) -> None:
        super().__init__(run, ask_s=30.0)
        self.now: QueueSnapshot | None = QueueSnapshot(asked_at, jobs)

    def snapshot(self, *, fresh: bool = False) -> QueueSnapshot | None:
        return self.now


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "run")


def cancellations(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The arguments of each scancel that will be run, none of which has an effect."""
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr("hpc_router.cluster.launchers.slurm.launcher.running_steps", lambda _: set())
    monkeypatch.setattr("hpc_router.cluster.launchers.slurm.launcher._scancel", lambda *words: calls.append(words))
    return calls


def submitted(run: RunDir, *, runner: Runner = Runner.SLURM, at: float = NOW, shared: bool = False) -> JobDir:
    job = JobDir(run, "math-0.g1")
    job.claim()
    job.write(JobInfo("7", "login1", submitted_at=at, runner=runner, shared=shared))
    return job


def observed(run: RunDir, queued: QueuedJob | None, asked_at: float = NOW):  # type: ignore[no-untyped-def]
    queue = FixedQueue(run, {} if queued is None else {"7": queued}, asked_at)
    return SlurmLauncher(run, Deployment(), queue, JobReader(run)).observe(["math-0.g1"])["math-0.g1"]


@pytest.mark.parametrize(
    ("word", "state"),
    [("PENDING", JobState.PENDING), ("COMPLETING", JobState.ENDING), ("NODE_FAIL", JobState.ENDED)],
)
def test_the_queue_shows_the_state_of_a_job_without_records(run: RunDir, word: str, state: JobState) -> None:
    submitted(run)
    assert observed(run, QueuedJob(word)).state is state


def test_the_report_of_a_waiting_job_has_reason_and_estimate(run: RunDir) -> None:
    submitted(run)
    report = observed(run, QueuedJob("PENDING", reason="Priority", starts_at=NOW + 60))
    assert (report.pending_reason, report.starts_at, report.ends_at) == ("Priority", NOW + 60, None)


def test_a_step_that_does_not_start_waits_for_the_resources_of_its_job(run: RunDir) -> None:
    job = submitted(run, runner=Runner.STEP, at=time.time())
    held = QueuedJob("RUNNING", node="n1")
    assert observed(run, held).pending_reason is None
    submitted(run, runner=Runner.STEP, at=time.time() - 6)
    report = observed(run, held)
    assert (report.state, report.pending_reason) == (JobState.PENDING, "StepResources")
    assert "other steps of the job" in explain_pending("StepResources", "7").what
    job.write(Process(1, 1, "n1", step_id="3"))
    assert observed(run, held).pending_reason is None


def test_the_report_of_a_running_job_has_node_and_end(run: RunDir) -> None:
    job = submitted(run)
    job.write(Process(1, 1, "n2", step_id="0"))
    report = observed(run, QueuedJob("RUNNING", node="n2", ends_at=NOW + 3600))
    assert (report.state, report.node, report.ends_at) == (JobState.RUNNING, "n2", NOW + 3600)


def test_its_own_files_are_newer_than_the_view(run: RunDir) -> None:
    job = submitted(run)
    pending = QueuedJob("PENDING")
    job.write(Process(1, 1, "n2"))
    assert observed(run, pending).state is JobState.RUNNING
    job.write(Exit(ok=False, reason=FailureReason.WEIGHTS, message="no such model"))
    assert observed(run, pending).state is JobState.ENDING
    job.write(Ended(1, NOW))
    assert observed(run, pending).state is JobState.ENDED


def test_slurms_state_is_awaited_for_a_job_without_exit_record(run: RunDir) -> None:
    """A step that ends with status 0 on a lost node is not a crash."""
    job = submitted(run)
    job.write(Ended(0, time.time()))
    assert observed(run, QueuedJob("RUNNING")).state is JobState.ENDING
    report = observed(run, QueuedJob("NODE_FAIL", node="n1"))
    assert report.state is JobState.ENDED
    assert report.end is not None
    assert report.end.reason is FailureReason.NODE_FAILED
    job.write(Ended(0, time.time() - SETTLE_S - 1))
    assert observed(run, QueuedJob("RUNNING")).state is JobState.ENDED


def test_a_job_submitted_after_the_view_is_not_lost(run: RunDir) -> None:
    submitted(run, at=NOW)
    assert observed(run, None, asked_at=NOW - 5).state is JobState.PENDING
    assert observed(run, None, asked_at=NOW + 3600).state is JobState.PENDING, "clocks of two hosts are not compared"


def test_a_job_that_slurm_has_forgotten_is_missing_in_answers_of_ones_own(run: RunDir) -> None:
    submitted(run)
    queue = FixedQueue(run, {})
    launcher = SlurmLauncher(run, Deployment(), queue, JobReader(run))
    for answered in range(MIN_MISSED_ANSWERS + 1):
        queue.answers = answered
        state = launcher.observe(["math-0.g1"])["math-0.g1"].state
        assert state is (JobState.ENDED if answered == MIN_MISSED_ANSWERS else JobState.PENDING)


@pytest.mark.parametrize(
    "record", [Exit(ok=False, reason=FailureReason.UNANSWERED, message="Socket timed out"), Stop(cancel_at=NOW)]
)
def test_a_job_submitted_although_sbatch_failed_is_cancelled(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, record: Exit | Stop
) -> None:
    """sbatch may time out and have submitted all the same, or its host may have died before the job was recorded."""
    job = JobDir(run, "math-0.g1")
    job.claim()
    queued = QueuedJob("PENDING", name="math-0.g1:demo", folder=str(run.path))
    launcher = SlurmLauncher(run, Deployment(), FixedQueue(run, {"7": queued}), JobReader(run))
    calls = cancellations(monkeypatch)
    assert launcher.remaining(["math-0.g1"]) == []
    job.write(record)
    launcher = SlurmLauncher(run, Deployment(), FixedQueue(run, {"7": queued}), JobReader(run))
    assert launcher.remaining(["math-0.g1"]) == ["7"]
    assert calls == [("7",)]


def submitting(run: RunDir, *replicas: str, ticks: int = 0) -> list[JobDir]:
    """Claimed replicas of one job, whose submitter started at `ticks`; 0: it has died."""
    jobs = [JobDir(run, replica) for replica in replicas]
    for job in jobs:
        job.claim()
        job.write(
            Submitter(os.getpid(), ticks, socket.gethostname(), replicas, ("expert", job.replica), "6", "of the config")
        )
    return jobs


def observed_queue(run: RunDir, name: str) -> SlurmLauncher:
    queue = FixedQueue(run, {"7": QueuedJob("RUNNING", name=f"{name}:run", folder=str(run.path))})
    launcher = SlurmLauncher(run, Deployment(), queue, JobReader(run))
    launcher.observe([name])
    return launcher


def test_a_job_whose_submitter_died_before_the_record_is_recorded(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = cancellations(monkeypatch)
    jobs = submitting(run, "math-0.g2", "math-1.g2")
    observed_queue(run, "math-0.g2")
    claimed_at = jobs[0].claimed_at()
    for job in jobs:
        info = job.info()
        assert info is not None
        assert abs(info.submitted_at - claimed_at) < 5
        assert replace(info, submitted_at=0.0) == JobInfo(
            "7", socket.gethostname(), submitted_at=0.0, argv=("expert", job.replica), runner=Runner.SLURM, shared=True,
            after="6", revision="of the config",
        )  # fmt: skip
    assert "job 7 (math-0.g2:run) was submitted, but not recorded" in caplog.text
    assert calls == []


def test_a_submitter_that_lives_records_its_jobs_itself(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = cancellations(monkeypatch)
    (job,) = submitting(run, "math-0.g2", ticks=start_ticks(os.getpid()) or 0)
    observed_queue(run, "math-0.g2")
    assert job.info() is None
    assert calls == []


@pytest.mark.parametrize(
    "record", [Exit(ok=False, reason=FailureReason.UNANSWERED, message="never submitted"), Stop(cancel_at=NOW)]
)
def test_a_job_that_was_given_up_is_cancelled_and_not_recorded(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, record: Exit | Stop
) -> None:
    calls = cancellations(monkeypatch)
    first, second = submitting(run, "math-0.g2", "math-1.g2")
    first.write(record)
    observed_queue(run, "math-0.g2")
    assert (first.info(), second.info()) == (None, None)
    assert calls == [("7",)]


def test_without_a_snapshot_the_files_count(run: RunDir) -> None:
    submitted(run)
    queue = FixedQueue(run, {})
    queue.now = None
    assert (
        SlurmLauncher(run, Deployment(), queue, JobReader(run)).observe(["math-0.g1"])["math-0.g1"].state
        is JobState.PENDING
    )


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("NODE_FAIL", FailureReason.NODE_FAILED),
        ("PREEMPTED", FailureReason.PREEMPTED),
        ("TIMEOUT", FailureReason.WALLTIME),
        ("OUT_OF_MEMORY", FailureReason.OUT_OF_MEMORY),
        ("CANCELLED", FailureReason.CANCELLED),
    ],
)
def test_slurms_state_is_the_reason_of_a_job_without_exit_record(run: RunDir, word: str, reason: FailureReason) -> None:
    job = submitted(run)
    job.write(Ended(137, NOW))
    end = observed(run, QueuedJob(word, node="n1")).end
    assert end is not None
    assert end.reason is reason


@pytest.mark.parametrize(
    ("ended", "reason"),
    [
        (Ended(137, NOW), FailureReason.KILLED),
        (Ended(143, NOW), FailureReason.CANCELLED),
        (Ended(1, NOW, "cluster.setup[0] failed on n1"), FailureReason.SETUP),
        (Ended(1, NOW), FailureReason.CRASHED),
    ],
)
def test_the_batch_scripts_record_counts_without_slurms_state(run: RunDir, ended: Ended, reason: FailureReason) -> None:
    submitted(run).write(ended)
    end = observed(run, None).end
    assert end is not None
    assert (end.reason, end.at) == (reason, NOW)


def test_a_job_is_cancelled_with_sigterm_only(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain scancel gives a job only the site's KillWait, which may be shorter than the drain."""
    submitted(run).write(Process(1, 1, "n1", step_id="0"))
    launcher = SlurmLauncher(run, Deployment(), FixedQueue(run, {}), JobReader(run))
    calls = cancellations(monkeypatch)
    launcher.cancel(["math-0.g1"])
    assert calls == [("--state=PENDING", "7"), ("--signal=TERM", "7")]


def test_slurm_does_not_start_a_cancelled_job_again(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job whose node did not start it is COMPLETING, then PENDING again: neither filter of scancel finds it."""
    submitted(run)
    launcher = SlurmLauncher(run, Deployment(), FixedQueue(run, {"7": QueuedJob("COMPLETING")}), JobReader(run))
    calls = cancellations(monkeypatch)
    launcher.cancel(["math-0.g1"])
    assert calls[-1] == ("7",)


def test_a_replica_that_shares_its_job_is_cancelled_alone(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted(run, shared=True).write(Process(1, 1, "n1", step_id="3"))
    other = JobDir(run, "math-1.g1")
    other.claim()
    other.write(JobInfo("7", "login1", runner=Runner.SLURM, shared=True))
    launcher = SlurmLauncher(run, Deployment(), FixedQueue(run, {}), JobReader(run))
    calls = cancellations(monkeypatch)
    launcher.cancel(["math-0.g1"])
    assert calls == [("--signal=TERM", "7.3")]
    for job in (JobDir(run, "math-0.g1"), other):
        job.write(Stop(cancel_at=NOW))
    launcher.cancel(["math-1.g1"])
    assert ("--state=PENDING", "7") in calls


def test_cancelling_a_step_never_ends_the_users_job(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    job = submitted(run, runner=Runner.STEP, shared=True)
    job.write(Process(1, 1, "n1", step_id="2"))
    job.write(Stop(cancel_at=NOW))
    launcher = SlurmLauncher(run, Deployment(), FixedQueue(run, {"7": QueuedJob("RUNNING")}), JobReader(run))
    calls = cancellations(monkeypatch)
    launcher.cancel(["math-0.g1"])
    launcher.kill(["math-0.g1"])
    assert calls == [("--signal=TERM", "7.2"), ("--signal=KILL", "7.2")]
    assert launcher.remaining(["math-0.g1"]) == []


def test_remaining_jobs_come_from_slurm(run: RunDir) -> None:
    job = submitted(run)
    job.write(Ended(0, NOW))
    for word, left in (("COMPLETING", ["7"]), ("RUNNING", ["7"]), ("COMPLETED", [])):
        launcher = SlurmLauncher(run, Deployment(), FixedQueue(run, {"7": QueuedJob(word)}), JobReader(run))
        assert launcher.remaining(["math-0.g1"]) == left
