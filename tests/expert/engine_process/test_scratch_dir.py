"""The agent's folder on its node: private, with a short path; removal of the folders of dead agents and no others."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc_router.errors import ConfigError, LaunchError
from hpc_router.expert.engine_process import scratch_dir
from hpc_router.expert.engine_process.scratch_dir import expanded, scratch_folder, sweep
from hpc_router.state.atomic_files import read_json


@pytest.fixture
def parent(scratch: Path) -> Iterator[Path]:
    folder = scratch / f"hpc-router-{os.getuid()}"
    yield folder
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def owned_folder(parent: Path, name: str, **changes: object) -> Path:
    """Creates a folder as an agent leaves it, with changes to `owner.json`."""
    with scratch_folder(parent.parent) as place:
        owner = read_json(place.folder / "owner.json")
    folder = parent / name
    folder.mkdir()
    (folder / "owner.json").write_text(json.dumps({**(owner or {}), **changes}))
    return folder


def test_the_folder_is_private_and_removed_at_the_end(scratch: Path, parent: Path) -> None:
    with scratch_folder(scratch) as place:
        for folder in (parent, place.folder, place.temporary, place.cache):
            assert folder.stat().st_mode & 0o777 == 0o700
    assert list(parent.iterdir()) == []


def test_folders_of_dead_agents_are_removed(scratch: Path, parent: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = owned_folder(parent, "left", pid=dead.pid)
    reused = owned_folder(parent, "reused", start_ticks=1)
    with scratch_folder(scratch):
        assert not left.exists()
        assert not reused.exists()


def test_folders_of_live_agents_and_other_hosts_stay(scratch: Path, parent: Path) -> None:
    alive = owned_folder(parent, "alive")
    elsewhere = owned_folder(parent, "elsewhere", host="another", pid=1, start_ticks=1)
    contained = owned_folder(parent, "contained", pid_namespace="pid:[1]", start_ticks=1)
    fresh = parent / "fresh"
    fresh.mkdir()
    with scratch_folder(scratch):
        assert all(folder.exists() for folder in (alive, elsewhere, contained, fresh))


def test_an_unfinished_folder_is_removed_after_a_time(scratch: Path, parent: Path) -> None:
    parent.mkdir(mode=0o700)
    old = parent / "old"
    old.mkdir()
    os.utime(old, (time.time() - 100, time.time() - 100))
    with scratch_folder(scratch):
        assert not old.exists()


@pytest.mark.parametrize("mode", [0o755, 0o777, 0o500])
def test_our_parent_with_a_wrong_mode_is_repaired(scratch: Path, parent: Path, mode: int) -> None:
    parent.mkdir()
    parent.chmod(mode)
    with scratch_folder(scratch) as place:
        assert parent.stat().st_mode & 0o777 == 0o700
        assert place.folder.parent == parent


def own_place(scratch: Path) -> Path:
    """Returns a place without a parent of ours: private, with a random name, removed at the end."""
    with scratch_folder(scratch) as place:
        assert place.folder.parent == scratch
        assert re.fullmatch(rf"hpc-router-{os.getuid()}-\w{{8}}", place.folder.name)
        for folder in (place.folder, place.temporary, place.cache):
            assert folder.stat().st_mode & 0o777 == 0o700
        assert (place.folder / "owner.json").exists()
    assert not place.folder.exists()
    return place.folder


def test_a_link_in_place_of_the_parent_does_not_prevent_a_start(scratch: Path, parent: Path) -> None:
    (scratch / "theirs").mkdir(mode=0o755)
    parent.symlink_to(scratch / "theirs")
    assert own_place(scratch) != own_place(scratch)
    assert (scratch / "theirs").stat().st_mode & 0o777 == 0o755
    assert list((scratch / "theirs").iterdir()) == []


def test_a_dangling_link_does_not_prevent_a_start(scratch: Path, parent: Path) -> None:
    parent.symlink_to(scratch / "nowhere")
    own_place(scratch)
    assert not (scratch / "nowhere").exists()


def test_a_file_in_place_of_the_parent_does_not_prevent_a_start(scratch: Path, parent: Path) -> None:
    parent.write_text("")
    own_place(scratch)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
@pytest.mark.parametrize("mode", [0o700, 0o777])
def test_a_folder_of_another_user_does_not_prevent_a_start(scratch: Path, parent: Path, mode: int) -> None:
    parent.mkdir()
    parent.chmod(mode)
    os.chown(parent, 12345, 12345)
    own_place(scratch)
    status = parent.stat()
    assert (status.st_uid, status.st_mode & 0o777) == (12345, mode)
    assert list(parent.iterdir()) == []


def test_a_path_that_is_too_long_is_refused_beside_the_parent_too(scratch: Path) -> None:
    long = scratch / ("x" * 30)
    long.mkdir()
    (long / f"hpc-router-{os.getuid()}").write_text("")
    with pytest.raises(ConfigError, match=r"cluster\.scratch=.*too long"), scratch_folder(long):
        pass
    assert [path.name for path in long.iterdir()] == [f"hpc-router-{os.getuid()}"]
    shutil.rmtree(long)


def beside(parent: Path, name: str, **changes: object) -> Path:
    """Creates the folder that an agent without a parent of its own leaves."""
    folder = owned_folder(parent, name, **changes).rename(parent.with_name(f"{parent.name}-{name}"))
    folder.chmod(0o700)
    return folder


def test_folders_of_dead_agents_beside_the_parent_are_removed(scratch: Path, parent: Path) -> None:
    left = beside(parent, "a0_bcdef", start_ticks=1)
    parent.rmdir()
    parent.symlink_to("nowhere")
    sweep(parent)
    assert not left.exists()


def test_other_folders_beside_the_parent_stay(scratch: Path, parent: Path) -> None:
    alive = beside(parent, "alive000")
    elsewhere = beside(parent, "elsewher", start_ticks=1, host="another")
    longer = beside(parent, "longer000", start_ticks=1)
    open_to_others = beside(parent, "open0000", start_ticks=1)
    open_to_others.chmod(0o755)
    unowned = old_folder(scratch, f"{parent.name}-unowned0")
    unowned.chmod(0o700)
    link = scratch / f"{parent.name}-link0000"
    link.symlink_to(longer)
    for path in (alive, elsewhere, longer, open_to_others, unowned):
        os.utime(path, (time.time() - 100, time.time() - 100))
    sweep(parent)
    kept = (alive, elsewhere, longer, open_to_others, unowned)
    assert all(folder.exists() for folder in kept)
    assert link.is_symlink()
    link.unlink()
    for folder in kept:
        shutil.rmtree(folder)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_folders_of_another_user_beside_the_parent_stay(scratch: Path, parent: Path) -> None:
    theirs = beside(parent, "theirs00", start_ticks=1)
    os.chown(theirs, 12345, 12345)
    sweep(parent)
    assert theirs.exists()
    shutil.rmtree(theirs)


def test_a_path_too_long_for_a_socket_is_refused(scratch: Path) -> None:
    long = scratch / ("x" * 30)
    long.mkdir()
    with pytest.raises(ConfigError, match=r"cluster\.scratch=.*too long"), scratch_folder(long):
        pass
    assert list(long.iterdir()) == []


def test_a_scratch_that_does_not_exist_is_named(scratch: Path) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.scratch=.*no such folder"), scratch_folder(scratch / "none"):
        pass


def old_folder(parent: Path, name: str) -> Path:
    """Creates a folder that was never finished, and is old enough to be removed."""
    folder = parent / name
    folder.mkdir(parents=True)
    os.utime(folder, (time.time() - 100, time.time() - 100))
    return folder


def test_a_parent_that_others_can_access_is_not_cleaned(scratch: Path, parent: Path) -> None:
    """Another user may have put a link into the shared folder, under the name that `down` cleans."""
    theirs = scratch / "theirs"
    old = old_folder(theirs, "old")
    theirs.chmod(0o700)
    parent.symlink_to(theirs)
    sweep(parent)
    theirs.chmod(0o755)
    sweep(theirs)
    sweep(old / "missing")
    assert old.exists()
    old.rmdir()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_folders_of_another_user_are_not_removed(scratch: Path, parent: Path) -> None:
    parent.mkdir(mode=0o700)
    old = old_folder(parent, "old")
    os.chown(old, 12345, 12345)
    sweep(parent)
    os.chown(parent, 12345, 12345)
    os.chown(old, 0, 0)
    sweep(parent)
    assert old.exists()


def test_a_link_among_the_folders_is_not_followed(scratch: Path, parent: Path) -> None:
    parent.mkdir(mode=0o700)
    old = old_folder(scratch, "elsewhere")
    (parent / "link").symlink_to(old)
    sweep(parent)
    assert old.exists()
    assert (parent / "link").is_symlink()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"pid": "x"}', "[" * 100_000, '{"pid": 1e99, "start_ticks": 1}'])
def test_a_folder_with_an_unknown_owner_stays(scratch: Path, parent: Path, text: str) -> None:
    folder = owned_folder(parent, "odd")
    described = read_json(folder / "owner.json") or {}
    odd = json.dumps({k: described[k] for k in ("host", "pid_namespace")} | json.loads(text)) if "{" in text else text
    (folder / "owner.json").write_text(odd)
    os.utime(folder, (time.time() - 100, time.time() - 100))
    sweep(parent)
    assert folder.exists()


def test_an_owner_file_that_is_not_a_file_blocks_nothing(scratch: Path, parent: Path) -> None:
    parent.mkdir(mode=0o700)
    pipe, link = old_folder(parent, "pipe"), old_folder(parent, "link")
    os.mkfifo(pipe / "owner.json")
    (link / "owner.json").symlink_to("nowhere")
    for folder in (pipe, link):
        os.utime(folder, (time.time() - 100, time.time() - 100))
    sweep(parent)
    assert pipe.exists()
    assert link.exists()


@pytest.mark.parametrize(
    ("scratch", "folder"), [("/tmp", "/tmp"), ("$TMPDIR", "/local/7"), ("/x/${JOB}_a", "/x/7_a"), ("/$$x", "/$x")]
)
def test_variables_of_the_job_name_the_folder(scratch: str, folder: str) -> None:
    assert expanded(scratch, {"TMPDIR": "/local/7", "JOB": "7"}) == Path(folder)


@pytest.mark.parametrize("scratch", ["$LOCAL", "/x/${EMPTY}", "/x/$"])
def test_a_variable_that_the_job_does_not_have(scratch: str) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.scratch=") as caught:
        expanded(scratch, {"EMPTY": ""})
    assert caught.value.key == "cluster.scratch"


@pytest.mark.parametrize("at", ["parent", "folder", "file"])
def test_a_full_disk_names_the_key(scratch: Path, parent: Path, at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no wrong value: the job may start on another node, or once there is room."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    match at:
        case "parent":
            monkeypatch.setattr(scratch_dir, "make_private", full)
        case "folder":
            monkeypatch.setattr(scratch_dir.tempfile, "mkdtemp", full)  # type: ignore[attr-defined]
        case "file":
            monkeypatch.setattr(os, "fsync", full)
    message = rf"^cluster\.scratch={scratch}: cannot write .*: No space left on device"
    with pytest.raises(LaunchError, match=message), scratch_folder(scratch):
        pass
    assert not parent.exists() or list(parent.iterdir()) == []
