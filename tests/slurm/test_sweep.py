"""The experiment as Slurm jobs: each combination of a sweep is a job, which brings its own deployment up as jobs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from analysis import report
from tests.needs import ROOT
from tests.slurm.cluster import SlurmCluster
from tests.waiting import eventually_sync

pytestmark = pytest.mark.slurm

LIMIT_S = 240


def test_a_sweep_of_jobs_ends_in_the_report(cluster: SlurmCluster, tmp_path: Path) -> None:
    folder = cluster.shared / "sweep"
    folder.mkdir()
    words = (
        *("-m", "hydra/launcher=submitit_slurm", "hydra.launcher.partition=batch", "hydra.launcher.timeout_min=30"),
        *("hydra.launcher.cpus_per_task=1", f"hydra.sweep.dir={folder}/hydra", f"bench.output={folder}/results"),
        *("topology=sim_2replicas", "policy=model_field,round_robin", "cluster=slurm", "bench=small"),
        *("bench.users=[1,2,4]", "bench.duration_s=1.5", "bench.warmup_s=0.3", "bench.max_tokens=4"),
    )
    done = subprocess.run(
        [sys.executable, "-m", "launch.bench", *words],
        cwd=ROOT, env=os.environ | cluster.environment, capture_output=True, text=True, timeout=LIMIT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found: list[dict[str, Any]] = [json.loads(path.read_text()) for path in (folder / "results").glob("*.jsonl")]
    seen = sorted((record["policy"], record["users"]) for record in found)
    assert seen == [(policy, users) for policy in ("model_field", "round_robin") for users in (1, 2, 4)]
    jobs = {record["provenance"]["job_id"] for record in found}
    assert len(jobs) == 2, "each combination was a job"
    assert None not in jobs
    for record in found:
        nodes = {endpoint["node"] for endpoint in record["provenance"]["endpoints"]}
        assert nodes <= {"n1", "n2", "n3", "c1"}
        assert record["succeeded"]
    eventually_sync(lambda: not cluster.run(["squeue", "--noheader"]).strip(), every_s=0.3)
    page = tmp_path / "report.html"
    assert report.main([str(folder / "results"), "--out", str(page)]) == 0
    assert "sim_2replicas round_robin" in page.read_text()
