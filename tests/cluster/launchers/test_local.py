"""Jobs on this machine, as real processes through submitit's local executor."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import hpc_router
from hpc_router.cluster.launchers.interface import JobState
from hpc_router.cluster.launchers.local import LocalLauncher
from hpc_router.errors import LaunchError
from hpc_router.state.job_records import FailureReason, JobDir, JobInfo, Process, start_ticks
from hpc_router.state.run_directory import RunDir
from tests.cluster.support import request_of
from tests.support.waiting import eventually_sync


def facts(service: Path, replica: str) -> dict[str, Any]:
    """What the service wrote about itself once it ran."""
    path = service.with_name(replica)
    eventually_sync(path.exists)
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def state(launcher: LocalLauncher, replica: str) -> JobState:
    return launcher.observe([replica])[replica].state


def test_the_job_is_the_service_itself(
    run: RunDir, service: Path, launcher: LocalLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process has no submitit, its own session, no variables of another job, and no inherited signal handlers."""
    monkeypatch.setenv("SLURM_CPU_BIND", "mask")
    assert launcher.submit([request_of(service, "math-0.g1")]) == ["math-0.g1"]
    seen = facts(service, "math-0.g1")
    assert state(launcher, "math-0.g1") is JobState.RUNNING
    process = JobDir(run, "math-0.g1").process()
    assert process is not None
    assert process.pid == seen["pid"]
    assert not any("submitit" in module for module in seen["modules"])
    assert not [key for key in seen["environ"] if key.startswith(("SLURM", "SUBMITIT"))]
    assert seen["sid"] != os.getsid(0)
    assert seen["umask"] == 0o077
    assert seen["usr2"]
    assert seen["environ"]["CUDA_VISIBLE_DEVICES"] == ""


def test_cancel_sends_sigterm(service: Path, launcher: LocalLauncher) -> None:
    launcher.submit([request_of(service, "math-0.g1")])
    facts(service, "math-0.g1")
    launcher.cancel(["math-0.g1"])
    eventually_sync(lambda: state(launcher, "math-0.g1") is JobState.ENDED)
    assert service.with_name("math-0.g1.stopped").read_text() == "SIGTERM"


def test_any_process_of_the_user_can_cancel(run: RunDir, service: Path, launcher: LocalLauncher) -> None:
    """submitit itself can cancel only from the process that submitted the job."""
    launcher.submit([request_of(service, "math-0.g1")])
    facts(service, "math-0.g1")
    program = (
        "import sys; from pathlib import Path; from hpc_router.state.run_directory import RunDir;"
        "from hpc_router.cluster.launchers.local import LocalLauncher;"
        "LocalLauncher(RunDir(Path(sys.argv[1]))).cancel(['math-0.g1'])"
    )
    subprocess.run([sys.executable, "-c", program, str(run.path)], check=True)
    eventually_sync(lambda: state(launcher, "math-0.g1") is JobState.ENDED)


def test_kill_ends_a_job_that_ignores_sigterm(service: Path, launcher: LocalLauncher) -> None:
    launcher.submit([request_of(service, "math-0.g1", how="deaf"), request_of(service, "math-1.g1")])
    pid = facts(service, "math-0.g1")["pid"]
    facts(service, "math-1.g1")
    launcher.cancel(["math-0.g1"])
    assert state(launcher, "math-0.g1") is JobState.RUNNING
    launcher.kill(["math-0.g1"])
    eventually_sync(lambda: state(launcher, "math-0.g1") is JobState.ENDED)
    assert start_ticks(pid) is None
    assert state(launcher, "math-1.g1") is JobState.RUNNING


def test_a_job_survives_its_controller(run: RunDir, service: Path, launcher: LocalLauncher) -> None:
    """A killed controller must not look like an ended job; otherwise a second job would be submitted."""
    launcher.submit([request_of(service, "math-0.g1")])
    facts(service, "math-0.g1")
    info = JobDir(run, "math-0.g1").info()
    assert info is not None
    os.kill(int(info.job_id), signal.SIGKILL)
    eventually_sync(lambda: start_ticks(int(info.job_id)) is None)
    assert state(launcher, "math-0.g1") is JobState.RUNNING
    launcher.cancel(["math-0.g1"])
    eventually_sync(lambda: state(launcher, "math-0.g1") is JobState.ENDED)


def test_a_service_that_ends_ends_its_job(service: Path, launcher: LocalLauncher) -> None:
    launcher.submit([request_of(service, "math-0.g1", how="die")])
    eventually_sync(lambda: state(launcher, "math-0.g1") is JobState.ENDED)


def test_only_the_first_claim_submits(service: Path, run: RunDir, launcher: LocalLauncher) -> None:
    """Eight threads submit at once; one job starts."""
    start, submitted = threading.Barrier(8), []

    def submit() -> None:
        start.wait()
        submitted.extend(launcher.submit([request_of(service, "math-0.g1")]))

    threads = [threading.Thread(target=submit) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert submitted == ["math-0.g1"]
    assert len(list(JobDir(run, "math-0.g1").path.glob("*_submitted.pkl"))) == 1


def test_each_job_has_gpus_of_its_own(service: Path, launcher: LocalLauncher) -> None:
    """Two callers that submit at once get different GPUs. An ended job's GPUs are free again."""
    requests = [request_of(service, f"math-{n}.g1", gpus=1) for n in range(4)]
    threads = [threading.Thread(target=launcher.submit, args=([request],)) for request in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen = sorted(facts(service, r.replica)["environ"]["CUDA_VISIBLE_DEVICES"] for r in requests)
    assert seen == ["0", "1", "2", "3"]
    assert launcher.submit([request_of(service, "code-0.g1", gpus=1)]) == []  # none is free: not even claimed
    launcher.cancel(["math-2.g1"])
    eventually_sync(lambda: state(launcher, "math-2.g1") is JobState.ENDED)
    freed = facts(service, "math-2.g1")["environ"]["CUDA_VISIBLE_DEVICES"]
    assert launcher.submit([request_of(service, "code-0.g1", gpus=1)]) == ["code-0.g1"]
    assert facts(service, "code-0.g1")["environ"]["CUDA_VISIBLE_DEVICES"] == freed


def test_a_refused_submission_is_raised_and_recorded(
    run: RunDir, launcher: LocalLauncher, service: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(LaunchError, match=r"math-0\.g1.*No such file"):
        launcher.submit([request_of(service, "math-0.g1")])
    end = JobDir(run, "math-0.g1").exit()
    assert end is not None
    assert not end.ok


def test_a_program_that_cannot_run_leaves_a_reason(run: RunDir, launcher: LocalLauncher, service: Path) -> None:
    request = request_of(service, "math-0.g1")
    broken = type(request)(request.replica, ("/no/such/python", *request.argv[1:]), request.resources)
    launcher.submit([broken])
    eventually_sync(lambda: state(launcher, "math-0.g1") is JobState.ENDED)
    end = JobDir(run, "math-0.g1").exit()
    assert end is not None
    assert (end.ok, end.reason) == (False, FailureReason.INTERPRETER)


def test_a_job_of_another_version_is_refused(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job's interpreter may have another version of hpc-router than the submitter."""
    from hpc_router.cluster.launchers import job_entry

    job = JobDir(run, "math-0.g1")
    job.claim()
    monkeypatch.setattr(hpc_router, "__version__", "9.9")
    with pytest.raises(SystemExit):
        job_entry.start(str(run.path), {job.replica: ["/bin/true"]}, "0.1")
    end = job.exit()
    assert end is not None
    assert end.reason is FailureReason.INTERPRETER
    assert "0.1" in end.message
    assert "9.9" in end.message


def test_a_job_of_another_host_is_unknown(run: RunDir, launcher: LocalLauncher) -> None:
    """It counts neither as ended nor is it signalled, because its process ids are invalid on this host."""
    job = JobDir(run, "math-0.g1")
    job.claim()
    mine = start_ticks(os.getpid())
    assert mine is not None
    job.write(JobInfo(job_id=str(os.getpid()), host="elsewhere", start_ticks=mine))
    job.write(Process(pid=os.getpid(), start_ticks=mine, host="elsewhere"))
    assert state(launcher, job.replica) is JobState.UNKNOWN
    launcher.cancel([job.replica])
    launcher.kill([job.replica])


def test_a_reused_process_id_is_not_the_job(run: RunDir, launcher: LocalLauncher) -> None:
    job = JobDir(run, "math-0.g1")
    job.claim()
    mine = start_ticks(os.getpid())
    assert mine is not None
    job.write(JobInfo(job_id=str(os.getpid()), host=os.uname().nodename, start_ticks=mine - 1))
    assert state(launcher, job.replica) is JobState.ENDED
    launcher.kill([job.replica])


def test_a_claim_alone_is_pending(run: RunDir, launcher: LocalLauncher) -> None:
    JobDir(run, "math-0.g1").claim()
    assert state(launcher, "math-0.g1") is JobState.PENDING
