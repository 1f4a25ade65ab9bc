"""What the verb `batch` prints, with a router that answers from a list."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hpc_router.cli.main import main
from hpc_router.cluster.commands import batch as commands
from hpc_router.cluster.commands.batch import AWAY_S, BatchCallRefusedError, followed
from hpc_router.errors import ConfigError, LaunchError
from hpc_router.state.run_directory import RunDir, make_run

ID = "batch_1a"
FAULT = {"code": "invalid_json_line", "message": "no JSON", "line": 3, "param": None}


def state(status: str, completed: int = 0, failed: int = 0, total: int = 4, **changes: Any) -> dict[str, Any]:
    counts = {"total": total, "completed": completed, "failed": failed}
    return {"id": ID, "status": status, "request_counts": counts, "errors": None, "created_at": 0, "expires_at": 0} | (
        {"output_file_id": None, "error_file_id": None, **changes}
    )


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "run")


class Answers:
    """The router's states of the batch, one per call; an error is raised."""

    def __init__(self, *states: dict[str, Any] | Exception) -> None:
        self._left: Iterator[dict[str, Any] | Exception] = iter(states)

    def __call__(self, run: RunDir, batch_id: str) -> dict[str, Any]:
        found = next(self._left)
        if isinstance(found, Exception):
            raise found
        return found


def call(run: RunDir, *words: str) -> int:
    return main(["batch", *words, "--run", str(run.path)])


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "POLL_S", 0.0)


RUNNING = (state("validating", total=0), state("in_progress"), state("in_progress"), state("in_progress", 2, 1))


def test_each_change_is_a_line_where_no_terminal_is(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands, "batch", Answers(*RUNNING, state("completed", 3, 1)))
    assert call(run, "status", ID, "--wait") == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.partition(" s  ")[2] for line in err.splitlines()[:-1]] == [
        "validating, 0 of 0 requests done, 0 failed",
        "in_progress, 0 of 4 requests done, 0 failed",
        "in_progress, 3 of 4 requests done, 1 failed",
        "completed, 4 of 4 requests done, 1 failed",
    ]


def test_each_change_is_an_event_for_scripts(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = state("failed", errors={"object": "list", "data": [FAULT]})
    monkeypatch.setattr(commands, "batch", Answers(*RUNNING, failed))
    assert call(run, "status", ID, "--wait", "--json") == 1
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["batch"]["status"] for event in events] == ["validating", "in_progress", "in_progress", "failed"]
    assert {event["event"] for event in events} == {"batch"}


def test_faults_are_shown_with_their_line(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands, "batch", Answers(state("failed", errors={"object": "list", "data": [FAULT]})))
    assert call(run, "status", ID) == 0
    out = capsys.readouterr().out
    assert "line 3: invalid_json_line: no JSON" in out
    assert ID in out


def test_results_before_the_end_are_an_error(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands, "batch", Answers(state("in_progress", 1)))
    assert call(run, "results", ID) == 1
    assert "has not ended: in_progress, 1 of 4 requests done" in capsys.readouterr().err


def test_without_a_router_it_waits_for_one(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a while; a call that the router refuses is not repeated."""
    now = 0.0

    def sleep(pause_s: float) -> None:
        nonlocal now
        now += AWAY_S / 4

    away = LaunchError("no router")
    monkeypatch.setattr(commands, "batch", Answers(state("in_progress"), away, away, state("completed")))
    assert [s["status"] for s in followed(run, ID, sleep=sleep, clock=lambda: now)] == ["in_progress", "completed"]
    monkeypatch.setattr(commands, "batch", Answers(*[away] * 9))
    with pytest.raises(LaunchError, match="no router"):
        list(followed(run, ID, sleep=sleep, clock=lambda: now))
    monkeypatch.setattr(commands, "batch", Answers(BatchCallRefusedError("there is no batch")))
    with pytest.raises(BatchCallRefusedError):
        list(followed(run, ID, sleep=sleep, clock=lambda: now))


@pytest.mark.parametrize("wrong", ["x", "batch_../../x", "batch_?a", "batch_\u00e9", ""])
def test_what_is_no_id(run: RunDir, wrong: str) -> None:
    with pytest.raises(ConfigError, match="is not the ID of a batch"):
        commands.batch(run, wrong)


def test_a_file_that_cannot_be_read(run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(run, "submit", str(tmp_path / "missing")) == 2
    assert "missing: No such file" in capsys.readouterr().err


def test_a_task_is_required(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        call(run)
    assert "TASK" in capsys.readouterr().err
