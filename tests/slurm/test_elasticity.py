"""Replicas follow the demand on a real Slurm: an expert has no job until a request comes, and none again afterwards."""

import json
from typing import Any

import pytest

from tests.e2e.cold_start import OVERRIDES, PROMPT, WITHIN_S, from_zero_to_one_and_back_in_each_mode, scalings
from tests.slurm.cluster import SlurmCluster
from tests.slurm.deployment import on_slurm
from tests.support.waiting import eventually_sync

pytestmark = pytest.mark.slurm

QUICK = (*OVERRIDES, "cluster.ask_s=2", "cluster.reconcile_s=0.5", "experts.math.idle_s=8")


@pytest.mark.newest
def test_from_zero_to_one_and_back_in_each_mode(cluster: SlurmCluster) -> None:
    with on_slurm(cluster, "elastic", *QUICK, wait_all=False) as deployed:
        from_zero_to_one_and_back_in_each_mode(deployed)


def test_a_held_stream_says_what_its_job_waits_for(cluster: SlurmCluster) -> None:
    """The job gets a GPU only when another job has gone."""
    options = ("experts.math.resources.gpus=1",)
    with on_slurm(cluster, "elastic-held", *QUICK, *options, wait_all=False) as deployed:
        hog = ["sbatch", "--parsable", "--nodes=3", "--gres=gpu:4", "--output=/dev/null", "--wrap=sleep 600"]
        blocker = cluster.run(hog).strip()
        try:
            comments: list[str] = []
            with deployed.client() as client:
                asking = client.chat.completions.with_streaming_response.create(
                    model="math", messages=PROMPT, stream=True, max_tokens=2
                )
                with asking as response:
                    for line in response.iter_lines():
                        comments += [line] if line.startswith(": ") else []
                        if "queued in Slurm (" in line:
                            cluster.run(["scancel", blocker])
                        if line == "data: [DONE]":
                            break
            assert any(
                "queued in Slurm (Resources)" in line or "queued in Slurm (Priority)" in line for line in comments
            )
            assert ": starting (loading)" in [line.partition(",")[0] for line in comments]
        finally:
            cluster.run(["scancel", blocker])
        eventually_sync(lambda: len(scalings(deployed)) == 2, within_s=WITHIN_S)

        def forecast() -> Any:
            return json.loads((deployed.run / "forecast.json").read_text())["experts"].get("math", {}).get("reason")

        eventually_sync(lambda: forecast() == "ScaledToZero", within_s=WITHIN_S)
