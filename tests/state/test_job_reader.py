"""The records of a job are read when its folder has changed, and never taken as missing when they cannot be read."""

import os
from pathlib import Path

import pytest

from hpc_router.state import job_reader
from hpc_router.state.atomic_files import load_json
from hpc_router.state.job_reader import SAME_PASS_S, SETTLED_S, JobReader
from hpc_router.state.job_records import FailureReason, JobDir, JobInfo, JobPhase, JobProgress, Runner, Stop, Submitter
from hpc_router.state.run_directory import RunDir, make_run


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "run")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were parsed."""
    names: list[str] = []

    def counted(path: Path) -> dict[str, object]:
        names.append(path.name)
        return load_json(path)

    monkeypatch.setattr(job_reader, "load_json", counted)
    return names


def claimed(run: RunDir) -> JobDir:
    job = JobDir(run, "math-0.g1")
    job.claim()
    return job


def test_all_records_are_read_at_once(run: RunDir) -> None:
    job = claimed(run)
    info = JobInfo("7", "login", gpus=(0, 1), argv=("a",), runner=Runner.SLURM)
    progress = JobProgress(JobPhase.LOADING, FailureReason.CUDA)
    for record in (info, progress, Stop(drain_at=1.0)):
        job.write(record)
    records = JobReader(run).read("math-0.g1")
    assert records is not None
    assert (records.info, records.progress, records.stop) == (info, progress, Stop(drain_at=1.0))
    assert (records.exit, records.process, records.ended, records.submitter) == (None, None, None, None)
    assert records.claimed_at == pytest.approx(job.claimed_at())
    assert JobReader(run).read("math-0.g2") is None


def test_a_folder_that_stands_still_is_not_read_again(run: RunDir, reads: list[str]) -> None:
    """Only once its time was the same for a while: a change in the same tick of the clock leaves no trace in it."""
    clock, job = Clock(), claimed(run)
    reader = JobReader(run, clock=clock)
    job.write(Stop(drain_at=1.0))
    counts = []
    for clock.now in (0.0, SAME_PASS_S / 2, SETTLED_S - 1, SETTLED_S, 2 * SETTLED_S, 9 * SETTLED_S):
        reader.read("math-0.g1")
        counts.append(len(reads))
    assert counts == [1, 1, 2, 3, 3, 3]
    job.write(Stop(drain_at=1.0, cancel_at=2.0))
    records = reader.read("math-0.g1")
    assert records is not None
    assert records.stop == Stop(drain_at=1.0, cancel_at=2.0)


def test_a_change_that_the_folders_time_does_not_show_is_found(run: RunDir) -> None:
    clock, job = Clock(), claimed(run)
    reader = JobReader(run, clock=clock)
    job.write(Stop(drain_at=1.0))
    os.utime(job.path, (5.0, 5.0))
    reader.read("math-0.g1")
    job.write(Stop(drain_at=1.0, cancel_at=2.0))
    os.utime(job.path, (5.0, 5.0))
    clock.now = SETTLED_S
    records = reader.read("math-0.g1")
    assert records is not None
    assert records.stop == Stop(drain_at=1.0, cancel_at=2.0)


def test_a_half_copied_record_is_read_until_it_is_whole(run: RunDir) -> None:
    clock, job = Clock(), claimed(run)
    reader = JobReader(run, clock=clock)
    path = job.path / "stop.json"
    path.write_text('{"drain_at": 1.')
    for clock.now in (0.0, SETTLED_S, 2 * SETTLED_S):
        records = reader.read("math-0.g1")
        assert records is not None
        assert records.stop is None
    path.write_text('{"drain_at": 1.0}')  # in place: the folder does not change
    clock.now = 3 * SETTLED_S
    records = reader.read("math-0.g1")
    assert records is not None
    assert records.stop == Stop(drain_at=1.0)


def test_a_record_that_cannot_be_read_is_not_missing(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its `job.json` a running job would look like a claim that was never submitted, and be replaced."""
    claimed(run).write(JobInfo("7", "login"))

    def fails(_path: Path) -> dict[str, object]:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(job_reader, "load_json", fails)
    with pytest.raises(OSError, match="Input/output error"):
        JobReader(run).read("math-0.g1")


def test_the_age_of_a_claim_is_that_of_its_submission(run: RunDir) -> None:
    """Not of the last write: a job that was not recorded writes its process and its progress there."""
    job = claimed(run)
    job.write(Submitter(1, 1, "login"))
    os.utime(job.path / "submitter.json", (5.0, 5.0))
    job.write(JobProgress(JobPhase.READY))
    records = JobReader(run).read("math-0.g1")
    assert records is not None
    assert records.claimed_at == 5.0
