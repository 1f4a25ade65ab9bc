"""The phases of a job: allowed transitions, and what the registry and `progress.json` show."""

import pytest

from hpc_router.expert.agent.lifecycle import JobLifecycle
from hpc_router.expert.engines import EngineFailure
from hpc_router.expert.staging.staging import StageReport
from hpc_router.state.job_records import FailureReason, JobPhase
from hpc_router.state.registry import State


def test_a_life_with_a_restart() -> None:
    life = JobLifecycle()
    seen = []
    for phase in (
        JobPhase.LOADING,
        JobPhase.READY,
        JobPhase.RESTARTING,
        JobPhase.LOADING,
        JobPhase.READY,
        JobPhase.DRAINING,
    ):
        life.move(phase, failure=EngineFailure(FailureReason.KILLED, "why") if phase is JobPhase.RESTARTING else None)
        seen.append(life.state)
    s = State
    assert seen == [s.STARTING, s.READY, s.STARTING, s.STARTING, s.READY, s.DRAINING]
    progress = life.progress()
    assert (progress.restarts, progress.reason, progress.message) == (1, FailureReason.KILLED, "why")


def test_ready_at_is_the_first_time() -> None:
    life = JobLifecycle(phase=JobPhase.LOADING)
    life.move(JobPhase.READY)
    first = life.ready_at
    life.move(JobPhase.RESTARTING)
    life.move(JobPhase.LOADING)
    life.move(JobPhase.READY)
    assert life.ready_at == first is not None


@pytest.mark.parametrize(
    ("before", "after"),
    [(JobPhase.DRAINING, JobPhase.READY), (JobPhase.STARTING, JobPhase.READY), (JobPhase.READY, JobPhase.LOADING)],
)
def test_an_unknown_step_names_both_ends(before: JobPhase, after: JobPhase) -> None:
    with pytest.raises(ValueError, match=f"no transition from {before} to {after}"):
        JobLifecycle(phase=before).move(after)


def test_the_message_tells_of_staging_until_the_engine_is_ready_or_fails() -> None:
    life = JobLifecycle(stage=StageReport(text="copies"))
    assert (life.progress().message, life.progress().stage_bytes, life.progress().load_s) == ("copies", None, None)
    life.stage.stage_s, life.stage.copied, life.stage.text = 2.0, 7, "was copied"
    life.move(JobPhase.LOADING)
    assert (life.progress().message, life.progress().stage_s, life.progress().stage_bytes) == ("was copied", 2.0, 7)
    life.move(JobPhase.READY)
    assert life.progress().message is None
    assert life.progress().load_s is not None
    life.move(JobPhase.RESTARTING, failure=EngineFailure(FailureReason.KILLED, "why"))
    life.move(JobPhase.LOADING)
    assert life.progress().message == "why"
