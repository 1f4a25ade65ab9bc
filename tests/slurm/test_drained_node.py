"""`drain NODE` on a real Slurm: neither a replacement nor a standby that was queued before starts on that node."""

import pytest

from tests.slurm.cluster import SlurmCluster
from tests.slurm.deployment import OnSlurm, on_slurm
from tests.support.waiting import eventually_sync

pytestmark = pytest.mark.slurm

OVERRIDES = (
    "topology=sim",
    "policy=round_robin",
    "experts={math: {model: m, engine: {kind: sim}, resources: {gpus: 1}}}",
    "policy.fallback=null",
)


def excluded(one: OnSlurm, replica: str) -> str:
    words = one.cluster.run(["scontrol", "--oneliner", "show", "job", one.job_id(replica)]).split()
    return next(word.partition("=")[2] for word in words if word.startswith("ExcNodeList="))


def test_a_drained_node_gets_neither_replacement_nor_standby(cluster: SlurmCluster) -> None:
    with on_slurm(cluster, "drained", *OVERRIDES) as one:
        router = one.serving("router-0")
        standby = eventually_sync(lambda: r if (r := one.newest("router-0")) != router else None, within_s=60)
        eventually_sync(lambda: one.job(standby).info())
        node = one.nodes_of("math-0.g1")
        one.verb("drain", node, "--wait")
        assert excluded(one, standby) == node
        replacement = one.until_ready("math-0", after="math-0.g1")
        assert one.nodes_of(replacement) != node
        assert excluded(one, replacement) == node

        one.cluster.run(["scancel", one.job_id(router)])
        one.until_ready("router-0", after=router)
        assert one.nodes_of(standby) != node
        successor = eventually_sync(lambda: r if (r := one.newest("router-0")) != standby else None, within_s=60)
        eventually_sync(lambda: one.job(successor).info())
        assert excluded(one, successor) == node

        one.verb("drain", "--undo", node)
        assert excluded(one, successor) == "(null)"
