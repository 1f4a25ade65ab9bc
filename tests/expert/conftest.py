"""Folders for agents: a scratch folder whose path is short enough for sockets, and a run directory."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc_router.state.run_directory import RunDir, make_run
from tests.support.scratch import scratch as scratch


@pytest.fixture
def socket_folder() -> Iterator[Path]:
    """Yields a folder whose path is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="hr", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture
def node_disk() -> Iterator[Path]:
    """For `cluster.stage_to`: another file system than that of a test's other files."""
    folder = Path(tempfile.mkdtemp(prefix="hpc-router-test-", dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "run")
