"""Preemption, cancel, dead agents and nodes, a controller and a file system that stall, under load: only streams that
were in flight on a replica that died break."""

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import SlurmCluster, lacking
from tests.slurm.continuity import under_load
from tests.slurm.deployment import OnSlurm, on_slurm
from tests.slurm.disk import mounted_disk
from tests.slurm.incidents import Incident, incidents, submitted_once
from tests.support.needs import need
from tests.support.waiting import eventually

pytestmark = pytest.mark.slurm

BUSY = 2
"""Times are this much longer on a machine that runs other tests; `handover_report` holds the limits themselves."""

OVERRIDES = (
    "topology=sim",
    "policy.fallback=null",
    *(f"experts.{name}.replicas=0" for name in ("medicine", "generalist", "code", "math")),
    "experts.law.replicas=2",
    "experts.law.resources.gpus=1",
    "experts.law.engine.options={ttft_ms: 10, itl_ms: 20, load_s: 2}",
    "router.resources.sbatch={nodelist: c1}",
    "cluster.walltime=30",
    "cluster.drain_s=4",
)


@pytest.fixture(scope="module")
def deployed() -> Iterator[OnSlurm]:
    """On a file system of its own, and with proctrack=cgroup, where Slurm signals the agents alone."""
    lack = lacking("cgroup")
    need(not lack, lack)
    with (
        mounted_disk() as folder,
        SlurmCluster(proctrack="cgroup") as cluster,
        on_slurm(cluster, "incidents", *OVERRIDES, shared=folder) as one,
    ):
        yield one


@pytest.mark.parametrize("incident", incidents(away_s=20, stalled_s=20), ids=lambda incident: incident.name)
async def test_only_streams_on_dead_replicas_break(deployed: OnSlurm, incident: Incident) -> None:
    before = deployed.claimed()
    async with under_load(deployed, "law") as service:
        await eventually(lambda: service.done("stream") > 20)
        outcome = await incident.cause(service)
    broken = service.failures("stream")
    print(incident.name, outcome, service.slow(), service.unready("law"), len(broken))
    assert service.failures("request") == []
    assert {failure.replica for failure in broken} <= outcome.hit, broken
    assert service.unready("law") == 0
    if incident.within_s is not None:
        assert outcome.submitted_s is not None
        assert outcome.submitted_s <= BUSY * incident.within_s
    assert submitted_once(deployed, before)
