"""Why a replica does not serve: for jobs that wait in the queue, and for every reason of failure."""

import os
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from hpc_router.cli.main import main
from hpc_router.cluster.commands import advice, why
from hpc_router.cluster.commands.advice import CUT_ADVICE, FAILURE_ADVICE, STATE_TEXT
from hpc_router.cluster.commands.replica_view import DisplayedState, ReplicaView
from hpc_router.cluster.commands.status import status
from hpc_router.cluster.commands.why import Cause, expected, router_causes
from hpc_router.cluster.control_loop.desired_state import exclude_nodes
from hpc_router.cluster.control_loop.elastic_states import write_states
from hpc_router.cluster.control_loop.elasticity import ElasticState
from hpc_router.cluster.control_loop.forecast import PlannedHandover
from hpc_router.cluster.control_loop.node_exclusion import BY
from hpc_router.cluster.control_loop.slots import Attempt, Observed, Slot
from hpc_router.cluster.launchers.interface import JobReport, JobState
from hpc_router.cluster.launchers.slurm import pending_reasons
from hpc_router.config import frozen
from hpc_router.config.schema import Deployment, EngineConfig, ExpertConfig, PolicyConfig
from hpc_router.router.settings import LIVE
from hpc_router.state.job_records import (
    Exit,
    FailureReason,
    JobDir,
    JobInfo,
    JobPhase,
    JobProgress,
    Process,
    Runner,
    start_ticks,
)
from hpc_router.state.registry import Record, RecordKind, State, publish
from hpc_router.state.run_directory import RunDir
from tests.cluster.control_loop.support import ended
from tests.cluster.programs import Programs

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


def test_a_job_that_will_never_start(run: RunDir) -> None:
    told = cause(run, waiting("PartitionTimeLimit", NOON))
    assert told.what == "its job waits: it asks for more time than its partition allows; so it will never start"
    assert told.advice == "change cluster.walltime or cluster.partition with `hpc-router apply`"


def test_a_held_job_is_named_in_the_advice(run: RunDir) -> None:
    assert cause(run, waiting("JobHeldUser")).advice == "`scontrol release 7` releases it"


@pytest.mark.parametrize("reason", list(FailureReason))
def test_every_reason_has_advice(reason: FailureReason, run: RunDir) -> None:
    told = cause(run, ReplicaView("math", "math-0.g1", DisplayedState.FAILED, reason=reason, message="m"))
    assert told.advice
    assert "{" not in told.advice
    assert set(FAILURE_ADVICE) == set(FailureReason)


KEY = re.compile(r"(?:router|cluster|policy|experts\.\{expert\}|resources)(?:\.[a-z_]+)+")


def advice_texts() -> Iterator[str]:
    yield from FAILURE_ADVICE.values()
    yield from STATE_TEXT.values()
    yield from (v for name, v in vars(advice).items() if name.endswith("_ADVICE") and isinstance(v, str))
    yield CUT_ADVICE.format(key="cluster.drain_s")
    limits = (f"{who}{kind}{what}" for who in ("QOS", "Assoc") for kind in ("Grp", "Max") for what in ("Jobs", "GRES"))
    for reason in [*pending_reasons._REASONS, *limits]:
        explained = pending_reasons.explain_pending(reason)
        if explained.advice is not None:
            yield explained.advice


def test_advice_names_no_key_that_cannot_be_changed() -> None:
    """`set` changes some keys at once, `apply` all others by replacing jobs; the place of a run needs a new one."""
    named = {text: keys for text in advice_texts() if (keys := KEY.findall(text))}
    assert len(named) > 20
    for text, keys in named.items():
        for key in keys:
            assert "hpc-router apply" in text or "a new run" in text or (key in LIVE and "hpc-router set" in text), text


def ends(*exits: Exit | None) -> Observed:
    """The attempts of math-0, one for each exit; None is a running job."""
    attempts = [
        Attempt(
            MATH,
            number,
            report=JobReport(JobState.ENDED if end else JobState.RUNNING),
            claimed_at=NOON - 60,
            exit=end,
            job_id=str(number),
        )
        for number, end in enumerate(exits, 1)
    ]
    return {MATH: tuple(attempts)}


MATH = Slot("math", "0")
KILLED = Exit(ok=False, reason=FailureReason.KILLED, message="its agent was killed by signal 9", at=NOON)
DRAINED = Exit(ok=True, reason=FailureReason.DRAINED, message="drained after SIGTERM", at=NOON)


@pytest.mark.parametrize("state", [DisplayedState.READY, DisplayedState.LOADING])
def test_the_last_end_of_a_replica_has_a_cause(run: RunDir, state: DisplayedState) -> None:
    """Its successor already loads or serves. Log lines and advice are those of the job that ended."""
    assert JobDir(run, "math-0.g1").claim()
    JobDir(run, "math-0.g1").agent_log.write_text("the last words\n")
    view = ReplicaView("math", "math-0.g2", state, job_id="2")
    (told,) = why._last_ends(run, [view], ends(KILLED, None), forgiven={}, now=NOON + 1)
    assert told.what == "math-0.g1 ended at 12:00:00: killed: its agent was killed by signal 9"
    assert told.advice is not None
    assert told.advice.startswith("it was killed from outside")
    assert told.lines == ("the last words",)


@pytest.mark.parametrize(
    ("view", "observed", "forgiven", "now"),
    [
        ("math-0.g2", ends(DRAINED, None), {}, NOON),  # it ended in order
        ("math-0.g3", ends(KILLED, DRAINED, None), {}, NOON),  # a newer job ended in order
        ("math-0.g1", ends(KILLED), {}, NOON),  # its state shows the end
        ("math-0.g2", ends(KILLED, None), {"math-0": 1}, NOON),  # before the last `up`
        ("math-0.g2", ends(KILLED, None), {}, NOON + why.RECENT_S + 1),
    ],
)
def test_other_ends_are_not_repeated(
    run: RunDir, view: str, observed: Observed, forgiven: dict[str, int], now: float
) -> None:
    shown = [ReplicaView("math", view, DisplayedState.READY)]
    assert why._last_ends(run, shown, observed, forgiven=forgiven, now=now) == []


PLANNED = PlannedHandover("math-0.g1", "overlap", NOON, NOON + 600)
WAITS = replace(PLANNED, successor="math-0.g2", ready_at=NOON + 900, late_s=330.0, reason="Priority")


@pytest.mark.parametrize(
    ("planned", "said"),
    [
        (PLANNED, "its successor is due and not submitted yet"),
        (
            WAITS,
            "math-0.g2 is to replace it and waits: jobs of higher priority go first; expected to be ready at 12:15, in "
            "15 minutes; no replica of this slot serves for about 330 s",
        ),
        (
            replace(PLANNED, successor="math-0.g2", ready_at=NOON + 120, reason="loading"),
            "math-0.g2 is to replace it and is starting; expected to be ready at 12:02, in 2 minutes",
        ),
        (replace(PLANNED, successor="math-0.g2"), "math-0.g2 is to replace it and is starting"),
        (
            replace(PLANNED, mode="drain_first", successor="math-0.g2", ready_at=NOON + 630, late_s=50.0),
            "math-0.g2 starts when it has ended; expected to be ready at 12:10, in 10 minutes; no replica of this slot "
            "serves for about 50 s",
        ),
        (
            replace(PLANNED, mode="drain_first", refused="QOSMaxSubmitJobPerUserLimit"),
            "Slurm refused a second job beside it, so the next one starts when it has ended: "
            "QOSMaxSubmitJobPerUserLimit",
        ),
    ],
)
def test_a_handover_and_what_delays_it(planned: PlannedHandover, said: str) -> None:
    view = ReplicaView("math", "math-0.g1", DisplayedState.READY)
    (told,) = why._handovers([view], [planned], now=NOON)
    assert told.what == f"its walltime ends at 12:10, in 10 minutes: {said}"
    assert (told.advice is not None) == (planned is WAITS or planned.refused is not None)


def test_why_and_status_show_a_handover_under_way(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """math-0.g1 serves near its end, and Slurm lets math-0.g2 wait."""
    deployment = Deployment(experts={"math": ExpertConfig(model="m", engine=EngineConfig(kind="sim"))})
    deployment.policy.kind = "model_field"
    deployment.cluster.kind = "slurm"
    run.config.write_text(frozen.to_yaml(deployment))
    now = time.time()
    began, ends, starts = (f"{datetime.fromtimestamp(now + s):%Y-%m-%dT%H:%M:%S}" for s in (-1000, 60, 3600))
    lines = (
        f"1\\tRUNNING\\tn1\\t{began}\\t{ends}\\tmath\\t/\\tbatch\\tNone",
        f"2\\tPENDING\\t\\t{starts}\\tN/A\\tmath\\t/\\tbatch\\tResources",
    )
    text = "\\n".join([*lines, ""])
    Programs(tmp_path / "bin", monkeypatch).add("squeue", f"printf '{text}'")
    for number in (1, 2):
        job = JobDir(run, f"math-0.g{number}")
        assert job.claim()
        job.write(JobInfo(str(number), "login1", runner=Runner.SLURM, submitted_at=now - 1000))
    JobDir(run, "math-0.g1").write(JobProgress(JobPhase.READY, ready_at=now - 900))
    JobDir(run, "math-0.g1").write(Process(1, 1, "n1", started_at=now - 950))
    record = Record(RecordKind.EXPERT, "math-0.g1", "http://n1:1", State.READY, {"math": None}, job_id="1", node="n1")
    publish(run.registry, record)
    (told,) = why.why(run, "math")
    assert told.view.replica == "math-0.g1"
    assert "math-0.g2 is to replace it and waits: it is next in line" in told.what
    assert main(["status", "--run", str(run.path)]) == 0
    assert "math-0.g2 is to replace it" in " ".join(capsys.readouterr().out.split())


def test_a_step_that_waits_in_a_job_of_the_user() -> None:
    """Slurm gives no reason: its queue only shows the job, which runs."""
    view = ReplicaView("math", "math-0.g1", DisplayedState.SUBMITTED, job_id="7")
    told = why._step_cause(Cause(view, "its job was submitted", None))
    assert "other steps hold the resources of job 7" in told.what
    assert told.advice == "`squeue --steps --jobs=7` lists the steps that hold the job's resources"
    loads = Cause(ReplicaView("math", "math-0.g1", DisplayedState.LOADING, job_id="7"), "it loads", None)
    assert why._step_cause(loads) is loads


def test_a_silent_controller_is_named(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`why` and `status` name it once, beside what the files show."""
    programs = Programs(tmp_path / "bin", monkeypatch)
    programs.add("squeue", 'echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1')
    deployment = Deployment(experts={"math": ExpertConfig(model="m", engine=EngineConfig(kind="sim"))})
    deployment.policy.kind = "model_field"
    deployment.cluster.kind = "slurm"
    run.config.write_text(frozen.to_yaml(deployment))
    assert JobDir(run, "math-0.g1").claim()
    JobDir(run, "math-0.g1").write(JobInfo("7", "login1", runner=Runner.SLURM))
    told = [cause for cause in why.why(run) if "controller" in cause.what]
    assert [cause.what for cause in told] == [
        "Slurm's controller does not answer: slurm_load_jobs error: Unable to contact slurm controller"
    ]
    assert "scontrol ping" in (told[0].advice or "")
    assert main(["status", "--run", str(run.path)]) == 0
    assert "Slurm's controller does not answer: slurm_load_jobs error" in capsys.readouterr().out
    programs.add("squeue", "true")
    assert not [cause for cause in why.why(run) if "controller" in cause.what]


def test_equal_entries_appear_once(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers of the router report the same problem."""
    monkeypatch.setattr(why, "ask_router", lambda _run: (None, {}, None))
    view = ReplicaView("router", "router-0.g1", DisplayedState.MISSING)
    twice = [Cause(view, "a change was not applied", None), Cause(view, "another", None)] * 2
    monkeypatch.setattr(why, "router_causes", lambda _shown, _answer: twice)
    told = [cause.what for cause in why.why(run)]
    assert told == ["a change was not applied", "another"]


def test_the_log_lines_of_a_failure(run: RunDir) -> None:
    """They are from the engine's log, or from the batch script's log if the script failed first. That log may be in the
    folder of another replica of the job."""
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
    """They follow those of rank 0, which only reports the loss. A rank whose engine never ran has an agent's log
    only."""
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
    """Other replicas get no cause, and neither does any replica if no router answers."""
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
    """The endpoint has no log in the run, and no job that could be drained."""
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
    ("answer", "problems"),
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
def test_problems_of_the_routers_processes_and_settings(answer: dict[str, Any], problems: list[str]) -> None:
    causes = router_causes([ROUTER], answer)
    assert len(causes) == len(problems)
    for cause_found, problem in zip(causes, problems, strict=True):
        assert problem in cause_found.what
        assert cause_found.advice


def test_a_replica_that_copies_its_model_says_so(run: RunDir) -> None:
    """`why` and `status` show that and how long the copy took."""
    deployment = Deployment(experts={"math": ExpertConfig(model="m", engine=EngineConfig(kind="sim"))})
    deployment.policy.kind = "model_field"
    run.config.write_text(frozen.to_yaml(deployment))
    job = JobDir(run, "math-0.g1")
    job.claim()
    job.write(JobInfo(str(os.getpid()), socket.gethostname(), start_ticks(os.getpid())))
    copies = "copies /models/math: 3.2 of 15.0 GB"
    job.write(JobProgress(JobPhase.STARTING, message=copies))
    [told] = why.why(run, "math")
    assert told.what == f"it is starting; {copies}"
    [shown] = status(run)["experts"]["math"]["replicas"]
    assert (shown["message"], shown["stage_s"], shown["stage_bytes"], shown["load_s"]) == (copies, None, None, None)
    job.write(JobProgress(JobPhase.READY, load_s=9.5, stage_s=12.25, stage_bytes=15))
    [shown] = status(run)["experts"]["math"]["replicas"]
    assert (shown["message"], shown["stage_s"], shown["stage_bytes"], shown["load_s"]) == (None, 12.25, 15, 9.5)


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


def test_why_and_status_explain_the_number_of_replicas(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    sim = EngineConfig(kind="sim")
    limits: dict[str, int] = {"replicas": 1, "min_replicas": 0, "max_replicas": 3}
    deployment = Deployment(
        experts={name: ExpertConfig(model="m", engine=sim, **limits) for name in ("math", "code", "law")},  # type: ignore[arg-type]
        policy=PolicyConfig(kind="model_field"),
    )
    run.config.write_text(frozen.to_yaml(deployment))
    now = time.time()
    states = {
        "math": ElasticState(0, now - 60, "no request for 300 s", changes=(now - 60,)),
        "code": ElasticState(
            2, now - 60, "9 requests for 8 places", changes=(now - 60,), blocked="it needs 3 replicas"
        ),
        "law": ElasticState(1, now - 7200, "a request came while it had no replica", changes=(now - 7200,)),
    }
    write_states(run, states, at=now)
    told = {cause.view.expert: cause for cause in why.why(run) if " has " in cause.what}
    assert told.keys() == {"math", "code"}, "law has changed long ago"
    assert told["math"].what.startswith("math has no replica since ")
    assert told["math"].what.endswith(": no request for 300 s; the next request starts one")
    assert "code has 2 replicas" in told["code"].what
    assert told["code"].advice == advice.MAX_GPUS_ADVICE
    assert [cause.view.replica for cause in why.why(run, "math")] == ["math"]
    shown = status(run)["experts"]
    assert shown["math"]["elastic"] == {
        "min_replicas": 0, "max_replicas": 3, "replicas": 0, "since": states["math"].changed_at,
        "reason": "no request for 300 s", "blocked": None,
    }  # fmt: skip
    assert shown["math"]["usage"] is None
    assert main(["status", "--run", str(run.path)]) == 0
    assert "starts on demand: no request for 300 s" in capsys.readouterr().out
