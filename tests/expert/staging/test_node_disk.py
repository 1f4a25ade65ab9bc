"""The folder of copies on a node: private, bounded, and nothing in use is removed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hpc_router.errors import StagingError
from hpc_router.expert.staging.model_files import ModelFiles, list_files
from hpc_router.expert.staging.node_disk import GB, MANIFEST, MAX_UNUSED_S, NodeDisk, StagedModel

USER = """
import sys
from pathlib import Path
from hpc_router.expert.staging.model_files import list_files
from hpc_router.expert.staging.node_disk import NodeDisk
disk, files = NodeDisk.open(Path(sys.argv[1])), list_files(Path(sys.argv[2]))
held = disk.cache(sys.argv[4]) if sys.argv[3] == "cache" else getattr(disk, sys.argv[3])(files)
assert held is not None
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def user(node_disk: Path, model: Path, *what: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds something: `find`, `begin` or `cache KEY`. Killed at the end."""
    argv = [sys.executable, "-c", USER, str(node_disk), str(model), *what]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.send_signal(signal.SIGKILL)


def a_model(folder: Path, *, size: int = 1000) -> Path:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"x" * size)
    return folder


def put(disk: NodeDisk, files: ModelFiles) -> Path:
    """A complete copy, used by no process."""
    part = disk.begin(files)
    assert part is not None
    for file in files.files:
        (part.path / file.path).write_bytes((files.source / file.path).read_bytes())
    disk.finish(part, files, {})
    found = disk.find(files)
    assert found is not None
    found.lock.release()
    return found.folder


def unused_for(folder: Path, seconds: float) -> None:
    at = time.time() - seconds
    os.utime(folder, (at, at))


def entries(disk: NodeDisk) -> list[str]:
    return sorted(path.name.partition("-")[0] for path in disk.folder.iterdir())


@pytest.fixture
def disk(node_disk: Path) -> NodeDisk:
    return NodeDisk.open(node_disk / "local")


@pytest.fixture
def files(tmp_path: Path) -> ModelFiles:
    return list_files(a_model(tmp_path / "math"))


def test_the_folder_is_private(disk: NodeDisk, files: ModelFiles, node_disk: Path) -> None:
    disk.folder.chmod(0o755)
    assert NodeDisk.open(node_disk / "local") == disk
    copy = put(disk, files)
    assert {path.stat().st_mode & 0o777 for path in (disk.folder, copy)} == {0o700}


def test_a_folder_that_we_cannot_have_is_refused(node_disk: Path) -> None:
    folder = node_disk / f"hpc-router-models-{os.getuid()}"
    folder.symlink_to(node_disk / "theirs")
    (node_disk / "theirs").mkdir()
    with pytest.raises(StagingError, match="belongs to another user, or is no folder"):
        NodeDisk.open(node_disk)
    folder.unlink()
    folder.write_text("")
    with pytest.raises(StagingError, match="belongs to another user, or is no folder"):
        NodeDisk.open(node_disk)
    with pytest.raises(FileNotFoundError):
        NodeDisk.open(node_disk / "no" / "folder")
    with pytest.raises(StagingError, match="not an absolute path"):
        NodeDisk.open(Path("local"))


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(disk: NodeDisk, node_disk: Path) -> None:
    os.chown(disk.folder, 12345, 12345)
    with pytest.raises(StagingError, match="belongs to another user"):
        NodeDisk.open(node_disk / "local")


def test_a_model_on_the_same_file_system_needs_no_copy(disk: NodeDisk, model: Path, node_disk: Path) -> None:
    assert not disk.has(model)
    assert disk.has(a_model(node_disk / "here"))


def test_a_copy_is_found_once_it_is_complete(disk: NodeDisk, files: ModelFiles) -> None:
    assert disk.find(files) is None
    part = disk.begin(files)
    assert part is not None
    assert disk.find(files) is None
    disk.discard(part)
    assert entries(disk) == []
    copy = put(disk, files)
    assert (copy / "math" / "model.safetensors").read_bytes() == b"x" * 1000
    assert disk.begin(files) is None  # it is there


def test_no_file_is_added_to_a_copy_while_it_is_removed(
    disk: NodeDisk, files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread of a copy fails and the copy is given up while the others are between two files."""
    part = disk.begin(files)
    assert part is not None
    part.path.mkdir(exist_ok=True)
    removed = []

    def rmtree(folder: Path, *, ignore_errors: bool) -> None:
        with pytest.raises(FileNotFoundError):
            (part.path / "model.safetensors").open("xb")
        removed.append(folder)
        remove(folder, ignore_errors=ignore_errors)

    remove = shutil.rmtree
    monkeypatch.setattr("hpc_router.expert.staging.node_disk.shutil.rmtree", rmtree)
    disk.discard(part)
    assert len(removed) == 1
    assert entries(disk) == []


def test_a_changed_model_is_another_one(disk: NodeDisk, files: ModelFiles) -> None:
    first = put(disk, files)
    (files.source / "model.safetensors").write_bytes(b"y" * 1000)
    changed = list_files(files.source)
    assert disk.find(changed) is None
    assert put(disk, changed) != first


def test_one_process_copies_and_its_death_leaves_the_work_to_the_next(
    disk: NodeDisk, files: ModelFiles, node_disk: Path
) -> None:
    with user(node_disk / "local", files.source, "begin") as writer:
        assert disk.begin(files) is None
        disk.sweep(now=time.time())
        assert entries(disk) == ["part"]
        writer.kill()
        writer.wait()
    part = disk.begin(files)
    assert part is not None
    assert sorted(path.name for path in part.folder.iterdir()) == ["math", MANIFEST]
    assert list(part.path.iterdir()) == []


def test_a_damaged_copy_is_removed_and_not_under_its_users(disk: NodeDisk, files: ModelFiles, node_disk: Path) -> None:
    copy = put(disk, files)
    with user(node_disk / "local", files.source, "find"):
        (copy / "math" / "model.safetensors").write_bytes(b"x")
        with pytest.raises(StagingError, match="lacks files, and another process uses it"):
            disk.find(files)
    assert disk.find(files) is None
    assert entries(disk) == []


def test_what_is_long_unused_is_swept_and_what_is_in_use_is_not(
    disk: NodeDisk, files: ModelFiles, node_disk: Path
) -> None:
    copy, cache = put(disk, files), disk.folder / "cache-sim-1-a"
    with user(node_disk / "local", files.source, "find"), user(node_disk / "local", files.source, "cache", "sim-1-a"):
        for folder in (copy, cache):
            unused_for(folder, 2 * MAX_UNUSED_S)
        disk.sweep(now=time.time())
        assert entries(disk) == ["cache", "model"]
    disk.sweep(now=time.time())
    assert entries(disk) == []


def test_what_was_used_of_late_and_what_is_not_ours_stays(disk: NodeDisk, files: ModelFiles) -> None:
    unused_for(put(disk, files), MAX_UNUSED_S - 60)
    (disk.folder / "notes").mkdir()
    unused_for(disk.folder / "notes", 2 * MAX_UNUSED_S)
    disk.sweep(now=time.time())
    assert entries(disk) == ["model", "notes"]


def test_remains_of_killed_processes_are_swept(disk: NodeDisk, files: ModelFiles) -> None:
    for name in ("part-0123", "gone-0123"):
        a_model(disk.folder / name)
    disk.sweep(now=time.time())
    assert entries(disk) == []


def test_the_longest_unused_copies_make_room(node_disk: Path, tmp_path: Path) -> None:
    disk = NodeDisk.open(node_disk / "local", limit=2500)
    models = {name: list_files(a_model(tmp_path / name)) for name in ("a", "b", "c")}
    for name, age_s in (("a", 10.0), ("b", 20.0)):
        unused_for(put(disk, models[name]), age_s)
    with user(node_disk / "local", models["a"].source, "find"):
        put(disk, models["c"])
        assert [disk.find(files) is None for files in models.values()] == [False, True, False]


def test_copies_in_use_and_copies_in_progress_count(node_disk: Path, tmp_path: Path) -> None:
    disk = NodeDisk.open(node_disk / "local", limit=2500)
    models = [list_files(a_model(tmp_path / name)) for name in ("a", "b", "c")]
    put(disk, models[0])
    place = node_disk / "local"
    with user(place, models[0].source, "find"), user(place, models[1].source, "begin"):
        said = r"no room for 0\.0 GB: cluster\.stage_gb=2\.5e-06, and other copies take 0\.0 GB"
        with pytest.raises(StagingError, match=said):
            disk.begin(models[2])
    assert disk.find(models[0]) is not None


def test_a_model_larger_than_the_limit_displaces_nothing(node_disk: Path, tmp_path: Path) -> None:
    disk = NodeDisk.open(node_disk / "local", limit=1500)
    small = list_files(a_model(tmp_path / "small"))
    put(disk, small)
    with pytest.raises(StagingError, match=r"more than cluster\.stage_gb=1\.5e-06"):
        disk.begin(list_files(a_model(tmp_path / "large", size=2000)))
    assert disk.find(small) is not None


def test_a_disk_without_room(disk: NodeDisk, files: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs(disk.folder)
    space = os.statvfs_result((*tuple(real)[:4], 0, *tuple(real)[5:], real.f_namemax))
    monkeypatch.setattr(os, "statvfs", lambda _path: space)
    with pytest.raises(StagingError, match=f"no room for .* GB: {disk.folder} has 0.0 GB"):
        disk.begin(files)
    assert entries(disk) == []


def test_the_rest_of_a_copy_in_progress_is_not_free(
    disk: NodeDisk, files: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = disk.begin(list_files(a_model(tmp_path / "law", size=GB // 100)))
    assert part is not None
    free = GB // 100 + 10 * 4096
    real = os.statvfs(disk.folder)
    values = list(real)
    values[0] = values[1] = 4096
    values[4] = free // 4096
    monkeypatch.setattr(os, "statvfs", lambda _path: os.statvfs_result(values))
    assert disk.begin(files) is not None
    with pytest.raises(StagingError, match="no room"):
        disk.begin(list_files(a_model(tmp_path / "code", size=20 * 4096)))


def held(disk: NodeDisk, key: str) -> StagedModel:
    cache = disk.cache(key)
    assert cache is not None
    return cache


def test_a_cache_is_kept_and_dropped_only_by_its_last_user(disk: NodeDisk, files: ModelFiles, node_disk: Path) -> None:
    cache = held(disk, "vllm-0.32-a")
    (cache.path / "kernel.so").write_text("")
    cache.lock.release()
    with user(node_disk / "local", files.source, "cache", "vllm-0.32-a"):
        disk.drop(held(disk, "vllm-0.32-a"))
        assert (cache.path / "kernel.so").exists()
    disk.drop(held(disk, "vllm-0.32-a"))
    assert entries(disk) == []
