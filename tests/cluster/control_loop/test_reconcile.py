"""The control loop's decisions. Pure: each case is a value in and a list of actions out."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_router.cluster.control_loop.reconcile import (
    BACKOFF_MAX_S,
    KILL_AFTER_S,
    KILL_AGAIN_S,
    STABLE_S,
    STANDBY_S,
    Action,
    Cancel,
    Desired,
    Drain,
    GiveUp,
    Kill,
    Submit,
    Wait,
    backoff_s,
    reconcile,
)
from hpc_router.cluster.control_loop.slots import CLAIM_S, ROUTER_SLOT, Attempt, Slot
from hpc_router.cluster.launchers.interface import JobReport, JobState
from hpc_router.state.job_records import BLAMELESS, Exit, FailureReason, JobPhase, JobProgress, Runner, Stop
from hpc_router.state.registry import State, split_replica

NOW = 1000.0
MATH = Slot("math", "0")
ONE = Desired(replicas={"math": 1})
NONE = Desired(replicas={"math": 0})


def attempt(generation: int = 1, *, slot: Slot = MATH, job: JobState = JobState.RUNNING, **facts: object) -> Attempt:
    base = Attempt(slot=slot, generation=generation, report=JobReport(job), claimed_at=NOW - 100)
    return replace(base, **facts)  # type: ignore[arg-type]


def failed(
    generation: int, at: float = NOW, reason: FailureReason = FailureReason.CRASHED, ready_s: float | None = None
) -> Attempt:
    progress = None if ready_s is None else JobProgress(JobPhase.READY, ready_at=at - ready_s)
    return attempt(generation, job=JobState.ENDED, exit=Exit(False, reason, "it broke", at), progress=progress)


def decide(desired: Desired, *attempts: Attempt, now: float = NOW) -> list[Action]:
    slots: dict[Slot, tuple[Attempt, ...]] = {}
    for one in attempts:
        slots[one.slot] = (*slots.get(one.slot, ()), one)
    return reconcile(desired, slots, now)


def test_missing_jobs_are_submitted() -> None:
    desired = Desired(replicas={"math": 2, "code": 0}, router=True)
    assert decide(desired) == [Submit(ROUTER_SLOT, 1), Submit(MATH, 1), Submit(Slot("math", "1"), 1)]


@pytest.mark.parametrize("job", [JobState.RUNNING, JobState.UNKNOWN, JobState.PENDING])
def test_live_jobs_are_left_alone(job: JobState) -> None:
    """A job whose state is unknown stays, too: two jobs in one slot would be worse than none."""
    assert decide(ONE, attempt(job=job)) == []


def test_a_first_failure_is_replaced_at_once() -> None:
    assert decide(ONE, failed(1)) == [Submit(MATH, 2)]


def test_failures_in_a_row_wait_longer() -> None:
    desired = replace(ONE, max_failures=10)
    assert decide(desired, failed(1), failed(2)) == [Wait("math-0.g3", NOW + 2, "2 failures in a row")]
    assert decide(desired, failed(1), failed(2), now=NOW + 2) == [Submit(MATH, 3)]
    assert [backoff_s(n) for n in (0, 1, 2, 3, 4)] == [0, 0, 2, 4, 8]
    assert backoff_s(50) == BACKOFF_MAX_S


def test_too_many_failures_give_up() -> None:
    assert decide(ONE, failed(1), failed(2), now=NOW + 99) == [Submit(MATH, 3)]
    last = failed(3)
    assert last.exit is not None
    assert decide(ONE, failed(1), failed(2), last, now=NOW + 99) == [GiveUp(MATH, 3, last.exit)]


@pytest.mark.parametrize("reason", [FailureReason.WEIGHTS, FailureReason.BAD_OPTION, FailureReason.INTERPRETER])
def test_a_reason_that_no_restart_fixes_gives_up_at_once(reason: FailureReason) -> None:
    last = failed(1, reason=reason)
    assert last.exit is not None
    assert decide(ONE, last) == [GiveUp(MATH, 1, last.exit)]


def test_failures_before_up_do_not_count() -> None:
    """`up` and `scale` reset the count."""
    desired = replace(ONE, forgiven={"math-0": 3})
    assert decide(desired, failed(1), failed(2), failed(3)) == [Submit(MATH, 4)]
    assert decide(replace(ONE, forgiven={"math-0": 1}), failed(1, reason=FailureReason.WEIGHTS)) == [Submit(MATH, 2)]


def test_a_job_that_was_ready_for_a_while_starts_the_count_again() -> None:
    steady = failed(3, ready_s=STABLE_S)
    assert decide(ONE, failed(1), failed(2), steady) == [Submit(MATH, 4)]
    assert isinstance(decide(ONE, failed(1), failed(2), failed(3, ready_s=STABLE_S - 1))[0], GiveUp)


def test_a_job_that_drained_did_not_fail() -> None:
    drained = attempt(3, job=JobState.ENDED, exit=Exit(True, FailureReason.DRAINED, "asked", NOW))
    assert decide(ONE, failed(1), failed(2), drained) == [Submit(MATH, 4)]


def test_a_claim_without_a_job_is_abandoned_after_a_minute() -> None:
    claim = attempt(job=JobState.PENDING, submitted=False, claimed_at=NOW)
    assert decide(ONE, claim) == [Wait("math-0.g1", NOW + CLAIM_S, "claimed, not submitted yet")]
    assert decide(ONE, claim, now=NOW + CLAIM_S) == [Submit(MATH, 2)]


def test_a_refused_submission_counts_as_a_failure() -> None:
    """It has an exit record and no job, so the loop does not wait until the claim expires."""
    refused = attempt(job=JobState.PENDING, submitted=False, exit=Exit(False, FailureReason.CRASHED, "no", NOW))
    assert decide(ONE, refused) == [Submit(MATH, 2)]


def test_a_surplus_replica_drains_then_ends_then_is_killed() -> None:
    ready = attempt(registered=State.READY)
    assert decide(NONE, ready) == [Drain("math-0.g1")]
    asked = replace(ready, stop=Stop(drain_at=NOW))
    assert decide(NONE, asked, now=NOW + 29.9) == [Wait("math-0.g1", NOW + 30, "asked to drain")]
    assert decide(NONE, asked, now=NOW + 30) == [Cancel("math-0.g1")]
    cancelled = replace(ready, stop=Stop(drain_at=NOW, cancel_at=NOW + 30))
    kill_at = NOW + 60 + KILL_AFTER_S
    assert decide(NONE, cancelled, now=kill_at - 1) == [Wait("math-0.g1", kill_at, "asked to end")]
    assert decide(NONE, cancelled, now=kill_at) == [Kill("math-0.g1")]


def test_a_surplus_replica_that_never_served_is_cancelled() -> None:
    assert decide(NONE, attempt(registered=State.STARTING)) == [Cancel("math-0.g1")]
    assert decide(NONE, attempt()) == [Cancel("math-0.g1")]


def test_the_highest_slots_are_surplus() -> None:
    ready = [attempt(slot=Slot("math", str(n)), registered=State.READY) for n in range(3)]
    assert decide(ONE, *ready) == [Drain("math-1.g1"), Drain("math-2.g1")]


def test_an_older_generation_is_ended_when_the_newer_is_ready() -> None:
    old, new = attempt(1, registered=State.READY), attempt(2, registered=State.STARTING)
    assert decide(ONE, old, new) == []
    assert decide(ONE, old, replace(new, registered=State.READY)) == [Drain("math-0.g1")]


def test_a_hung_replica_is_replaced_at_once_and_killed() -> None:
    """It drains nothing, so neither the time to drain nor its end is waited for: its node may be lost."""
    hung = attempt(registered=State.READY, hung=True)
    assert decide(ONE, hung) == [Cancel("math-0.g1"), Submit(MATH, 2)]
    asked = replace(hung, stop=Stop(cancel_at=NOW))
    kill_at = NOW + KILL_AFTER_S
    assert decide(ONE, asked, now=kill_at - 1) == [Wait("math-0.g1", kill_at, "asked to end"), Submit(MATH, 2)]
    assert decide(ONE, asked, attempt(2), now=kill_at) == [Kill("math-0.g1")]
    awake = decide(ONE, replace(asked, hung=False), now=kill_at)
    assert awake == [Wait("math-0.g1", kill_at + ONE.drain_s, "asked to end")], "it woke up, and drains"
    assert decide(ONE, failed(1, reason=FailureReason.TIMEOUT)) == [Submit(MATH, 2)]


def test_a_replica_that_does_not_drain_is_cancelled() -> None:
    """`drain` ends a replica that is wanted; its successor is submitted when it has ended."""
    asked = attempt(registered=State.DRAINING, stop=Stop(drain_at=NOW))
    assert decide(ONE, asked) == [Wait("math-0.g1", NOW + ONE.drain_s, "asked to drain")]
    assert decide(ONE, asked, now=NOW + ONE.drain_s) == [Cancel("math-0.g1")]


def test_a_submission_that_slurm_does_not_answer_is_tried_for_ever_but_slowly() -> None:
    ends = [failed(n, reason=FailureReason.UNANSWERED) for n in range(1, 9)]
    assert decide(ONE, *ends) == [Wait("math-0.g9", NOW + BACKOFF_MAX_S, "8 failures in a row")]
    assert decide(ONE, *ends, now=NOW + BACKOFF_MAX_S) == [Submit(MATH, 9)]


@pytest.mark.parametrize("reason", sorted(BLAMELESS))
def test_an_end_that_is_not_the_replicas_fault_is_not_counted(reason: FailureReason) -> None:
    ends = [failed(n, reason=reason) for n in range(1, 9)]
    assert decide(ONE, *ends, now=NOW + BACKOFF_MAX_S) == [Submit(MATH, 9)], "however often"
    assert decide(ONE, failed(1, reason=reason)) == [Submit(MATH, 2)], "at once"
    (wait,) = decide(ONE, *ends)
    assert isinstance(wait, Wait), "but a site that ends every job at its start is not asked every two seconds"


def test_a_router_that_serves_steadily_has_a_successor_waiting_for_its_end() -> None:
    desired = Desired(router=True, standby=True)
    ready = JobProgress(JobPhase.READY, ready_at=NOW - STANDBY_S)
    router = attempt(slot=ROUTER_SLOT, registered=State.READY, progress=ready, job_id="7", runner=Runner.SLURM)
    assert decide(desired, router) == [Submit(ROUTER_SLOT, 2, after="7")]
    assert decide(desired, router, now=NOW - 1) == [], "not before it has proved itself"
    waiting = attempt(2, slot=ROUTER_SLOT, job=JobState.PENDING, job_id="8")
    assert decide(desired, router, waiting) == []
    assert decide(replace(desired, standby=False), router) == []
    assert decide(desired, replace(router, runner=Runner.PROCESS)) == [], "a process id is no job to wait for"


@pytest.mark.parametrize("reason", [FailureReason.CANCELLED, FailureReason.UNANSWERED])
def test_a_successor_that_was_refused_or_cancelled_is_followed_by_the_next(reason: FailureReason) -> None:
    desired = Desired(router=True, standby=True)
    ready = JobProgress(JobPhase.READY, ready_at=NOW - STANDBY_S)
    router = attempt(slot=ROUTER_SLOT, registered=State.READY, progress=ready, job_id="7", runner=Runner.SLURM)
    lost = [replace(failed(n, reason=reason), slot=ROUTER_SLOT) for n in (2, 3)]
    assert decide(desired, router, lost[0]) == [Submit(ROUTER_SLOT, 3, after="7")]
    assert isinstance(decide(desired, router, *lost)[0], Wait)
    refused = [replace(failed(n, reason=FailureReason.REFUSED), slot=ROUTER_SLOT) for n in (2, 3)]
    (wait,) = decide(desired, router, *refused)
    assert isinstance(wait, Wait), "the router itself has not failed"


def test_a_job_that_goes_on_after_its_exit_record_is_cancelled() -> None:
    end = Exit(False, FailureReason.CRASHED, "it broke", NOW)
    lingering = attempt(job=JobState.ENDING, exit=end)
    assert decide(NONE, lingering) == []
    assert decide(NONE, lingering, now=NOW + KILL_AFTER_S) == [Cancel("math-0.g1")]
    asked = replace(lingering, stop=Stop(cancel_at=NOW))
    assert decide(NONE, asked, now=NOW + KILL_AFTER_S) == [Kill("math-0.g1")]
    assert Submit(MATH, 2) in decide(ONE, lingering), "its slot does not wait for that"


def test_a_job_that_its_node_did_not_start_is_cancelled_at_once() -> None:
    """Slurm would start it again beside its successor."""
    not_begun = attempt(job=JobState.ENDING, exit=Exit(False, FailureReason.NODE_FAILED, "n1", NOW))
    assert decide(NONE, not_begun) == [Cancel("math-0.g1")]
    assert decide(NONE, replace(not_begun, started_at=NOW)) == []
    assert decide(NONE, replace(not_begun, stop=Stop(cancel_at=NOW))) == [
        Wait("math-0.g1", NOW + KILL_AFTER_S, "asked to end")
    ]


def test_a_kill_is_not_repeated_at_every_pass() -> None:
    killed = attempt(stop=Stop(cancel_at=NOW - 100, kill_at=NOW))
    assert decide(NONE, killed, now=NOW + 1) == [Wait("math-0.g1", NOW + KILL_AGAIN_S, "asked to end")]
    assert decide(NONE, killed, now=NOW + KILL_AGAIN_S) == [Kill("math-0.g1")]


def test_a_surplus_claim_is_cancelled_before_its_job_is_submitted() -> None:
    claim = attempt(job=JobState.PENDING, submitted=False, claimed_at=NOW)
    assert decide(NONE, claim) == [Cancel("math-0.g1")]
    assert decide(NONE, replace(claim, stop=Stop(cancel_at=NOW))) == []


def test_a_claim_whose_submitter_is_alive_is_kept() -> None:
    """A busy controller may take long to submit many jobs."""
    claim = attempt(job=JobState.PENDING, submitted=False, claimed_at=NOW - 2 * CLAIM_S, submitting=True)
    assert isinstance(decide(ONE, claim)[0], Wait)
    assert decide(ONE, replace(claim, submitting=False)) == [Submit(MATH, 2)]


def test_a_job_that_was_asked_to_end_before_it_began_does_not_hold_its_slot() -> None:
    """One replica of a shared job cannot be removed from the queue."""
    doomed = attempt(job=JobState.PENDING, stop=Stop(cancel_at=NOW))
    assert Submit(MATH, 2) in decide(ONE, doomed)


def test_a_waiting_successor_is_cancelled_with_its_deployment() -> None:
    router = attempt(slot=ROUTER_SLOT, registered=State.READY, job_id="7")
    waiting = attempt(2, slot=ROUTER_SLOT, job=JobState.PENDING, job_id="8")
    cleared = decide(Desired(router=True, standby=True, down=True, clear=True), router, waiting)
    assert cleared == [Cancel("router-0.g1"), Cancel("router-0.g2")]


def test_a_hung_successor_replaces_no_job() -> None:
    old, new = attempt(1, registered=State.READY), attempt(2, registered=State.READY, hung=True)
    assert decide(ONE, old, new) == [Cancel("math-0.g2")]
    assert decide(ONE, replace(old, hung=True), replace(new, hung=False)) == [Cancel("math-0.g1")]


def test_a_hung_replica_started_by_hand_is_left_alone() -> None:
    assert decide(ONE, attempt(registered=State.READY), attempt(slot=Slot("math", "h0"), hung=True)) == []


def test_services_started_by_hand_stay_until_down() -> None:
    by_hand = attempt(slot=Slot("math", "h0"), registered=State.READY)
    router = attempt(slot=ROUTER_SLOT, registered=State.READY)
    assert decide(NONE, by_hand, router) == []
    assert decide(replace(NONE, down=True), by_hand, router) == []
    cleared = decide(replace(NONE, down=True, clear=True), by_hand, router)
    assert cleared == [Cancel("math-h0.g1"), Cancel("router-0.g1")]


def test_down_cancels_everything_and_starts_nothing() -> None:
    desired = replace(Desired(replicas={"math": 2}, router=True), down=True)
    assert decide(desired, attempt(registered=State.READY)) == [Cancel("math-0.g1")]
    assert decide(desired, failed(1)) == []


def test_clearing_ends_nothing_and_starts_nothing_once_it_is_brought_up_again() -> None:
    """The live jobs then belong to the `up` that came after `down`."""
    desired = replace(Desired(replicas={"math": 2}, router=True), clear=True)
    assert decide(desired, attempt(slot=Slot("math", "h0"), registered=State.READY), failed(1)) == []


# Any sequence of failures, kills and changed replica counts ends in the desired state.


@dataclass
class World:
    """A small simulation with its own clock, in which jobs follow the actions of the control loop."""

    desired: Desired = ONE
    jobs: dict[Slot, list[Attempt]] = field(default_factory=dict)
    now: float = NOW

    def tick(self, seconds: float) -> list[Action]:
        """Advances the clock, then runs one pass and carries out its actions."""
        self.now += seconds
        observed = {slot: tuple(attempts) for slot, attempts in self.jobs.items()}
        actions = reconcile(self.desired, observed, self.now)
        for action in actions:
            self._carry_out(action)
        self.check()
        return actions

    def _carry_out(self, action: Action) -> None:
        match action:
            case Submit(slot, generation):
                attempts = self.jobs.setdefault(slot, [])
                assert all(a.generation < generation for a in attempts)
                attempts.append(Attempt(slot, generation, JobReport(JobState.RUNNING), claimed_at=self.now))
            case Drain(replica) | Cancel(replica):
                self.change(
                    replica, report=JobReport(JobState.ENDED), exit=Exit(True, FailureReason.DRAINED, "asked", self.now)
                )
            case Kill(replica):
                self.change(
                    replica,
                    report=JobReport(JobState.ENDED),
                    exit=Exit(False, FailureReason.KILLED, "killed", self.now),
                )
            case Wait() | GiveUp():
                pass

    def change(self, replica: str, **facts: object) -> None:
        expert, name, generation = split_replica(replica)
        attempts = self.jobs[Slot(expert, name)]
        at = next(i for i, a in enumerate(attempts) if a.generation == generation)
        attempts[at] = replace(attempts[at], **facts)  # type: ignore[arg-type]

    def live(self) -> list[Attempt]:
        return [a for attempts in self.jobs.values() for a in attempts if a.live]

    def check(self) -> None:
        """Asserts that no slot has two jobs, and that no more jobs exist than were ever wanted."""
        slots = [a.slot for a in self.live()]
        assert len(slots) == len(set(slots))

    def fail(self, which: int, reason: FailureReason) -> None:
        live = self.live()
        if live:
            one = live[which % len(live)]
            self.change(one.replica, report=JobReport(JobState.ENDED), exit=Exit(False, reason, "it broke", self.now))

    def ready(self) -> None:
        for one in self.live():
            if one.registered is None:
                self.change(
                    one.replica, registered=State.READY, progress=JobProgress(JobPhase.READY, ready_at=self.now)
                )


STEPS = st.one_of(
    st.tuples(st.just("tick"), st.sampled_from([0.0, 1.0, 3.0, 70.0])),
    st.tuples(
        st.just("fail"),
        st.integers(0, 9),
        st.sampled_from([FailureReason.CRASHED, FailureReason.KILLED, FailureReason.WEIGHTS]),
    ),
    st.tuples(st.just("ready")),
    st.tuples(st.just("scale"), st.sampled_from(["math", "code"]), st.integers(0, 3)),
    st.tuples(st.just("down"), st.booleans()),
    st.tuples(st.just("router"), st.booleans()),
)


@settings(max_examples=300)
@given(st.lists(STEPS, max_size=40))
def test_any_history_ends_in_the_desired_state(steps: Sequence[tuple[object, ...]]) -> None:
    """Slots that were given up are excluded; only `up` restarts them."""
    world = World()
    for step in steps:
        match step:
            case ("tick", float(seconds)):
                world.tick(seconds)
            case ("fail", int(which), FailureReason() as reason):
                world.fail(which, reason)
            case ("ready",):
                world.ready()
            case ("scale", str(name), int(count)):
                world.desired = replace(world.desired, replicas={**world.desired.replicas, name: count})
            case ("down", bool(down)):
                world.desired = replace(world.desired, down=down)
            case ("router", bool(router)):
                world.desired = replace(world.desired, router=router)
    forgiven = {str(slot): attempts[-1].generation for slot, attempts in world.jobs.items()}
    world.desired = replace(world.desired, forgiven=forgiven)
    for _ in range(5):
        world.tick(100.0)
        world.ready()
    wanted = set(world.desired.slots())
    live = {a.slot for a in world.live()}
    assert live - {ROUTER_SLOT} == wanted - {ROUTER_SLOT}
    assert ROUTER_SLOT in live or ROUTER_SLOT not in wanted  # a router that is no longer wanted stays
    assert world.tick(1000.0) == []


def test_a_job_that_has_just_ended_is_given_time_to_release_its_resources() -> None:
    """By its launcher's report, if it left no exit record itself: cancelling it would look like a request to end."""
    end = Exit(ok=False, reason=FailureReason.KILLED, message="killed by signal 9", at=NOW)
    ending = replace(attempt(claimed_at=NOW - 3600), report=JobReport(JobState.ENDING, end=end))
    assert decide(ONE, ending) == [Submit(MATH, 2)]
    assert decide(ONE, ending, now=NOW + KILL_AFTER_S) == [Cancel("math-0.g1"), Submit(MATH, 2)]


def test_a_replica_that_hangs_in_its_first_minute_is_replaced_at_once() -> None:
    """Its claim's age is no pause: the pause after a first failure is none."""
    hung = attempt(registered=State.READY, hung=True, claimed_at=NOW - 20)
    assert decide(ONE, hung) == [Cancel("math-0.g1"), Submit(MATH, 2)]
