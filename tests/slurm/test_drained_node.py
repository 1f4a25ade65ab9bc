"""`drain NODE` on a real Slurm: neither a replacement nor a standby that was queued before starts on that node."""

import pytest

from tests.slurm.cluster import SlurmCluster
from tests.slurm.deployment import on_slurm
from tests.support.waiting import eventually_sync

pytestmark = pytest.mark.slurm

OVERRIDES = (
    "topology=sim",
    "policy=round_robin",
    "experts={math: {model: m, engine: {kind: sim}, resources: {gpus: 1}}}",
    "policy.fallback=null",
)


def test_a_drained_node_gets_neither_replacement_nor_standby(cluster: SlurmCluster) -> None:
    with on_slurm(cluster, "drained", *OVERRIDES) as one:
        router = one.serving("router-0")
        standby = eventually_sync(lambda: r if (r := one.newest("router-0")) != router else None, within_s=60)
        eventually_sync(lambda: one.job(standby).info())
        node = one.nodes_of("math-0.g1")
        one.verb("drain", node, "--wait")
        assert one.excluded_of(standby) == node
        replacement = one.until_ready("math-0", after="math-0.g1")
        assert one.nodes_of(replacement) != node
        assert one.excluded_of(replacement) == node

        one.cluster.run(["scancel", one.job_id(router)])
        one.until_ready("router-0", after=router)
        assert one.nodes_of(standby) != node
        successor = eventually_sync(lambda: r if (r := one.newest("router-0")) != standby else None, within_s=60)
        eventually_sync(lambda: one.job(successor).info())
        assert one.excluded_of(successor) == node

        one.verb("drain", "--undo", node)
        assert one.excluded_of(successor) == "(null)"
