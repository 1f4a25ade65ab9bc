"""The displayed state of each replica, from one pass of the control loop, for `up`, `status` and `why`.

The view of a slot shows its newest job. The files in `jobs/` show how far a job has started; the registry shows whether
it serves.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from hpc_router.cluster.control_loop.loop import LoopPass
from hpc_router.cluster.control_loop.reconcile import GiveUp, Wait
from hpc_router.cluster.control_loop.slots import Attempt, Slot
from hpc_router.cluster.launchers.interface import ROUTER, JobState
from hpc_router.state.job_records import FailureReason, JobPhase
from hpc_router.state.registry import Record, RecordKind, State


class DisplayedState(StrEnum):
    """The state of a replica as users see it."""

    MISSING = "missing"  # wanted, no job submitted yet
    SUBMITTED = "submitted"  # the job waits in the queue, or has just started
    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    RESTARTING = "restarting"
    DRAINING = "draining"
    WAITING = "waiting"  # the last attempt failed; the next one follows after a pause
    FAILED = "failed"  # no further attempt follows
    STOPPED = "stopped"  # it was asked to stop, and ended in order
    REGISTERED = "registered"  # an external endpoint; only the router knows whether it answers


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """The displayed state of one replica. `reason`, `message`: those of its last failure; if nothing failed, `message`
    says how the model gets to the node's disk. `stage_s`, `stage_bytes`: how long staging took, and how much was
    copied. `successor`: the replica that is to replace it."""

    expert: str
    replica: str
    state: DisplayedState
    job_id: str | None = None
    node: str | None = None
    url: str | None = None
    reason: FailureReason | None = None
    message: str | None = None
    restarts: int = 0
    kind: RecordKind = RecordKind.EXPERT
    native_state: str | None = None  # Slurm's name of the job's state
    pending_reason: str | None = None  # Slurm's reason why it waits
    starts_at: float | None = None  # Slurm's estimate of its start, Unix seconds
    ends_at: float | None = None  # end of its walltime, Unix seconds
    engine: str | None = None
    load_s: float | None = None  # from the engine's start until it was ready
    stage_s: float | None = None
    stage_bytes: int | None = None
    successor: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "replica": self.replica,
            "kind": self.kind.value,
            "state": self.state.value,
            "reason": None if self.reason is None else self.reason.value,
            "message": self.message,
            "restarts": self.restarts,
            "node": self.node,
            "job_id": self.job_id,
            "job_state": self.native_state,
            "pending": self.pending_reason,
            "starts_at": self.starts_at,
            "ends_at": self.ends_at,
            "engine": self.engine,
            "load_s": self.load_s,
            "stage_s": self.stage_s,
            "stage_bytes": self.stage_bytes,
            "successor": self.successor,
            "url": self.url,
        }


def views(seen: LoopPass, records: Mapping[str, Record]) -> list[ReplicaView]:
    """Returns the view of each slot that is wanted or has a live job, and of each external endpoint in `records`. The
    router comes first."""
    wanted = seen.desired.slots()
    waits = {a.replica: a for a in seen.actions if isinstance(a, Wait)}
    given_up = {a.slot: a for a in seen.actions if isinstance(a, GiveUp)}
    shown = [_view(slot, seen.observed.get(slot, ()), records, given_up.get(slot), waits) for slot in wanted]
    for slot in sorted(set(seen.observed) - set(wanted)):
        attempts = [attempt for attempt in seen.observed[slot] if attempt.holds_resources]
        if attempts:
            shown.append(_view(slot, attempts, records, None, waits))
    shown.extend(_external(record) for record in records.values() if record.kind is RecordKind.EXTERNAL)
    return sorted(shown, key=lambda view: (view.expert != ROUTER, view.expert, view.replica))


def expert_views(shown: Iterable[ReplicaView]) -> list[ReplicaView]:
    return [view for view in shown if view.expert != ROUTER]


def _view(
    slot: Slot,
    attempts: Sequence[Attempt],
    records: Mapping[str, Record],
    given_up: GiveUp | None,
    waits: Mapping[str, Wait],
) -> ReplicaView:
    kind = RecordKind.ROUTER if slot.expert == ROUTER else RecordKind.EXPERT
    if not attempts:
        return ReplicaView(slot.expert, slot.replica(1), DisplayedState.MISSING, kind=kind)
    living = [a for a in attempts if a.live]
    serving = [a for a in living if a.ready] or living  # a successor that waits or starts does not serve
    attempt = serving[-1] if serving else attempts[-1]
    record = records.get(attempt.replica)
    progress = attempt.progress
    state = _displayed_state(attempt, failed=given_up is not None)
    failure = attempt.exit if attempt.exit is not None and not attempt.live else progress
    failing = state is not DisplayedState.READY and failure is not None
    message = failure.message if failing and failure is not None else None
    later = waits.get(slot.replica(attempt.generation + 1))
    if state is DisplayedState.WAITING and later is not None:
        message = f"{message or ''} (the next attempt waits: {later.why})".strip()
    return ReplicaView(
        expert=slot.expert,
        replica=attempt.replica,
        state=state,
        job_id=attempt.job_id,
        node=record.node if record is not None else attempt.node,
        url=record.url if record is not None and attempt.live else None,
        reason=failure.reason if failing and failure is not None else None,
        message=message,
        restarts=progress.restarts if progress is not None else 0,
        kind=kind,
        native_state=attempt.report.native_state if attempt.holds_resources else None,
        pending_reason=attempt.report.pending_reason,
        starts_at=attempt.report.starts_at,
        ends_at=attempt.expires_at,
        engine=record.engine.kind if record is not None else None,
        load_s=record.load_s if record is not None else progress.load_s if progress is not None else None,
        stage_s=progress.stage_s if progress is not None else None,
        stage_bytes=progress.stage_bytes if progress is not None else None,
        successor=living[-1].replica if living and living[-1] is not attempt else None,
    )


_PHASES: Mapping[JobPhase, DisplayedState] = {
    JobPhase.STARTING: DisplayedState.STARTING,
    JobPhase.LOADING: DisplayedState.LOADING,
    JobPhase.READY: DisplayedState.READY,
    JobPhase.RESTARTING: DisplayedState.RESTARTING,
    JobPhase.DRAINING: DisplayedState.DRAINING,
}


def _displayed_state(attempt: Attempt, *, failed: bool) -> DisplayedState:
    if attempt.live:
        if attempt.registered is State.READY:
            return DisplayedState.READY
        if attempt.registered is State.DRAINING:
            return DisplayedState.DRAINING
        if attempt.progress is None:
            return DisplayedState.SUBMITTED
        state = _PHASES[attempt.progress.phase]
        # The record is published a moment after the progress.
        return DisplayedState.LOADING if state is DisplayedState.READY else state
    if failed:
        return DisplayedState.FAILED
    if not attempt.submitted and attempt.exit is None and attempt.job is not JobState.ENDED:
        return DisplayedState.SUBMITTED
    return DisplayedState.STOPPED if attempt.exit is not None and attempt.exit.ok else DisplayedState.WAITING


def _external(record: Record) -> ReplicaView:
    expert = next(iter(record.serves), record.replica)
    return ReplicaView(
        expert,
        record.replica,
        DisplayedState.REGISTERED,
        url=record.url,
        kind=RecordKind.EXTERNAL,
        engine=record.engine.kind,
    )
