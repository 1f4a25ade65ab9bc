"""The shared snapshot of the queue: how often Slurm is queried, and how its answers are parsed."""

import time
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import pytest

from hpc_router.cluster.launchers.commands import SlurmCommandError
from hpc_router.cluster.launchers.slurm import squeue
from hpc_router.cluster.launchers.slurm.pending_reasons import explain_pending
from hpc_router.cluster.launchers.slurm.squeue import Queue, QueuedJob, QueueSnapshot, parse_squeue
from hpc_router.state.atomic_files import replace_json
from hpc_router.state.run_directory import RunDir, make_run


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "run")


@pytest.fixture
def queries(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list with one entry for each query of Slurm. The clock stands at `now` unless a test moves it."""
    questions: list[int] = []

    def answer() -> dict[str, QueuedJob]:
        questions.append(1)
        return {"7": QueuedJob("RUNNING", node="n1")}

    monkeypatch.setattr(squeue, "ask_squeue", answer)
    return questions


def test_squeue_lines_are_read() -> None:
    text = (
        "12|PENDING||2026-11-22T14:05:00|N/A|math-0.g1:demo|/runs/x|batch|Resources\n"
        "13|RUNNING|n[1-2]|2026-11-22T13:00:00|2026-11-22T15:00:00|sh|/home|batch|None\n"
        "14|PENDING||N/A|N/A|sh|/home|batch,urgent|ReqNodeNotAvail, UnavailableNodes:n1;n2\n"
        "nonsense\n"
    )
    jobs = parse_squeue(text.replace("|", "\t"))
    assert jobs["12"] == QueuedJob(
        "PENDING",
        reason="Resources",
        starts_at=datetime.fromisoformat("2026-11-22T14:05:00").timestamp(),
        name="math-0.g1:demo",
        folder="/runs/x",
    )
    assert jobs["13"].node == "n[1-2]"
    assert jobs["13"].ends_at == datetime.fromisoformat("2026-11-22T15:00:00").timestamp()
    assert jobs["14"].reason == "ReqNodeNotAvail, UnavailableNodes:n1;n2"
    assert set(jobs) == {"12", "13", "14"}


def test_a_reason_of_one_of_several_partitions_is_not_that_of_the_job() -> None:
    """Slurm shows the reason of the partition that it considered last, so the job may still start elsewhere."""
    line = "12|PENDING||N/A|N/A|sh|/home|tiny,batch|PartitionTimeLimit".replace("|", "\t")
    reason = parse_squeue(line)["12"].reason
    assert reason == "PartitionTimeLimit for one of the partitions tiny,batch"
    assert not explain_pending(reason).hopeless
    (alone,) = parse_squeue(line.replace("tiny,", "")).values()
    assert explain_pending(alone.reason or "").hopeless


def test_many_watchers_share_one_query(run: RunDir, queries: list[int]) -> None:
    watchers = [Queue(run, ask_s=30.0) for _ in range(5)]
    views = [watcher.snapshot() for watcher in watchers for _ in range(3)]
    assert len(queries) == 1
    assert all(view is not None and view.jobs["7"].node == "n1" for view in views)


def test_a_verb_queries_at_once_and_the_others_get_its_answer(run: RunDir, queries: list[int]) -> None:
    loop, verb = Queue(run, ask_s=30.0), Queue(run, ask_s=30.0)
    loop.snapshot()
    seen = verb.snapshot(fresh=True)
    assert len(queries) == 2
    assert loop.snapshot() == seen
    assert len(queries) == 2


def test_an_old_snapshot_is_replaced(run: RunDir, queries: list[int]) -> None:
    replace_json(run.path / "squeue.json", asdict(QueueSnapshot(asked_at=0.0, jobs={})))
    view = Queue(run, ask_s=30.0).snapshot()
    assert len(queries) == 1
    assert view is not None
    assert "7" in view.jobs


def test_a_snapshot_from_the_future_is_ignored(run: RunDir, queries: list[int]) -> None:
    replace_json(run.path / "squeue.json", asdict(QueueSnapshot(asked_at=time.time() + 3600, jobs={})))
    view = Queue(run, ask_s=30.0).snapshot()
    assert view is not None
    assert "7" in view.jobs


def test_a_hanging_squeue_leaves_the_last_snapshot(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The output before the timeout arrives as bytes."""
    tool = tmp_path / "squeue"
    tool.write_text("#!/bin/bash\necho slow >&2\nexec sleep 60\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(squeue, "TIMEOUT_S", 0.2)
    assert Queue(run, ask_s=30.0).snapshot(fresh=True) is None


def test_while_another_process_queries_the_old_snapshot_is_valid(run: RunDir, queries: list[int]) -> None:
    replace_json(run.path / "squeue.json", asdict(QueueSnapshot(asked_at=5.0, jobs={})))
    (run.path / ".squeue.asking").touch()
    view = Queue(run, ask_s=30.0).snapshot()
    assert queries == []
    assert view is not None
    assert view.asked_at == 5.0


def test_the_claim_of_a_process_that_died_is_taken_over(run: RunDir, queries: list[int]) -> None:
    (run.path / ".squeue.asking").touch()
    watcher = Queue(run, ask_s=0.0)
    watcher.snapshot()  # finds the claim old, and removes it
    watcher.snapshot()
    assert len(queries) == 1


def test_a_controller_that_does_not_answer_leaves_the_last_snapshot(
    run: RunDir, queries: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    watcher = Queue(run, ask_s=30.0)
    before = watcher.snapshot()

    def broken() -> dict[str, QueuedJob]:
        raise SlurmCommandError("squeue is not installed here")

    monkeypatch.setattr(squeue, "ask_squeue", broken)
    assert watcher.snapshot(fresh=True) == before
    assert Queue(run, ask_s=30.0).snapshot(fresh=True) == before


@pytest.mark.parametrize(
    "text", ["{}", '{"asked_at": 1, "jobs": {"1": {"unknown": 2}}}', '{"asked_at": null, "jobs": {}}']
)
def test_a_damaged_snapshot_is_ignored(run: RunDir, queries: list[int], text: str) -> None:
    (run.path / "squeue.json").write_text(text)
    assert Queue(run, ask_s=30.0).snapshot() is not None
    assert len(queries) == 1
