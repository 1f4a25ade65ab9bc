"""The folder on disk: the same bytes from the same training, and every damage refused in words."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save

from hpc_router.errors import ArtefactError
from hpc_router.routing import artefact as module
from hpc_router.routing.artefact import MANIFEST, TABLES, Artefact, read
from hpc_router.routing.features import Features
from tests.routing.samples import artefact


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def edit(folder: Path, **changes: object) -> None:
    """Change the manifest and make its version fit again, as a buggy writer would."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest.update(changes)
    del manifest["version"]
    (folder / MANIFEST).write_text(json.dumps({"version": module._version(manifest), **manifest}))


def test_what_was_written_is_read(tmp_path: Path) -> None:
    made = artefact(Features(ngrams=2, prefix=4))
    made.write(tmp_path / "a")
    found = read(tmp_path / "a")
    for entry in dataclasses.fields(Artefact):
        assert np.array_equal(getattr(found, entry.name), getattr(made, entry.name)), entry.name
    assert found.version == made.version == json.loads((tmp_path / "a" / MANIFEST).read_text())["version"]
    assert len(found.version) == 12


def test_one_training_gives_one_set_of_bytes(tmp_path: Path) -> None:
    """Also when it is read and written again."""
    artefact().write(tmp_path / "a")
    artefact().write(tmp_path / "b")
    read(tmp_path / "a").write(tmp_path / "c")
    for name in (MANIFEST, TABLES):
        content = (tmp_path / "a" / name).read_bytes()
        assert content == (tmp_path / "b" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()


def test_another_table_of_experts_is_another_version() -> None:
    made = artefact()
    moved = dataclasses.replace(made, experts=("code", None, "code"))
    assert moved.version != made.version


def test_writing_replaces_an_artefact_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "a"
    artefact().write(folder)
    second = artefact(Features(prefix=0))
    second.write(folder)
    assert read(folder).version == second.version
    assert names(folder.parent) == ["a"]
    assert names(folder) == [MANIFEST, TABLES]


def test_a_folder_of_other_files_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtefactError, match=r"thesis\.tex"):
        artefact().write(tmp_path)
    with pytest.raises(ArtefactError, match="not a folder"):
        artefact().write(tmp_path / "thesis.tex")
    assert names(tmp_path) == ["thesis.tex"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
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
    "newer schema": (lambda f: edit(f, schema=3), "schema 3.*update hpc_router"),
    "no schema": (lambda f: edit(f, schema=None), "schema None.*train"),
    "unknown norm": (lambda f: edit(f, norm="student"), "norm is 'student'"),
    "unknown features": (lambda f: edit(f, features={"kind": "lexical"}), "features must have exactly"),
    "features no object": (lambda f: edit(f, features=3), "features must be an object"),
    "cluster lost": (lambda f: edit(f, clusters=["code"], experts=["code"]), "shape"),
    "clusters twice": (lambda f: edit(f, clusters=["code", "code", "math"]), "distinct"),
    "clusters no list": (lambda f: edit(f, clusters="code"), "clusters must be a list"),
    "experts too few": (lambda f: edit(f, experts=["code"]), "experts"),
    "method missing": (lambda f: edit(f, method=None), "method must be a string"),
    "threshold text": (lambda f: edit(f, margin_threshold="low"), "margin_threshold must be a number"),
    "threshold NaN": (lambda f: edit(f, margin_threshold=float("nan")), "margin_threshold is not a finite"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES.keys())
def test_every_damage_is_refused_in_words(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    folder = tmp_path / "a"
    artefact().write(folder)
    damage(folder)
    with pytest.raises(ArtefactError, match=message) as caught:
        read(folder)
    assert str(folder) in str(caught.value)


def test_wrong_types_inside_features_are_named(tmp_path: Path) -> None:
    artefact().write(tmp_path / "a")
    features = {**dataclasses.asdict(Features()), "ngrams": "2"}
    edit(tmp_path / "a", features=features)
    with pytest.raises(ArtefactError, match=r"features\.ngrams"):
        read(tmp_path / "a")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"no artefact at .*nowhere"):
        read(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["weights", "idf"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_no_numbers_are_refused(name: str, value: float) -> None:
    made = artefact()
    table = getattr(made, name).copy()
    table.flat[3] = value
    with pytest.raises(ValueError, match=f"'{name}' holds values"):
        dataclasses.replace(made, **{name: table})


@pytest.mark.parametrize(("name", "message"), [("idf", "lacks the tensor 'idf'"), ("weights", "'weights' is float64")])
def test_tables_of_another_make_are_refused(tmp_path: Path, name: str, message: str) -> None:
    """A file that is whole but lacks a tensor or has another type."""
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
