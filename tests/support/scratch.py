"""The fixture of a scratch folder for an agent."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.waiting import eventually_sync


@pytest.fixture
def scratch() -> Iterator[Path]:
    """Asserts that at the end only our own, empty parent folder is left in it, because agents must remove their files.
    For a killed agent its guard does so, a moment later."""
    folder = Path(tempfile.mkdtemp(prefix="hr", dir="/tmp"))
    yield folder

    def left() -> list[Path]:
        return [path for parent in folder.iterdir() for path in parent.iterdir()]

    try:
        eventually_sync(lambda: not left(), within_s=10)
    except AssertionError as error:
        raise AssertionError(f"left: {left()}") from error
    finally:
        shutil.rmtree(folder)
