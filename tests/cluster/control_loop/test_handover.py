"""When handovers are due, and what they do. Pure: each case is a value in and a decision out."""

from dataclasses import replace

import pytest

from hpc_router.cluster.control_loop.handover import Durations, HandoverPolicy, measured, schedule, served_until_ready
from hpc_router.cluster.control_loop.reconcile import (
    END_MARGIN_S,
    FOUND_S,
    Action,
    Cancel,
    Desired,
    Drain,
    GiveUp,
    ReleaseJob,
    Submit,
    Wait,
    reconcile,
)
from hpc_router.cluster.control_loop.slots import ROUTER_SLOT, Attempt, Slot
from hpc_router.cluster.launchers.interface import JobReport, JobState
from hpc_router.config.schema import HandoverMode
from hpc_router.state.job_records import Exit, FailureReason, JobPhase, JobProgress, Runner, Stop
from hpc_router.state.registry import State
from tests.cluster.control_loop.support import BEGAN, DUE, LIFE_S, MATH, POLICY, ended, serving, waiting


def decide(*attempts: Attempt, now: float = DUE, mode: HandoverMode = "overlap", router: bool = False) -> list[Action]:
    desired = Desired(
        replicas={} if router else {"math": 1},
        router=router,
        standby=router,
        handovers={"math": replace(POLICY, mode=mode), "router": replace(POLICY, mode=mode)},
    )
    return reconcile(desired, {attempts[0].slot: attempts}, now)


def test_the_successor_is_submitted_when_its_time_to_ready_is_left() -> None:
    assert decide(serving(), now=DUE - 0.1) == []
    assert decide(serving()) == [Submit(MATH, 2, replaces="math-0.g1")]


def test_a_job_without_a_known_end_never_hands_over() -> None:
    assert decide(serving(expires_at=None), now=BEGAN + 10 * LIFE_S) == []


def test_the_predecessor_serves_until_the_successor_is_ready() -> None:
    assert decide(serving(), waiting(2)) == []
    starting = replace(serving(2), registered=State.STARTING)
    assert decide(serving(), starting) == []
    ready = serving(2, expires_at=BEGAN + 3 * LIFE_S)
    assert decide(serving(), ready) == [Drain("math-0.g1", until_at=BEGAN + LIFE_S - END_MARGIN_S)]


def test_the_predecessor_serves_until_routers_have_found_the_successor() -> None:
    """Their probe may come later than the drain, and the expert would be without a ready replica."""
    fresh = replace(serving(2, expires_at=BEGAN + 3 * LIFE_S), progress=JobProgress(JobPhase.READY, ready_at=DUE))
    assert decide(serving(), fresh, now=DUE) == []
    assert decide(serving(), fresh, now=DUE + FOUND_S) == [Drain("math-0.g1", until_at=BEGAN + LIFE_S - END_MARGIN_S)]
    assert decide(serving(), fresh, now=DUE - 60) != [], "the clock of its node is ahead"


def test_requests_in_flight_may_take_the_rest_of_the_walltime() -> None:
    until_at, ready = BEGAN + LIFE_S - END_MARGIN_S, serving(2, expires_at=BEGAN + 3 * LIFE_S)
    asked = replace(serving(), registered=State.DRAINING, stop=Stop(drain_at=DUE, until_at=until_at))
    assert decide(asked, ready, now=until_at - 1) == [Wait("math-0.g1", until_at, "asked to drain")]
    assert decide(asked, ready, now=until_at) == [Cancel("math-0.g1")]


def test_a_predecessor_that_drains_by_itself_is_given_its_drain_time() -> None:
    """Slurm's warning made it drain. A SIGTERM would also reach its engine where Slurm signals every process."""
    progress = JobProgress(JobPhase.DRAINING, at=DUE, ready_at=BEGAN)
    draining = replace(serving(), registered=State.DRAINING, progress=progress)
    ready = serving(2, expires_at=BEGAN + 3 * LIFE_S)
    assert decide(draining, ready) == [Wait("math-0.g1", DUE + Desired().drain_s, "asked to drain")]


def test_without_room_the_successor_waits_for_the_end() -> None:
    assert decide(serving(), mode="drain_first") == [Submit(MATH, 2, after="math-0.1", replaces="math-0.g1")]
    waits = waiting(2, reason="Dependency", after="math-0.1")
    assert decide(serving(), waits, mode="drain_first") == []


def test_mode_none_submits_when_the_job_has_ended() -> None:
    assert decide(serving(), mode="none") == []
    drained = ended(1, FailureReason.DRAINED, at=DUE)
    assert decide(drained, mode="none") == [Submit(MATH, 2)]


def test_a_job_served_until_its_successor_was_ready() -> None:
    """Whenever that is looked at: while it still serves, while it drains, and after its end."""
    old, new = serving(), replace(serving(2), progress=JobProgress(JobPhase.READY, ready_at=DUE))
    assert served_until_ready(old, new)
    for at, expected in ((DUE + 1, True), (DUE - 1, False)):
        draining = replace(old, progress=JobProgress(JobPhase.DRAINING, at=at, ready_at=BEGAN))
        over = replace(old, report=JobReport(JobState.ENDED), exit=ended(1, FailureReason.DRAINED, at=at).exit)
        for job in (draining, over, replace(old, stop=Stop(drain_at=at))):
            assert served_until_ready(job, new) is expected
    never_ready = replace(old, progress=JobProgress(JobPhase.LOADING))
    assert not served_until_ready(never_ready, new)
    assert not served_until_ready(replace(old, hung=True), new)


def test_a_refused_overlap_falls_back_to_the_jobs_end() -> None:
    refused = ended(2, FailureReason.REFUSED, at=DUE)
    assert decide(serving(), refused) == [Submit(MATH, 3, after="math-0.1", replaces="math-0.g1")]
    again = [ended(3, FailureReason.REFUSED, at=DUE + 1), ended(4, FailureReason.REFUSED, at=DUE + 2)]
    assert decide(serving(), refused, *again, now=DUE + 3) == [Wait("math-0.g5", DUE + 4, "2 failures in a row")]
    after = Submit(MATH, 5, after="math-0.1", replaces="math-0.g1")
    assert decide(serving(), refused, *again, now=DUE + 4) == [after], "the limit may allow it later"


def test_a_refused_standby_is_submitted_again_with_pauses() -> None:
    """Nothing could replace the router once its job has ended."""
    router = serving(slot=ROUTER_SLOT)
    refused = [replace(ended(n, FailureReason.REFUSED, at=BEGAN + n), slot=ROUTER_SLOT) for n in (2, 3, 4)]
    assert decide(router, *refused, router=True, now=BEGAN + 20) == [Submit(ROUTER_SLOT, 5, after="router-0.1")]


def test_a_refused_overlap_does_not_give_the_slot_up() -> None:
    """Limits that forbid two jobs at once still allow one."""
    over = ended(1, FailureReason.DRAINED, at=DUE + 50)
    refused = [ended(2, FailureReason.REFUSED, at=DUE), ended(3, FailureReason.REFUSED, at=DUE + 1)]
    assert decide(over, *refused, now=DUE + 51) == [Submit(MATH, 4)]


def test_a_refusal_after_the_end_gives_up() -> None:
    over, refused = ended(1, FailureReason.DRAINED, at=DUE), ended(2, FailureReason.REFUSED, at=DUE + 1)
    assert refused.exit is not None
    assert decide(over, refused, now=DUE + 99) == [GiveUp(MATH, 1, refused.exit)]


def test_failed_successors_are_tried_again_with_pauses() -> None:
    crashed = [ended(n, FailureReason.CRASHED, at=DUE + n) for n in (2, 3)]
    assert decide(serving(), crashed[0], now=DUE + 2) == [Submit(MATH, 3, replaces="math-0.g1")]
    assert decide(serving(), *crashed, now=DUE + 3) == [Wait("math-0.g4", DUE + 5, "2 failures in a row")]
    more = [*crashed, ended(4, FailureReason.CRASHED, at=DUE + 4)]
    assert decide(serving(), *more, now=DUE + 99) == []


def test_the_standby_of_a_router_is_released() -> None:
    router = serving(slot=ROUTER_SLOT)
    standby = waiting(2, slot=ROUTER_SLOT, reason="Dependency", after="router-0.1")
    assert decide(router, standby, router=True, now=DUE - 1) == []
    assert decide(router, standby, router=True) == [ReleaseJob("router-0.g2", "router-0.g1")]
    released = waiting(2, slot=ROUTER_SLOT, reason="Priority", after="router-0.1")
    assert decide(router, released, router=True) == []


def test_a_router_without_standby_gets_a_successor() -> None:
    assert decide(serving(slot=ROUTER_SLOT), router=True) == [Submit(ROUTER_SLOT, 2, replaces="router-0.g1")]


def test_two_routers_serve_until_the_old_one_ends() -> None:
    ready = serving(2, slot=ROUTER_SLOT, expires_at=BEGAN + 3 * LIFE_S)
    assert decide(serving(slot=ROUTER_SLOT), ready, router=True) == []


def due_at(*attempts: Attempt, policy: HandoverPolicy = POLICY) -> dict[str, float]:
    observed = {attempt.slot: (attempt,) for attempt in attempts}
    due = schedule(observed, {"math": policy, "code": policy}, measured(observed))
    return {replica: one.due_at for replica, one in due.items()}


def test_replicas_that_end_together_hand_over_one_after_the_other() -> None:
    """Each handover has the time of one load and one drain."""
    three = [serving(slot=Slot("math", str(n))) for n in range(3)]
    assert due_at(*three) == {"math-2.g1": DUE, "math-1.g1": DUE - 80, "math-0.g1": DUE - 160}


def test_replicas_that_end_at_different_times_hand_over_at_theirs() -> None:
    two = serving(), serving(slot=Slot("math", "1"), expires_at=BEGAN + LIFE_S + 80)
    assert due_at(*two) == {"math-0.g1": DUE, "math-1.g1": DUE + 80}


def test_experts_do_not_wait_for_each_other() -> None:
    assert due_at(serving(), serving(slot=Slot("code", "0"))) == {"math-0.g1": DUE, "code-0.g1": DUE}


def test_many_replicas_share_the_second_half_of_their_life() -> None:
    due = due_at(*(serving(slot=Slot("math", str(n))) for n in range(200)))
    assert min(due.values()) >= BEGAN + LIFE_S / 2
    assert len(set(due.values())) == len(due)


def test_a_walltime_that_is_too_short_hands_over_after_half_of_it() -> None:
    assert due_at(serving(expires_at=BEGAN + 100)) == {"math-0.g1": BEGAN + 50}


def test_the_replicas_of_one_job_hand_over_together() -> None:
    """The earliest due time counts, also for replicas of another expert."""
    both = [replace(serving(slot=Slot(name, "0")), job_id="17") for name in ("math", "code")]
    slow = replace(both[1], started_at=BEGAN - 500, submitted_at=BEGAN - 510)
    assert due_at(both[0], slow) == {"math-0.g1": DUE - 450, "code-0.g1": DUE - 450}


def test_only_slurm_jobs_of_this_deployment_hand_over() -> None:
    assert due_at(replace(serving(), runner=Runner.STEP)) == {}
    assert due_at(serving(), policy=replace(POLICY, mode="none")) == {}


def test_times_are_measured_from_the_jobs_own_records() -> None:
    drained = replace(
        serving(1),
        report=JobReport(JobState.ENDED),
        progress=JobProgress(JobPhase.DRAINING, at=BEGAN + 100, ready_at=BEGAN),
        exit=Exit(ok=True, reason=FailureReason.DRAINED, message="drained", at=BEGAN + 107),
    )
    observed = {MATH: (drained, replace(serving(2), claimed_at=BEGAN))}
    assert measured(observed) == {"math": Durations(queue_s=(10, 10), load_s=(50, 50), drain_s=(7,))}


@pytest.mark.parametrize("after", ["17", None])
def test_the_wait_for_another_job_is_not_queue_time(after: str | None) -> None:
    observed = {MATH: (replace(serving(), after=after),)}
    assert measured(observed)["math"].queue_s == (() if after else (10,))
