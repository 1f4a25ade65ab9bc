"""The interface between the control loop and the place that runs jobs: this machine, Slurm, or one Slurm job.

A launcher submits jobs, reports their states and ends them; it decides nothing. It reads and writes only `jobs/`, and
must not know experts, prompts or HTTP.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Protocol

from hpc_router.config.schema import ResourceConfig
from hpc_router.state.job_records import Exit
from hpc_router.state.registry import split_replica

ROUTER: Final = "router"
"""Stands in place of an expert's name in the names of routers: `router-0.g1`."""


class JobState(StrEnum):
    """State of a claimed job, as its launcher reports it."""

    PENDING = "pending"  # claimed or queued, no process yet
    RUNNING = "running"
    ENDING = "ending"  # its service has ended; it may still hold resources
    ENDED = "ended"
    UNKNOWN = "unknown"  # on another host, which cannot be observed from here


@dataclass(frozen=True, slots=True)
class JobReport:
    """The state of one claimed job; values that are not known are None. Times are Unix seconds.

    `pending_reason`: Slurm's reason why the job waits (`Resources`). `starts_at`: Slurm's estimate of its start. `end`:
    how it ended, if the job itself left no exit record.
    """

    state: JobState
    node: str | None = None
    native_state: str | None = None  # Slurm's name of the state, such as COMPLETING
    pending_reason: str | None = None
    starts_at: float | None = None
    ends_at: float | None = None
    end: Exit | None = None


@dataclass(frozen=True, slots=True)
class JobRequest:
    """The job of one replica: its command and its resources. `after`: id of the job for whose end this job waits.
    `dependency_met`: whether an earlier job with the same `sbatch.dependency` has started. `exclude`: nodes on which
    this job may not start. `revision`: digest of the config values that this job reads."""

    replica: str
    argv: tuple[str, ...]
    resources: ResourceConfig = field(default_factory=ResourceConfig)
    after: str | None = None
    dependency_met: bool = False
    exclude: tuple[str, ...] = ()
    revision: str | None = None

    @property
    def is_router(self) -> bool:
        return split_replica(self.replica)[0] == ROUTER


class Launcher(Protocol):
    """Submits, observes and ends jobs. Methods take several jobs at once, because each call costs a child process or a
    query to the Slurm controller."""

    def submit(self, requests: Sequence[JobRequest]) -> list[str]:
        """Claims the replicas of these requests and submits their jobs. Returns the replicas that this call claimed;
        another process had claimed the others.

        If Slurm refuses a job, writes an exit record into its folder, and raises LaunchError when all were tried.
        """

    def observe(self, replicas: Iterable[str], *, fresh: bool = False) -> Mapping[str, JobReport]:
        """Returns the state of each replica's job. `fresh`: whether to query the Slurm controller now; if not, an
        answer of the last `cluster.ask_s` seconds is used."""

    def release(self, requests: Sequence[JobRequest]) -> None:
        """Lets these jobs, which wait in the queue for the end of another job, start now. A failure is only logged."""

    def cancel(self, replicas: Iterable[str]) -> None:
        """Sends SIGTERM to these jobs, which then drain and end."""

    def kill(self, replicas: Iterable[str]) -> None:
        """Sends SIGKILL to the processes of these replicas. Other replicas in the same job are not affected."""

    def remaining(self, replicas: Iterable[str]) -> list[str]:
        """Queries Slurm now, and returns the ids of those jobs of these replicas that hold resources."""

    def update_exclusions(self, requests: Sequence[JobRequest]) -> list[str]:
        """Tells Slurm for each job in the queue the excluded nodes of its request. Returns the replicas whose jobs have
        left the queue. Raises LaunchError if Slurm does not answer."""

    def trouble(self) -> str | None:
        """Returns why the last query to the Slurm controller failed; None if it succeeded."""
