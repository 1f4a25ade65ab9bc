"""What rank 0 makes of the other ranks' reports, as tables over a clock of numbers."""

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
    """All ranks have reported in at 0 and run the first attempt."""
    group = RankGroup(nodes, SILENCE_S)
    for rank in range(1, nodes):
        group.heard(report(rank), now=0.0)
    group.begin("10.0.0.1", 4000)
    for rank in range(1, nodes):
        group.heard(running(rank), now=0.0)
    return group


def test_an_attempt_waits_for_every_rank() -> None:
    group = RankGroup(3, SILENCE_S)
    assert group.absent(now=0.0) == [1, 2]
    assert group.heard(report(1), now=0.0) == RankOrder(Action.WAIT)
    assert group.absent(now=0.0) == [2]
    group.heard(report(2), now=1.0)
    assert group.absent(now=1.0) == []
    group.begin("10.0.0.1", 4000)
    assert group.heard(report(1), now=2.0) == RankOrder(Action.RUN, 1, "10.0.0.1", 4000)


def test_the_next_attempt_waits_until_the_last_ones_engines_have_ended() -> None:
    group = begun()
    group.end()
    assert group.absent(now=1.0) == [1]
    assert group.heard(running(), now=1.0).action is Action.WAIT
    group.heard(report(attempt=1), now=2.0)
    assert group.absent(now=2.0) == []
    group.begin("10.0.0.1", 4001)
    assert group.heard(report(attempt=1), now=3.0) == RankOrder(Action.RUN, 2, "10.0.0.1", 4001)


def test_silence_is_a_loss_exactly_at_the_limit() -> None:
    group = begun()
    assert group.trouble(now=SILENCE_S - 0.001) is None
    failure = group.trouble(now=SILENCE_S)
    assert failure == EngineFailure(FailureReason.RANK_LOST, "rank 1 on n1 has not been heard of for 10 s")
    assert group.absent(now=SILENCE_S) == [1]


def test_another_process_than_before_has_nothing_of_the_engine() -> None:
    group = begun()
    anew = report(instance="b")
    assert group.heard(anew, now=1.0).action is Action.WAIT
    assert group.trouble(now=1.0) == EngineFailure(FailureReason.RANK_LOST, "rank 1 on n1 was restarted")
    group.end()
    assert group.absent(now=1.0) == []
    group.begin("10.0.0.1", 4001)
    assert group.heard(anew, now=2.0).action is Action.RUN
    assert group.trouble(now=2.0) is None


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("out_of_memory", FailureReason.OUT_OF_MEMORY),
        ("crashed", FailureReason.CRASHED),
        ("of_another_version", FailureReason.CRASHED),
    ],
)
def test_a_rank_whose_engine_ended_says_why(said: str, meant: FailureReason) -> None:
    group = begun(nodes=3)
    group.heard(ended(said, rank=2), now=1.0)
    assert group.trouble(now=1.0) == EngineFailure(meant, "rank 2 on n2: its last words")


def test_the_end_of_an_earlier_attempt_is_no_trouble() -> None:
    group = begun()
    group.heard(ended("killed"), now=1.0)
    group.end()
    group.begin("10.0.0.1", 4001)
    assert group.trouble(now=2.0) is None


def test_an_engine_that_can_say_why_it_ended_is_believed() -> None:
    own = EngineFailure(FailureReason.OUT_OF_MEMORY, "CUDA out of memory")
    group = begun()
    group.heard(ended("killed"), now=1.0)
    assert group.cause(own, ended_at=1.0, now=1.0) == own


@pytest.mark.parametrize("vague", [FailureReason.CRASHED, FailureReason.CUDA])
def test_an_engine_that_lost_a_peer_says_nothing_of_use(vague: FailureReason) -> None:
    """The other rank does, as soon as it is heard."""
    own = EngineFailure(vague, "connection closed by peer")
    group = begun()
    assert group.cause(own, ended_at=1.0, now=1.0) is None
    group.heard(ended("killed"), now=2.0)
    assert group.cause(own, ended_at=1.0, now=2.0) == EngineFailure(
        FailureReason.KILLED, "rank 1 on n1: its last words"
    )


def test_nor_does_a_rank_that_crashed_because_the_first_did() -> None:
    group = begun()
    group.heard(ended("crashed"), now=2.0)
    assert group.cause(CRASHED, ended_at=1.0, now=2.0) == CRASHED


def test_a_rank_that_falls_silent_with_it_was_lost() -> None:
    group = begun()
    assert group.cause(CRASHED, ended_at=1.0, now=SILENCE_S - 0.001) is None
    cause = group.cause(CRASHED, ended_at=1.0, now=SILENCE_S)
    assert cause is not None
    assert cause.reason is FailureReason.RANK_LOST


def test_all_are_told_to_stop() -> None:
    group = begun(nodes=3)
    group.stop()
    assert not group.dismissed(now=1.0)
    assert group.heard(running(1), now=1.0).action is Action.STOP
    assert not group.dismissed(now=1.0)
    assert group.heard(running(2), now=2.0).action is Action.STOP
    assert group.dismissed(now=2.0)
    assert group.deserter() is None


def test_the_dead_need_not_be_told() -> None:
    group = begun()
    group.stop()
    assert not group.dismissed(now=SILENCE_S - 0.001)
    assert group.dismissed(now=SILENCE_S)
    assert group.deserter() == EngineFailure(
        FailureReason.RANK_LOST, "rank 1 on n1 had gone before it was told to stop"
    )


def test_who_is_missing_is_named_by_node_where_it_is_known() -> None:
    group = begun(nodes=3)
    group.end()
    group.heard(report(1, attempt=1), now=15.0)
    failure = group.missing(now=20.0, waited_s=30.0)
    assert failure == EngineFailure(FailureReason.RANK_LOST, "rank 2 on n2 did not report in within 30 s")


@pytest.mark.parametrize("rank", [0, 2, -1])
def test_a_rank_that_cannot_be(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"rank {rank} reports; there are 1 to 1"):
        RankGroup(2, SILENCE_S).heard(report(rank), now=0.0)


@given(st.lists(st.tuples(st.sampled_from(["hear", "begin", "end"]), st.integers(1, 2), st.sampled_from("ab"))))
def test_no_rank_runs_what_others_do_not(steps: list[tuple[str, int, str]]) -> None:
    """Whatever comes when: only an attempt that all were there for is run, and only by those who were there."""
    group, now, present = RankGroup(3, SILENCE_S), 0.0, dict[int, str]()
    taking_part: dict[int, str] | None = None
    for what, rank, instance in steps:
        now += 1.0
        if what == "hear":
            present[rank] = instance
            order = group.heard(report(rank, instance=instance), now=now)
            expected = taking_part is not None and taking_part[rank] == instance
            assert (order.action is Action.RUN) == expected
        elif what == "end":
            group.end()
            taking_part = None
        elif taking_part is None and not group.absent(now=now):
            group.begin("10.0.0.1", 4000)
            taking_part = dict(present)
