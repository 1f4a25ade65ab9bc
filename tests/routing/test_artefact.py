"""The artefact folder: the same training gives the same bytes, and every kind of damage is refused with its reason."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save

from hpc_router.errors import ArtefactError
from hpc_router.routing.artefact import MANIFEST, TABLES, Artefact, read
from hpc_router.routing.features import Features
from tests.routing.samples import artefact, edit, topic_artefact


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_an_artefact_survives_writing_and_reading(tmp_path: Path) -> None:
    trained = artefact(Features(ngrams=2, prefix=4))
    trained.write(tmp_path / "a")
    stored = read(tmp_path / "a")
    for entry in dataclasses.fields(Artefact):
        assert np.array_equal(getattr(stored, entry.name), getattr(trained, entry.name)), entry.name
    assert stored.version == trained.version == json.loads((tmp_path / "a" / MANIFEST).read_text())["version"]
    assert len(stored.version) == 12


def test_topics_are_stored_and_have_a_schema_of_their_own(tmp_path: Path) -> None:
    topic_artefact().write(tmp_path / "a")
    assert read(tmp_path / "a").topics == ("medicine",)
    assert json.loads((tmp_path / "a" / MANIFEST).read_text())["schema"] == 4
    with pytest.raises(ValueError, match="shape"):
        topic_artefact(topics=())
    with pytest.raises(ValueError, match="topics need clusters without offsets"):
        topic_artefact(offsets=np.ones(2, np.float32))


def test_the_same_training_gives_the_same_bytes(tmp_path: Path) -> None:
    """Reading and writing an artefact again gives the same bytes too."""
    artefact().write(tmp_path / "a")
    artefact().write(tmp_path / "b")
    read(tmp_path / "a").write(tmp_path / "c")
    for name in (MANIFEST, TABLES):
        content = (tmp_path / "a" / name).read_bytes()
        assert content == (tmp_path / "b" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()


def test_a_changed_expert_table_changes_the_version() -> None:
    trained = artefact()
    moved = dataclasses.replace(trained, experts=("code", None, "code"))
    assert moved.version != trained.version


def test_writing_replaces_an_artefact_and_leaves_no_temporary_files(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "a"
    artefact().write(folder)
    second = artefact(Features(prefix=0))
    second.write(folder)
    assert read(folder).version == second.version
    assert names(folder.parent) == ["a"]
    assert names(folder) == [MANIFEST, TABLES]


def test_a_folder_with_other_files_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtefactError, match=r"thesis\.tex"):
        artefact().write(tmp_path)
    with pytest.raises(ArtefactError, match="not a folder"):
        artefact().write(tmp_path / "thesis.tex")
    assert names(tmp_path) == ["thesis.tex"]


def test_an_error_names_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ArtefactError, match="cannot write the artefact"):
        artefact().write(tmp_path / "file" / "a")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def turn_into_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "manifest missing": (lambda f: (f / MANIFEST).unlink(), f"{MANIFEST} is missing"),
    "tables missing": (lambda f: (f / TABLES).unlink(), f"{TABLES} is missing"),
    "manifest is a folder": (lambda f: turn_into_folder(f / MANIFEST), "cannot read"),
    "manifest empty": (lambda f: (f / MANIFEST).write_text(""), "not JSON"),
    "manifest truncated": (lambda f: truncate(f / MANIFEST), "not JSON"),
    "manifest not UTF-8": (lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe{}"), "not JSON"),
    "manifest a list": (lambda f: (f / MANIFEST).write_text("[]"), "not a JSON object"),
    "manifest edited": (
        lambda f: (f / MANIFEST).write_text((f / MANIFEST).read_text().replace('"math"', '"maths"')),
        "edited by hand",
    ),
    "tables empty": (lambda f: (f / TABLES).write_bytes(b""), "damaged"),
    "tables truncated": (lambda f: truncate(f / TABLES), "damaged"),
    "one bit flipped": (lambda f: flip(f / TABLES), "damaged"),
    "newer schema": (lambda f: edit(f, schema=5), "schema 5.*update hpc_router"),
    "no schema": (lambda f: edit(f, schema=None), "schema None.*train"),
    "unknown norm": (lambda f: edit(f, norm="student"), "norm is 'student'"),
    "unknown features": (lambda f: edit(f, features={"kind": "lexical"}), "features must have exactly"),
    "features not an object": (lambda f: edit(f, features=3), "features must be an object"),
    "cluster missing": (lambda f: edit(f, clusters=["code"], experts=["code"]), "shape"),
    "duplicate cluster": (lambda f: edit(f, clusters=["code", "code", "math"]), "distinct"),
    "clusters not a list": (lambda f: edit(f, clusters="code"), "clusters must be a list"),
    "experts too few": (lambda f: edit(f, experts=["code"]), "experts"),
    "method missing": (lambda f: edit(f, method=None), "method must be a string"),
    "threshold text": (lambda f: edit(f, margin_threshold="low"), "margin_threshold must be a number"),
    "threshold NaN": (lambda f: edit(f, margin_threshold=float("nan")), "margin_threshold is not a finite"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_artefact_is_refused_with_its_reason(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    folder = tmp_path / "a"
    artefact().write(folder)
    damage(folder)
    with pytest.raises(ArtefactError, match=message) as caught:
        read(folder)
    assert str(folder) in str(caught.value)


def test_an_error_names_a_feature_setting_of_the_wrong_type(tmp_path: Path) -> None:
    artefact().write(tmp_path / "a")
    features = {**dataclasses.asdict(Features()), "ngrams": "2"}
    edit(tmp_path / "a", features=features)
    with pytest.raises(ArtefactError, match=r"features\.ngrams"):
        read(tmp_path / "a")


def test_an_error_names_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"no artefact at .*nowhere"):
        read(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["weights", "idf"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(name: str, value: float) -> None:
    trained = artefact()
    table = getattr(trained, name).copy()
    table.flat[3] = value
    with pytest.raises(ValueError, match=f"'{name}' has values that are not finite"):
        dataclasses.replace(trained, **{name: table})


@pytest.mark.parametrize(("name", "message"), [("idf", "lacks the tensor 'idf'"), ("weights", "'weights' is float64")])
def test_a_missing_tensor_or_a_wrong_tensor_type_is_refused(tmp_path: Path, name: str, message: str) -> None:
    """The file is intact and its hash matches."""
    folder = tmp_path / "a"
    artefact().write(folder)
    tensors = load((folder / TABLES).read_bytes())
    if name == "idf":
        del tensors[name]
    else:
        tensors[name] = tensors[name].astype(np.float64)
    content = save(tensors)
    (folder / TABLES).write_bytes(content)
    edit(folder, tables_sha256=hashlib.sha256(content).hexdigest())
    with pytest.raises(ArtefactError, match=message):
        read(folder)
