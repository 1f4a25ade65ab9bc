"""The phases of a job: what may follow what, and what the registry and `progress.json` show of it."""

import pytest

from hpc_router.expert.agent.lifecycle import Life
from hpc_router.expert.engines import Failure
from hpc_router.state.job_records import Phase, Reason
from hpc_router.state.registry import State


def test_a_life_with_a_restart() -> None:
    life = Life()
    seen = []
    for phase in (Phase.LOADING, Phase.READY, Phase.RESTARTING, Phase.LOADING, Phase.READY, Phase.DRAINING):
        life.move(phase, failure=Failure(Reason.KILLED, "why") if phase is Phase.RESTARTING else None)
        seen.append(life.state)
    s = State
    assert seen == [s.STARTING, s.READY, s.STARTING, s.STARTING, s.READY, s.DRAINING]
    progress = life.progress()
    assert (progress.restarts, progress.reason, progress.message) == (1, Reason.KILLED, "why")


def test_ready_at_is_the_first_time() -> None:
    life = Life(phase=Phase.LOADING)
    life.move(Phase.READY)
    first = life.ready_at
    life.move(Phase.RESTARTING)
    life.move(Phase.LOADING)
    life.move(Phase.READY)
    assert life.ready_at == first is not None


@pytest.mark.parametrize(
    ("before", "after"), [(Phase.DRAINING, Phase.READY), (Phase.STARTING, Phase.READY), (Phase.READY, Phase.LOADING)]
)
def test_an_unknown_step_names_both_ends(before: Phase, after: Phase) -> None:
    with pytest.raises(ValueError, match=f"no way from {before} to {after}"):
        Life(phase=before).move(after)
