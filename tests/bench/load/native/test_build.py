"""Programs are built once, in a private folder. Without a compiler, the error names the packages to install."""

import subprocess
from pathlib import Path

import pytest

from hpc_router.bench.load.native import build
from hpc_router.errors import LaunchError


@pytest.mark.parametrize("program", ["load", "engine"])
def test_no_compiler_warnings(program: str, tmp_path: Path) -> None:
    cc = build.compiler()
    assert cc is not None
    command = [cc, *build.FLAGS, "-Werror", "-Wshadow=local", "-o", str(tmp_path / program)]
    done = subprocess.run([*command, str(build.SOURCES / f"{program}.c")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_program_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = build.build_program("engine", cache=tmp_path / "cache")
    monkeypatch.setattr(build, "COMPILERS", ())
    assert build.build_program("engine", cache=tmp_path / "cache") == binary
    assert binary.parent.stat().st_mode & 0o777 == 0o700
    assert list(binary.parent.iterdir()) == [binary]


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "COMPILERS", ("no-such-compiler",))
    with pytest.raises(LaunchError, match="install gcc"):
        build.build_program("load", cache=tmp_path / "cache")


def test_a_source_that_does_not_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("load.c", "int main(void) { return nothing; }"), ("loop.h", "")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    with pytest.raises(LaunchError, match=r"cannot build load\.c: .*nothing"):
        build.build_program("load", cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_open_to_other_users_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(LaunchError, match="open to other users"):
        build.build_program("load", cache=folder)
