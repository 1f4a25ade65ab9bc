"""Steps inside one Slurm job that somebody holds already: the job of an `sbatch` script or an `salloc` that runs `up`.

Each replica is an `srun` of its own into that job, started on this host by the same script that a batch job would be;
once started, `SlurmLauncher` looks after it.
The allocation is its owner's: nothing here ends it, and everything here ends with it.
"""

import os
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

import hpc_router
from hpc_router.cluster.launchers.commands import last_words
from hpc_router.cluster.launchers.interface import JobRequest
from hpc_router.cluster.launchers.slurm.sbatch import BatchJob, python_of
from hpc_router.cluster.launchers.submit import keep_refusals
from hpc_router.config.schema import Deployment
from hpc_router.errors import LaunchError
from hpc_router.net.job_environment import current_job_id, without_job_variables
from hpc_router.state.atomic_files import replace_text
from hpc_router.state.job_records import Exit, FailureReason, JobDir, JobInfo, Runner
from hpc_router.state.run_directory import RunDir, private_umask


@dataclass(frozen=True)
class AllocationLauncher:
    run: RunDir
    deployment: Deployment

    def submit(self, requests: Sequence[JobRequest]) -> list[str]:
        job_id = current_job_id()
        if job_id is None:
            raise LaunchError("cluster=allocation starts steps inside a Slurm job: run this in an sbatch or salloc")
        claimed = [request for request in requests if JobDir(self.run, request.replica).claim()]
        refused: dict[str, str | None] = {}
        for request in claimed:
            try:
                self._start(request, job_id)
            except (OSError, subprocess.SubprocessError) as error:
                (JobDir(self.run, request.replica).path / "job.json").unlink(missing_ok=True)
                refused[request.replica] = last_words(error)
        keep_refusals(self.run, refused, lambda _, said: Exit(ok=False, reason=FailureReason.CRASHED, message=said))
        return [request.replica for request in claimed]

    def _start(self, request: JobRequest, job_id: str) -> None:
        job, cluster = JobDir(self.run, request.replica), self.deployment.cluster
        command = (
            python_of(cluster),
            "-m",
            "hpc_router.cluster.launchers.job_entry",
            str(self.run.path),
            request.replica,
        )
        batch = BatchJob(
            run=self.run,
            requests=(request,),
            cluster=cluster,
            name=request.replica,
            command=(*command, hpc_router.__version__, "--", *request.argv),
            jobid=job_id,
        )
        script = job.path / "step.sh"
        replace_text(script, batch.script())
        job.write(JobInfo(job_id=job_id, host=socket.gethostname(), argv=request.argv, runner=Runner.STEP, shared=True))
        with private_umask(), (job.path / f"{job_id}_batch.log").open("ab") as log:
            subprocess.run(
                ["setsid", "--fork", "/bin/bash", str(script)],
                env=without_job_variables(os.environ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                check=True,
            )
