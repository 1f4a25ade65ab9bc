"""Tests with `sbatch --test-only` whether Slurm would accept the jobs, with the scripts that `up` submits.

Only the controller knows accounts, limits and a site's own rules. Each test costs it a scheduling pass, so equal jobs
are tested once. A refusal is a fault; if sbatch cannot be run, that is a warning.
"""

from collections.abc import Sequence
from typing import Final

from hpc_router.cluster.launchers.commands import SlurmCommandError, run_slurm_command
from hpc_router.cluster.launchers.slurm.sbatch import BatchJob
from hpc_router.cluster.launchers.slurm.submit_errors import explain, is_temporary
from hpc_router.config.schema import Deployment
from hpc_router.state.registry import split_replica

TIMEOUT_S: Final = 30.0
MAX_TESTED: Final = 8
"""Maximum number of different jobs that are tested."""
NOT_CHECKED: Final = "could not be checked with Slurm: "
_NAMES: Final = ("job-name", "output", "chdir")
"""Options in which otherwise equal jobs differ."""


def check_submission(deployment: Deployment, jobs: Sequence[BatchJob]) -> tuple[list[str], list[str]]:
    """Tests these jobs with `sbatch --test-only`. Returns a fault for each job that Slurm refuses, and warnings about
    jobs that were not tested or that Slurm may accept later. Each is one line."""
    faults: dict[str, None] = {}
    shapes = _group_by_shape(jobs)
    warnings = (
        [f"only {MAX_TESTED} of {len(shapes)} different jobs were tested with Slurm"]
        if len(shapes) > MAX_TESTED
        else []
    )
    for alike in shapes[:MAX_TESTED]:
        try:
            error_text = _refusal(alike[0].script())
        except SlurmCommandError as error:
            return list(faults), [*warnings, f"{NOT_CHECKED}{error}"]
        if error_text is None:
            continue
        experts = dict.fromkeys(split_replica(replica)[0] for job in alike for replica in job.replicas)
        texts = [explain(error_text, deployment, expert) for expert in experts]
        if is_temporary(error_text):
            warnings.append(f"{alike[0].replicas[0]}: {texts[0]}")
        else:
            faults |= dict.fromkeys(texts)
    return list(faults), list(dict.fromkeys(warnings))


def _group_by_shape(jobs: Sequence[BatchJob]) -> list[list[BatchJob]]:
    found: dict[str, list[BatchJob]] = {}
    for job in jobs:
        shape = repr(sorted((name, value) for name, value in job.options().items() if name not in _NAMES))
        found.setdefault(shape, []).append(job)
    return list(found.values())


def _refusal(script: str) -> str | None:
    """Returns why sbatch refuses the script; None if it would accept it. Raises SlurmCommandError if sbatch cannot be
    run."""
    try:
        run_slurm_command(["sbatch", "--test-only"], stdin=script, timeout_s=TIMEOUT_S)
    except SlurmCommandError as error:
        if error.output is None:
            raise
        return error.output
    return None
