"""Passes of the control loop on a real run directory with real processes; only the service is a stand-in."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from hpc_router.cluster.commands.down import down
from hpc_router.cluster.commands.drain import drain
from hpc_router.cluster.commands.manual_start import claim_expert, claim_router
from hpc_router.cluster.commands.router_access import live_router
from hpc_router.cluster.commands.scale import scale
from hpc_router.cluster.control_loop import desired_state
from hpc_router.cluster.control_loop import loop as control_module
from hpc_router.cluster.control_loop.loop import ControlLoop
from hpc_router.cluster.control_loop.observer import record_exit
from hpc_router.cluster.control_loop.reconcile import Desired, Submit
from hpc_router.cluster.control_loop.slots import ROUTER_SLOT, Attempt, Observed, Slot
from hpc_router.cluster.launchers.interface import JobReport, JobRequest, JobState, Launcher
from hpc_router.cluster.launchers.local import LocalLauncher
from hpc_router.config import frozen
from hpc_router.config.schema import Deployment, EngineConfig, ExpertConfig
from hpc_router.errors import ConfigError, LaunchError, RegistryError
from hpc_router.state import registry
from hpc_router.state.job_records import Exit, FailureReason, JobDir, JobInfo, JobPhase, JobProgress, start_ticks
from hpc_router.state.registry import Record, RecordKind, State
from hpc_router.state.run_directory import RunDir
from tests.cluster.control_loop.support import DUE, ended, serving
from tests.cluster.support import request_of
from tests.support.processes import handles, ignores
from tests.support.waiting import eventually_sync

MATH = Slot("math", "0")


@pytest.fixture
def control(run: RunDir, service: Path, launcher: LocalLauncher, monkeypatch: pytest.MonkeyPatch) -> ControlLoop:
    """A control loop with the experts math and code, one replica each, whose job is the stand-in."""

    def requests(_run: RunDir, _deployment: Deployment, replicas: Sequence[str], **_: object) -> list[JobRequest]:
        return [request_of(service, replica) for replica in replicas]

    monkeypatch.setattr(control_module, "job_requests", requests)
    sim = EngineConfig(kind="sim")
    deployment = Deployment(experts={name: ExpertConfig(model="m", engine=sim) for name in ("math", "code")})
    deployment.policy.kind = "model_field"
    deployment.cluster = replace(deployment.cluster, drain_s=0.1)
    run.config.write_text(frozen.to_yaml(deployment))
    return ControlLoop(run)


def records_of(run: RunDir) -> list[str]:
    return sorted(path.name for path in run.registry.iterdir())


def live(control: ControlLoop) -> list[str]:
    observed = control.preview().observed
    return sorted(a.replica for attempts in observed.values() for a in attempts if a.live)


def started(run: RunDir, replica: str) -> bool:
    """Whether the stand-in has installed its signal handlers."""
    return (run.path / replica).exists()


def record(replica: str, *, kind: RecordKind = RecordKind.EXPERT, state: State = State.READY) -> Record:
    _, _, generation = registry.split_replica(replica)
    return Record(
        kind=kind, replica=replica, url="http://127.0.0.1:1", state=state, serves={}, generation=generation, nonce="n"
    )


def test_one_pass_submits_missing_jobs(control: ControlLoop) -> None:
    assert sorted(control.run_pass().submitted) == ["code-0.g1", "math-0.g1"]
    assert control.run_pass().actions == []
    assert live(control) == ["code-0.g1", "math-0.g1"]


def test_a_killed_job_is_replaced_and_its_record_removed(run: RunDir, control: ControlLoop) -> None:
    """Only a record whose job is known to have ended is removed."""
    control.run_pass()
    eventually_sync(lambda: started(run, "math-0.g1"))
    for name in ("math-0.g1", "code-0.g1", "law-0.g1"):
        registry.publish(run.registry, record(name))
    control.launcher.kill(["math-0.g1"])
    eventually_sync(lambda: "math-0.g2" in control.run_pass().submitted)
    assert sorted(p.stem for p in run.registry.iterdir()) == ["code-0.g1", "law-0.g1"]
    end = JobDir(run, "math-0.g1").exit()
    assert end is not None
    assert end.reason is FailureReason.VANISHED


def test_a_hung_job_is_replaced(run: RunDir, control: ControlLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped process is alive, but its beats stop and its address does not answer."""
    monkeypatch.setattr("hpc_router.cluster.control_loop.reconcile.KILL_AFTER_S", 0.0)
    control.run_pass()
    eventually_sync(lambda: started(run, "math-0.g1"))
    service = JobDir(run, "math-0.g1").process()
    assert service is not None
    os.kill(service.pid, signal.SIGSTOP)
    registry.publish(run.registry, replace(record("math-0.g1"), beat=1, beat_s=0.001))
    eventually_sync(lambda: "math-0.g2" in control.run_pass().submitted)

    def end_after_a_pass() -> Exit | None:  # the successor does not wait for it
        control.run_pass()
        return JobDir(run, "math-0.g1").exit()

    assert eventually_sync(end_after_a_pass).reason is FailureReason.TIMEOUT
    assert live(control) == ["code-0.g1", "math-0.g2"]


def test_loops_at_once_submit_each_job_once(run: RunDir, control: ControlLoop, launcher: LocalLauncher) -> None:
    start = threading.Barrier(6)
    submitted: list[str] = []

    def loop() -> None:
        own = ControlLoop(run, launcher=launcher)
        start.wait()
        for _ in range(3):
            submitted.extend(own.run_pass().submitted)

    threads = [threading.Thread(target=loop) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(submitted) == ["code-0.g1", "math-0.g1"]


def test_a_handover_is_reported_once_though_the_loops_change(run: RunDir) -> None:
    """The second loop sees it only after the end of the old job, and reports it if the first one did not."""
    progress = JobProgress(JobPhase.READY, ready_at=DUE)
    successors = [replace(serving(n), progress=progress) for n in (2, 3)]
    for job in successors:
        JobDir(run, job.replica).claim()
    over = replace(serving(), report=JobReport(JobState.ENDED), exit=ended(1, FailureReason.DRAINED, at=DUE + 9).exit)

    def loop(*attempts: Attempt) -> list[str]:
        """The reported handovers after a pass of a new loop."""
        control = ControlLoop(run, deployment=Deployment())
        control.publish(control.decide(Desired(), {MATH: attempts}))
        lines = run.events.read_text().splitlines() if run.events.exists() else []
        return [event["replica"] for line in lines if (event := json.loads(line))["kind"] == "handover_done"]

    assert loop(over) == []
    assert loop(over, successors[0]) == ["math-0.g2"]
    assert loop(over, successors[0]) == ["math-0.g2"]
    assert loop(serving(2), successors[1]) == ["math-0.g2", "math-0.g3"]
    assert loop(over, successors[1]) == ["math-0.g2", "math-0.g3"]


def test_scaling_adds_and_drains(run: RunDir, control: ControlLoop) -> None:
    desired_state.scale(run, control.deployment, {"math": 2, "code": 0}, control.preview().observed)
    assert sorted(control.run_pass().submitted) == ["math-0.g1", "math-1.g1"]
    eventually_sync(lambda: started(run, "math-1.g1"))
    registry.publish(run.registry, record("math-1.g1"))
    desired_state.scale(run, control.deployment, {"math": 1}, control.preview().observed)
    control.run_pass()  # no process answers the drain call, so the deadline ends the replica
    assert JobDir(run, "math-1.g1").stop() is not None
    eventually_sync(lambda: control.run_pass() and live(control) == ["math-0.g1"])
    assert (run.path / "math-1.g1.stopped").read_text() == "SIGTERM"


def test_scaling_warns_of_experts_without_a_ready_replica(run: RunDir, control: ControlLoop) -> None:
    desired_state.scale(run, control.deployment, {"math": 2}, {})
    control.run_pass()
    eventually_sync(lambda: started(run, "math-0.g1") and started(run, "math-1.g1"))
    registry.publish(run.registry, record("math-1.g1"))
    assert scale(run, {"math": 3})[1] == []
    (warning,) = scale(run, {"math": 1})[1]
    assert warning.startswith("math has no ready replica until another one starts")
    counts, warnings = scale(run, {"math": 0})
    assert counts["math"] == 0
    assert warnings == ["math=0: it has no replicas, and requests for it fail until it is scaled up"]


def test_scaling_an_unknown_expert_is_refused(run: RunDir, control: ControlLoop) -> None:
    with pytest.raises(ConfigError, match=r"no expert is named 'mth'; did you mean 'math'\?"):
        desired_state.scale(run, control.deployment, {"mth": 2}, {})
    for count in (-1, 1025, 99_999_999):
        with pytest.raises(ConfigError, match=rf"experts\.math\.replicas={count}: out of range \(valid: 0 to 1024\)"):
            desired_state.scale(run, control.deployment, {"math": count}, {})
    assert not run.desired.exists()


def test_an_adapter_is_scaled_with_its_host(run: RunDir, control: ControlLoop) -> None:
    control.deployment.experts["law"] = ExpertConfig(model="a", adapter_of="math")
    assert sorted(control.run_pass().submitted) == ["code-0.g1", "math-0.g1"]
    with pytest.raises(ConfigError, match=r"law is an adapter on the engine of math; scale that: math=3"):
        desired_state.scale(run, control.deployment, {"law": 3}, {})


def test_a_desired_file_edited_by_hand_breaks_nothing(run: RunDir, control: ControlLoop) -> None:
    run.desired.write_text(
        '{"replicas": {"math": "many", "code": 1000000000, "nope": 4}, "down": "yes", "forgiven": 3}'
    )
    assert sorted(control.run_pass().submitted) == ["code-0.g1", "math-0.g1"]


def test_down_ends_everything_and_cleans_up(run: RunDir, control: ControlLoop) -> None:
    control.run_pass()
    eventually_sync(lambda: started(run, "math-0.g1") and started(run, "code-0.g1"))
    registry.publish(run.registry, record("math-0.g1"))
    registry.publish(run.registry, record("big-x0.g1", kind=RecordKind.EXTERNAL))
    (run.registry / ".code-0.g1.json.abcd").write_text("half")
    run.registry_json.write_text("{}")
    assert down(run) == 2
    assert live(control) == []
    assert [p.name for p in run.registry.iterdir()] == ["big-x0.g1.json"]
    assert not run.registry_json.exists()
    assert down(run) == 0
    assert control.run_pass().submitted == []  # it stays down


def test_a_pass_that_began_before_down_replaces_nothing(
    run: RunDir, control: ControlLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process takes the run down, and the jobs end, while the leading loop observes them."""
    control.run_pass()
    eventually_sync(lambda: started(run, "math-0.g1") and started(run, "code-0.g1"))
    observe = control.observer.observe

    def overtaken(*, fresh: bool = False) -> Observed:
        monkeypatch.setattr(control.observer, "observe", observe)
        assert down(run) == 2
        return observe(fresh=fresh)

    monkeypatch.setattr(control.observer, "observe", overtaken)
    assert control.run_pass(leading=True).submitted == []


class SlowToCancel:
    """A launcher whose cancellation takes a while to reach the job."""

    def __init__(self, launcher: Launcher) -> None:
        self.observe, self.submit, self.release = launcher.observe, launcher.submit, launcher.release
        self.kill, self.remaining = launcher.kill, launcher.remaining
        self.update_exclusions, self.trouble = launcher.update_exclusions, launcher.trouble
        self._cancel = launcher.cancel
        self.done_at = 0.0

    def cancel(self, replicas: Iterable[str]) -> None:
        self._cancel(replicas)
        self.done_at = time.time()


def test_the_successor_of_a_hung_job_does_not_wait_for_scancel(run: RunDir, control: ControlLoop) -> None:
    """It takes many seconds if the job's node is lost."""
    control.run_pass()
    eventually_sync(lambda: started(run, "math-0.g1"))
    control.launcher = slow = SlowToCancel(control.launcher)
    service = JobDir(run, "math-0.g1").process()
    assert service is not None
    os.kill(service.pid, signal.SIGSTOP)
    registry.publish(run.registry, replace(record("math-0.g1"), beat=1, beat_s=0.001))
    eventually_sync(lambda: "math-0.g2" in control.run_pass().submitted)
    info = JobDir(run, "math-0.g2").info()
    assert info is not None
    assert info.submitted_at < slow.done_at


@pytest.mark.parametrize("by", ["loop", "drain"])
def test_the_drain_time_starts_after_scancel(run: RunDir, control: ControlLoop, by: str) -> None:
    """scancel may take a minute, so the deadline counts from its end."""
    control.run_pass()
    eventually_sync(lambda: started(run, "math-0.g1"))
    control.launcher = slow = SlowToCancel(control.launcher)
    if by == "drain":
        drain(control, ["math-0"])
    else:
        control.cancel(["math-0.g1"])
    stop = JobDir(run, "math-0.g1").stop()
    assert stop is not None
    assert stop.cancel_at is not None
    assert stop.cancel_at >= slow.done_at > 0


def test_down_counts_what_the_control_loop_ends_before_it(
    run: RunDir, control: ControlLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    control.run_pass()
    eventually_sync(lambda: started(run, "math-0.g1") and started(run, "code-0.g1"))

    def overtaken(run: RunDir) -> None:
        desired_state.want_down(run)
        eventually_sync(lambda: control.run_pass(clear=True) and not live(control))

    monkeypatch.setattr("hpc_router.cluster.commands.down.want_down", overtaken)
    assert down(run) == 2


def test_down_kills_jobs_that_do_not_end(
    run: RunDir, control: ControlLoop, service: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpc_router.cluster.control_loop.reconcile.KILL_AFTER_S", 0.0)
    control.launcher.submit([request_of(service, "math-0.g1", how="deaf")])
    eventually_sync(lambda: started(run, "math-0.g1"))
    assert down(run) == 1
    assert live(control) == []


def test_down_works_with_a_config_of_another_version(run: RunDir, control: ControlLoop) -> None:
    control.run_pass()
    eventually_sync(lambda: started(run, "math-0.g1") and started(run, "code-0.g1"))
    run.config.write_text("a_key_of_tomorrow: 1\n")
    assert down(run) == 2


def test_down_stops_when_it_is_brought_up_again(run: RunDir, control: ControlLoop) -> None:
    """`down` then neither starts nor ends jobs, because another `up` wants them."""
    control.run_pass()
    eventually_sync(lambda: started(run, "math-0.g1") and started(run, "code-0.g1"))

    class Up:
        def living(self, attempts: list[Attempt]) -> None:
            desired_state.want_up(run, {})

    with pytest.raises(LaunchError, match="started again by `hpc-router up`"):
        down(run, watcher=Up())
    assert not JobDir(run, "router-0.g1").path.exists()


def test_an_unreadable_desired_state_skips_the_pass(run: RunDir, control: ControlLoop) -> None:
    """An unreadable `desired.json` does not mean the config's counts: live replicas beyond these would drain."""
    desired_state.scale(run, control.deployment, {"math": 2}, {})
    control.run_pass()
    run.desired.write_text('{"replicas": {"ma')
    with pytest.raises(RegistryError, match=r"desired\.json"):
        control.run_pass()
    with pytest.raises(RegistryError, match=r"desired\.json"):
        down(run)
    assert all(JobDir(run, name).stop() is None for name in live(control_of_config(run)))


def control_of_config(run: RunDir) -> ControlLoop:
    """A control loop of the run without `desired.json`."""
    run.desired.unlink()
    return ControlLoop(run)


def test_a_loop_of_a_run_that_is_down_ends_no_router(run: RunDir, control: ControlLoop, service: Path) -> None:
    """A user may have started the router after `down`."""
    desired_state.want_down(run)
    control.launcher.submit([request_of(service, "router-0.g1"), request_of(service, "math-0.g1")])
    eventually_sync(lambda: started(run, "router-0.g1") and started(run, "math-0.g1"))
    eventually_sync(lambda: control.run_pass() and live(control) == ["router-0.g1"])
    assert down(run) == 1


def test_down_cannot_reach_another_host(run: RunDir, control: ControlLoop) -> None:
    job = JobDir(run, "math-0.g1")
    job.claim()
    job.write(JobInfo(job_id="1", host="elsewhere", start_ticks=1))
    with pytest.raises(LaunchError, match=r"math-0\.g1 run on elsewhere"):
        down(run)


def test_the_exit_record_of_the_job_itself_is_kept(run: RunDir) -> None:
    """The job may write it while the observer decides that there is none."""
    job = JobDir(run, "math-0.g1")
    job.claim()
    own = Exit(ok=True, reason=FailureReason.DRAINED, message="asked")
    job.write(own)
    assert record_exit(job, Exit(ok=False, reason=FailureReason.VANISHED, message="?")) == own


def _dead(run: RunDir, replica: str) -> None:
    job = JobDir(run, replica)
    job.claim()
    job.write(JobInfo(job_id="1", host=os.uname().nodename, start_ticks=-1))


def test_a_dead_routers_record_is_removed(run: RunDir, control: ControlLoop) -> None:
    """Until it is removed, no client sends the owner's token to its address."""
    for generation in (1, 2):
        _dead(run, f"router-0.g{generation}")
        registry.publish(run.registry, record(f"router-0.g{generation}", kind=RecordKind.ROUTER))
    assert live_router(run) is None
    control.run_pass()
    assert [name for name in records_of(run) if name.startswith("router")] == []
    mine = claim_router(run)
    assert mine == "router-0.g3"
    registry.publish(run.registry, record(mine, kind=RecordKind.ROUTER))
    control.run_pass()
    assert f"{mine}.json" in records_of(run)
    found = live_router(run)
    assert found is not None
    assert found.replica == mine


def test_the_loop_acts_only_beside_the_leading_router(run: RunDir, control: ControlLoop) -> None:
    """A dead router of a higher generation does not count."""
    first, second = claim_router(run), claim_router(run)
    assert control.leads(first)
    registry.publish(run.registry, record(first, kind=RecordKind.ROUTER))
    registry.publish(run.registry, record(second, kind=RecordKind.ROUTER))
    assert control.leads(second)
    assert not control.leads(first)
    _dead(run, "router-0.g9")
    registry.publish(run.registry, record("router-0.g9", kind=RecordKind.ROUTER))
    assert control.leads(second)


def test_experts_started_by_hand_have_slots_of_their_own(run: RunDir, control: ControlLoop) -> None:
    """They take the first slot without a live job. The control loop neither replaces nor ends them."""
    assert claim_expert(run, "math") == "math-h0.g1"
    assert claim_expert(run, "math") == "math-h1.g1"
    _dead(run, "math-h2.g4")
    assert claim_expert(run, "math") == "math-h2.g5"
    assert all(isinstance(a, Submit) and a.slot.managed for a in control.run_pass().actions)


def test_a_router_is_submitted_once_up_wants_it(run: RunDir, control: ControlLoop) -> None:
    desired_state.want_up(run, {})
    assert "router-0.g1" in control.run_pass().submitted
    assert ROUTER_SLOT in control.preview().observed


def test_a_failing_pass_does_not_end_the_loop(run: RunDir, control: ControlLoop) -> None:
    """The loop runs as the router starts it, tied to a pipe. It survives a damaged run and ends when the pipe
    closes."""
    config = run.config.read_text()
    hidden = run.path / "hidden"
    loop = subprocess.Popen(
        [sys.executable, "-m", "hpc_router.cli", "reconcile", "--loop", "--tied", "--run", str(run.path)],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert loop.stderr is not None
        assert loop.stdin is not None
        eventually_sync(lambda: handles(loop.pid, signal.SIGTERM))
        run.registry.rename(hidden)
        said = ""
        while "a pass of the control loop failed" not in said:
            said = loop.stderr.readline()
            assert said, "the loop ended"
        hidden.rename(run.registry)
        loop.communicate()  # closes its stdin
        assert loop.returncode == 0
    finally:
        loop.kill()
        loop.communicate()
    assert run.config.read_text() == config


def test_the_loop_ends_with_its_run_directory(run: RunDir, tmp_path: Path) -> None:
    deployment = Deployment()
    deployment.cluster.reconcile_s = 0.01
    run.config.write_text(frozen.to_yaml(deployment))
    loop = subprocess.Popen(
        [sys.executable, "-m", "hpc_router.cli", "reconcile", "--loop", "--run", str(run.path)],
        stderr=subprocess.DEVNULL,
    )
    try:
        eventually_sync(lambda: handles(loop.pid, signal.SIGTERM))
        run.path.rename(tmp_path / "away")
        assert loop.wait(30) == 0
    finally:
        loop.kill()
        loop.wait()


@pytest.mark.parametrize("options", [[], ["--tied"]], ids=["alone", "tied"])
def test_the_loop_ends_on_sigterm(run: RunDir, options: list[str]) -> None:
    """It ignores the walltime warning of its router's job. A loop that is tied to a process still reads its stdin then;
    a buffered reader would abort the interpreter with "Fatal Python error: _enter_buffered_busy"."""
    run.desired.write_text(json.dumps({"down": True}))
    with subprocess.Popen(
        [sys.executable, "-m", "hpc_router.cli", "reconcile", "--loop", *options, "--run", str(run.path)],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as loop:
        eventually_sync(lambda: handles(loop.pid, signal.SIGTERM) and ignores(loop.pid, signal.SIGUSR2))
        assert all(ignores(loop.pid, number) for number in (signal.SIGUSR1, signal.SIGALRM, signal.SIGQUIT))
        assert ignores(loop.pid, signal.SIGHUP) is bool(options), "a loop on a terminal ends with it"
        if options:
            eventually_sync(lambda: len(list(Path(f"/proc/{loop.pid}/task").iterdir())) > 1)  # the one that reads
        for number in (signal.SIGUSR1, signal.SIGALRM, signal.SIGQUIT, *([signal.SIGHUP] if options else [])):
            loop.send_signal(number)
        loop.send_signal(signal.SIGUSR2)
        loop.terminate()
        assert loop.wait(20) == 0
        assert start_ticks(loop.pid) is None
        assert loop.stderr is not None
        assert "Fatal" not in loop.stderr.read()
