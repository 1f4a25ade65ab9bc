"""What `cluster.notify` tells, when, and how: a command or a mail."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hpc_router.cluster.control_loop.elasticity import ElasticState
from hpc_router.cluster.control_loop.forecast import PlannedHandover
from hpc_router.cluster.control_loop.loop import ControlLoop
from hpc_router.cluster.control_loop.notices import GONE_S, Notice, Notifier, problems
from hpc_router.cluster.control_loop.reconcile import Desired, GiveUp
from hpc_router.config.schema import ClusterConfig, Deployment, ExpertConfig
from hpc_router.config.validation import notify_command
from hpc_router.errors import ConfigError
from hpc_router.state.job_records import Exit, FailureReason
from hpc_router.state.run_directory import RunDir, make_run
from tests.cluster.control_loop.support import BEGAN, MATH, ended

FULL = Notice("disk_full", None, None, "the file system is full")
LATE = Notice("successor_late", "math-0.g1", "math", "it is late")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "run")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def program(folder: Path, name: str = "tell", *, status: int = 0) -> Path:
    """A program that appends its arguments and its input to a file."""
    path = folder / name
    path.write_text(f'#!/bin/sh\n{{ echo "$0 $*"; cat; }} >>"{folder}/told"\necho broken >&2\nexit {status}\n')
    path.chmod(0o755)
    return path


def told(folder: Path) -> list[str]:
    path = folder / "told"
    return path.read_text().splitlines() if path.exists() else []


def test_which_problems_there_are() -> None:
    gave_up = GiveUp(MATH, 3, Exit(False, FailureReason.WEIGHTS, "no weights"))
    late = PlannedHandover("math-1.g2", "overlap", 1.0, 2.0, late_s=90.0, reason="Priority")
    others = [
        PlannedHandover("law-0.g1", "overlap", 1.0, 2.0, late_s=None),
        PlannedHandover("law-1.g1", "overlap", 1.0, 2.0, late_s=0.5),
        PlannedHandover("law-2.g1", "drain_first", 1.0, 2.0, late_s=90.0),  # as configured
    ]
    enough = ElasticState(1, 0.0, "it is enough")
    elastic = {"law": replace(enough, blocked="its demand needs 2 replicas"), "tax": enough}
    assert problems([gave_up], [late, *others], elastic, "it is full") == [
        Notice("gave_up", "math-0", "math", "math-0 failed for good: no weights"),
        Notice("successor_late", "math-1.g2", "math", "the successor of math-1.g2 is expected 90 s late (Priority)"),
        Notice("budget_reached", None, "law", "law: its demand needs 2 replicas"),
        Notice("disk_full", None, None, "it is full"),
    ]
    assert problems([], [], {}, None) == []


def test_a_command_gets_each_problem_once_and_again_when_it_returns(run: RunDir, tmp_path: Path) -> None:
    clock = Clock()
    notifier = Notifier(run, f"'{program(tmp_path)}' --urgent 'two words'", clock=clock)
    for present, passed_s in (([FULL], 0), ([FULL, LATE], 2), ([FULL], GONE_S), ([], 2), ([LATE], GONE_S), ([LATE], 1)):
        clock.now += passed_s
        notifier.look(present)
    notifier.close()
    calls = told(tmp_path)
    assert [line for line in calls if line.startswith("/")] == [f"{tmp_path}/tell --urgent two words"] * 3
    contents = [json.loads(line) for line in calls if line.startswith("{")]
    assert [content["kind"] for content in contents] == ["disk_full", "successor_late", "successor_late"]
    assert {key: contents[1][key] for key in ("run", "replica", "expert", "reason")} == {
        "run": str(run.path), "replica": "math-0.g1", "expert": "math", "reason": "it is late"
    }  # fmt: skip


@pytest.mark.parametrize("name", ["mail", "sendmail"])
def test_a_mail(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    program(tmp_path, name)
    cat = tmp_path / "cat"
    cat.symlink_to("/bin/cat")
    monkeypatch.setenv("PATH", str(tmp_path))
    notifier = Notifier(run, "ops@example.org")
    notifier.look([LATE])
    notifier.close()
    call, *body = told(tmp_path)
    subject = "hpc_router: math: successor late"
    if name == "mail":
        assert call.endswith(f"/mail -s {subject} ops@example.org")
    else:
        assert call.endswith("/sendmail -t")
        assert body[:3] == ["To: ops@example.org", f"Subject: {subject}", ""]
    assert "it is late" in body
    assert f"run: {run.path}" in body


@pytest.mark.parametrize("notify", ["/no/such/program", "FAILING", "ops@example.org"])
def test_a_failure_is_logged_and_ends_nothing(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, notify: str
) -> None:
    failing = program(tmp_path, status=3)
    if "@" in notify:
        monkeypatch.setenv("PATH", "/nowhere")
        monkeypatch.setattr("shutil.which", lambda name: None)
    notifier = Notifier(run, str(failing) if notify == "FAILING" else notify)
    notifier.look([FULL])
    notifier.look([FULL, LATE])
    notifier.close()
    assert caplog.text.count("could not be told") == 2
    assert {"FAILING": "status 3: broken", "ops@example.org": "neither `mail`"}.get(
        notify, "No such file"
    ) in caplog.text


def test_without_the_key_nothing_runs(run: RunDir) -> None:
    notifier = Notifier(run, None)
    notifier.look([FULL])
    notifier.close()
    assert notifier._thread is None


def test_the_leading_loop_tells_what_a_pass_has_given_up(run: RunDir, tmp_path: Path) -> None:
    cluster = ClusterConfig(notify=str(program(tmp_path)))
    deployment = Deployment(experts={"math": ExpertConfig(model="m")}, cluster=cluster)
    control = ControlLoop(run, deployment=deployment)
    desired = Desired(replicas={"math": 1}, max_failures=1)
    failed = {MATH: (ended(1, FailureReason.WEIGHTS, at=BEGAN),)}
    for _ in range(2):
        seen = control.decide(desired, failed)
        assert [str(action.slot) for action in seen.given_up] == ["math-0"]
        control.publish(seen)
    control._notifier.close()
    [content] = [json.loads(line) for line in told(tmp_path) if line.startswith("{")]
    assert (content["kind"], content["expert"], content["reason"]) == (
        "gave_up", "math", "math-0 failed for good: it ended",
    )  # fmt: skip


def test_what_the_key_may_be() -> None:
    assert notify_command("ops@example.org") is None
    assert notify_command("/opt/me@work/tell") == ["/opt/me@work/tell"]
    assert notify_command("tell 'a b' c") == ["tell", "a b", "c"]
    for wrong in ("", "  ", "tell 'a"):
        with pytest.raises(ConfigError, match=r"cluster\.notify"):
            notify_command(wrong)
