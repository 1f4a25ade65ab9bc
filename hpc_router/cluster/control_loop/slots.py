"""Slots and attempts: the observed state from which the control loop decides.

A slot is the place of one replica of an expert (`math-0`) or of the router (`router-0`). A generation is one job in a
slot, and an attempt is the known state of one generation. The control loop manages slots whose name is a number. A slot
with a letter was started by hand (`math-h0`) or is an external endpoint (`math-x0`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from hpc_router.cluster.launchers.interface import ROUTER, JobReport, JobState
from hpc_router.state.job_records import Exit, JobPhase, JobProgress, Runner, Stop
from hpc_router.state.registry import State, replica_name


class Slot(NamedTuple):
    """The place of one replica. `name`: a number, with a letter before it if the control loop does not manage the
    slot."""

    expert: str
    name: str

    def __str__(self) -> str:
        return f"{self.expert}-{self.name}"

    @property
    def managed(self) -> bool:
        """Returns whether the control loop submits and ends the jobs of this slot."""
        return self.name.isdecimal()

    def replica(self, generation: int) -> str:
        return replica_name(self.expert, self.name, generation)


ROUTER_SLOT: Final = Slot(ROUTER, "0")


CLAIM_S: Final = 60.0
"""Time in seconds after which a claim without a job is abandoned."""
NO_STOP: Final = Stop()
_NOT_LIVE: Final = (JobState.ENDING, JobState.ENDED)


@dataclass(frozen=True, slots=True)
class Attempt:
    """The known state of one generation of a slot. `submitted`: whether there is a job and not only a claim.
    `submitting`: whether the process that submits the job is alive. `hung`: whether the job runs but renews no lease
    and answers no call. `after`: id of the job for whose end this job had to wait. `expires_at`: end of the job's
    walltime. `revision`: revision of the config with which it was submitted. Times are Unix seconds.

    `live`: whether it serves or may serve later. `live` and `replica` are computed once, because a run has thousands of
    attempts and each pass looks at all of them.
    """

    slot: Slot
    generation: int
    report: JobReport
    claimed_at: float
    submitted: bool = True
    exit: Exit | None = None
    progress: JobProgress | None = None
    stop: Stop = NO_STOP
    registered: State | None = None
    job_id: str | None = None
    node: str | None = None
    hung: bool = False
    submitting: bool = False
    runner: Runner | None = None
    submitted_at: float | None = None
    started_at: float | None = None
    after: str | None = None
    expires_at: float | None = None
    revision: str | None = None
    replica: str = field(init=False)
    live: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "replica", self.slot.replica(self.generation))
        object.__setattr__(self, "live", self.submitted and self.report.state not in _NOT_LIVE)

    @property
    def job(self) -> JobState:
        return self.report.state

    @property
    def holds_resources(self) -> bool:
        """Returns whether the job may still hold resources."""
        return self.submitted and self.job is not JobState.ENDED

    @property
    def ready_at(self) -> float | None:
        """Returns when the attempt was first ready."""
        return self.progress.ready_at if self.progress is not None else None

    @property
    def draining_at(self) -> float | None:
        """Returns when the drain began, even if a process other than the control loop started it; None if there is no
        drain."""
        return self.progress.at if self.progress is not None and self.progress.phase is JobPhase.DRAINING else None

    @property
    def stop_requested(self) -> bool:
        return self.stop != NO_STOP

    @property
    def ready(self) -> bool:
        return self.live and self.registered is State.READY and not self.hung


Observed = Mapping[Slot, tuple[Attempt, ...]]
"""The attempts of each slot, oldest generation first."""


def all_attempts(observed: Observed) -> list[Attempt]:
    """Returns the attempts of all slots."""
    return [attempt for attempts in observed.values() for attempt in attempts]
