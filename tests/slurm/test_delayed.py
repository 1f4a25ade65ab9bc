"""A run directory on a file system whose clients cache: other hosts see names and attributes seconds later."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc_router.state.run_directory import make_run
from tests.slurm.cluster import SlurmCluster
from tests.slurm.configuration import NODES
from tests.slurm.delayed import delayed_folder
from tests.slurm.deployment import OnSlurm, on_slurm
from tests.slurm.host import SlurmClusterError
from tests.slurm.node import Node
from tests.support.needs import ROOT
from tests.support.waiting import eventually_sync

pytestmark = pytest.mark.slurm

OVERRIDES = (
    "topology=sim",
    "policy.fallback=null",
    *(f"experts.{name}.replicas=0" for name in ("medicine", "generalist", "code")),
    *(f"experts.{name}.resources.gpus=1" for name in ("math", "law")),
    "router.resources.sbatch={nodelist: c1}",
    "cluster.walltime=30",
)
CLAIM = """\
import sys
from pathlib import Path
from hpc_router.state.job_records import JobDir
from hpc_router.state.run_directory import RunDir
job = JobDir(RunDir(Path(sys.argv[1])), sys.argv[2])
job.path.exists()
print(job.claim())
"""


@pytest.fixture(scope="module")
def folder(cluster: SlurmCluster) -> Iterator[Path]:
    with delayed_folder(cluster) as one:
        yield one


@pytest.fixture(scope="module")
def deployed(cluster: SlurmCluster, folder: Path) -> Iterator[OnSlurm]:
    with on_slurm(cluster, "delayed", *OVERRIDES, shared=folder) as one:
        yield one


def maybe(node: Node, argv: list[str]) -> str:
    try:
        return node.enter(argv)
    except SlurmClusterError:
        return ""


def test_hosts_see_old_names(cluster: SlurmCluster, folder: Path) -> None:
    """Otherwise the other tests here show nothing. A host that is slow may look again only when its cache has ended,
    so several folders are tried."""
    node, numbers = cluster.node("n1"), itertools.count()

    def is_seen_late() -> bool:
        place = folder / f"names-{next(numbers)}"
        place.mkdir()
        eventually_sync(lambda: place.name in node.enter(["ls", str(folder)]))
        before = node.enter(["ls", str(place)])
        (place / "new").touch()
        at_once = node.enter(["ls", str(place)])
        eventually_sync(lambda: node.enter(["ls", str(place)]) == "new\n")
        return (before, at_once) == ("", "")

    assert eventually_sync(is_seen_late, within_s=120)


def test_of_all_hosts_one_claims_a_replica(cluster: SlurmCluster, folder: Path) -> None:
    """Each looks first whether the claim is there, and then keeps that it is not."""
    run = make_run(folder / "claims").path
    eventually_sync(lambda: all("jobs" in maybe(cluster.node(node), ["ls", str(run)]) for node in NODES))
    for number in range(3):
        replica = f"math-{number}.g1"
        argv = ["env", f"PYTHONPATH={ROOT}", sys.executable, "-c", CLAIM, str(run), replica]
        claimers = [
            subprocess.Popen(cluster.node(node).inside(argv), stdout=subprocess.PIPE, text=True, env={**os.environ})
            for node in NODES
        ]
        assert sorted(claimer.communicate(timeout=60)[0].strip() for claimer in claimers) == ["False"] * 3 + ["True"]


def answered(deployed: OnSlurm, expert: str) -> str:
    with deployed.client() as client:
        raw = client.chat.completions.with_raw_response.create(
            model=expert, messages=[{"role": "user", "content": "hello"}]
        )
    return raw.headers["x-replica"]


@pytest.mark.long
def test_replicas_that_register_there_serve(deployed: OnSlurm) -> None:
    assert answered(deployed, "math") == "math-0.g1"
    assert answered(deployed, "law") == "law-0.g1"
    assert deployed.status()["experts"]["math"]["replicas"][0]["state"] == "ready"


@pytest.mark.long
def test_a_killed_agent_and_a_cancelled_job_are_replaced_once(deployed: OnSlurm, cluster: SlurmCluster) -> None:
    """Records of ends and of successors are read through the caches."""
    process = deployed.job("math-0.g1").process()
    assert process is not None
    cluster.node(process.host).enter(["kill", "-KILL", str(process.pid)])
    assert deployed.until_ready("math-0", after="math-0.g1") == "math-0.g2"
    cluster.run(["scancel", deployed.job_id("law-0.g1")])
    assert deployed.until_ready("law-0", after="law-0.g1") == "law-0.g2"
    eventually_sync(lambda: answered(deployed, "math") == "math-0.g2")
    eventually_sync(lambda: answered(deployed, "law") == "law-0.g2")
    assert deployed.claimed("math") == ["math-0.g1", "math-0.g2"]
    assert deployed.claimed("law") == ["law-0.g1", "law-0.g2"]


@pytest.mark.long
def test_verbs_on_this_machine_reach_the_control_loop(deployed: OnSlurm) -> None:
    """`scale` writes desired.json here, and the control loop reads it on another host."""
    deployed.verb("scale", "law=2")
    eventually_sync(lambda: len(deployed.ready("law")) == 2, within_s=60, every_s=0.5)
    deployed.verb("scale", "law=1")
    eventually_sync(lambda: len(deployed.queued("law")) == 1, within_s=60, every_s=0.5)
    events = [json.loads(line) for line in (deployed.run / "events.jsonl").read_text().splitlines()]
    assert len([event for event in events if event["event"] == "submitted" and event["replica"] == "law-1.g1"]) == 1
