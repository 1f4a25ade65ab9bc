"""Random storms on a simulated Slurm: no fault, and no order of faults, breaks the rules of `storm`.

`python -m tests.cluster.control_loop.test_storms SEED [calm]` plays one seed again and prints its events.
"""

import logging
import os
import sys
import tempfile
from pathlib import Path

import pytest

from tests.cluster.control_loop.storm import storm

SEEDS = 200
LONG_SEEDS = 1000
CHUNK = 20
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""A storm writes thousands of small files."""


def play(first: int) -> None:
    """Every fourth seed is calm: only walltimes, handovers, slow answers and changed time limits."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        for seed in range(first, first + CHUNK):
            with storm(seed, Path(folder), calm=seed % 4 == 0) as played:
                played.play()


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """A storm warns of each of its faults."""
    caplog.set_level(logging.CRITICAL)


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_storms(first: int) -> None:
    play(first)


@pytest.mark.long
@pytest.mark.parametrize("first", range(SEEDS, SEEDS + LONG_SEEDS, CHUNK))
def test_many_more_storms(first: int) -> None:
    play(first)


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as path, storm(int(sys.argv[1]), Path(path), calm="calm" in sys.argv) as one:
        one.play()
        print(*one.trace, sep="\n")
