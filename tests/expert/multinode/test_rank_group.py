"""The decisions of rank 0 about the reports of the other ranks, with numbers as times."""

from dataclasses import replace
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_router.expert.engines import EngineFailure
from hpc_router.expert.multinode.rank_group import RankGroup
from hpc_router.net.protocol import Action, RankOrder, RankReport, RankState
from hpc_router.state.job_records import FailureReason

SILENCE_S: Final = 10.0
CRASHED: Final = EngineFailure(FailureReason.CRASHED, "ended with exit status 1")


def report(rank: int = 1, *, instance: str = "a", attempt: int = 0, state: RankState = RankState.IDLE) -> RankReport:
    return RankReport(rank, instance, "c", f"n{rank}", attempt, state)


def running(rank: int = 1, *, attempt: int = 1) -> RankReport:
    return report(rank, attempt=attempt, state=RankState.RUNNING)


def ended(reason: str | None, rank: int = 1) -> RankReport:
    return replace(report(rank, attempt=1, state=RankState.ENDED), reason=reason, message="its last words")


def begun(*, nodes: int = 2) -> RankGroup:
    """Returns a group whose ranks all reported at time 0 and run the first attempt."""
    group = RankGroup(nodes, SILENCE_S)
    for rank in range(1, nodes):
        group.on_report(report(rank), now=0.0)
    group.begin("10.0.0.1", 4000)
    for rank in range(1, nodes):
        group.on_report(running(rank), now=0.0)
    return group


def test_an_attempt_waits_for_every_rank() -> None:
    group = RankGroup(3, SILENCE_S)
    assert group.unavailable(now=0.0) == [1, 2]
    assert group.on_report(report(1), now=0.0) == RankOrder(Action.WAIT)
    assert group.unavailable(now=0.0) == [2]
    group.on_report(report(2), now=1.0)
    assert group.unavailable(now=1.0) == []
    group.begin("10.0.0.1", 4000)
    assert group.on_report(report(1), now=2.0) == RankOrder(Action.RUN, 1, "10.0.0.1", 4000)


def test_the_next_attempt_waits_until_the_last_ones_engines_have_ended() -> None:
    group = begun()
    group.end()
    assert group.unavailable(now=1.0) == [1]
    assert group.on_report(running(), now=1.0).action is Action.WAIT
    group.on_report(report(attempt=1), now=2.0)
    assert group.unavailable(now=2.0) == []
    group.begin("10.0.0.1", 4001)
    assert group.on_report(report(attempt=1), now=3.0) == RankOrder(Action.RUN, 2, "10.0.0.1", 4001)


def test_silence_is_a_loss_exactly_at_the_limit() -> None:
    group = begun()
    assert group.find_failure(now=SILENCE_S - 0.001) is None
    failure = group.find_failure(now=SILENCE_S)
    assert failure == EngineFailure(FailureReason.RANK_LOST, "rank 1 on n1 sent no report for 10 s")
    assert group.unavailable(now=SILENCE_S) == [1]


def test_a_restarted_rank_is_lost() -> None:
    group = begun()
    restarted = report(instance="b")
    assert group.on_report(restarted, now=1.0).action is Action.WAIT
    assert group.find_failure(now=1.0) == EngineFailure(FailureReason.RANK_LOST, "rank 1 on n1 was restarted")
    group.end()
    assert group.unavailable(now=1.0) == []
    group.begin("10.0.0.1", 4001)
    assert group.on_report(restarted, now=2.0).action is Action.RUN
    assert group.find_failure(now=2.0) is None


@pytest.mark.parametrize(
    ("reported", "expected"),
    [
        ("out_of_memory", FailureReason.OUT_OF_MEMORY),
        ("crashed", FailureReason.CRASHED),
        ("of_another_version", FailureReason.CRASHED),
    ],
)
def test_a_rank_reports_why_its_engine_ended(reported: str, expected: FailureReason) -> None:
    group = begun(nodes=3)
    group.on_report(ended(reported, rank=2), now=1.0)
    assert group.find_failure(now=1.0) == EngineFailure(expected, "rank 2 on n2: its last words")


def test_the_end_of_an_earlier_attempt_is_no_failure() -> None:
    group = begun()
    group.on_report(ended("killed"), now=1.0)
    group.end()
    group.begin("10.0.0.1", 4001)
    assert group.find_failure(now=2.0) is None


def test_a_specific_reason_of_the_own_engine_counts() -> None:
    own = EngineFailure(FailureReason.OUT_OF_MEMORY, "CUDA out of memory")
    group = begun()
    group.on_report(ended("killed"), now=1.0)
    assert group.find_cause(own, ended_at=1.0, now=1.0) == own


@pytest.mark.parametrize("unspecific", [FailureReason.CRASHED, FailureReason.CUDA])
def test_an_unspecific_reason_waits_for_the_other_ranks(unspecific: FailureReason) -> None:
    """The other rank's report decides, as soon as it arrives."""
    own = EngineFailure(unspecific, "connection closed by peer")
    group = begun()
    assert group.find_cause(own, ended_at=1.0, now=1.0) is None
    group.on_report(ended("killed"), now=2.0)
    assert group.find_cause(own, ended_at=1.0, now=2.0) == EngineFailure(
        FailureReason.KILLED, "rank 1 on n1: its last words"
    )


def test_two_unspecific_reasons_leave_the_own_one() -> None:
    group = begun()
    group.on_report(ended("crashed"), now=2.0)
    assert group.find_cause(CRASHED, ended_at=1.0, now=2.0) == CRASHED


def test_a_rank_that_is_silent_too_was_lost() -> None:
    group = begun()
    assert group.find_cause(CRASHED, ended_at=1.0, now=SILENCE_S - 0.001) is None
    find_cause = group.find_cause(CRASHED, ended_at=1.0, now=SILENCE_S)
    assert find_cause is not None
    assert find_cause.reason is FailureReason.RANK_LOST


def test_all_ranks_receive_the_order_to_stop() -> None:
    group = begun(nodes=3)
    group.stop()
    assert not group.all_stopped(now=1.0)
    assert group.on_report(running(1), now=1.0).action is Action.STOP
    assert not group.all_stopped(now=1.0)
    assert group.on_report(running(2), now=2.0).action is Action.STOP
    assert group.all_stopped(now=2.0)
    assert group.missing_rank() is None


def test_dead_ranks_need_no_order() -> None:
    group = begun()
    group.stop()
    assert not group.all_stopped(now=SILENCE_S - 0.001)
    assert group.all_stopped(now=SILENCE_S)
    assert group.missing_rank() == EngineFailure(
        FailureReason.RANK_LOST, "rank 1 on n1 was lost before it got the order to stop"
    )


def test_missing_ranks_are_named_with_their_known_nodes() -> None:
    group = begun(nodes=3)
    group.end()
    group.on_report(report(1, attempt=1), now=15.0)
    failure = group.assembly_failure(now=20.0, waited_s=30.0)
    assert failure == EngineFailure(FailureReason.RANK_LOST, "rank 2 on n2 did not report in within 30 s")


@pytest.mark.parametrize("rank", [0, 2, -1])
def test_an_unknown_rank_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"rank {rank} reports; there are 1 to 1"):
        RankGroup(2, SILENCE_S).on_report(report(rank), now=0.0)


@given(st.lists(st.tuples(st.sampled_from(["on_report", "begin", "end"]), st.integers(1, 2), st.sampled_from("ab"))))
def test_no_rank_runs_an_attempt_without_the_others(steps: list[tuple[str, int, str]]) -> None:
    """For any order of events: an attempt runs only with all ranks, and only on ranks that were part of it."""
    group, now, present = RankGroup(3, SILENCE_S), 0.0, dict[int, str]()
    taking_part: dict[int, str] | None = None
    for what, rank, instance in steps:
        now += 1.0
        if what == "on_report":
            present[rank] = instance
            order = group.on_report(report(rank, instance=instance), now=now)
            expected = taking_part is not None and taking_part[rank] == instance
            assert (order.action is Action.RUN) == expected
        elif what == "end":
            group.end()
            taking_part = None
        elif taking_part is None and not group.unavailable(now=now):
            group.begin("10.0.0.1", 4000)
            taking_part = dict(present)
