"""Which incidents eject a replica, for how long, and which replicas may not be ejected."""

import pytest

from hpc_router.router.replicas.health import (
    MAX_LATE_PROBES,
    EjectionRules,
    Incident,
    ReplicaHealth,
    Verdict,
    can_eject,
)

RULES = EjectionRules(connect_errors=2, request_errors=3, exclusion_s=10.0, max_exclusion_s=30.0, max_share=0.5)


def notes(health: ReplicaHealth, *incidents: Incident, now: float = 0.0, spare: bool = True) -> list[Verdict]:
    return [health.record(incident, now=now, rules=RULES, spare=spare) for incident in incidents]


@pytest.mark.parametrize("between", [Incident.ANSWERED, Incident.PROBE_OK])
def test_connections_that_cannot_be_made_in_a_row_eject(between: Incident) -> None:
    health = ReplicaHealth()
    assert notes(health, Incident.NO_CONNECTION, between, Incident.NO_CONNECTION) == [Verdict.KEEP] * 3
    assert notes(health, Incident.NO_CONNECTION) == [Verdict.EJECT]


def test_errors_in_a_row_exclude_and_a_success_resets_them() -> None:
    health, error = ReplicaHealth(), Incident.ERROR
    assert notes(health, error, error, Incident.ANSWERED, error, error) == [Verdict.KEEP] * 5
    assert notes(health, Incident.PROBE_OK) == [Verdict.KEEP], "a probe reaches the agent, not its engine"
    assert notes(health, error) == [Verdict.EXCLUDE]


def test_a_replica_that_cannot_be_spared_is_kept() -> None:
    health = ReplicaHealth()
    assert notes(health, *[Incident.ERROR] * 9, spare=False) == [Verdict.KEEP] * 9
    assert notes(health, Incident.ERROR, spare=True) == [Verdict.EXCLUDE]


def test_the_exclusion_doubles_up_to_its_limit() -> None:
    health, now, times = ReplicaHealth(), 0.0, []
    for _ in range(4):
        assert notes(health, *[Incident.ERROR] * 3, now=now)[-1] is Verdict.EXCLUDE
        assert health.is_excluded(now)
        times.append(health.excluded_until - now)
        assert health.is_excluded(health.excluded_until - 0.001)
        now = health.excluded_until
        assert not health.is_excluded(now)
    assert times == [10.0, 20.0, 30.0, 30.0], "up to the longest"
    notes(health, *[Incident.ERROR] * 3, now=now + RULES.max_exclusion_s + 0.001)
    assert health.excluded_until == now + RULES.max_exclusion_s + 0.001 + 10.0, "old exclusions do not count"


def test_errors_during_an_exclusion_do_not_lengthen_it() -> None:
    health = ReplicaHealth()
    notes(health, *[Incident.ERROR] * 3)
    assert notes(health, *[Incident.ERROR] * 5, now=9.0) == [Verdict.KEEP] * 5
    assert health.excluded_until == 10.0


@pytest.mark.parametrize("late", [Incident.PROBE_LATE, Incident.PROBE_UNANSWERED])
def test_late_probes_in_a_row_eject_and_one_that_fails_does_at_once(late: Incident) -> None:
    assert notes(ReplicaHealth(), *[late] * MAX_LATE_PROBES) == [Verdict.KEEP] * (MAX_LATE_PROBES - 1) + [Verdict.EJECT]
    assert notes(ReplicaHealth(), late, Incident.PROBE_OK, late, late) == [Verdict.KEEP] * 4
    assert notes(ReplicaHealth(), Incident.PROBE_FAILED) == [Verdict.EJECT]


@pytest.mark.parametrize(
    ("others", "share", "may"),
    [
        ([], 1.0, False),  # the only one
        ([(True, False)], 0.5, True),
        ([(True, False)], 0.4, False),  # half of them would be more than the share
        ([(False, False)], 1.0, False),  # the other one is not ready
        ([(False, True), (True, False)], 0.5, False),  # one of three is out, two would be more than half
        ([(False, True), (True, False), (True, False)], 0.5, True),
    ],
)
def test_a_share_may_be_excluded_and_never_the_last_ready_one(
    others: list[tuple[bool, bool]], share: float, may: bool
) -> None:
    assert can_eject(others=others, share=share) is may
