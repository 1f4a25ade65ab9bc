"""Which files of a model are copied, what identifies them, and which SHA-256 is recorded for them."""

import hashlib
import os
from pathlib import Path

import pytest

from hpc_router.errors import StagingError
from hpc_router.expert.staging import model_files
from hpc_router.expert.staging.model_files import list_files, local_models

SHA256 = hashlib.sha256(b"weights").hexdigest()


def names(model: Path) -> list[str]:
    return [str(file.path) for file in list_files(model).files]


def recorded(model: Path, name: str) -> str | None:
    files = list_files(model)
    [file] = [file for file in files.files if file.path == Path(name)]
    return files.recorded_sha256(file)


def test_hidden_entries_and_a_second_copy_of_the_weights_are_left_out(model: Path) -> None:
    assert names(model) == ["1_Pooling/config.json", "config.json", "model-1.safetensors", "model-2.safetensors"]
    assert list_files(model).size == sum((model / name).stat().st_size for name in names(model))


def test_the_key_changes_with_any_file_and_not_with_the_way_to_the_folder(model: Path, tmp_path: Path) -> None:
    key = list_files(model).key
    (tmp_path / "latest").symlink_to(model)
    assert list_files(tmp_path / "latest").key == key
    (model / ".git" / "index").write_text("")
    assert list_files(model).key == key
    os.utime(model / "config.json", ns=(0, 1))
    touched = list_files(model).key
    (model / "added.json").write_text("")
    assert len({key, touched, list_files(model).key}) == 3


def test_a_snapshot_of_the_hubs_cache_is_read_through_its_links(tmp_path: Path) -> None:
    """The name of a large file's blob is its SHA-256, that of a small one a hash of git."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "c0ffee"
    for folder in (blobs, snapshot):
        folder.mkdir(parents=True)
    for name, blob, content in (("model.safetensors", SHA256, "weights"), ("config.json", "ab" * 20, "{}")):
        (blobs / blob).write_text(content)
        (snapshot / name).symlink_to(Path("../../blobs") / blob)
    assert [(str(f.path), f.size) for f in list_files(snapshot).files] == [("config.json", 2), ("model.safetensors", 7)]
    assert recorded(snapshot, "model.safetensors") == SHA256
    assert recorded(snapshot, "config.json") is None


def test_the_record_of_a_download_holds_until_the_file_changes(model: Path) -> None:
    records = model / ".cache" / "huggingface" / "download"
    records.mkdir(parents=True)
    file, record = model / "model-1.safetensors", records / "model-1.safetensors.metadata"
    at = file.stat().st_mtime
    record.write_text(f"c0ffee\n{SHA256}\n{at}\n")
    assert recorded(model, file.name) == SHA256
    os.utime(file, (at + 5, at + 5))
    assert recorded(model, file.name) is None
    for damaged in ("", "c0ffee\n", f"c0ffee\n{SHA256}\nnever\n", f'c0ffee\n"{SHA256[:40]}"\n{at + 9}\n'):
        record.write_text(damaged)
        assert recorded(model, file.name) is None


def test_a_file_of_sha256sum_beside_the_weights(model: Path) -> None:
    beside = model / "model-1.safetensors.sha256"
    beside.write_text(f"{SHA256.upper()}  model-1.safetensors\n")
    assert recorded(model, "model-1.safetensors") == SHA256
    beside.write_text("none yet\n")
    assert recorded(model, "model-1.safetensors") is None


def test_a_model_of_one_file(tmp_path: Path) -> None:
    """A link to it keeps its name, since engines judge a file by that."""
    (tmp_path / SHA256).write_text("weights")
    (tmp_path / "model.gguf").symlink_to(tmp_path / SHA256)
    files = list_files(tmp_path / "model.gguf")
    assert (files.source.name, files.size, len(files.files)) == ("model.gguf", 7, 1)
    assert files.recorded_sha256(files.files[0]) == SHA256


def test_local_models_are_folders_and_files_and_no_hub_ids(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model)
    file = str(model / "config.json")
    assert local_models([str(model), "org/model", "config.json", file, str(model), "/nowhere"]) == [str(model), file]


def test_folders_that_cannot_be_listed(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model / "loop").symlink_to(model)
    with pytest.raises(OSError, match="symbolic links"):
        list_files(model)
    (model / "loop").unlink()
    (model / "gone").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError):
        list_files(model)
    (tmp_path / "empty").mkdir()
    with pytest.raises(StagingError, match="has no files"):
        list_files(tmp_path / "empty")
    (model / "gone").unlink()
    monkeypatch.setattr(model_files, "MAX_FILES", 3)
    with pytest.raises(StagingError, match="more than 3 files"):
        list_files(model)
