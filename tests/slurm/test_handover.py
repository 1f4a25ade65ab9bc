"""Walltimes end under load, of experts and of the router: no request fails and no stream breaks."""

from functools import partial

import pytest

from tests.slurm.cluster import SlurmCluster, lacking
from tests.slurm.continuity import under_load
from tests.slurm.deployment import on_slurm
from tests.slurm.handovers import handed_over
from tests.support.needs import need
from tests.support.waiting import eventually

pytestmark = pytest.mark.slurm

OVERRIDES = (
    "topology=sim",
    "policy.fallback=null",
    *(f"experts.{name}.replicas=0" for name in ("medicine", "law", "generalist", "code")),
    *(f"experts.{name}.engine.options={{ttft_ms: 10, itl_ms: 20, load_s: 2}}" for name in ("math", "code", "law")),
    "experts.math.resources.gpus=1",
    "experts.law.resources.gpus=1",
    "router.resources.sbatch={nodelist: c1}",
    "cluster.walltime=2",
    "cluster.warn_s=10",
    "cluster.handover_margin_s=0",
    "cluster.ask_s=5",
)


async def test_two_walltime_ends_of_experts_and_router_fail_nothing(cluster: SlurmCluster) -> None:
    """For clients that follow the routers by themselves, and for plain ones through `connect`."""
    await two_walltime_ends(cluster)


@pytest.mark.long
async def test_two_walltime_ends_where_slurm_signals_the_agents_alone() -> None:
    lack = lacking("cgroup")
    need(not lack, lack)
    with SlurmCluster(proctrack="cgroup") as cluster:
        await two_walltime_ends(cluster)


async def two_walltime_ends(cluster: SlurmCluster) -> None:
    with on_slurm(cluster, "handover", *OVERRIDES, "experts.law.replicas=2") as deployed:
        async with under_load(deployed, "math", "law") as service:
            for slot in ("math-0", "law-0", "law-1", "router-0"):
                await eventually(partial(handed_over, deployed, slot), within_s=240)
            await eventually(deployed.job("router-0.g1").exit)
        ends = [
            (end.ok, end.cut) for replica in deployed.claimed() if (end := deployed.job(replica).exit()) is not None
        ]
        print([load.done for load in service.loads], service.slow(), service.unready_s)
        assert [failure for load in service.loads for failure in load.failures] == []
        assert service.slow() == []
        assert ends == [(True, 0)] * len(ends)
        assert len(ends) >= 7
        assert len({router for router, _ in service.unready_s}) == 3
        assert service.unready("math") == 0
        assert min(load.done["request"] for load in service.loads) > 250
