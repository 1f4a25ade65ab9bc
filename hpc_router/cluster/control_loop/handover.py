"""Computes when a job that nears its walltime must get a successor, so that the service outlives its jobs. Pure.

A handover is due at `expires_at - (queue + load + drain + margin)`. Queue and load times are the longest of the
expert's last MAX_SAMPLES jobs. The drain begins with Slurm's warning, which may come early. All replicas of one job
hand over together. Jobs of one expert that end at about the same time hand over one after the other: all but the last
hand over early, so that their successors end at different times. No job hands over in the first half of its life.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from operator import attrgetter
from typing import Final

from hpc_router.cluster.control_loop.slots import Attempt, Observed, Slot
from hpc_router.config.schema import HandoverMode
from hpc_router.state.job_records import Runner

MAX_SAMPLES: Final = 20
"""Number of an expert's most recent jobs from which its times are estimated."""
WARNING_EARLY_S: Final = 60.0
"""Slurm may send its warning up to this many seconds early (sbatch's manual, `--signal`)."""
MAX_LIFE_SHARE: Final = 0.5
"""Earliest time of a handover, as a share of the time from ready to the end of the walltime."""


@dataclass(frozen=True, slots=True)
class HandoverPolicy:
    """The rules by which the jobs of one expert hand over. `margin_s`: seconds by which a handover begins earlier than
    its expected duration requires. `warn_s`: seconds before the end of the walltime at which Slurm's warning makes a
    job drain. `drain_s`: time limit of the drain."""

    mode: HandoverMode = "none"
    margin_s: float = 60.0
    warn_s: float = 90.0
    drain_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Durations:
    """The measured times of one expert's jobs in seconds, oldest first. `queue_s`: from submission to start. `load_s`:
    from start to ready. `drain_s`: from the drain request to the end."""

    queue_s: Sequence[float] = ()
    load_s: Sequence[float] = ()
    drain_s: Sequence[float] = ()

    @property
    def until_ready_s(self) -> float:
        """Returns the expected seconds from submission to ready: the longest measured queue and load times."""
        return max(self.queue_s, default=0.0) + max(self.load_s, default=0.0)


def before_drain_s(policy: HandoverPolicy) -> float:
    """Returns how many seconds before the end of the walltime a job may begin to drain."""
    return max(policy.warn_s + WARNING_EARLY_S, policy.drain_s)


@dataclass(frozen=True, slots=True)
class Due:
    """The time of one replica's handover. `due_at`: when to submit its successor (Unix seconds). `drains_at`: when
    Slurm's warning will make the replica drain. `outdated`: whether the replica is replaced because its config has
    changed."""

    mode: HandoverMode
    due_at: float
    drains_at: float
    expires_at: float
    outdated: bool = False


@dataclass(slots=True)
class _Job:
    """The ready replicas of one job. `earliest_at`: time before which the job does not hand over. `spacing_s`: minimum
    time in seconds between its handover and the preceding handover."""

    attempts: list[Attempt] = field(default_factory=list)
    expires_at: float = 0.0
    earliest_at: float = 0.0
    due_at: float = 0.0
    spacing_s: float = 0.0

    @property
    def first_slot(self) -> Slot:
        return min(attempt.slot for attempt in self.attempts)


def served_until_ready(older: Attempt, successor: Attempt) -> bool:
    """Returns whether `older`, a job of the same slot, served until `successor` was ready, so that there was no gap."""
    ended_at = older.exit.at if older.exit is not None else None
    ends = [at for at in (older.stop.drain_at, older.stop.cancel_at, older.draining_at, ended_at) if at is not None]
    began_at, ready_at = older.ready_at, successor.ready_at
    if began_at is None or ready_at is None or older.hung:
        return False
    return began_at <= ready_at <= min(ends) if ends else older.live


def measured(observed: Observed) -> dict[str, Durations]:
    """Returns for each expert the measured times of its last MAX_SAMPLES jobs."""
    by_expert: defaultdict[str, list[Attempt]] = defaultdict(list)
    for slot, attempts in observed.items():
        by_expert[slot.expert].extend(attempts[-MAX_SAMPLES:])
    return {expert: _durations(attempts) for expert, attempts in by_expert.items()}


def schedule(
    observed: Observed, policies: Mapping[str, HandoverPolicy], durations: Mapping[str, Durations]
) -> dict[str, Due]:
    """Returns for each ready replica with a known walltime when it hands over. Leaves out replicas whose policy is not
    to hand over."""
    jobs: defaultdict[str, _Job] = defaultdict(_Job)
    for attempts in observed.values():
        for attempt in attempts:
            if not attempt.ready:
                continue
            policy = policies.get(attempt.slot.expert)
            timed = attempt.expires_at is not None and attempt.ready_at is not None
            handed_over = policy is not None and policy.mode != "none" and attempt.runner is Runner.SLURM
            if handed_over and timed:
                jobs[attempt.job_id or attempt.replica].attempts.append(attempt)
    by_experts: defaultdict[str, list[_Job]] = defaultdict(list)
    for job in jobs.values():
        _set_due(job, policies, durations)
        by_experts[job.first_slot.expert].append(job)
    for alike in by_experts.values():
        _stagger(alike)
    return {a.replica: _due(a, job, policies[a.slot.expert]) for job in jobs.values() for a in job.attempts}


def _set_due(job: _Job, policies: Mapping[str, HandoverPolicy], durations: Mapping[str, Durations]) -> None:
    """Sets when the handover of `job` is due, and the limits for changing that time."""
    ready_at = max(ready for a in job.attempts if (ready := a.ready_at) is not None)
    job.expires_at = min(a.expires_at for a in job.attempts if a.expires_at is not None)
    job.earliest_at = ready_at + MAX_LIFE_SHARE * max(0.0, job.expires_at - ready_at)
    lead_s = 0.0
    for expert in {attempt.slot.expert for attempt in job.attempts}:
        policy, known = policies[expert], durations.get(expert, Durations())
        lead_s = max(lead_s, known.until_ready_s + before_drain_s(policy) + policy.margin_s)
        job.spacing_s = max(job.spacing_s, max(known.load_s, default=0.0) + policy.drain_s)
    job.due_at = max(job.expires_at - lead_s, job.earliest_at)


def _stagger(jobs: list[_Job]) -> None:
    """Makes `due_at` of a job earlier where its handover would overlap with the next one. Begins with the last two
    jobs; the last job keeps its time."""
    jobs.sort(key=lambda job: (job.due_at, job.first_slot))
    for job, later in zip(reversed(jobs[:-1]), reversed(jobs[1:]), strict=True):
        room_s = (job.due_at - job.earliest_at) / len(jobs)
        job.due_at = max(min(job.due_at, later.due_at - min(later.spacing_s, room_s)), job.earliest_at)


def _due(attempt: Attempt, job: _Job, policy: HandoverPolicy) -> Due:
    assert attempt.expires_at is not None
    return Due(policy.mode, job.due_at, attempt.expires_at - policy.warn_s, attempt.expires_at)


def _durations(attempts: Iterable[Attempt]) -> Durations:
    """Returns the measured times of these attempts. Jobs that waited for another job's end have no queue time."""
    ordered = sorted(attempts, key=attrgetter("claimed_at"), reverse=True)
    queue = (a.started_at - a.submitted_at for a in ordered if a.started_at and a.submitted_at and a.after is None)
    load = (a.ready_at - a.started_at for a in ordered if a.started_at and a.ready_at)
    drain = (a.exit.at - at for a in ordered if a.exit is not None and (at := a.draining_at) is not None)
    newest = (islice(samples, MAX_SAMPLES) for samples in (queue, load, drain))
    return Durations(*(tuple(max(0.0, s) for s in samples)[::-1] for samples in newest))
