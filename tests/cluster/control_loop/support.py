"""Attempts as the control loop observes them: serving, waiting and ended."""

from dataclasses import replace

from hpc_router.cluster.control_loop.handover import WARNING_EARLY_S, HandoverPolicy
from hpc_router.cluster.control_loop.slots import Attempt, Slot
from hpc_router.cluster.launchers.interface import JobReport, JobState
from hpc_router.state.job_records import Exit, FailureReason, JobPhase, JobProgress, Runner
from hpc_router.state.registry import State

BEGAN = 100_000.0
LIFE_S = 10_000.0
MATH = Slot("math", "0")
POLICY = HandoverPolicy("overlap", margin_s=60, warn_s=90, drain_s=30)
LEAD_S = 10 + 50 + 90 + WARNING_EARLY_S + 60
"""Queue, load, warning, margin of the jobs below."""
DUE = BEGAN + LIFE_S - LEAD_S


def serving(generation: int = 1, *, slot: Slot = MATH, expires_at: float | None = BEGAN + LIFE_S) -> Attempt:
    """Ready at BEGAN, after 10 s in the queue and 50 s of loading."""
    return Attempt(
        slot=slot,
        generation=generation,
        report=JobReport(JobState.RUNNING),
        claimed_at=BEGAN - 60,
        submitted_at=BEGAN - 60,
        started_at=BEGAN - 50,
        progress=JobProgress(JobPhase.READY, ready_at=BEGAN),
        registered=State.READY,
        job_id=f"{slot}.{generation}",
        runner=Runner.SLURM,
        expires_at=expires_at,
    )


def waiting(generation: int, *, slot: Slot = MATH, reason: str | None = None, after: str | None = None) -> Attempt:
    report = JobReport(JobState.PENDING, pending_reason=reason)
    return replace(
        serving(generation, slot=slot, expires_at=None),
        report=report, progress=None, registered=None, started_at=None, after=after,
    )  # fmt: skip


def ended(generation: int, reason: FailureReason, *, at: float) -> Attempt:
    exited = Exit(ok=reason is FailureReason.DRAINED, reason=reason, message="it ended", at=at)
    report = JobReport(JobState.ENDED)
    return replace(waiting(generation), report=report, exit=exited)
