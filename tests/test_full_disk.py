"""A full file system: commands that only read still work, and every other error names the file."""

import errno
import os
import socket
from pathlib import Path

import pytest

from hpc_router.cli.main import main
from hpc_router.cluster.commands.status import status
from hpc_router.cluster.commands.why import why
from hpc_router.cluster.control_loop.loop import ControlLoop
from hpc_router.config import frozen
from hpc_router.config.schema import Deployment, EngineConfig, ExpertConfig
from hpc_router.state.atomic_files import create_text, replace_text
from hpc_router.state.job_records import JobDir, JobInfo
from hpc_router.state.run_directory import RunDir, make_run


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """With a job that ended and left no exit record."""
    made = make_run(tmp_path / "run")
    deployment = Deployment(experts={"math": ExpertConfig(model="m", engine=EngineConfig(kind="sim"))})
    deployment.policy.kind = "model_field"
    made.config.write_text(frozen.to_yaml(deployment))
    job = JobDir(made, "math-0.g1")
    job.claim()
    job.write(JobInfo(job_id=str(os.getpid()), host=socket.gethostname(), start_ticks=1))  # a process of another start
    return made


def fill(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on no file can be synced."""

    def fsync(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)


def files(run: RunDir) -> set[Path]:
    return set(run.path.rglob("*"))


def test_commands_that_only_read_write_nothing(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(run)
    fill(monkeypatch)
    assert status(run)["experts"]["math"]["replicas"][0]["replica"] == "math-0.g1"
    assert [cause.view.replica for cause in why(run)]
    assert files(run) == before
    monkeypatch.undo()
    ControlLoop(run).preview()  # the control loop does
    assert (run.jobs / "math-0.g1" / "exit.json").exists()


def test_a_full_file_system_is_reported(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run.space_error() is None
    space = {"bsize": 4096, "frsize": 4096, "blocks": 9, "bfree": 9, "bavail": 999, "files": 9, "ffree": 9, "favail": 9}
    for changed, said in (({"bavail": 0}, "is full: 0 bytes are free"), ({"favail": 0}, "all its inodes are in use")):
        values = (*(space | changed).values(), 0, 255)
        monkeypatch.setattr(os, "statvfs", lambda _path, values=values: os.statvfs_result(values))
        assert said in (run.space_error() or "")
        assert said in status(run)["full"]
        assert any(said in cause.what for cause in why(run))


@pytest.mark.parametrize("write", [replace_text, create_text])
def test_an_error_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: object) -> None:
    fill(monkeypatch)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write(tmp_path / "x.json", "text")  # type: ignore[operator]
    assert caught.value.errno == errno.ENOSPC
    assert str(tmp_path) in str(caught.value.filename)
    assert list(tmp_path.iterdir()) == []


def test_up_leaves_no_half_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    fill(monkeypatch)
    for words in ([], ["--run", "mine"]):
        assert main(["up", "topology=sim_2replicas", *words]) == 1
        said = capsys.readouterr().err
        assert "No space left on device" in said
        assert "config.yaml" in said
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert not (tmp_path / "mine").exists()


def test_an_event_that_cannot_be_written_names_its_file(run: RunDir) -> None:
    (run.path / "events.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as caught:
        run.event("set", settings={})
    assert caught.value.filename == str(run.path / "events.jsonl")
