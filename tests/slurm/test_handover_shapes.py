"""Handovers of jobs of every shape, one deployment each."""

import asyncio
import subprocess
from functools import partial
from typing import Final

import pytest

from launch import tiny_model
from tests.slurm.cluster import SlurmCluster
from tests.slurm.continuity import under_load
from tests.slurm.deployment import on_slurm
from tests.slurm.handovers import OPTIONS, QUICK, SIM, handed_over
from tests.support.needs import VLLM_ENV, engine_python
from tests.support.waiting import eventually

pytestmark = pytest.mark.slurm

SHAPES: Final = {
    "replicas_per_job": (
        *SIM,
        "cluster.replicas_per_job=2",
        *(f"experts.{n}.resources.gpus=1" for n in ("math", "law")),
    ),
    "two nodes": (*SIM, "~experts.law", "experts.math.resources.nodes=2", "cluster.trusted_network=true"),
    "LoRA": ("topology=sim_lora", "experts.base.replicas=1", "policy.fallback=null"),
}
SHAPE_PARAMS: Final = [
    pytest.param("replicas_per_job", marks=pytest.mark.newest),
    pytest.param("two nodes", marks=pytest.mark.long),
    pytest.param("LoRA", marks=pytest.mark.long),
]


@pytest.mark.parametrize("shape", SHAPE_PARAMS)
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
        "cluster.handover_margin_s=60",  # the successor loads more slowly than the first, which had the machine alone
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
