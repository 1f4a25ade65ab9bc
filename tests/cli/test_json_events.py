"""The progress of `up`, `down` and `apply` for scripts: one JSON object per line, and the end as the last one."""

import json
from pathlib import Path
from typing import Any

import pytest

from hpc_router.cli.json_events import JsonEvents
from hpc_router.cli.main import main
from hpc_router.cluster.commands.replica_view import DisplayedState, ReplicaView
from hpc_router.cluster.signals import Interrupted
from hpc_router.errors import LaunchError
from hpc_router.state.job_records import FailureReason
from hpc_router.state.run_directory import make_run
from tests.cluster.control_loop.support import serving


def events(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(event.pop("at") > 1e9 for event in found)
    return found


def test_each_change_of_a_replica_is_one_event(capsys: pytest.CaptureFixture[str]) -> None:
    waiting = ReplicaView("math", "math-0.g1", DisplayedState.WAITING, pending_reason="Priority")
    ready = ReplicaView("math", "math-0.g1", DisplayedState.READY)
    failed = ReplicaView("law", "law-0.g1", DisplayedState.FAILED, reason=FailureReason.WEIGHTS, message="no weights")
    progress = JsonEvents()
    for shown in ([waiting], [waiting], [waiting, failed], [ready, failed], [ready, failed]):
        progress.show(shown)
    assert [(e["event"], e["replica"], e["state"], e["reason"], e["message"]) for e in events(capsys)] == [
        ("replica", "math-0.g1", "waiting", "Priority", None),
        ("replica", "law-0.g1", "failed", "weights", "no weights"),
        ("replica", "math-0.g1", "ready", None, None),
    ]


def test_the_jobs_that_are_left(capsys: pytest.CaptureFixture[str]) -> None:
    progress = JsonEvents()
    for attempts in ([serving(1), serving(2)], [serving(1), serving(2)], [serving(2)], []):
        progress.living(attempts)
    assert events(capsys) == [
        {"event": "ending", "left": ["math-0.g1", "math-0.g2"]},
        {"event": "ending", "left": ["math-0.g2"]},
        {"event": "ending", "left": []},
    ]


@pytest.mark.parametrize(
    ("error", "event"),
    [(LaunchError("nothing can serve"), "failed"), (OSError("no space"), "failed"), (Interrupted("x"), "interrupted")],
)
def test_the_last_event_is_the_error(capsys: pytest.CaptureFixture[str], error: BaseException, event: str) -> None:
    with pytest.raises(type(error)), JsonEvents():
        raise error
    assert events(capsys) == [{"event": event, "error": str(error)}]


def test_down_of_a_run_without_jobs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    assert main(["down", "--run", str(run.path), "--json"]) == 0
    assert events(capsys) == [{"event": "ending", "left": []}, {"event": "down", "run": str(run.path), "jobs": 0}]


def test_up_that_fails_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["up", "--json", "topology=nothing"]) == 2
    [event] = events(capsys)
    assert event["event"] == "failed"
    assert "nothing" in event["error"]
