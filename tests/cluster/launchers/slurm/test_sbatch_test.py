"""Jobs are tested with Slurm before anything is submitted, each kind once."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hpc_router.cluster.control_loop.job_requests import job_requests
from hpc_router.cluster.launchers.slurm import sbatch_test
from hpc_router.cluster.launchers.slurm.sbatch import BatchJob, batch_jobs
from hpc_router.cluster.launchers.slurm.sbatch_test import MAX_TESTED, check_submission
from hpc_router.config.schema import ClusterConfig, Deployment, EngineConfig, ExpertConfig, ResourceConfig
from hpc_router.state.run_directory import RunDir
from tests.cluster.programs import Programs

SIM = ExpertConfig(model="m", engine=EngineConfig(kind="sim"))


def deployment(*cpus: int, **cluster: Any) -> Deployment:
    """A deployment with an expert of two replicas for each number of CPUs."""
    experts = {f"e{n}": replace(SIM, replicas=2, resources=ResourceConfig(cpus=c)) for n, c in enumerate(cpus)}
    return replace(Deployment(experts=experts), cluster=ClusterConfig(kind="slurm", **cluster))


def jobs_of(made: Deployment) -> list[BatchJob]:
    run = RunDir(Path("<run>"))
    replicas = ["router-0.g1", *(f"{name}-{n}.g1" for name in made.experts for n in range(2))]
    return batch_jobs(run, made, job_requests(run, made, replicas, exclude=()))


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    return Programs(tmp_path / "bin", monkeypatch)


def test_equal_jobs_are_tested_once(programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test uses the script that will be submitted, and ignores sbatch options in the user's environment."""
    monkeypatch.setenv("SBATCH_PARTITION", "other")
    programs.add("sbatch", f'echo "$SBATCH_PARTITION" >>{programs.folder}/seen; cat >>{programs.folder}/script')
    made = deployment(1, 1, 2)
    jobs = jobs_of(made)
    assert check_submission(made, jobs) == ([], [])
    assert programs.calls("sbatch") == ["--test-only"] * 2
    assert (programs.folder / "seen").read_text() == "\n\n"
    assert (programs.folder / "script").read_text().startswith(jobs[0].script())


def test_a_refusal_names_all_experts_that_it_is_about(programs: Programs) -> None:
    programs.add("sbatch", "cat >/dev/null; echo 'sbatch: error: CPU count specification invalid' >&2; exit 1")
    made = deployment(4, 4, account="mine")
    made.router.resources.cpus = 4
    faults, warnings = check_submission(made, jobs_of(made))
    assert [fault.partition(":")[0] for fault in faults] == [
        "router.resources.cpus=4",
        "experts.e0.resources.cpus=4",
        "experts.e1.resources.cpus=4",
    ]
    assert warnings == []
    programs.add("sbatch", "cat >/dev/null; echo 'allocation failure: Invalid account specified' >&2; exit 1")
    faults, _ = check_submission(made, jobs_of(made))
    assert [fault.partition(":")[0] for fault in faults] == ["cluster.account=mine"]


def test_an_sbatch_that_cannot_run_is_a_warning(programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    programs.add("sbatch", "cat >/dev/null; echo 'Unable to contact slurm controller (connect failure)' >&2; exit 1")
    made = deployment()
    faults, warnings = check_submission(made, jobs_of(made))
    assert faults == []
    assert warnings[0].startswith("router-0.g1: Slurm cannot take it now: Unable to contact slurm controller")
    monkeypatch.setattr(sbatch_test, "TIMEOUT_S", 2.0)
    for script, said in {"": "", "echo x; printf 'a\\nretrying \\377\\n' >&2; ": ": retrying \ufffd"}.items():
        programs.add("sbatch", f"{script}exec sleep 60")
        warning = f"could not be checked with Slurm: sbatch gave no answer within 2 s{said}"
        assert check_submission(made, jobs_of(made)) == ([], [warning])
    monkeypatch.setenv("PATH", "/nowhere")
    assert check_submission(made, jobs_of(made)) == (
        [],
        ["could not be checked with Slurm: sbatch is not installed here"],
    )


def test_the_number_of_tested_jobs_is_limited(programs: Programs) -> None:
    programs.add("sbatch", "cat >/dev/null")
    made = deployment(*range(2, MAX_TESTED + 2))
    assert check_submission(made, jobs_of(made)) == (
        [],
        [f"only {MAX_TESTED} of {MAX_TESTED + 1} different jobs were tested with Slurm"],
    )
    assert len(programs.calls("sbatch")) == MAX_TESTED
