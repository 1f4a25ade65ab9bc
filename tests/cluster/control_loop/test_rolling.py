"""A changed config replaces jobs slot by slot, and stops at the first expert that fails."""

import math
from dataclasses import replace

import pytest

from hpc_router.cluster.control_loop.reconcile import Action, Cancel, Desired, Drain, Submit, reconcile, rollout_failure
from hpc_router.cluster.control_loop.rolling import may_roll
from hpc_router.cluster.control_loop.slots import ROUTER_SLOT, Attempt, Slot
from hpc_router.state.job_records import Exit, FailureReason
from hpc_router.state.registry import State
from tests.cluster.control_loop.support import DUE, MATH, ended, serving, waiting

NEW = {"math": "new", "code": "new", "router": "new"}


def old(generation: int = 1, *, slot: Slot = MATH) -> Attempt:
    return replace(serving(generation, slot=slot), revision="old", expires_at=None)


def new(generation: int = 2, *, slot: Slot = MATH) -> Attempt:
    return replace(old(generation, slot=slot), revision="new")


def decide(*attempts: Attempt, overlapping: bool = True, router: bool = False, now: float = DUE) -> list[Action]:
    slots: dict[Slot, tuple[Attempt, ...]] = {}
    for one in attempts:
        slots[one.slot] = (*slots.get(one.slot, ()), one)
    experts = [slot.expert for slot in slots if slot != ROUTER_SLOT]
    desired = Desired(
        replicas={name: experts.count(name) for name in experts},
        router=router,
        revisions=NEW,
        overlapping=frozenset(NEW) if overlapping else frozenset(),
    )
    return reconcile(desired, slots, now)


def test_an_outdated_job_is_replaced_when_its_successor_is_ready() -> None:
    assert decide(old()) == [Submit(MATH, 2, replaces="math-0.g1")]
    assert decide(old(), replace(waiting(2), revision="new")) == []
    assert decide(old(), new()) == [Drain("math-0.g1")]
    assert decide(new()) == []


def test_a_job_of_unknown_revision_is_left_alone() -> None:
    """It was submitted by a version without `apply`."""
    assert decide(replace(old(), revision=None)) == []


def test_without_room_for_two_it_drains_first() -> None:
    assert decide(old(), overlapping=False) == [Drain("math-0.g1")]


@pytest.mark.parametrize("state", [None, State.STARTING])
def test_an_outdated_job_that_does_not_serve_is_ended_at_once(state: State | None) -> None:
    assert decide(replace(old(), registered=state)) == [Cancel("math-0.g1")]


def test_one_slot_after_the_other() -> None:
    first, second = Slot("math", "0"), Slot("math", "1")
    assert decide(old(slot=first), old(slot=second)) == [Submit(first, 2, replaces="math-0.g1")]
    assert decide(old(slot=first), new(slot=first), old(slot=second)) == [Drain("math-0.g1")]
    assert decide(new(slot=first), old(slot=second)) == [Submit(second, 2, replaces="math-1.g1")]


def test_a_quarter_of_many_slots_at_a_time() -> None:
    slots = [Slot("math", str(n)) for n in range(8)]
    chosen = may_roll(slots, {slot: (old(slot=slot),) for slot in slots}, NEW)
    assert chosen == {slots[0], slots[1]}


def test_one_expert_after_the_other_and_the_router_last() -> None:
    code = Slot("code", "0")
    assert decide(old(), old(slot=code), old(slot=ROUTER_SLOT), router=True) == [Submit(code, 2, replaces="code-0.g1")]
    done = new(slot=code)
    assert decide(old(), done, old(slot=ROUTER_SLOT), router=True) == [Submit(MATH, 2, replaces="math-0.g1")]
    assert decide(new(), done, old(slot=ROUTER_SLOT), router=True) == [Submit(ROUTER_SLOT, 2, replaces="router-0.g1")]


def test_an_outdated_router_ends_when_its_successor_leads() -> None:
    assert decide(old(slot=ROUTER_SLOT), new(slot=ROUTER_SLOT), router=True) == [Cancel("router-0.g1")]


def test_the_rollout_stops_at_an_expert_whose_successor_fails() -> None:
    code = Slot("code", "0")
    failed = replace(ended(2, FailureReason.WEIGHTS, at=DUE), slot=code, revision="new")
    assert decide(old(slot=code), failed, old(), now=DUE + 99) == []


def refused(generation: int, *, at: float = DUE) -> Attempt:
    return replace(ended(generation, FailureReason.REFUSED, at=at), revision="new")


def failure_of(*successors: Attempt) -> Exit | None:
    return rollout_failure(old(), (old(), *successors), Desired(revisions=NEW))


def test_a_refused_overlap_drains_once_slurm_has_accepted_the_next_job() -> None:
    """A job that serves is never ended for a successor that Slurm does not take."""
    after = Submit(MATH, 3, after="math-0.1", replaces="math-0.g1")
    assert decide(old(), refused(2), now=DUE + 1) == [after]
    accepted = replace(waiting(3, reason="Dependency", after="math-0.1"), revision="new")
    assert decide(old(), refused(2), accepted, now=DUE + 2) == [Drain("math-0.g1")]
    assert failure_of(refused(2)) is None
    assert failure_of(refused(2), accepted) is None


def test_a_successor_that_slurm_refuses_in_any_form_stops_the_rollout() -> None:
    again = refused(3, at=DUE + 1)
    assert decide(old(), refused(2), again, now=DUE + 99) == []
    assert failure_of(refused(2), again) == again.exit


def test_a_successor_that_failed_without_its_fault_does_not_stop_the_rollout() -> None:
    preempted = [replace(ended(n, FailureReason.PREEMPTED, at=DUE + n), revision="new") for n in (2, 3, 4)]
    assert failure_of(*preempted) is None
    assert decide(old(), *preempted, now=DUE + 99) == [Submit(MATH, 5, replaces="math-0.g1")]
    crashed = [replace(ended(n, FailureReason.CRASHED, at=DUE + n), revision="new") for n in (2, 3, 4)]
    assert failure_of(*crashed[:2]) is None
    assert failure_of(*crashed) == crashed[-1].exit


def test_the_walltime_does_not_matter() -> None:
    assert decide(replace(old(), expires_at=math.inf)) == [Submit(MATH, 2, replaces="math-0.g1")]
