"""One launcher for a run, which passes each job to the launcher of the place that runs it.

One run may have jobs in several places: a deployment on Slurm may have its router on this machine, and services may be
started by hand, here or in a batch job of the user.
"""

import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from hpc_router.cluster.launchers.interface import JobReport, JobRequest, JobState, Launcher
from hpc_router.cluster.launchers.local import LocalLauncher
from hpc_router.cluster.launchers.slurm.allocation import AllocationLauncher
from hpc_router.cluster.launchers.slurm.launcher import SlurmLauncher
from hpc_router.cluster.launchers.slurm.sbatch import BatchJob
from hpc_router.cluster.launchers.slurm.squeue import Queue
from hpc_router.config.schema import Deployment
from hpc_router.errors import ConfigError
from hpc_router.net.job_environment import current_job_id
from hpc_router.state.job_reader import JobReader
from hpc_router.state.job_records import Runner
from hpc_router.state.run_directory import RunDir

_Submitting = LocalLauncher | SlurmLauncher | AllocationLauncher


def check_reach(deployment: Deployment) -> None:
    """Raises ConfigError if jobs of this deployment cannot be submitted from this process."""
    kind, key = deployment.cluster.kind, "cluster.kind"
    if kind == "allocation" and current_job_id() is None:
        raise ConfigError(f"{key}=allocation starts steps inside a Slurm job: run this in an sbatch or salloc", key=key)
    if kind != "local" and shutil.which("srun" if kind == "allocation" else "sbatch") is None:
        raise ConfigError(f"{key}={kind}: Slurm's commands are not on the PATH here (valid here: local)", key=key)


@dataclass(frozen=True)
class Launchers:
    """Passes each job to its launcher. `submitting`: function that returns the launcher for a new request. `running`:
    for each kind of runner, the launcher that observes and ends its jobs."""

    run: RunDir
    submitting: Callable[[JobRequest], _Submitting]
    running: Mapping[Runner, Launcher]
    reader: JobReader
    slurm: SlurmLauncher | None = None

    def jobs(self, requests: Sequence[JobRequest]) -> list[BatchJob]:
        """Returns the Slurm jobs, or steps of one Slurm job, that `submit` starts for these requests. Leaves out
        requests for processes of this machine."""
        by_launcher = self._by_launcher(requests)
        return [
            j for launcher, own in by_launcher if not isinstance(launcher, LocalLauncher) for j in launcher.jobs(own)
        ]

    def submit(self, requests: Sequence[JobRequest]) -> list[str]:
        return [replica for launcher, own in self._by_launcher(requests) for replica in launcher.submit(own)]

    def _by_launcher(self, requests: Sequence[JobRequest]) -> list[tuple[_Submitting, list[JobRequest]]]:
        groups: dict[int, tuple[_Submitting, list[JobRequest]]] = {}
        for request in requests:
            launcher = self.submitting(request)
            groups.setdefault(id(launcher), (launcher, []))[1].append(request)
        return list(groups.values())

    def observe(self, replicas: Iterable[str], *, fresh: bool = False) -> Mapping[str, JobReport]:
        reports = dict.fromkeys(replicas, JobReport(JobState.PENDING))
        for launcher, names in self._by_runner(reports):
            reports.update(launcher.observe(names, fresh=fresh))
        return reports

    def release(self, requests: Sequence[JobRequest]) -> None:
        for launcher, names in self._by_runner([request.replica for request in requests]):
            launcher.release([request for request in requests if request.replica in names])

    def cancel(self, replicas: Iterable[str]) -> None:
        for launcher, names in self._by_runner(replicas):
            launcher.cancel(names)

    def kill(self, replicas: Iterable[str]) -> None:
        for launcher, names in self._by_runner(replicas):
            launcher.kill(names)

    def remaining(self, replicas: Iterable[str]) -> list[str]:
        names = list(replicas)
        return self.slurm.remaining(names) if self.slurm is not None else []

    def update_exclusions(self, requests: Sequence[JobRequest]) -> list[str]:
        return self.slurm.update_exclusions(requests) if self.slurm is not None else []

    def trouble(self) -> str | None:
        return self.slurm.trouble() if self.slurm is not None else None

    def _by_runner(self, replicas: Iterable[str]) -> list[tuple[Launcher, list[str]]]:
        """Returns each launcher with those of the replicas whose jobs it runs. Leaves out claims without a job."""
        names: dict[Runner, list[str]] = defaultdict(list)
        for replica in replicas:
            records = self.reader.read(replica)
            if records is not None and records.info is not None:
                names[records.info.runner].append(replica)
        return [(self.running[runner], replicas) for runner, replicas in names.items()]


def launcher_for(run: RunDir, deployment: Deployment, reader: JobReader | None = None) -> Launchers:
    """Returns the launcher of a run. `reader`: the caller's reader of job records, so that each record is read only
    once; None: a new reader is made."""
    cluster, reader = deployment.cluster, reader or JobReader(run)
    here = LocalLauncher(run, gpus=cluster.gpus or 0)
    queue = Queue(run, ask_s=cluster.ask_s)
    slurm = SlurmLauncher(run, deployment, queue, reader)
    steps = AllocationLauncher(run, deployment)
    kinds: Mapping[str, _Submitting] = {"local": here, "slurm": slurm, "allocation": steps}
    new = kinds[cluster.kind]
    return Launchers(
        run=run,
        submitting=lambda request: here if request.is_router and deployment.router.place == "here" else new,
        running={Runner.PROCESS: here, Runner.SLURM: slurm, Runner.STEP: slurm},
        reader=reader,
        slurm=slurm if cluster.kind != "local" else None,
    )
