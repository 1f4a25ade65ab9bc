"""Folders for agents: a scratch folder whose path is short enough for sockets, and a run directory."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc_router.state.run_directory import RunDir, make_run


@pytest.fixture
def scratch() -> Iterator[Path]:
    """Empty but for our own, empty, parent folder when the test ends: agents leave nothing behind."""
    folder = Path(tempfile.mkdtemp(prefix="hr", dir="/tmp"))
    yield folder
    left = [path for parent in folder.iterdir() for path in parent.iterdir()]
    shutil.rmtree(folder)
    assert left == []


@pytest.fixture
def socket_folder() -> Iterator[Path]:
    """A folder whose path is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="hr", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "run")
