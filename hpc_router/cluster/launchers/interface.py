"""The seam between the control loop and whatever runs jobs: this machine, Slurm, or one Slurm job.

A launcher submits, tells which jobs live, and stops them; it decides nothing. It reads and writes only `jobs/`, and it
knows nothing of experts, prompts or HTTP.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Protocol

from hpc_router.config.schema import ResourceConfig
from hpc_router.state.job_records import Exit
from hpc_router.state.registry import split_replica

ROUTER: Final = "router"
"""Stands where an expert's name does, in the router's replicas."""


class JobState(StrEnum):
    """What is known of a claimed job, from the place that runs it."""

    PENDING = "pending"  # claimed or queued, no process yet
    RUNNING = "running"
    ENDING = "ending"  # it serves no more, and may still hold its resources
    ENDED = "ended"
    UNKNOWN = "unknown"  # it cannot be asked from here


@dataclass(frozen=True, slots=True)
class JobReport:
    """One claimed job as the place that runs it tells it; unknown is None. Times are Unix seconds.

    `pending`: Slurm's own word for why it waits (`Resources`); `starts_at`: its estimate. `end`: how it ended, for a
    job that said nothing itself.
    """

    state: JobState
    node: str | None = None
    native_state: str | None = None  # the place's own word for the state, such as COMPLETING
    pending_reason: str | None = None
    starts_at: float | None = None
    ends_at: float | None = None
    end: Exit | None = None


@dataclass(frozen=True, slots=True)
class JobRequest:
    """One job as `plan` prints it: the replica, what it runs and what it asks for. `after`: the job whose end it is to
    wait for. `dependency_met`: an earlier job with the same `sbatch.dependency` has begun. `exclude`: nodes that
    were drained."""

    replica: str
    argv: tuple[str, ...]
    resources: ResourceConfig = field(default_factory=ResourceConfig)
    after: str | None = None
    dependency_met: bool = False
    exclude: tuple[str, ...] = ()

    @property
    def is_router(self) -> bool:
        return split_replica(self.replica)[0] == ROUTER


class Launcher(Protocol):
    """Every method takes whole batches: one call costs one child process or one question to the controller."""

    def submit(self, requests: Sequence[JobRequest]) -> list[str]:
        """Claim and submit; the replicas that this call submitted, without those that another process had claimed.

        Raises LaunchError for a refusal, after writing an exit record into each refused job's folder.
        """

    def observe(self, replicas: Iterable[str], *, fresh: bool = False) -> Mapping[str, JobReport]:
        """`fresh`: ask the controller now; else what it said within `cluster.ask_s` stands."""

    def cancel(self, replicas: Iterable[str]) -> None:
        """Ask these jobs to end (SIGTERM: they drain)."""

    def kill(self, replicas: Iterable[str]) -> None:
        """End exactly these jobs' processes now."""

    def remaining(self, replicas: Iterable[str]) -> list[str]:
        """The ids of jobs that still hold something, asked now: for whoever wants to see that nothing is left."""
