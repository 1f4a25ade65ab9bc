"""The cluster that this folder's tests share: coming up takes seconds, and tests leave it as they found it."""

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import SlurmCluster, lacking
from tests.support.needs import need


@pytest.fixture(scope="session")
def machine() -> None:
    """A machine that can carry a cluster."""
    lack = lacking()
    need(not lack, lack)


@pytest.fixture(scope="session")
def cluster(machine: None) -> Iterator[SlurmCluster]:
    with SlurmCluster() as cluster:
        yield cluster
