"""The tasks of one `srun` step: which task claims a replica and which ones join it. Claims themselves: test_loop."""

import os
import socket
from pathlib import Path

import pytest

from hpc_router.cluster.commands.manual_start import Step, claim_expert, join_expert, rank_of, step_of
from hpc_router.errors import ConfigError, LaunchError
from hpc_router.state.job_records import JobDir, Runner, start_ticks
from hpc_router.state.run_directory import make_run

TASK = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "2", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}
STEP = Step("7", "2", task=1, tasks=2)


def test_a_task_of_a_step() -> None:
    assert step_of(TASK) == STEP
    assert step_of(TASK | {"HPC_ROUTER_RANK": "0"}) == Step("7", "2", task=0, tasks=2)


@pytest.mark.parametrize("step", [None, "", "4294967291", "4294967290", "interactive"])
def test_outside_srun_there_is_no_step(step: str | None) -> None:
    """The batch script and an interactive shell run in steps that Slurm starts itself."""
    environment = {key: value for key, value in TASK.items() if key != "SLURM_STEP_ID"}
    assert step_of(environment | ({} if step is None else {"SLURM_STEP_ID": step})) is None
    assert step_of({"SLURM_STEP_ID": "0"}) is None


def test_one_task_per_node() -> None:
    assert rank_of(STEP, "big", nodes=2) == 1
    assert rank_of(STEP, "small", nodes=1) == 0  # each task a replica of its own
    assert rank_of(None, "small", nodes=1) == 0


@pytest.mark.parametrize("step", [None, STEP])
def test_too_few_tasks(step: Step | None) -> None:
    with pytest.raises(ConfigError, match=r"experts\.big\.resources\.nodes=3: .* srun --nodes=3 --ntasks-per-node=1"):
        rank_of(step, "big", nodes=3)


def test_a_step_is_claimed_by_its_first_task_and_joined_by_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run")
    for name, value in TASK.items():
        monkeypatch.setenv(name, value)
    replica = claim_expert(run, "big")
    assert replica == "big-h0.g1"
    info, process = JobDir(run, replica).info(), JobDir(run, replica).process()
    assert info is not None
    assert (info.job_id, info.runner, info.shared, info.start_ticks) == ("7", Runner.STEP, True, None)
    assert process is not None
    here = (os.getpid(), start_ticks(os.getpid()), socket.gethostname(), "2")
    assert (process.pid, process.start_ticks, process.host, process.step_id) == here
    assert join_expert(run, "big", STEP, clock=lambda: 0.0, sleep=lambda _: no_time_passes()) == replica


def no_time_passes() -> None:
    raise AssertionError("it was there at once")


def test_by_hand_outside_slurm_the_process_is_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    job = JobDir(run, claim_expert(run, "big"))
    info = job.info()
    assert info is not None
    assert (info.job_id, info.runner) == (str(os.getpid()), Runner.PROCESS)
    assert job.process() is None


@pytest.mark.parametrize(
    "other", [Step("8", "2", 1, 2), Step("7", "3", 1, 2)], ids=["of another job", "another step of the job"]
)
def test_a_claim_of_another_step_is_not_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: Step) -> None:
    run, now = make_run(tmp_path / "run"), [0.0]
    for name, value in TASK.items():
        monkeypatch.setenv(name, value)
    claim_expert(run, "big")

    def sleep(delay_s: float) -> None:
        now[0] += delay_s

    with pytest.raises(LaunchError, match="claimed nothing in 120 s"):
        join_expert(run, "big", other, clock=lambda: now[0], sleep=sleep)
    with pytest.raises(LaunchError):
        join_expert(run, "bigger", STEP, clock=lambda: now[0], sleep=sleep)
