"""A file is copied whole, and a copy that differs from its source or its recorded hash is an error."""

import hashlib
import os
from pathlib import Path

import pytest

from hpc_router.errors import StagingError
from hpc_router.expert.staging import copying
from hpc_router.expert.staging.copying import CopyProgress, copy_file
from hpc_router.expert.staging.model_files import ModelFile, ModelFiles, list_files

NAME = "model-1.safetensors"


def listed(model: Path) -> tuple[ModelFiles, ModelFile]:
    files = list_files(model)
    return files, next(file for file in files.files if file.path == Path(NAME))


def test_a_copy_and_its_hash(model: Path, node_disk: Path) -> None:
    files, file = listed(model)
    progress, content = CopyProgress(), (model / NAME).read_bytes()
    assert copy_file(files, file, node_disk / NAME, progress) == hashlib.sha256(content).hexdigest()
    assert (node_disk / NAME).read_bytes() == content
    assert progress.size == file.size == len(content)


@pytest.mark.parametrize("right", [True, False])
def test_a_recorded_hash_is_compared(model: Path, node_disk: Path, right: bool) -> None:
    content = (model / NAME).read_bytes()
    recorded = hashlib.sha256(content if right else b"as it was published").hexdigest()
    (model / f"{NAME}.sha256").write_text(f"{recorded}  {NAME}\n")
    if right:
        assert copy_file(*listed(model), node_disk / NAME, CopyProgress()) == recorded
    else:
        with pytest.raises(StagingError, match=f"{recorded} is recorded for the file"):
            copy_file(*listed(model), node_disk / NAME, CopyProgress())


def test_what_the_disk_returns_is_compared_with_what_was_read(
    model: Path, node_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk changes one byte after the file was written."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        os.pwrite(descriptor, b"!", 1000)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(StagingError, match=f"{node_disk}/{NAME} differs from what was read from {model}/{NAME}"):
        copy_file(*listed(model), node_disk / NAME, CopyProgress())


@pytest.mark.parametrize("change", ["size", "time"])
def test_a_source_that_changed_since_it_was_listed(model: Path, node_disk: Path, change: str) -> None:
    files, file = listed(model)
    if change == "size":
        with (model / NAME).open("ab") as stream:
            stream.write(b"!")
        os.utime(model / NAME, ns=(file.mtime_ns, file.mtime_ns))
    else:
        os.utime(model / NAME, ns=(file.mtime_ns, file.mtime_ns + 1))
    with pytest.raises(StagingError, match="changed while it was copied"):
        copy_file(files, file, node_disk / NAME, CopyProgress())


def test_a_stopped_copy_writes_no_further_chunk(model: Path, node_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    progress, counted = CopyProgress(), CopyProgress.add

    def add(self: CopyProgress, size: int) -> None:
        counted(self, size)
        self.stop()

    monkeypatch.setattr(CopyProgress, "add", add)
    with pytest.raises(StagingError, match="stopped"):
        copy_file(*listed(model), node_disk / NAME, progress)
    assert (node_disk / NAME).stat().st_size == progress.size == copying.CHUNK_BYTES
