"""The walltimes of an expert and of the router end under load: no request fails and no stream breaks."""

import json
from functools import partial
from typing import Any

import pytest

from hpc_router.client import async_openai_client
from tests.slurm.cluster import SlurmCluster
from tests.slurm.deployment import OnSlurm, on_slurm
from tests.support.load import Load
from tests.support.waiting import eventually

pytestmark = pytest.mark.slurm

OVERRIDES = (
    "topology=sim",
    "policy.fallback=null",
    *(f"experts.{name}.replicas=0" for name in ("medicine", "law", "generalist", "code")),
    "experts.math.engine.options={ttft_ms: 10, itl_ms: 20, load_s: 2}",
    "experts.math.resources.gpus=1",
    "router.resources.sbatch={nodelist: c1}",
    "cluster.walltime=2",
    "cluster.warn_s=10",
    "cluster.handover_margin_s=0",
    "cluster.ask_s=5",
)


def events(deployed: OnSlurm, kind: str) -> list[dict[str, Any]]:
    lines = (deployed.run / "events.jsonl").read_text().splitlines()
    return [event for line in lines if (event := json.loads(line))["kind"] == kind]


def handed_over(deployed: OnSlurm, expert: str) -> bool:
    """Whether the expert handed over twice."""
    return len([event for event in events(deployed, "handover_done") if event["expert"] == expert]) >= 2


async def test_two_walltime_ends_of_expert_and_router_fail_nothing(cluster: SlurmCluster) -> None:
    with on_slurm(cluster, "handover", *OVERRIDES) as deployed:
        client = async_openai_client(deployed.run, max_retries=0, timeout=60)
        load = Load(client, ("math",), streams=10, per_s=10, stream_tokens=100)
        async with load.running():
            for expert in ("math", "router"):
                await eventually(partial(handed_over, deployed, expert), within_s=240)
        await client.close()
        ends = [deployed.job(r).exit() for r in deployed.claimed("math-0") if deployed.job(r).exit() is not None]
        print(load.done, load.slow, [end and end.message for end in ends])
        assert load.failures == []
        assert [end and (end.ok, end.cut) for end in ends] == [(True, 0)] * len(ends)
        assert load.done["request"] > 500
