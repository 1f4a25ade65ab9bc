"""A site's dependency counts as met as soon as one job of the run has started with it."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from hpc_router.cluster.control_loop.job_requests import job_requests
from hpc_router.cluster.launchers.slurm.sbatch import batch_jobs, without_job_dependencies
from hpc_router.cluster.launchers.slurm.squeue import QueuedJob, QueueSnapshot
from hpc_router.config.schema import ClusterConfig, Deployment, ExpertConfig, ResourceConfig, RouterConfig
from hpc_router.state.atomic_files import replace_json
from hpc_router.state.job_records import Ended, JobDir, JobInfo, Process, Runner
from hpc_router.state.run_directory import RunDir

WANTED = "afterok:17"


def deployment(**own: str) -> Deployment:
    """A deployment. `own`: dependencies of experts that differ from the cluster's."""
    experts = {
        name: ExpertConfig(model="m", resources=ResourceConfig(sbatch={"dependency": own[name]} if name in own else {}))
        for name in ("math", "code")
    }
    cluster = ClusterConfig(kind="slurm", sbatch={"dependency": WANTED})
    return Deployment(experts=experts, cluster=cluster, router=RouterConfig())


def submitted(run: RunDir, replica: str, *, runner: Runner = Runner.SLURM) -> JobDir:
    job = JobDir(run, replica)
    job.claim()
    job.write(JobInfo("20", "login1", runner=runner))
    return job


def dependency_of(run: RunDir, replica: str, **own: str) -> str | None:
    """The dependency in the batch script of the replica's job."""
    (job,) = batch_jobs(run, deployment(**own), job_requests(run, deployment(**own), [replica], exclude=()))
    found: str | None = job.options().get("dependency")
    return found


def test_the_dependency_is_submitted_until_a_job_has_started(run: RunDir) -> None:
    assert dependency_of(run, "math-0.g1") == WANTED
    job = submitted(run, "math-0.g1")
    assert dependency_of(run, "math-1.g1") == WANTED, "the first one waits"
    job.write(Process(1, 1, "n1"))
    for replica in ("math-0.g2", "math-1.g1", "code-0.g1", "router-0.g2"):
        assert dependency_of(run, replica) is None


@pytest.mark.parametrize("state", ["PENDING", "CANCELLED"])
@pytest.mark.parametrize("reason", ["Resources", "Priority", "Dependency", "DependencyNeverSatisfied", None])
def test_a_job_that_waits_for_something_else_has_met_it(run: RunDir, state: str, reason: str | None) -> None:
    """Also after the job was cancelled in the queue. Without it, no replacement could be submitted once Slurm has
    forgotten the job that the dependency names."""
    submitted(run, "math-0.g1")
    replace_json(run.squeue_json, asdict(QueueSnapshot(0.0, {"20": QueuedJob(state=state, reason=reason)})))
    met = reason in ("Resources", "Priority")
    assert dependency_of(run, "math-0.g2") == (None if met else WANTED)


def test_a_job_whose_setup_failed_had_started(run: RunDir) -> None:
    submitted(run, "code-0.g1").write(Ended(1, 0.0, "cluster.setup[0] failed"))
    assert dependency_of(run, "math-0.g1") is None


def test_the_jobs_are_read_once_for_all_requests(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(4):
        submitted(run, f"math-{n}.g1")
    read: list[str] = []
    original = JobDir.info

    def info(job: JobDir) -> JobInfo | None:
        read.append(job.replica)
        return original(job)

    monkeypatch.setattr(JobDir, "info", info)
    wanted = [f"math-{n}.g2" for n in range(8)]
    assert len(job_requests(run, deployment(code="afterok:18"), [*wanted, "code-0.g1"], exclude=())) == 9
    assert sorted(read) == [f"math-{n}.g1" for n in range(4)]


@pytest.mark.parametrize("replica", ["code-0.g1", "law-0.g1"])
def test_a_job_with_another_dependency_does_not_count(run: RunDir, replica: str) -> None:
    """Neither does a job of an expert that was removed and whose record names no dependency."""
    submitted(run, replica).write(Process(1, 1, "n1"))
    assert dependency_of(run, "math-0.g1", code="afterok:18") == WANTED


def test_a_router_on_the_login_node_does_not_count(run: RunDir) -> None:
    submitted(run, "router-0.g1", runner=Runner.PROCESS).write(Process(1, 1, "login1"))
    assert dependency_of(run, "math-0.g1") == WANTED


def test_a_run_without_a_directory_has_met_no_dependency(tmp_path: Path) -> None:
    assert dependency_of(RunDir(tmp_path / "none"), "math-0.g1") == WANTED


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ("afterok:1:2,singleton", "singleton"),
        ("singleton", "singleton"),
        ("expand:7", None),  # in the config of a run that an earlier version started
        ("aftercorr:1+10,singleton,afterburstbuffer:3", "singleton"),
        (" AfterAny:1 , Singleton", " Singleton"),
    ],
)
def test_only_parts_that_name_no_job_stay(given: str, left: str | None) -> None:
    assert without_job_dependencies(given) == left


def test_a_changed_dependency_was_not_met_by_jobs_of_the_earlier_config(run: RunDir) -> None:
    """Nor does a job that left the earlier one out. Changed back, the earlier one is still met."""
    for replica in ("math-0.g1", "math-0.g2"):
        job = JobDir(run, replica)
        job.claim()
        job.write(JobInfo("20", "login1", runner=Runner.SLURM, dependency=WANTED))
        job.write(Process(1, 1, "n1"))
    changed = {"math": "afterok:18", "code": "afterok:18"}
    assert dependency_of(run, "math-0.g3", **changed) == "afterok:18"
    assert dependency_of(run, "code-0.g1", **changed) == "afterok:18"
    assert dependency_of(run, "math-0.g3") is None


def test_an_added_dependency_was_not_met_by_jobs_without_one(run: RunDir) -> None:
    job = JobDir(run, "math-0.g1")
    job.claim()
    job.write(JobInfo("20", "login1", runner=Runner.SLURM, dependency=""))
    job.write(Process(1, 1, "n1"))
    assert dependency_of(run, "math-0.g2") == WANTED


def test_a_job_knows_the_configured_dependency_even_if_it_is_left_out(run: RunDir) -> None:
    requests = job_requests(run, deployment(), ["math-0.g1"], exclude=())
    for met in (False, True):
        (job,) = batch_jobs(run, deployment(), [replace(each, dependency_met=met) for each in requests])
        assert (job.dependency, job.options().get("dependency")) == (WANTED, None if met else WANTED)
