"""`drain NAME`: which jobs a name selects, and how they end. Jobs are processes, and the agent is a real server."""

import getpass
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from hpc_router.cli.main import main
from hpc_router.cluster.commands.drain import DrainResult, drain, select_jobs, successor, undo, unserved_warnings, wait
from hpc_router.cluster.control_loop import loop
from hpc_router.cluster.control_loop.desired_state import exclude_nodes, excluded_nodes, include_nodes
from hpc_router.cluster.control_loop.job_requests import job_requests
from hpc_router.cluster.control_loop.loop import ControlLoop
from hpc_router.cluster.control_loop.node_exclusion import BY
from hpc_router.cluster.control_loop.slots import NO_STOP, ROUTER_SLOT, Attempt, Observed, Slot
from hpc_router.cluster.launchers.interface import JobReport, JobRequest, JobState, Launcher
from hpc_router.cluster.launchers.local import LocalLauncher
from hpc_router.cluster.launchers.slurm.sbatch import batch_jobs
from hpc_router.config import frozen
from hpc_router.config.schema import Deployment, EngineConfig, ExpertConfig
from hpc_router.errors import ConfigError
from hpc_router.net.auth import replica_key
from hpc_router.net.protocol import DRAIN
from hpc_router.state.job_records import Exit, FailureReason, JobDir, JobInfo, Runner, Stop
from hpc_router.state.registry import Record, RecordKind, State, publish
from hpc_router.state.run_directory import RunDir
from tests.cluster.programs import Programs
from tests.cluster.support import request_of
from tests.support.waiting import eventually_sync


def attempt(
    slot: Slot,
    *,
    node: str = "n1",
    job: JobState = JobState.RUNNING,
    generation: int = 1,
    registered: State | None = None,
    stop: Stop = NO_STOP,
) -> Attempt:
    report = JobReport(job, node=node)
    return Attempt(slot, generation, report=report, claimed_at=0.0, registered=registered, stop=stop)


MATH_0, MATH_1, CODE_0, HAND = Slot("math", "0"), Slot("math", "1"), Slot("code", "0"), Slot("math", "h0")
OBSERVED = {
    MATH_0: (attempt(MATH_0, job=JobState.ENDED, node="n5"), attempt(MATH_0, generation=2)),
    MATH_1: (attempt(MATH_1, node="n2.hpc.example"),),
    CODE_0: (attempt(CODE_0, node="n2.hpc.example"),),
    HAND: (attempt(HAND, job=JobState.ENDED),),
    ROUTER_SLOT: (attempt(ROUTER_SLOT, node="n2.hpc.example"),),
}
EXTERNAL = Record(RecordKind.EXTERNAL, "law-x0.g1", "http://h:1", State.READY, {"law": None})
ELSEWHERE = Record(RecordKind.EXPERT, "code-0.g1", "http://h:1", State.READY, {}, node="n3")


@pytest.mark.parametrize(
    ("names", "selected"),
    [
        (["math-0.g2"], ["math-0.g2"]),
        (["math-0"], ["math-0.g2"]),
        (["math"], ["math-0.g2", "math-1.g1"]),
        (["n2"], ["code-0.g1", "math-1.g1"]),
        (["n2.hpc.example"], ["code-0.g1", "math-1.g1"]),
        (["n3"], ["code-0.g1"]),  # the record's node counts before the submission's
        (["n1", "math-0", "math"], ["math-0.g2", "math-1.g1"]),
        (["router"], ["router-0.g1"]),
        (["router-0"], ["router-0.g1"]),
        (["math-0.g1"], []),  # it has ended
        (["n5"], []),  # its only job has ended; further ones are kept off
        (["math-h0"], []),
        (["law"], []),  # an expert without a job
    ],
)
def test_names_select_jobs(names: list[str], selected: list[str]) -> None:
    records = {r.replica: r for r in (EXTERNAL, ELSEWHERE)}
    assert [a.replica for a in select_jobs(names, OBSERVED, records, experts=["math", "code", "law"])] == selected


STANDBY = attempt(ROUTER_SLOT, job=JobState.PENDING, generation=2)


def beside_a_standby(state: State | None, *, job: JobState = JobState.RUNNING) -> Observed:
    return {ROUTER_SLOT: (attempt(ROUTER_SLOT, registered=state, job=job), STANDBY)}


@pytest.mark.parametrize(
    ("name", "observed", "selected"),
    [
        ("router", beside_a_standby(State.READY), ["router-0.g1"]),
        ("router-0", beside_a_standby(State.READY), ["router-0.g1"]),
        ("router-0.g2", beside_a_standby(State.READY), ["router-0.g2"]),
        ("router", beside_a_standby(State.DRAINING), ["router-0.g1"]),  # drained a second time
        ("router", beside_a_standby(None), ["router-0.g1"]),
        ("router", beside_a_standby(None, job=JobState.PENDING), ["router-0.g1", "router-0.g2"]),
        ("router", beside_a_standby(None, job=JobState.ENDED), ["router-0.g2"]),
    ],
)
def test_a_standby_is_not_the_router(name: str, observed: Observed, selected: list[str]) -> None:
    """A standby waits for the end of the serving router and replaces it, so only its own name drains it."""
    assert [a.replica for a in select_jobs([name], observed, {}, experts=[])] == selected


def test_a_standby_replaces_what_ends(run: RunDir) -> None:
    serves, standby = beside_a_standby(State.READY)[ROUTER_SLOT]
    observed = {ROUTER_SLOT: (serves, standby)}
    assert successor(observed, [serves]) == "router-0.g2"
    assert successor(observed, [standby]) == "router-0.g1"
    assert successor(observed, [serves, standby]) is None
    assert successor({ROUTER_SLOT: (serves, replace(standby, stop=Stop(cancel_at=1.0)))}, [serves]) is None
    assert successor(OBSERVED, []) == "router-0.g1"
    assert not DrainResult((), ("router-0.g1",), successor="router-0.g2").needs_reconcile(run)
    assert DrainResult((), ("router-0.g1",)).needs_reconcile(run)
    assert DrainResult(("math-0.g1",), ()).needs_reconcile(run)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mth-0", r"this run has nothing named 'mth-0'; did you mean 'math-0'\? \(valid: .*math-0\.g2.*n1.*n2"),
        ("n9", r"'n9'; did you mean 'n\d"),
        ("law-x0", "law-x0 is an external endpoint; `hpc-router unregister law-x0`"),
    ],
)
def test_unknown_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        select_jobs(["math-0", name], OBSERVED, {EXTERNAL.replica: EXTERNAL}, experts=["math"])


@pytest.fixture
def control(run: RunDir, service: Path, launcher: LocalLauncher, monkeypatch: pytest.MonkeyPatch) -> ControlLoop:
    """A control loop with the experts math (two replicas) and code, whose jobs are stand-ins that serve nothing."""
    sim = EngineConfig(kind="sim")
    deployment = Deployment(
        experts={"math": ExpertConfig(model="m", engine=sim, replicas=2), "code": ExpertConfig(model="m", engine=sim)}
    )
    deployment.policy.kind = "model_field"
    run.config.write_text(frozen.to_yaml(deployment))
    monkeypatch.setattr(
        "hpc_router.cluster.control_loop.loop.job_requests",
        lambda _run, _deployment, replicas, **_: [request_of(service, replica) for replica in replicas],
    )
    control = ControlLoop(run, deployment=deployment)
    submitted = control.run_pass().submitted
    eventually_sync(lambda: all((run.path / replica).exists() for replica in submitted))
    return control


@contextmanager
def agent(run: RunDir, replica: str, *, status: int = 202) -> Iterator[list[str | None]]:
    """A record and an HTTP server for this replica. The server records the drain call and ends the job."""
    offered: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == DRAIN
            offered.append(self.headers.get("authorization"))
            if status == 202:
                JobDir(run, replica).write(Exit(ok=True, reason=FailureReason.DRAINED, message="asked"))
            self.send_response(status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        publish(
            run.registry, Record(RecordKind.EXPERT, replica, url, State.READY, {"math": None}, nonce="n", node="n7")
        )
        try:
            yield offered
        finally:
            server.shutdown()
            thread.join()


def refusing_to_sleep(_length_s: float) -> None:
    raise AssertionError("nothing to wait for")


def stopped(run: RunDir, replica: str) -> Callable[[], bool]:
    return lambda: (run.path / f"{replica}.stopped").exists()


def test_an_agent_gets_the_drain_call(run: RunDir, control: ControlLoop) -> None:
    """The call has the replica's own key. Other replicas stay."""
    with agent(run, "math-0.g1") as offered:
        retired = drain(control, ["math-0"])
    assert (retired.asked, retired.signalled) == (("math-0.g1",), ())
    assert offered == [f"Bearer {replica_key(run.secret(), 'n')}"]
    stop = JobDir(run, "math-0.g1").stop()
    assert stop is not None
    assert stop.drain_at is not None
    assert stop.cancel_at is None
    assert JobDir(run, "math-1.g1").stop() is None


def test_an_adapter_is_drained_only_with_its_host(run: RunDir, control: ControlLoop) -> None:
    control.deployment.experts["law"] = ExpertConfig(model="a", adapter_of="math")
    with pytest.raises(
        ConfigError, match=r"law is an adapter on the engine of math; drain math, which drains all that it serves$"
    ):
        drain(control, ["law"])
    assert JobDir(run, "math-0.g1").stop() is None


def test_a_second_drain_does_not_move_the_deadline(run: RunDir, control: ControlLoop) -> None:
    JobDir(run, "math-0.g1").write(Stop(drain_at=1.0))
    with agent(run, "math-0.g1") as offered:
        drain(control, ["math-0"])
    assert len(offered) == 1
    assert JobDir(run, "math-0.g1").stop() == Stop(drain_at=1.0)


def test_a_replica_that_does_not_serve_yet_gets_sigterm(run: RunDir, control: ControlLoop) -> None:
    assert drain(control, ["math"]) == DrainResult(asked=(), signalled=("math-0.g1", "math-1.g1"))
    eventually_sync(stopped(run, "math-0.g1"))
    eventually_sync(stopped(run, "math-1.g1"))
    stop = JobDir(run, "math-0.g1").stop()
    assert stop is not None
    assert stop.cancel_at is not None


def test_a_replica_that_refuses_the_call_gets_sigterm(
    run: RunDir, control: ControlLoop, caplog: pytest.LogCaptureFixture
) -> None:
    with agent(run, "math-0.g1", status=500):
        retired = drain(control, ["n7"])
    assert (retired.asked, retired.signalled) == ((), ("math-0.g1",))
    eventually_sync(stopped(run, "math-0.g1"))
    assert "math-0.g1 refused to drain" in caplog.text


def on_slurm(control: ControlLoop) -> ControlLoop:
    """The same control loop for a deployment on Slurm, where only submissions differ."""
    control.deployment.cluster.kind = "slurm"
    return control


def exclusions(control: ControlLoop, replica: str) -> str | None:
    run, deployment = control.run, control.deployment
    (job,) = batch_jobs(run, deployment, job_requests(run, deployment, [replica], exclude=excluded_nodes(run)))
    found: str | None = job.options().get("exclude")
    return found


def test_a_node_that_is_drained_gets_no_further_jobs(run: RunDir, control: ControlLoop) -> None:
    """The exclusion lasts until `drain --undo`. A node that the site excludes stays excluded."""
    on_slurm(control).deployment.cluster.exclude = "n[1-2]"
    with agent(run, "math-0.g1"):
        retired = drain(control, ["n7"])
    assert (retired.asked, retired.excluded) == (("math-0.g1",), ("n7",))
    assert "no further job starts on node n7 until `hpc-router drain --undo n7`" in retired.lines()
    facts = run.read_desired()["excluded_nodes"]["n7"]
    assert (facts["reason"], facts["by"]) == ("drain", getpass.getuser())
    assert exclusions(control, "math-0.g2") == "n[1-2],n7"
    assert exclusions(control, "router-0.g1") == "n[1-2],n7"
    assert [e for e in events(run) if e["event"] == "node_excluded"]
    assert main(["drain", "--run", str(run.path), "--undo", "n7"]) == 0
    assert exclusions(control, "math-0.g2") == "n[1-2]"
    assert main(["drain", "--run", str(run.path), "--undo", "n7"]) == 2


def queue_job(run: RunDir, replica: str, number: str) -> None:
    job = JobDir(run, replica)
    assert job.claim()
    job.write(JobInfo(number, "login1", runner=Runner.SLURM))


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    """A `scontrol` for which job 8 has started and the other jobs wait."""
    monkeypatch.setattr(loop, "job_requests", job_requests)
    programs = Programs(tmp_path / "bin", monkeypatch)
    programs.add("scontrol", 'case "$*" in *JobId=8*) echo "Job is no longer pending execution" >&2; exit 1;; esac')
    programs.add("scancel", "true")
    programs.add("squeue", "true")
    return programs


def test_a_drained_node_is_excluded_for_the_jobs_in_the_queue(
    run: RunDir, control: ControlLoop, scontrol: Programs
) -> None:
    """The jobs are a standby router and a successor. A job that has just started is replaced, wherever it runs."""
    control = ControlLoop(run, deployment=on_slurm(control).deployment)
    control.deployment.cluster.exclude = "n[1-2]"
    queue_job(run, "router-0.g2", "7")
    queue_job(run, "code-0.g2", "8")
    with agent(run, "math-0.g1"):
        drained = drain(control, ["n7"])
    assert drained.replicas == ("math-0.g1",)
    assert sorted(scontrol.calls("scontrol")) == [
        "update JobId=7 ExcNodeList=n[1-2],n7",
        "update JobId=8 ExcNodeList=n[1-2],n7",
    ]
    stops = {replica: JobDir(run, replica).stop() for replica in ("router-0.g2", "code-0.g2")}
    assert stops["router-0.g2"] is None
    assert stops["code-0.g2"] is not None
    assert stops["code-0.g2"].cancel_at is not None
    assert "8" in scontrol.calls("scancel")[-1].split()
    undo(control, ["n7"])
    assert sorted(scontrol.calls("scontrol"))[0] == "update JobId=7 ExcNodeList=n[1-2]"


class Submitting:
    """A launcher with another `submit`."""

    def __init__(self, launcher: Launcher, submit: Callable[[Sequence[JobRequest]], list[str]]) -> None:
        self._launcher, self.submit = launcher, submit

    def __getattr__(self, name: str) -> Any:
        return getattr(self._launcher, name)


def test_a_job_submitted_while_a_node_is_drained_is_kept_off_it(
    run: RunDir, control: ControlLoop, scontrol: Programs
) -> None:
    """Its request was built before the node was excluded."""
    control = ControlLoop(run, deployment=on_slurm(control).deployment)
    control.deployment.experts["code"].replicas = 2

    def submit(requests: Sequence[JobRequest]) -> list[str]:
        exclude_nodes(run, ["n7"], reason="drain")
        queue_job(run, requests[0].replica, "9")
        return [requests[0].replica]

    control.launcher = Submitting(control.launcher, submit)
    assert control.run_pass().submitted == ["code-1.g1"]
    assert scontrol.calls("scontrol") == ["update JobId=9 ExcNodeList=n7"]


def test_a_forgotten_node_is_allowed_for_the_jobs_in_the_queue(
    run: RunDir, control: ControlLoop, scontrol: Programs
) -> None:
    """As after `drain --undo`."""
    run.config.write_text(frozen.to_yaml(on_slurm(control).deployment))
    queue_job(run, "router-0.g2", "7")
    queue_job(run, "code-0.g2", "8")
    exclude_nodes(run, ["n7", "n9"], reason="it failed twice", by=BY)
    assert main(["nodes", "forget", "--run", str(run.path), "n7"]) == 0
    assert sorted(scontrol.calls("scontrol")) == ["update JobId=7 ExcNodeList=n9", "update JobId=8 ExcNodeList=n9"]
    assert JobDir(run, "code-0.g2").stop() is None, "it has started, where it may"


def test_the_loop_applies_exclusions_that_others_changed(run: RunDir, control: ControlLoop, scontrol: Programs) -> None:
    """A verb that was interrupted has changed only `desired.json`."""
    control = ControlLoop(run, deployment=on_slurm(control).deployment)
    queue_job(run, "router-0.g2", "7")
    control.run_pass()
    assert scontrol.calls("scontrol") == []
    exclude_nodes(run, ["n7"], reason="drain")
    control.run_pass()
    control.run_pass()
    assert scontrol.calls("scontrol") == ["update JobId=7 ExcNodeList=n7"]
    include_nodes(run, ["n7"])
    control.run_pass()
    assert scontrol.calls("scontrol")[1:] == ["update JobId=7 ExcNodeList="]


def test_a_new_loop_applies_them_once_more(run: RunDir, control: ControlLoop, scontrol: Programs) -> None:
    """It does not know what the loop before it has applied."""
    exclude_nodes(run, ["n7"], reason="drain")
    include_nodes(run, ["n7"])
    queue_job(run, "router-0.g2", "7")
    control = ControlLoop(run, deployment=on_slurm(control).deployment)
    control.run_pass()
    control.run_pass()
    assert scontrol.calls("scontrol") == ["update JobId=7 ExcNodeList="]


def test_jobs_wait_on_while_slurm_does_not_answer(run: RunDir, control: ControlLoop, scontrol: Programs) -> None:
    """No answer does not mean that they have started. The next pass asks again."""
    answers = run.path / "answers"
    scontrol.add("scontrol", f"test -e {answers} || {{ echo 'Unable to contact slurm controller' >&2; exit 1; }}")
    control = ControlLoop(run, deployment=on_slurm(control).deployment)
    queue_job(run, "router-0.g2", "7")
    with agent(run, "math-0.g1"):
        drain(control, ["n7"])
    assert JobDir(run, "router-0.g2").stop() is None
    answers.touch()
    control.run_pass()
    control.run_pass()
    assert scontrol.calls("scontrol") == ["update JobId=7 ExcNodeList=n7"] * 2


def events(run: RunDir) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]


def test_a_replica_that_is_drained_excludes_no_node(run: RunDir, control: ControlLoop) -> None:
    with agent(run, "math-0.g1"):
        assert drain(on_slurm(control), ["math-0"]).excluded == ()
    assert exclusions(control, "math-0.g2") is None


def test_one_machine_is_not_excluded(run: RunDir, control: ControlLoop) -> None:
    """No job could run any more."""
    with agent(run, "math-0.g1"):
        assert drain(control, ["n7"]).excluded == ()


def test_an_expert_that_loses_its_last_ready_replica_is_a_warning(run: RunDir, control: ControlLoop) -> None:
    with agent(run, "math-0.g1"), agent(run, "math-1.g1"):
        assert drain(control, ["math-0"]).warnings == ()
    with agent(run, "code-0.g1"):
        (warning,) = drain(control, ["code"]).warnings
    assert warning.startswith("code has no ready replica until another one starts")


def test_an_expert_with_an_external_endpoint_is_no_warning() -> None:
    ready = attempt(CODE_0, registered=State.READY)
    observed = {CODE_0: (ready,)}
    assert list(unserved_warnings(observed, [ready], []))
    external = Record(RecordKind.EXTERNAL, "code-x0.g1", "http://h:1", State.READY, {"code": None})
    assert list(unserved_warnings(observed, [ready], [external])) == []


def test_waiting_ends_with_the_last_replica_and_fills_the_slots(run: RunDir, control: ControlLoop) -> None:
    """There is no router, so `wait` runs the passes of the control loop."""
    retired = drain(control, ["math"])
    eventually_sync(lambda: not any(a.live for a in control.preview().observed[MATH_0]))  # leaves the exit records
    eventually_sync(lambda: not any(a.live for a in control.preview().observed[MATH_1]))
    done = wait(control, retired, sleep=refusing_to_sleep)
    assert done.left == ()
    assert done.to_json() == {
        "asked": [],
        "signalled": ["math-0.g1", "math-1.g1"],
        "ended": ["math-0.g1", "math-1.g1"],
        "left": [],
    }
    observed = control.preview().observed
    assert [a.generation for a in observed[MATH_0]] == [1, 2]


def test_waiting_has_a_limit(run: RunDir, control: ControlLoop) -> None:
    """The limit is the drain time plus MARGIN_S."""
    now = iter([0.0, 59.9, 60.0, 60.0, 60.0])
    slept: list[float] = []
    retired = DrainResult(asked=("math-0.g1",), signalled=())
    done = wait(control, retired, clock=lambda: next(now), sleep=slept.append)
    assert done.left == ("math-0.g1",)
    assert len(slept) == 1


class TestTheVerb:
    def test_it_prints_what_it_did(self, run: RunDir, control: ControlLoop, capsys: pytest.CaptureFixture[str]) -> None:
        with agent(run, "math-0.g1"):
            assert main(["drain", "--run", str(run.path), "math-0", "code"]) == 0
        said = capsys.readouterr()
        assert said.out == "math-0.g1 drains\ncode-0.g1 drains: its job got SIGTERM\n"
        assert "no router will replace" in said.err

    def test_json(self, run: RunDir, control: ControlLoop, capsys: pytest.CaptureFixture[str]) -> None:
        with agent(run, "math-0.g1"):
            assert main(["drain", "--run", str(run.path), "math-0", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {
            "asked": ["math-0.g1"],
            "signalled": [],
            "ended": None,
            "left": None,
        }

    def test_without_live_jobs(self, run: RunDir, control: ControlLoop, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["drain", "--run", str(run.path), "router"]) == 1
        assert "no job of router runs" in capsys.readouterr().err

    def test_a_wrong_name(self, run: RunDir, control: ControlLoop, capsys: pytest.CaptureFixture[str]) -> None:
        """No replica is drained, not even those whose names are valid."""
        assert main(["drain", "--run", str(run.path), "math-0", "cod"]) == 2
        assert "did you mean 'code'?" in capsys.readouterr().err
        assert JobDir(run, "math-0.g1").stop() is None
