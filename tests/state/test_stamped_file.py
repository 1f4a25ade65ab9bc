"""A JSON file that is parsed only after it was replaced, and keeps its last value while it cannot be read."""

import os
from pathlib import Path
from typing import Any

import pytest

from hpc_router.errors import RegistryError
from hpc_router.state.atomic_files import replace_json
from hpc_router.state.stamped_file import StampedFile, stamp_at


class Parser:
    """Returns `n` of the content, and counts its calls."""

    calls = 0

    def __call__(self, content: dict[str, Any]) -> int:
        self.calls += 1
        if "n" not in content:
            raise RegistryError("it has no n")
        return int(content["n"])


def test_it_is_parsed_once_for_each_version(tmp_path: Path) -> None:
    parse = Parser()
    file = StampedFile(tmp_path / "a.json", parse)
    assert file.read() is None
    replace_json(file.path, {"n": 1})
    assert (file.read(), file.read(), parse.calls) == (1, 1, 1)
    replace_json(file.path, {"n": 2})
    assert (file.read(), file.value, parse.calls) == (2, 2, 2)
    file.path.unlink()
    assert (file.read(), file.value) == (None, None)


def test_a_file_that_cannot_be_read_now_keeps_its_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = StampedFile(tmp_path / "a.json", Parser())
    replace_json(file.path, {"n": 1})
    assert file.read() == 1
    file.path.write_text('{"n": ')  # incomplete copy
    assert file.read() == 1
    replace_json(file.path, {"n": 3})
    assert file.read() == 3

    def stale(*_: object, **__: object) -> None:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(Path, "lstat", stale)
    with pytest.raises(OSError, match="Stale"):
        file.read()
    assert file.value == 3


@pytest.mark.parametrize("invalid", ["content", "link", "owner"])
def test_a_file_that_is_not_valid_has_no_value_and_one_warning(
    tmp_path: Path, invalid: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = StampedFile(tmp_path / "a.json", Parser())
    replace_json(file.path, {"n": 1})
    assert file.read() == 1
    replace_json(tmp_path / "b.json", {"n": 2} if invalid != "content" else {})
    if invalid == "link":
        (tmp_path / "c.json").symlink_to(tmp_path / "b.json")
        (tmp_path / "c.json").replace(file.path)
    else:
        (tmp_path / "b.json").replace(file.path)
    if invalid == "owner":
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert [file.read(), file.read()] == [None, None]
    assert len(caplog.records) == 1
    assert str(file.path) in caplog.text


def test_a_stamp_changes_with_each_version(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert stamp_at(path) is None
    replace_json(path, {"n": 1})
    first = stamp_at(path)
    assert first is not None
    replace_json(path, {"n": 2})
    assert stamp_at(path) != first
