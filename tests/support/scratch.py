"""The fixture of a scratch folder for an agent."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def scratch() -> Iterator[Path]:
    """Asserts that at the end only our own, empty parent folder is left in it, because agents must remove their
    files."""
    folder = Path(tempfile.mkdtemp(prefix="hr", dir="/tmp"))
    yield folder
    left = [path for parent in folder.iterdir() for path in parent.iterdir()]
    shutil.rmtree(folder)
    assert left == []
