"""A node that fails twice on a real Slurm gets no further jobs, not even one that waits in the queue, until `nodes
forget`."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.e2e.deployment import cli
from tests.slurm.cluster import SlurmCluster
from tests.slurm.configuration import SLURMD_TIMEOUT_S
from tests.slurm.continuity import events
from tests.slurm.deployment import OnSlurm, on_slurm
from tests.support.waiting import eventually_sync

pytestmark = [pytest.mark.slurm, pytest.mark.long]

OVERRIDES = (
    "topology=empty",
    "policy=round_robin",
    "experts={math: {model: m, engine: {kind: sim}, resources: {gpus: 1}}}",
    "policy.fallback=null",
    "router.resources.sbatch={nodelist: c1}",
    "cluster.ask_s=5",
)
FAULTY = "n1"


@contextmanager
def closed(cluster: SlurmCluster, *nodes: str) -> Iterator[None]:
    """Lets no job start on these nodes."""

    def update(state: str) -> None:
        cluster.run(["scontrol", "update", f"NodeName={','.join(nodes)}", f"State={state}", "Reason=test"])

    update("DRAIN")
    try:
        yield
    finally:
        update("RESUME")


def switched_off(one: OnSlurm, replica: str) -> str:
    """Switches its node off until Slurm knows that, and returns the reason that its record then has."""
    node = one.cluster.node(FAULTY)
    node.kill()
    try:
        end = eventually_sync(one.job(replica).exit, within_s=12 * SLURMD_TIMEOUT_S)
        eventually_sync(lambda: one.cluster.states()[FAULTY].startswith("down"), within_s=12 * SLURMD_TIMEOUT_S)
    finally:
        node.restart()
    assert FAULTY in end.message
    assert [event["reason"] for event in events(one, "ended") if event["replica"] == replica] == [end.reason]
    return str(end.reason)


def nodes(one: OnSlurm, task: str, *arguments: str) -> str:
    return cli("nodes", task, "--run", str(one.run), *arguments, env=one.environment).stdout


def waits_elsewhere(one: OnSlurm, after: str) -> str | None:
    """Its newest job, if that is later than `after` and waits with the node excluded. One that Slurm had sent to the
    node before is replaced first."""
    replica = one.newest("math-0")
    if replica == after or one.job(replica).info() is None or one.job(replica).exit() is not None:
        return None
    return replica if one.excluded_of(replica) == FAULTY else None


@pytest.mark.timeout(600)
def test_a_node_that_fails_twice_is_excluded_until_it_is_forgotten(cluster: SlurmCluster) -> None:
    with closed(cluster, "n2", "n3"), on_slurm(cluster, "faulty", *OVERRIDES, wait_all=False) as one:
        first = one.until_ready("math-0", after="math-0.g0", within_s=90)
        assert one.nodes_of(first) == FAULTY
        reasons = [switched_off(one, first)]
        second = one.until_ready("math-0", after=first, within_s=120)
        assert one.nodes_of(second) == FAULTY
        assert not events(one, "node_excluded"), "one loss is one failure, whatever Slurm still sent there"
        reasons.append(switched_off(one, second))
        assert reasons == ["node_failed", "node_failed"]
        (event,) = eventually_sync(lambda: events(one, "node_excluded"), within_s=60)
        assert (event["node"], event["by"]) == (FAULTY, "control loop")
        waiting = eventually_sync(lambda: waits_elsewhere(one, second), within_s=60, every_s=0.5)
        assert FAULTY in one.verb("why").stdout
        listed = json.loads(nodes(one, "list", "--json"))
        assert listed[FAULTY]["reason"].startswith("it failed twice")
        nodes(one, "forget", FAULTY)
        assert one.excluded_of(waiting) == "(null)"
        one.until_ready("math-0", after=second, within_s=120)
        assert one.nodes_of(one.serving("math-0")) == FAULTY, "it may be used again"
        assert len(events(one, "node_excluded")) == 1
