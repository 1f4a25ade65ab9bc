"""The content of `forecast.json` and `estimates.json`, from observed jobs."""

import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from hpc_router.cluster.control_loop.forecast import (
    ExpectedReady,
    ForecastFiles,
    PlannedHandover,
    forecast,
    not_submitted,
)
from hpc_router.cluster.control_loop.handover import measured, schedule
from hpc_router.cluster.control_loop.reconcile import Desired
from hpc_router.cluster.control_loop.slots import Attempt, Observed
from hpc_router.cluster.launchers.interface import JobReport, JobState
from hpc_router.state.forecast import FAILED, SCALED_TO_ZERO, ForecastReader, StartForecast
from hpc_router.state.job_records import FailureReason, JobPhase, JobProgress, Stop
from hpc_router.state.registry import State
from hpc_router.state.run_directory import make_run
from tests.cluster.control_loop.support import BEGAN, DUE, LIFE_S, MATH, POLICY, ended, serving, waiting

ONE = Desired(replicas={"math": 1}, handovers={"math": POLICY})
OLD = replace(serving(), report=JobReport(JobState.ENDED), exit=ended(1, FailureReason.DRAINED, at=DUE).exit)
"""Waited 10 s in the queue and loaded for 50 s."""


def predicted(
    desired: Desired, observed: Observed, now: float
) -> tuple[dict[str, ExpectedReady], list[PlannedHandover], list[ExpectedReady]]:
    durations = measured(observed)
    return forecast(observed, schedule(observed, desired.handovers, durations), durations, now)


def expected(*attempts: Attempt, now: float = BEGAN) -> ExpectedReady | None:
    observed = {MATH: (OLD, *attempts)}
    return predicted(ONE, observed, now)[0].get("math")


def handovers(*attempts: Attempt, now: float = DUE) -> list[PlannedHandover]:
    return predicted(ONE, {MATH: attempts}, now)[1]


def test_all_replicas_that_are_not_ready_are_listed() -> None:
    """Also those of an expert that has a ready replica, whose own time is not forecast."""
    observed = {MATH: (serving(), waiting(2, reason="Priority"))}
    experts, _, starting = predicted(ONE, observed, BEGAN)
    assert experts == {}
    assert [(found.replica, found.reason) for found in starting] == [("math-0.g2", "Priority")]


def test_a_waiting_job_is_expected_after_the_measured_times() -> None:
    job = waiting(2, reason="Priority")
    assert expected(job) == ExpectedReady(None, "math-0.g2", "Priority"), "it should be ready already"
    later = replace(job, submitted_at=BEGAN)
    assert expected(later) == ExpectedReady(BEGAN + 10 + 50, "math-0.g2", "Priority")


def test_slurms_estimate_of_the_start_counts_first() -> None:
    job = waiting(2)
    job = replace(job, report=replace(job.report, starts_at=BEGAN + 1000))
    assert expected(job) == ExpectedReady(BEGAN + 1050, "math-0.g2", None)


def test_a_loading_job_is_expected_after_the_measured_load_time() -> None:
    progress = JobProgress(JobPhase.LOADING, at=BEGAN)
    job = replace(serving(2), registered=State.STARTING, progress=progress, started_at=BEGAN - 20)
    assert expected(job) == ExpectedReady(BEGAN + 30, "math-0.g2", "loading")


def test_an_expert_with_a_ready_replica_is_left_out() -> None:
    assert expected(serving(2)) is None


def test_a_handover_names_its_successor_and_whether_it_will_be_late() -> None:
    plain = PlannedHandover("math-0.g1", "overlap", DUE, BEGAN + LIFE_S)
    assert handovers(serving(), now=DUE - 1) == []
    assert handovers(serving()) == [plain]
    successor = replace(waiting(2), submitted_at=DUE)
    assert handovers(serving(), successor) == [replace(plain, successor="math-0.g2", ready_at=DUE + 60)]
    job = replace(successor, report=JobReport(JobState.PENDING, pending_reason="Resources", starts_at=BEGAN + LIFE_S))
    (late,) = handovers(serving(), job)
    assert (late.late_s, late.reason) == (50 + POLICY.warn_s, "Resources")


def test_a_ready_successor_is_not_late() -> None:
    (done,) = handovers(serving(), serving(2, expires_at=BEGAN + 3 * LIFE_S))
    assert (done.ready_at, done.late_s) == (BEGAN, None)


def test_files_are_written_when_their_content_changes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    files = ForecastFiles(run)

    def write(observed: Observed, now: float) -> None:
        durations = measured(observed)
        files.write(
            observed,
            schedule(observed, ONE.handovers, durations),
            durations,
            {"math": "gpu"},
            now,
            absent={},
            adapters={},
        )

    write({MATH: (OLD, serving(2))}, DUE)
    assert json.loads(run.estimates_json.read_text()) == {
        "experts": {"math": {"gpu": {"queue_s": [10.0, 10.0], "load_s": [50.0, 50.0], "drain_s": []}}}
    }
    content = json.loads(run.forecast_json.read_text())
    assert (content["at"], content["experts"], len(content["handovers"])) == (DUE, {}, 1)
    write({MATH: (OLD, serving(2))}, DUE + 1)
    assert json.loads(run.forecast_json.read_text()) == content
    write({MATH: (OLD, waiting(2))}, DUE + 2)
    assert json.loads(run.forecast_json.read_text())["experts"]["math"]["replica"] == "math-0.g2"


def test_a_successor_that_starts_after_the_end_leaves_a_gap() -> None:
    """The drain and the load: 0 s, for no drain was measured, and 50 s."""
    desired = replace(ONE, handovers={"math": replace(POLICY, mode="drain_first")})
    successor = replace(waiting(2, reason="Dependency", after="math-0.1"), submitted_at=DUE)
    observed = {MATH: (serving(), successor)}
    (planned,) = predicted(desired, observed, DUE)[1]
    drains_at = BEGAN + LIFE_S - POLICY.warn_s
    assert planned == PlannedHandover(
        "math-0.g1", "drain_first", DUE, BEGAN + LIFE_S, "math-0.g2", ready_at=drains_at + 50, late_s=50
    )


def test_a_refused_overlap_is_named() -> None:
    """The next one starts after the end, submitted or not."""
    refused = ended(2, FailureReason.REFUSED, at=DUE)
    (planned,) = handovers(serving(), refused)
    assert (planned.mode, planned.refused, planned.successor, planned.late_s) == ("drain_first", "it ended", None, 50)
    (planned,) = handovers(serving(), refused, waiting(3, reason="Dependency", after="math-0.1"))
    assert (planned.mode, planned.refused, planned.successor, planned.late_s) == (
        "drain_first",
        "it ended",
        "math-0.g3",
        50,
    )
    failed = ended(2, FailureReason.CRASHED, at=DUE)
    assert handovers(serving(), failed)[0].refused is None


def test_experts_without_a_job_have_a_forecast_too(tmp_path: Path) -> None:
    """Also adapters; an expert whose only job is draining counts as one without a job."""
    serves = serving()
    durations = measured({MATH: (serves,)})
    draining = replace(serves, stop=Stop(drain_at=DUE))
    absent = {"math": SCALED_TO_ZERO, "code": FAILED, "law": JobPhase.STARTING.value}
    assert not_submitted(absent, {MATH: (serves,)}, durations).keys() == {"code", "law"}
    found = not_submitted(absent, {MATH: (draining,)}, durations)
    assert found["math"] == ExpectedReady(None, None, SCALED_TO_ZERO, until_ready_s=60.0)
    run = make_run(tmp_path / "run")
    files = ForecastFiles(run)
    files.write(
        {MATH: (draining,)}, {}, durations, {"math": "gpu"}, DUE, absent=absent, adapters={"tune": "math", "x": "other"}
    )
    reader = ForecastReader(run)
    reader.read()
    assert reader.experts == {
        "math": StartForecast("scaled to zero, starts on demand", until_ready_s=60.0),
        "tune": StartForecast("scaled to zero, starts on demand", until_ready_s=60.0),
        "code": StartForecast("failed", hopeless=True),
        "law": StartForecast("starting"),
    }
    assert reader.experts["math"].expected_ready_at(DUE) == DUE + 60
    assert reader.content.keys() == {"at", "experts", "starting", "handovers"}
    run.forecast_json.write_text('{"experts": {}}')
    reader.read()
    assert (reader.content, reader.experts) == ({"experts": {}}, {})
    run.forecast_json.unlink()
    reader.read()
    assert (reader.content, reader.experts) == ({}, {})


def test_the_text_of_a_forecast_has_the_date_of_another_day() -> None:
    noon = datetime(2026, 3, 1, 12).timestamp()
    assert StartForecast("starting", noon + 60).text(noon) == "starting, expected at 12:01"
    assert StartForecast("starting", noon + 86400).text(noon) == "starting, expected at 2026-03-02 12:00"
    assert StartForecast("starting", noon).text(noon) == "starting"
    assert StartForecast("starting").text(noon) == "starting"
