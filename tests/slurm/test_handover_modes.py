"""Handovers of other modes, and for a changed config, one deployment each."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.slurm.cluster import SlurmCluster
from tests.slurm.continuity import events, under_load
from tests.slurm.deployment import on_slurm
from tests.slurm.handovers import OPTIONS, QUICK, SIM, until_why
from tests.support.waiting import eventually

pytestmark = pytest.mark.slurm


async def test_drain_first_queues_the_successor_and_leaves_the_gap_of_drain_and_load(cluster: SlurmCluster) -> None:
    """Requests wait for it, as the router has a queue. The warning comes up to a minute early."""
    overrides = (*SIM, "~experts.law", *QUICK, f"experts.math.engine.options={OPTIONS}", "cluster.walltime=2")
    with on_slurm(cluster, "drain-first", *overrides, "experts.math.handover=drain_first") as deployed:
        async with under_load(deployed, "math") as service:
            said = await until_why(deployed, "math-0.g1", "starts when it has ended")
            await eventually(lambda: deployed.claimed("math-0.g2"), within_s=30)
            info = await eventually(deployed.job("math-0.g2").info)
            assert info.after == deployed.job_id("math-0.g1")
            status = await asyncio.to_thread(deployed.verb, "status")
            assert "math-0.g2 is to replace it" in " ".join(status.stdout.split())
            await eventually(lambda: deployed.record("math-0.g2"), within_s=120)
            await asyncio.sleep(2)
        end, progress = deployed.job("math-0.g1").exit(), deployed.job("math-0.g2").progress()
        assert end is not None
        assert end.ok
        assert end.cut == 0
        assert progress is not None
        assert progress.ready_at is not None
        print(said, service.unready("math"), progress.ready_at - end.at, service.slow())
        assert service.failures("stream") == []
        assert service.failures("request") == []
        assert 2 < service.unready("math") < 20


@contextmanager
def submit_limit(cluster: SlurmCluster, jobs: int) -> Iterator[None]:
    """Of root's jobs in the queue."""

    def limit(value: int) -> None:
        words = ["sacctmgr", "--immediate", "--quiet", "modify", "user", "root", "set", f"MaxSubmitJobs={value}"]
        cluster.run(words)

    limit(jobs)
    try:
        yield
    finally:
        limit(-1)


@pytest.mark.long
async def test_a_refused_overlap_waits_for_the_end_and_why_says_so(cluster: SlurmCluster) -> None:
    """The association may have three jobs: the expert's, the router's and its standby."""
    overrides = (*SIM, "~experts.law", *QUICK, f"experts.math.engine.options={OPTIONS}", "cluster.walltime=2")
    with on_slurm(cluster, "refused", *overrides, "router.resources.walltime=30") as deployed:
        await eventually(lambda: deployed.claimed("router-0.g2"))
        with submit_limit(cluster, 3):
            async with under_load(deployed, "math") as service:
                said = await until_why(deployed, "math-0.g1", "Slurm refused a second job beside it")
                refused = deployed.job("math-0.g2").exit()
                assert refused is not None
                assert refused.reason == "refused"
                assert "no replica of this slot serves for about" in said
                await eventually(lambda: deployed.newest("math-0") != "math-0.g2" and
                                 deployed.record(deployed.newest("math-0")), within_s=150)  # fmt: skip
                await eventually(deployed.job("math-0.g1").exit, within_s=60)
                await eventually(lambda: deployed.record(deployed.newest("math-0")), within_s=60)
                await asyncio.sleep(2)
        end = deployed.job("math-0.g1").exit()
        assert end is not None
        assert end.ok
        assert end.cut == 0
        info = deployed.job(deployed.newest("math-0")).info()
        assert info is not None
        print(said, deployed.claimed("math-0."), info.submitted_at - end.at, service.unready("math"), service.slow())
        assert info.submitted_at - end.at < 5
        assert service.failures("stream") == []
        assert service.failures("request") == []


async def test_apply_changes_an_engine_option_and_fails_nothing(cluster: SlurmCluster) -> None:
    overrides = (*SIM, *QUICK, *(f"experts.{name}.engine.options={OPTIONS}" for name in ("math", "law")))
    with on_slurm(cluster, "apply", *overrides, "cluster.walltime=30", "experts.math.replicas=2") as deployed:
        async with under_load(deployed, "math", "law") as service:
            await asyncio.to_thread(deployed.verb, "apply", "experts.math.engine.options.seed=7")
        await eventually(lambda: sorted(deployed.ready("math")) == ["math-0.g2", "math-1.g2"])
        assert deployed.ready("law") == ["law-0.g1"]
        assert [failure for load in service.loads for failure in load.failures] == []
        assert service.unready("math") == service.unready("law") == 0
        assert len(events(deployed, "handover_started")) >= 2
