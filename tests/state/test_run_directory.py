"""The run directory: modes of its secrets, errors for invalid ones, and how a command finds one."""

import json
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc_router.errors import ConfigError, RegistryError
from hpc_router.state.log_file import rotated_path
from hpc_router.state.run_directory import find_run, make_run, open_run, point_latest, private_umask


@pytest.fixture(params=[0o000, 0o022, 0o777])
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


def test_only_the_owner_can_read_it_regardless_of_the_umask(tmp_path: Path, umask: None) -> None:
    run = make_run(tmp_path / "run")
    run.event("made")
    run.write_desired({"math": 1})
    run.store_external_token("math-x0.g1", "t")
    for path in [run.path, *run.path.rglob("*")]:
        assert stat.S_IMODE(path.lstat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_making_it_again_changes_no_secret(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    token, secret = run.token(), run.secret()
    again = make_run(tmp_path / "run")
    assert (again.token(), again.secret()) == (token, secret)
    assert token != secret


def test_a_secret_that_is_no_text_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run.path / "token").write_bytes(b"\xff\xfet")
    with pytest.raises(ConfigError, match=r"cannot read .*/run/token: not UTF-8 text"):
        run.token()


def test_concurrent_creators_agree_on_the_secrets(tmp_path: Path) -> None:
    start, tokens = threading.Barrier(8), []

    def make() -> None:
        start.wait()
        tokens.append(make_run(tmp_path / "run").token())

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tokens) == 8
    assert len(set(tokens)) == 1


def test_an_error_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no run directory"):
        open_run(tmp_path / "absent")
    (tmp_path / "plain").mkdir(mode=0o700)
    with pytest.raises(ConfigError, match="no registry"):
        open_run(tmp_path / "plain")
    run = make_run(tmp_path / "run")
    run.path.chmod(0o750)
    with pytest.raises(ConfigError, match="chmod 700"):
        open_run(run.path)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_another_users_run_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    os.chown(run.path, 12345, 12345)
    with pytest.raises(ConfigError, match="belongs to uid 12345"):
        open_run(run.path)


def test_a_verb_finds_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order is `--run`, then $HPC_ROUTER_RUN, then runs/latest."""
    monkeypatch.delenv("HPC_ROUTER_RUN", raising=False)
    one, two, three = (make_run(tmp_path / "runs" / name) for name in ("one", "two", "three"))
    runs = tmp_path / "runs"
    with pytest.raises(ConfigError):
        find_run(None, runs=runs)
    point_latest(runs, one)
    point_latest(runs, two)
    assert find_run(None, runs=runs) == two
    monkeypatch.setenv("HPC_ROUTER_RUN", str(three.path))
    assert find_run(None, runs=runs) == three
    assert find_run(one.path, runs=runs) == one


@pytest.mark.parametrize("text", ["", '{"replicas": {', "[]", "[" * 100_000, " " * 2**20 + " {}"])
def test_only_a_missing_desired_file_is_empty(tmp_path: Path, text: str) -> None:
    run = make_run(tmp_path / "run")
    assert run.read_desired() == {}
    run.desired.write_text(text)
    with pytest.raises(RegistryError, match=r"cannot read .*desired\.json"):
        run.read_desired()


def test_an_unreadable_desired_file_is_an_error(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    run.desired.mkdir()
    with pytest.raises(RegistryError, match=r"cannot read .*desired\.json: Is a directory"):
        run.read_desired()


def test_events_are_rotated_by_exactly_one_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The claim of a dead process is removed, and a long line is written in one call."""
    monkeypatch.setattr("hpc_router.state.run_directory.LOG_BYTES", 20_000)
    run = make_run(tmp_path / "run")
    claim = run.path / ".events.rotating"
    claim.mkdir()
    run.event("down", replicas=["x" * 30_000])
    assert run.events.exists(), "another one rotates it"
    os.utime(claim, (0, 0))
    run.event("one")
    assert not claim.exists()
    run.event("two")
    assert not run.events.exists()
    run.event("three")
    older = [json.loads(line)["event"] for line in rotated_path(run.events).read_text().splitlines()]
    assert older == ["down", "one", "two"]
    assert [json.loads(line)["event"] for line in run.events.read_text().splitlines()] == ["three"]
    assert not claim.exists()


def test_overlapping_blocks_with_a_private_umask_leave_the_umask_as_it_was() -> None:
    """Two threads may overlap so that the first to begin is the first to end."""
    before = os.umask(0o022)
    try:
        first, second = private_umask(), private_umask()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert os.umask(0o077) == 0o077, "the second block has not ended"
        second.__exit__(None, None, None)
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)
