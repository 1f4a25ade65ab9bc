"""A request becomes one batch script, and that script does to the shell what it says."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from hpc_router.cluster.batch import BatchJob, batch_jobs, effective
from hpc_router.cluster.launcher import JobRequest
from hpc_router.config import ClusterConfig, Deployment, ResourceConfig
from hpc_router.rundir import RunDir

RUN = RunDir(Path("/runs/mine"))


def request(replica: str = "math-0.g1", **resources: object) -> JobRequest:
    return JobRequest(replica, ("/bin/true",), ResourceConfig(**resources))  # type: ignore[arg-type]


def jobs(*requests: JobRequest, **cluster: object) -> list[BatchJob]:
    deployment = Deployment(name="demo", cluster=ClusterConfig(kind="slurm", **cluster))  # type: ignore[arg-type]
    return batch_jobs(RUN, deployment, requests)


def script(*requests: JobRequest, **cluster: object) -> str:
    (job,) = jobs(*requests, **cluster)
    return job.script()


@pytest.mark.parametrize(
    ("cluster", "line"),
    [
        ({"partition": "gpu"}, "#SBATCH --partition=gpu"),
        ({"account": "proj1"}, "#SBATCH --account=proj1"),
        ({"qos": "long"}, "#SBATCH --qos=long"),
        ({"constraint": "a100&ib"}, "#SBATCH --constraint='a100&ib'"),
        ({"reservation": "school"}, "#SBATCH --reservation=school"),
        ({"exclude": "n[1-3]"}, "#SBATCH --exclude='n[1-3]'"),
        ({"walltime": "1-00:00:00"}, "#SBATCH --time=1-00:00:00"),
        ({"exclusive": True}, "#SBATCH --exclusive"),
        ({"warn_s": 120.0}, "#SBATCH --signal=USR2@120"),
        ({"sbatch": {"mail-type": "FAIL", "contiguous": True}}, "#SBATCH --mail-type=FAIL"),
        ({"sbatch": {"contiguous": True}}, "#SBATCH --contiguous"),
    ],
)
def test_each_option_of_the_cluster_is_a_line(cluster: dict[str, object], line: str) -> None:
    assert line in script(request(), **cluster).splitlines()


@pytest.mark.parametrize(
    ("form", "kind", "line"),
    [
        ("gres", None, "#SBATCH --gres=gpu:2"),
        ("gres", "a100", "#SBATCH --gres=gpu:a100:2"),
        ("gpus_per_node", None, "#SBATCH --gpus-per-node=2"),
        ("gpus_per_node", "a100", "#SBATCH --gpus-per-node=a100:2"),
    ],
)
def test_gpus_are_asked_in_the_form_that_the_site_wants(form: str, kind: str | None, line: str) -> None:
    assert line in script(request(gpus=2, gpu_type=kind), gpu_request=form).splitlines()


def test_sizes_are_per_replica() -> None:
    lines = script(request(cpus=6, memory_gb=10.5, nodes=2)).splitlines()
    for line in ("#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=1", "#SBATCH --cpus-per-task=6"):
        assert line in lines
    assert "#SBATCH --mem=10752M" in lines
    assert not any("gres" in line for line in lines)


def test_what_is_not_asked_is_left_to_the_site() -> None:
    assert not any(word in script(request()) for word in ("--partition", "--time", "--mem", "--gres", "--account"))


def test_an_expert_overrules_the_cluster_and_adds_to_its_options() -> None:
    cluster = ClusterConfig(partition="gpu", qos="low", sbatch={"contiguous": True, "mail-type": "FAIL"})
    resources = ResourceConfig(partition="h100", exclusive=False, sbatch={"contiguous": None, "nodelist": "n7"})
    options = effective(cluster, resources)
    assert (options.partition, options.qos, options.exclusive) == ("h100", "low", False)
    (job,) = batch_jobs(RUN, Deployment(cluster=cluster), [JobRequest("math-0.g1", ("/bin/true",), resources)])
    assert job.options()["nodelist"] == "n7"
    assert "contiguous" not in job.options()


def test_a_job_is_never_requeued_by_slurm() -> None:
    """A requeued job waits for minutes; a fresh one is the faster replacement, and keeps no count of time-outs."""
    assert "#SBATCH --no-requeue" in script(request()).splitlines()


def test_srun_is_told_the_cpus() -> None:
    """It does not take them from sbatch since Slurm 22.05: the service would run on one core."""
    step = next(line for line in script(request(cpus=6)).split("\n\n") if "srun" in line)
    assert "--cpus-per-task=6" in step
    assert "SRUN_CPUS_PER_TASK" in Path("hpc_router/cluster/batch.sh").read_text()


def test_replicas_of_one_shape_share_a_job_up_to_the_given_number() -> None:
    asked = [request(f"math-{n}.g1", gpus=1) for n in range(3)] + [request("law-0.g1", gpus=2)]
    made = jobs(request("router-0.g1"), *asked, replicas_per_job=2)
    shapes = [job.replicas for job in made]
    assert shapes == [("router-0.g1",), ("math-0.g1", "math-1.g1"), ("math-2.g1",), ("law-0.g1",)]
    shared = made[1]
    assert shared.options()["gres"] == "gpu:2"
    assert shared.options()["ntasks-per-node"] == 2
    assert shared.script().count("--exact") == 2
    assert shared.script().count("--gres=gpu:1") == 2


def test_ranks_over_several_nodes_have_a_job_of_their_own() -> None:
    made = jobs(request("big-0.g1", nodes=2), request("big-1.g1", nodes=2), replicas_per_job=4)
    assert [job.replicas for job in made] == [("big-0.g1",), ("big-1.g1",)]


def test_a_step_inside_an_allocation_names_it_and_has_no_header() -> None:
    (job,) = jobs(request(memory_gb=4))
    text = replace(job, jobid="17").script()
    assert "#SBATCH" not in text
    for word in ("--jobid=17", "--exact", "--mem=4096M", "--gres=none"):
        assert word in text


def test_paths_may_hold_spaces_and_percent_signs() -> None:
    (job,) = batch_jobs(RunDir(Path("/runs/my run 100%")), Deployment(), [request()])
    assert "#SBATCH --output='/runs/my run 100%%/jobs/math-0.g1/%j_batch.log'" in job.script().splitlines()


def run_script(
    tmp_path: Path, *requests: JobRequest, srun: str = 'shift $(($# - 5)); exec "$@"', **cluster: object
) -> int:
    """Run the script with a stand-in for srun on the PATH; its exit status."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "srun").write_text(f"#!/bin/bash\n{srun}\n")
    (tools / "srun").chmod(0o755)
    run = RunDir(tmp_path / "run")
    for each in requests:
        (run.jobs / each.replica).mkdir(parents=True)
    deployment = Deployment(cluster=ClusterConfig(kind="slurm", **cluster))  # type: ignore[arg-type]
    (job,) = batch_jobs(run, deployment, requests)
    text = replace(job, command=("/bin/true", "2", "3", "4", "5")).script()
    path = tmp_path / "job.sh"
    path.write_text(text)
    return subprocess.run(
        ["/bin/bash", str(path)], env={"PATH": f"{tools}:/usr/bin:/bin"}, check=False, capture_output=True
    ).returncode


def ended(tmp_path: Path, replica: str = "math-0.g1") -> dict[str, object]:
    value = json.loads((tmp_path / "run" / "jobs" / replica / "ended.json").read_text())
    assert isinstance(value, dict)
    return value


def test_a_step_that_ends_leaves_its_status(tmp_path: Path) -> None:
    assert run_script(tmp_path, request(), srun="exit 7") == 7
    assert ended(tmp_path)["status"] == 7
    assert ended(tmp_path)["message"] is None


def test_each_of_several_steps_leaves_its_own(tmp_path: Path) -> None:
    requests = [request("math-0.g1"), request("math-1.g1")]
    srun = "[[ $HPC_ROUTER_REPLICA == math-0.g1 ]] || exit 3"
    assert run_script(tmp_path, *requests, srun=srun, replicas_per_job=2) == 3
    assert ended(tmp_path, "math-0.g1")["status"] == 0
    assert ended(tmp_path, "math-1.g1")["status"] == 3


@pytest.mark.parametrize("line", ["false", "no_such_program", 'cd "/no/such \\ folder" # with a comment', "exit 4"])
def test_a_setup_line_that_fails_ends_the_job_and_is_named(tmp_path: Path, line: str) -> None:
    assert run_script(tmp_path, request(), setup=["true", line]) != 0
    record = ended(tmp_path)
    assert record["status"] != 0
    if not line.startswith("exit"):
        assert str(record["message"]).startswith("cluster.setup[1] failed on ")


def test_setup_lines_and_environment_reach_the_steps(tmp_path: Path) -> None:
    srun = '[[ $GREETING == "hello there" && $FROM_SETUP == yes ]]'
    status = run_script(
        tmp_path, request(), srun=srun, env={"GREETING": "hello there"}, setup=["export FROM_SETUP=yes"]
    )
    assert status == 0


def test_sigterm_to_the_script_does_not_lose_the_record(tmp_path: Path) -> None:
    """Slurm signals the batch script together with its steps."""
    status = run_script(tmp_path, request(), srun='kill -TERM "$PPID" "$(ps -o ppid= -p "$PPID")"; exit 5')
    assert status == 5
    assert ended(tmp_path)["status"] == 5
