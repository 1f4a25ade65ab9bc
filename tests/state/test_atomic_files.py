"""Files that another host has just written, read through an NFS client that caches missing names."""

import os
from pathlib import Path
from typing import Any

import pytest

from hpc_router.state.atomic_files import exists_now, read_json, replace_json


@pytest.fixture
def remembering(monkeypatch: pytest.MonkeyPatch) -> None:
    """Imitates an NFS client: a missing name stays missing until its folder is opened."""
    absent: set[Path] = set()
    plain_open, plain_stat = os.open, os.stat

    def known(path: Any) -> None:
        if Path(path) in absent:
            raise FileNotFoundError(path)

    def opened(path: Any, flags: int, *others: Any, **more: Any) -> int:
        if flags & os.O_DIRECTORY:
            absent.difference_update([one for one in absent if one.parent == Path(path)])
        known(path)
        try:
            return plain_open(path, flags, *others, **more)
        except FileNotFoundError:
            absent.add(Path(path))
            raise

    def asked(path: Any, **more: Any) -> os.stat_result:
        known(path)
        try:
            return plain_stat(path, **more)
        except FileNotFoundError:
            absent.add(Path(path))
            raise

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "stat", asked)


@pytest.mark.usefixtures("remembering")
def test_a_file_that_was_just_created_is_read(tmp_path: Path) -> None:
    path = tmp_path / "exit.json"
    assert read_json(path) is None
    replace_json(path, {"ok": True})
    assert read_json(path) == {"ok": True}


@pytest.mark.usefixtures("remembering")
def test_a_file_that_was_just_created_exists(tmp_path: Path) -> None:
    path = tmp_path / "stop"
    assert not exists_now(path)
    replace_json(path, {})
    assert exists_now(path)


def test_nothing_exists_in_a_missing_folder(tmp_path: Path) -> None:
    path = tmp_path / "gone" / "stop"
    assert not exists_now(path)
    assert read_json(path) is None
