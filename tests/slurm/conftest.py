"""The cluster that all tests of this folder share, because its start takes seconds. Each test leaves it as it found
it."""

from collections.abc import Iterator

import pytest

from tests.slurm import releases
from tests.slurm.cluster import SlurmCluster, lacking
from tests.support.needs import need


@pytest.fixture(scope="session", autouse=True)
def machine() -> None:
    """Skips the tests on a machine that cannot run a cluster, or where the chosen release cannot be had."""
    releases.need_chosen()
    lack = lacking()
    need(not lack, lack)


@pytest.fixture(scope="session")
def cluster(machine: None) -> Iterator[SlurmCluster]:
    with SlurmCluster() as cluster:
        yield cluster
