"""All the places where jobs of one run may live, as one launcher: each job is looked after by the one that runs it.

A deployment on Slurm may have its router on this machine, and a run may be joined by services that somebody started by
hand, here or in a batch job of their own.
"""

import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from hpc_router.cluster.launchers.interface import JobReport, JobRequest, JobState, Launcher, Submits
from hpc_router.cluster.launchers.local import LocalLauncher
from hpc_router.cluster.launchers.slurm.allocation import AllocationLauncher
from hpc_router.cluster.launchers.slurm.launcher import SlurmLauncher
from hpc_router.cluster.launchers.slurm.squeue import Queue
from hpc_router.config.schema import Deployment
from hpc_router.errors import ConfigError
from hpc_router.net.job_environment import current_job_id
from hpc_router.state.job_records import JobDir, Runner
from hpc_router.state.run_directory import RunDir


def launcher_for(run: RunDir, deployment: Deployment) -> Launcher:
    cluster = deployment.cluster
    here = LocalLauncher(run, gpus=cluster.gpus or 0)
    queue = Queue(run, ask_s=cluster.ask_s)
    slurm = SlurmLauncher(run, deployment, queue)
    steps = AllocationLauncher(run, deployment)
    kinds: Mapping[str, Submits] = {"local": here, "slurm": slurm, "allocation": steps}
    new = kinds[cluster.kind]
    return Launchers(
        run=run,
        submitting=lambda request: here if request.is_router and deployment.router.place == "here" else new,
        running={Runner.PROCESS: here, Runner.SLURM: slurm, Runner.STEP: slurm},
        slurm=slurm if cluster.kind != "local" else None,
    )


def check_reach(deployment: Deployment) -> None:
    """Whether jobs can be submitted from here at all. Raises ConfigError."""
    kind, key = deployment.cluster.kind, "cluster.kind"
    if kind == "allocation" and current_job_id() is None:
        raise ConfigError(f"{key}=allocation starts steps inside a Slurm job: run this in an sbatch or salloc", key=key)
    if kind != "local" and shutil.which("srun" if kind == "allocation" else "sbatch") is None:
        raise ConfigError(f"{key}={kind}: Slurm's commands are not on the PATH here (valid here: local)", key=key)


@dataclass(frozen=True)
class Launchers:
    """`submitting`: who gets a request; `running`: who looks after a job."""

    run: RunDir
    submitting: Callable[[JobRequest], Submits]
    running: Mapping[Runner, Launcher]
    slurm: SlurmLauncher | None = None

    def submit(self, requests: Sequence[JobRequest]) -> list[str]:
        batches: dict[int, list[JobRequest]] = defaultdict(list)
        launchers = {id(self.submitting(request)): self.submitting(request) for request in requests}
        for request in requests:
            batches[id(self.submitting(request))].append(request)
        return [replica for key, batch in batches.items() for replica in launchers[key].submit(batch)]

    def observe(self, replicas: Iterable[str], *, fresh: bool = False) -> Mapping[str, JobReport]:
        reports = dict.fromkeys(replicas, JobReport(JobState.PENDING))
        for launcher, names in self._by_runner(reports):
            reports.update(launcher.observe(names, fresh=fresh))
        return reports

    def cancel(self, replicas: Iterable[str]) -> None:
        for launcher, names in self._by_runner(replicas):
            launcher.cancel(names)

    def kill(self, replicas: Iterable[str]) -> None:
        for launcher, names in self._by_runner(replicas):
            launcher.kill(names)

    def remaining(self, replicas: Iterable[str]) -> list[str]:
        names = list(replicas)
        return self.slurm.remaining(names) if self.slurm is not None else []

    def _by_runner(self, replicas: Iterable[str]) -> list[tuple[Launcher, list[str]]]:
        """Those with a job; a claim alone belongs to nobody yet."""
        names: dict[Runner, list[str]] = defaultdict(list)
        for replica in replicas:
            info = JobDir(self.run, replica).info()
            if info is not None:
                names[info.runner].append(replica)
        return [(self.running[runner], replicas) for runner, replicas in names.items()]
