"""Preemption, cancel, dead agents and nodes, a controller and a file system that stall, under load: only streams that
were in flight on a replica that died break."""

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import SlurmCluster, lacking
from tests.slurm.configuration import Proctrack
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


INCIDENTS = incidents(away_s=20, stalled_s=20)
BY_SIGNAL = [incident for incident in INCIDENTS if incident.name in ("preemption", "cancel")]


@pytest.fixture(scope="module")
def deployed(request: pytest.FixtureRequest) -> Iterator[OnSlurm]:
    """On a file system of its own."""
    proctrack: Proctrack = request.param
    lack = lacking(proctrack)
    need(not lack, lack)
    with (
        mounted_disk() as folder,
        SlurmCluster(proctrack=proctrack) as cluster,
        on_slurm(cluster, "incidents", *OVERRIDES, shared=folder) as one,
    ):
        yield one


def on(*proctracks: Proctrack) -> pytest.MarkDecorator:
    """One deployment for all incidents under a plugin."""
    marks = {"cgroup": [pytest.mark.newest], "linuxproc": []}
    params = [pytest.param(name, marks=marks[name] if len(proctracks) > 1 else []) for name in proctracks]
    return pytest.mark.parametrize("deployed", params, indirect=True, scope="module")


@on("cgroup", "linuxproc")
@pytest.mark.parametrize("incident", BY_SIGNAL, ids=lambda incident: incident.name)
async def test_only_streams_on_signalled_replicas_break(deployed: OnSlurm, incident: Incident) -> None:
    await only_streams_on_dead_replicas_break(deployed, incident)


@on("cgroup")
@pytest.mark.parametrize(
    "incident", [one for one in INCIDENTS if one not in BY_SIGNAL], ids=lambda incident: incident.name
)
async def test_only_streams_on_dead_replicas_break(deployed: OnSlurm, incident: Incident) -> None:
    await only_streams_on_dead_replicas_break(deployed, incident)


async def only_streams_on_dead_replicas_break(deployed: OnSlurm, incident: Incident) -> None:
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
