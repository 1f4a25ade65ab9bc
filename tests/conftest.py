"""What every test may rely on: processes it starts take Ctrl-C and buffer their output, as a user's do; and no example
of hypothesis is too slow, for how fast this machine is today says nothing about the code."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support.users import open_folder

settings.register_profile("any machine", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_configure() -> None:
    """A background shell leaves SIGINT ignored and nohup SIGHUP, and every process started by a test would inherit
    that."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)
    os.environ.pop("PYTHONUNBUFFERED", None)


@pytest.fixture
def open_path() -> Iterator[Path]:
    with open_folder() as folder:
        yield folder
