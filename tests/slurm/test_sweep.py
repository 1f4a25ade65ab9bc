"""The experiment as Slurm jobs: one command submits a job for each topology. Each of these submits the jobs of its
deployment and of its load, and the command ends with the report."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.slurm.cluster import SlurmCluster
from tests.support.needs import ROOT

pytestmark = pytest.mark.slurm


def test_a_sweep_as_jobs_ends_in_the_report(cluster: SlurmCluster) -> None:
    folder = cluster.shared / "sweep"
    launcher = ("hydra/launcher=submitit_slurm", "+hydra.launcher.additional_parameters={nodelist: c1}",
                "hydra.launcher.timeout_min=5", f"hydra.sweep.dir={folder}/hydra")  # fmt: skip
    load = ("bench=small", "bench.duration_s=1.5", "bench.warmup_s=0.3", "bench.max_tokens=4", "bench.load_jobs=2",
            "bench.load_place=slurm", "bench.load_options={nodelist: c1}")  # fmt: skip
    words = (*launcher, *load, "topology=sim,sim_2replicas", "cluster=slurm", f"bench.output={folder}/results")
    environment = os.environ | cluster.environment
    done = subprocess.run(
        [sys.executable, "-m", "launch.bench", "-m", *words],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    logs = "".join(f"== {path}\n{path.read_text()}" for path in sorted(folder.rglob("*_log.*")))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    records: list[dict[str, Any]] = [json.loads(path.read_text()) for path in (folder / "results").glob("*.jsonl")]
    seen = sorted((r["topology"], r["users"]) for r in records)
    assert seen == [(topology, users) for topology in ("sim", "sim_2replicas") for users in (1, 4, 16)]
    assert {r["provenance"]["hardware"]["host"] for r in records} == {"c1"}
    assert len({r["provenance"]["job_id"] for r in records}) == 2, "a job per topology"
    assert all(endpoint["job_id"] for r in records for endpoint in r["provenance"]["endpoints"])
    assert all(r["succeeded"] and r["direct"]["succeeded"] for r in records)
    assert "sim_2replicas" in (folder / "results" / "report.html").read_text()
    cluster.wait_idle()
