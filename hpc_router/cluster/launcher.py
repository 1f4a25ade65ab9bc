"""The seam between the control loop and whatever runs jobs: this machine now, Slurm next.

A launcher submits, tells which jobs live, and stops them; it decides nothing. It reads and writes only `jobs/`, and it
knows nothing of experts, prompts or HTTP.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from hpc_router.config import ResourceConfig


class JobState(StrEnum):
    """What is known of a claimed job, from the place that runs it."""

    PENDING = "pending"  # claimed or queued, no process yet
    RUNNING = "running"
    ENDED = "ended"
    UNKNOWN = "unknown"  # it cannot be asked from here


@dataclass(frozen=True, slots=True)
class JobRequest:
    """One job as `plan` prints it: the replica, what it runs and what it asks for."""

    replica: str
    argv: tuple[str, ...]
    resources: ResourceConfig = field(default_factory=ResourceConfig)


class Launcher(Protocol):
    """Every method takes whole batches: one call costs one child process or one question to the controller."""

    def submit(self, requests: Sequence[JobRequest]) -> list[str]:
        """Claim and submit; the replicas that this call submitted, without those that somebody else has claimed.

        Raises LaunchError for a refusal, after an exit record was left in each refused job's folder.
        """

    def observe(self, replicas: Iterable[str]) -> Mapping[str, JobState]: ...

    def cancel(self, replicas: Iterable[str]) -> None:
        """Ask these jobs to end (SIGTERM: they drain)."""

    def kill(self, replicas: Iterable[str]) -> None:
        """End exactly these jobs' processes now."""
