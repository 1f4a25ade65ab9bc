"""What every test may rely on: processes it starts take Ctrl-C and buffer their output, as a user's do; and no example
of hypothesis is too slow, for how fast this machine is today says nothing about the code."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support.users import open_folder

LONGEST_FILES = (
    *("e2e/test_engines.py", "slurm/test_doctor.py", "slurm/test_incidents.py", "slurm/test_deployment.py"),
    *("slurm/test_shapes.py", "slurm/test_handover.py", "slurm/test_handover_modes.py", "slurm/test_signals.py"),
    *("cluster/commands/test_up.py", "e2e/test_bench_router.py", "slurm/test_elasticity.py"),
    *("slurm/test_handover_shapes.py", "expert/multinode/test_ranks.py", "e2e/test_apply.py", "e2e/test_sim.py"),
)
"""The files whose tests take longer than a minute together, the longest first."""
settings.register_profile("any machine", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_configure() -> None:
    """A background shell leaves SIGINT ignored and nohup SIGHUP, and every process started by a test would inherit
    that."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)
    os.environ.pop("PYTHONUNBUFFERED", None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first. `--dist loadfile` gives each worker one file after the other, so no long one should
    begin when there are no others left. It needs `--no-loadscope-reorder`."""
    ranks = {Path(__file__).parent / name: rank for rank, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


@pytest.fixture
def open_path() -> Iterator[Path]:
    with open_folder() as folder:
        yield folder
