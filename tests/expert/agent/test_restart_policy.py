"""When a failed engine is started again: values exactly at the limits."""

import pytest

from hpc_router.expert.agent.restart_policy import STABLE_S, RestartPolicy
from hpc_router.state.job_records import PERMANENT, FailureReason


def test_pauses_double_until_the_limit_of_restarts() -> None:
    restarts = RestartPolicy(max_in_a_row=3)
    pauses = [restarts.after_failure(FailureReason.CRASHED, ready_s=0, chance=0) for _ in range(4)]
    assert pauses == [1.0, 2.0, 4.0, None]
    assert restarts.total == 3


def test_chance_shortens_a_pause_by_up_to_a_half() -> None:
    assert RestartPolicy(max_in_a_row=1).after_failure(FailureReason.KILLED, ready_s=0, chance=1.0) == 0.5


def test_pauses_have_an_upper_bound() -> None:
    assert RestartPolicy(max_in_a_row=99, in_a_row=50).after_failure(FailureReason.CRASHED, ready_s=0, chance=0) == 60.0


def test_an_engine_that_was_ready_for_long_starts_with_a_clean_record() -> None:
    restarts = RestartPolicy(max_in_a_row=1, in_a_row=1, total=1)
    assert restarts.after_failure(FailureReason.CRASHED, ready_s=STABLE_S - 0.001, chance=0) is None
    assert restarts.after_failure(FailureReason.CRASHED, ready_s=STABLE_S, chance=0) == 1.0
    assert restarts.total == 2


def test_no_restart_is_allowed() -> None:
    assert RestartPolicy(max_in_a_row=0).after_failure(FailureReason.CRASHED, ready_s=0, chance=0) is None


@pytest.mark.parametrize("reason", sorted(PERMANENT))
def test_a_permanent_failure_is_not_restarted(reason: FailureReason) -> None:
    assert RestartPolicy(max_in_a_row=3).after_failure(reason, ready_s=STABLE_S, chance=0) is None
