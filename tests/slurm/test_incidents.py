"""Preemption, cancel, dead agents and nodes, a controller and a file system that stall, under load: only streams that
were in flight on a replica that died break."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.batch_storm import reached, submit, write_lines
from tests.slurm.cluster import SlurmCluster, lacking
from tests.slurm.configuration import Proctrack
from tests.slurm.continuity import Service, under_load
from tests.slurm.deployment import OnSlurm, on_slurm
from tests.slurm.disk import mounted_disk
from tests.slurm.incidents import Incident, incidents, preempted, submitted_once
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


LINES = 1500
"""Of a batch, which two replicas serve in about 20 s."""
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


@on("cgroup", "linuxproc")
async def test_a_batch_outlives_a_preemption(deployed: OnSlurm, tmp_path: Path) -> None:
    """Each line has one result, in the order of the input, although Slurm takes the node of a replica."""
    write_lines(tmp_path / "lines.jsonl", LINES, model="law", max_tokens=20)
    with deployed.client() as client:
        batch = submit(client, tmp_path / "lines.jsonl")
        await eventually(lambda: reached(deployed, batch, LINES / 10))
        assert (reached(deployed, batch, 0) or 0) < LINES, "it still runs"
        await preempted(Service(deployed, ()))
        ended = deployed.run / "batches" / batch / "ended.json"
        await eventually(ended.exists, within_s=120)
        shown = await asyncio.to_thread(client.batches.retrieve, batch)
        assert (shown.status, shown.request_counts and shown.request_counts.failed) == ("completed", 0)
        results = client.files.content(str(shown.output_file_id)).text.splitlines()
    assert [json.loads(line)["custom_id"] for line in results] == [f"line-{number}" for number in range(LINES)]


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
