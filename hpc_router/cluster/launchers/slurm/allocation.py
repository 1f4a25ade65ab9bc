"""Runs replicas as steps inside one Slurm job that exists already: the `sbatch` script or `salloc` that runs `up`.

An `srun` on this host starts each replica in that job, from the same script that a batch job would have.
`SlurmLauncher` then observes and ends the replica. The allocation belongs to the user: this module never ends it, and
its end ends every step.
"""

import os
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import hpc_router
from hpc_router.cluster.launchers.commands import last_error_line
from hpc_router.cluster.launchers.interface import JobRequest
from hpc_router.cluster.launchers.slurm.sbatch import BatchJob, python_of
from hpc_router.cluster.launchers.submitit.submission import record_refusals
from hpc_router.config.schema import Deployment
from hpc_router.errors import LaunchError
from hpc_router.net.job_environment import current_job_id, without_job_variables
from hpc_router.state.atomic_files import replace_text
from hpc_router.state.job_records import JobDir, JobInfo, Runner
from hpc_router.state.run_directory import RunDir, private_umask

NO_JOB: Final = "<job>"
"""Placeholder in a plan for the id of the job in which `up` will run."""


@dataclass(frozen=True)
class AllocationLauncher:
    """Starts replicas as steps of the job in which this process runs."""

    run: RunDir
    deployment: Deployment

    def jobs(self, requests: Sequence[JobRequest]) -> list[BatchJob]:
        """Returns the steps that `submit` starts for these requests."""
        return [self._step(request, current_job_id() or NO_JOB) for request in requests]

    def submit(self, requests: Sequence[JobRequest]) -> list[str]:
        if current_job_id() is None:
            raise LaunchError("cluster=allocation starts steps inside a Slurm job: run this in an sbatch or salloc")
        claimed = [request for request in requests if JobDir(self.run, request.replica).claim()]
        errors: dict[str, str | None] = {}
        for step in self.jobs(claimed):
            try:
                _start(step)
            except (OSError, subprocess.SubprocessError) as error:
                (step.folder / "job.json").unlink(missing_ok=True)
                errors[step.name] = last_error_line(error)
        record_refusals(self.run, errors)
        return [request.replica for request in claimed]

    def _step(self, request: JobRequest, job_id: str) -> BatchJob:
        cluster = self.deployment.cluster
        entry = (python_of(cluster), "-m", "hpc_router.cluster.launchers.job_entry")
        arguments = (str(self.run.path), request.replica, hpc_router.__version__, "--", *request.argv)
        return BatchJob(self.run, (request,), cluster, request.replica, (*entry, *arguments), job_id)


def _start(step: BatchJob) -> None:
    assert step.jobid is not None
    (request,) = step.requests
    job, script = JobDir(step.run, request.replica), step.folder / "step.sh"
    replace_text(script, step.script())
    host = socket.gethostname()
    job.write(
        JobInfo(
            job_id=step.jobid, host=host, argv=request.argv, runner=Runner.STEP, shared=True, revision=request.revision
        )
    )
    with private_umask(), (step.folder / f"{step.jobid}_batch.log").open("ab") as log:
        subprocess.run(
            ["setsid", "--fork", "/bin/bash", str(script)],
            env=without_job_variables(os.environ),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            check=True,
        )
