"""Why a replica does not serve, for one that waits in the queue and for every way to fail."""

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest

from hpc_router.cluster.commands import why
from hpc_router.cluster.commands.advice import FAILURE_ADVICE
from hpc_router.cluster.commands.replica_view import DisplayedState, ReplicaView
from hpc_router.cluster.commands.why import Cause, expected, router_causes
from hpc_router.cluster.control_loop.desired_state import exclude_nodes
from hpc_router.cluster.control_loop.node_exclusion import BY
from hpc_router.cluster.control_loop.slots import Slot
from hpc_router.state.job_records import FailureReason, JobDir
from hpc_router.state.registry import RecordKind
from hpc_router.state.run_directory import RunDir
from tests.cluster.control_loop.support import ended

NOON = datetime(2026, 3, 1, 12).timestamp()


@pytest.mark.parametrize(
    ("after", "said"),
    [
        (timedelta(seconds=-300), "at 11:55, which is now"),
        (timedelta(seconds=20), "at 12:00, which is now"),
        (timedelta(minutes=1), "at 12:01, in a minute"),
        (timedelta(minutes=12), "at 12:12, in 12 minutes"),
        (timedelta(minutes=119), "at 13:59, in 119 minutes"),
        (timedelta(hours=5), "at 17:00, in 5 hours"),
        (timedelta(hours=20), "at 2026-03-02 08:00, in 20 hours"),
        (timedelta(days=3), "at 2026-03-04 12:00, in 3 days"),
    ],
)
def test_the_estimate_is_readable(after: timedelta, said: str) -> None:
    assert expected(NOON + after.total_seconds(), now=NOON) == f"Slurm expects to start it {said}"


def test_no_estimate() -> None:
    assert expected(None, now=NOON) == "Slurm gives no estimate yet"


def cause(run: RunDir, view: ReplicaView) -> Cause:
    return why._cause(run, view, now=NOON)


def waiting(pending: str, starts_at: float | None = None) -> ReplicaView:
    return ReplicaView(
        "math", "math-0.g1", DisplayedState.SUBMITTED, job_id="7", pending_reason=pending, starts_at=starts_at
    )


def test_a_job_that_waits(run: RunDir) -> None:
    told = cause(run, waiting("Priority", NOON + 720))
    assert told.what == (
        "its job waits: jobs of higher priority go first; Slurm expects to start it at 12:12, in 12 minutes"
    )
    assert told.advice is not None
    assert cause(run, waiting("Resources")).what.endswith("become free; Slurm gives no estimate yet")


def test_a_job_that_waits_in_vain(run: RunDir) -> None:
    told = cause(run, waiting("PartitionTimeLimit", NOON))
    assert told.what == "its job waits: it asks for more time than its partition allows; so it will never start"
    assert told.advice == "edit cluster.walltime or cluster.partition, then `hpc-router up` in a new run"


def test_a_held_job_is_named_in_the_advice(run: RunDir) -> None:
    assert cause(run, waiting("JobHeldUser")).advice == "`scontrol release 7` releases it"


@pytest.mark.parametrize("reason", list(FailureReason))
def test_every_reason_has_advice(reason: FailureReason, run: RunDir) -> None:
    told = cause(run, ReplicaView("math", "math-0.g1", DisplayedState.FAILED, reason=reason, message="m"))
    assert told.advice
    assert "{" not in told.advice
    assert set(FAILURE_ADVICE) == set(FailureReason)


def test_the_log_lines_of_a_failure(run: RunDir) -> None:
    """Of the engine; of the batch script where it failed before, though it lie with another replica of the job."""
    first, second = JobDir(run, "law-0.g1"), JobDir(run, "math-0.g1")
    assert first.claim()
    assert second.claim()
    (first.path / "7_batch.log").write_text("module: not found\n")
    view = ReplicaView("math", "math-0.g1", DisplayedState.FAILED, job_id="7", reason=FailureReason.SETUP)
    assert cause(run, view).lines == ("module: not found",)
    second.engine_log.write_text("a\n" * 50 + "out of memory\n")
    assert cause(run, view).lines == ("module: not found",)
    crashed = ReplicaView("math", "math-0.g1", DisplayedState.FAILED, job_id="7", reason=FailureReason.CRASHED)
    assert cause(run, crashed).lines[-1] == "out of memory"
    assert len(cause(run, crashed).lines) == why.LOG_LINES
    assert (
        cause(run, ReplicaView("math", "math-0.g1", DisplayedState.STOPPED, reason=FailureReason.DRAINED)).lines == ()
    )


def test_the_log_lines_of_a_lost_rank(run: RunDir) -> None:
    """Beside those of rank 0, which only says that the other is gone; its agent's where its engine never ran."""
    job = JobDir(run, "math-0.g1")
    assert job.claim()
    job.engine_log.write_text("waiting for ranks\n")
    for name, text in {
        "rank1.engine.log": "x\n" * 50 + "CUDA error: unspecified launch failure\n",
        "rank1.log": "rank 1 agent\n",
        "rank2.log": "cannot reach rank 0\n",
        "rank10.engine.log": "",
    }.items():
        (run.logs / f"math-0.g1.{name}").write_text(text)
    (run.logs / "math-0.g11.rank1.engine.log").write_text("another's\n")
    lost = ReplicaView("math", "math-0.g1", DisplayedState.FAILED, job_id="7", reason=FailureReason.RANK_LOST)
    told = cause(run, lost)
    assert told.lines[0] == "waiting for ranks"
    assert told.lines[-2:] == ("rank 1: CUDA error: unspecified launch failure", "rank 2: cannot reach rank 0")
    assert len(told.lines) == 1 + why.RANK_LINES + 1
    assert "`hpc-router logs math-0.g1`" in (told.advice or "")
    crashed = ReplicaView("math", "math-0.g1", DisplayedState.FAILED, job_id="7", reason=FailureReason.CRASHED)
    assert cause(run, crashed).lines == ("waiting for ranks",)


def test_the_router_reports_ejected_and_degraded_replicas() -> None:
    """Out of use, slow or with errors; nothing is said of the others, nor without a router that answers."""
    seen = [
        {"replica": "math-0.g1", "state": "ejected", "trouble": "does not answer probes", "sick": None},
        {"replica": "math-1.g1", "state": "ready", "trouble": None, "sick": "is slow: 1 s to the first byte"},
        {"replica": "math-2.g1", "state": "ready", "trouble": None, "sick": None},
    ]
    views = [ReplicaView("math", f"math-{n}.g1", DisplayedState.READY) for n in range(4)]
    told = {cause.view.replica: cause for cause in why._degraded(views, {"experts": {"math": {"replicas": seen}}})}
    assert {replica: cause.what for replica, cause in told.items()} == {
        "math-0.g1": "the router has ejected it: does not answer probes",
        "math-1.g1": "it is slow: 1 s to the first byte",
    }
    assert told["math-1.g1"].advice is not None
    assert "hpc-router drain math-1.g1" in told["math-1.g1"].advice
    assert why._degraded(views, {}) == []


def test_advice_for_an_external_endpoint_can_be_followed() -> None:
    """It has no log here, and no job that could be drained."""
    seen = {"replica": "big-x0.g1", "kind": "external", "state": "ejected", "trouble": "http://h:1 answered 404"}
    view = ReplicaView("big", "big-x0.g1", DisplayedState.REGISTERED)
    (cause,) = why._degraded([view], {"experts": {"big": {"replicas": [seen]}}})
    assert cause.advice is not None
    assert "hpc-router unregister big-x0.g1" in cause.advice
    assert "drain" not in cause.advice
    assert "logs" not in cause.advice


ROUTER = ReplicaView("router", "router-0.g1", DisplayedState.READY, kind=RecordKind.ROUTER)


def status_of(**router: Any) -> dict[str, Any]:
    worker = {"worker": 0, "pid": 1, "serving": True, "in_flight": 0, "restarts": 0, "last_end": None}
    healthy = {"replica": "router-0.g1", "workers": [worker], "control": {"restarts": 0}, "settings_trouble": None}
    return {"router": healthy | router}


@pytest.mark.parametrize(
    ("status", "problems"),
    [
        (status_of(), []),
        ({}, []),
        (status_of(workers=[{"worker": 1, "serving": False}]), ["worker 1 does not serve: it is being started"]),
        (
            status_of(control={"restarts": 2, "last_end": "was killed by signal 9"}),
            ["the control process was started again 2 times: the last one was killed by signal 9"],
        ),
        (status_of(settings_trouble="policy.kind=nope"), ["a change was not applied: policy.kind=nope"]),
    ],
)
def test_problems_of_the_routers_processes_and_settings(status: dict[str, Any], problems: list[str]) -> None:
    causes = router_causes([ROUTER], status)
    assert len(causes) == len(problems)
    for cause_found, problem in zip(causes, problems, strict=True):
        assert problem in cause_found.what
        assert cause_found.advice


def test_excluded_and_failing_nodes_are_named(run: RunDir) -> None:
    exclude_nodes(run, ["n1"], reason="it failed twice: math-0.g1 cuda, math-0.g2 cuda", by=BY)
    exclude_nodes(run, ["n9"], reason="drain")
    observed = {
        slot: tuple(
            replace(
                ended(g, FailureReason.CUDA, at=NOON - 100 + g * 20),
                slot=slot,
                node=node,
                started_at=NOON - 101 + g * 20,
            )
            for g in (1, 2)
        )
        for slot, node in ((Slot("math", "0"), "n1"), (Slot("math", "1"), "n2"))
    }
    shown = [ReplicaView("router", "router-0.g1", DisplayedState.READY)]
    causes = why._node_causes(run, shown, observed, now=NOON)
    assert [cause.what for cause in causes] == [
        "node n1 gets no further jobs: it failed twice: math-0.g1 cuda, math-0.g2 cuda",
        "node n2 is not excluded: it failed twice: math-1.g1 cuda, math-1.g2 cuda",
    ]
    assert causes[0].advice is not None
    assert "`hpc-router nodes forget n1`" in causes[0].advice
