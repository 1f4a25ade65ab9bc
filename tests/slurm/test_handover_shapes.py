"""Handovers of jobs of every shape, of other modes and for a changed config, one deployment each."""

import asyncio
import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import pytest

from launch import tiny_model
from tests.slurm.cluster import SlurmCluster
from tests.slurm.continuity import events, under_load
from tests.slurm.deployment import OnSlurm, on_slurm
from tests.slurm.test_handover import handed_over
from tests.support.needs import VLLM_ENV, engine_python
from tests.support.waiting import eventually, eventually_sync

pytestmark = pytest.mark.slurm

OPTIONS: Final = "{ttft_ms: 10, itl_ms: 20, load_s: 2}"
SIM: Final = (
    "topology=sim",
    "policy=model_field",
    "policy.fallback=null",
    *(f"~experts.{n}" for n in ("medicine", "generalist", "code")),
)
QUICK: Final = (
    "router.resources.sbatch={nodelist: c1}",
    "cluster.warn_s=10",
    "cluster.handover_margin_s=0",
    "cluster.ask_s=5",
)
SHAPES: Final = {
    "replicas_per_job": (
        *SIM,
        "cluster.replicas_per_job=2",
        *(f"experts.{n}.resources.gpus=1" for n in ("math", "law")),
    ),
    "two nodes": (*SIM, "~experts.law", "experts.math.resources.nodes=2", "cluster.trusted_network=true"),
    "LoRA": ("topology=sim_lora", "experts.base.replicas=1", "policy.fallback=null"),
}


@pytest.mark.parametrize("shape", [pytest.param("replicas_per_job", marks=pytest.mark.newest), "two nodes", "LoRA"])
async def test_all_replicas_of_a_job_hand_over_together(cluster: SlurmCluster, shape: str) -> None:
    """After the first half of a walltime of two minutes."""
    hosts = ("base",) if shape == "LoRA" else ("math",) if shape == "two nodes" else ("math", "law")
    models = ("math", "law") if shape == "LoRA" else hosts
    options = [f"experts.{name}.engine.options={OPTIONS}" for name in hosts]
    with on_slurm(cluster, f"shape-{len(shape)}", *SHAPES[shape], *QUICK, *options, "cluster.walltime=2") as deployed:
        async with under_load(deployed, *models) as service:
            for host in hosts:
                await eventually(partial(handed_over, deployed, f"{host}-0", 1), within_s=120)
                await eventually(deployed.job(f"{host}-0.g1").exit, within_s=30)
        assert [failure for load in service.loads for failure in load.failures] == []
        assert [service.unready(model) for model in models] == [0.0] * len(models)
        assert len({deployed.job_id(f"{host}-0.g1") for host in hosts}) == 1
        assert len({deployed.job_id(f"{host}-0.g2") for host in hosts}) == 1, "one job, as before"
        assert deployed.job_id(f"{hosts[0]}-0.g1") != deployed.job_id(f"{hosts[0]}-0.g2")


@pytest.mark.long
@pytest.mark.vllm
@pytest.mark.timeout(900)  # two starts of vLLM on a CPU
async def test_vllm_hands_over(cluster: SlurmCluster) -> None:
    model = cluster.shared / "tiny-handover"
    argv = [str(engine_python("transformers")), tiny_model.__file__, str(model)]
    await asyncio.to_thread(subprocess.run, argv, check=True)
    overrides = (
        *SIM,
        "~experts.law",
        f"experts.math.model={model}",
        f"experts.math.engine={{kind: vllm, python: {engine_python('vllm')}, threads: 1}}",
        "experts.math.engine.options={device: cpu, max_model_len: 512, extra: {enforce-eager: true}}",
        "experts.math.resources.cpus=2",
        f"cluster.env={VLLM_ENV}",
        "cluster.walltime=5",
    )
    with on_slurm(cluster, "vllm-handover", *QUICK, *overrides) as deployed:
        async with under_load(deployed, "math", streams=4, per_s=1, stream_tokens=40) as service:
            await eventually(partial(handed_over, deployed, "math-0", 1), within_s=400)
            end = await eventually(deployed.job("math-0.g1").exit, within_s=120)
            await asyncio.sleep(5)
        print([load.done for load in service.loads], service.slow(), service.unready_s, end)
        assert [failure for load in service.loads for failure in load.failures] == []
        assert (end.ok, end.cut) == (True, 0)
        assert service.unready("math") == 0
        assert service.done("stream") > 8


def cause_of(deployed: OnSlurm, replica: str, text: str) -> str | None:
    """What `why` says of it, if that has the text."""
    causes: list[dict[str, Any]] = json.loads(deployed.verb("why", "--json").stdout)
    return next((c["what"] for c in causes if c["replica"] == replica and text in c["what"]), None)


async def until_why(deployed: OnSlurm, replica: str, text: str) -> str:
    ask = partial(eventually_sync, partial(cause_of, deployed, replica, text), within_s=120, every_s=2.0)
    return await asyncio.to_thread(ask)


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
        assert sorted(deployed.ready("math")) == ["math-0.g2", "math-1.g2"]
        assert deployed.ready("law") == ["law-0.g1"]
        assert [failure for load in service.loads for failure in load.failures] == []
        assert service.unready("math") == service.unready("law") == 0
        assert len(events(deployed, "handover_started")) >= 2
