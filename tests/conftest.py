"""What every test may rely on: processes it starts take Ctrl-C and buffer their output, as a user's do."""

import os
import signal
from typing import Final

import pytest

LONG_FILES: Final = ("test_multinode.py", "test_engines.py", "test_sweep.py", "test_soak.py", "test_shapes.py")
"""Where one worker runs a whole file: begun last, they would leave the other one idle."""


def pytest_configure() -> None:
    """A background shell leaves SIGINT ignored, and every process started by a test would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.pop("PYTHONUNBUFFERED", None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: at for at, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))
