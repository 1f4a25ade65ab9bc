"""Decides which actions turn the observed jobs into the desired jobs. Pure: no I/O, time is an argument.

Rules, one slot at a time:
1. A live job stays. A job that was asked to stop, or that hangs, is ended, and killed if it still runs after its drain
   time. When a job has ended or hangs, the next generation is submitted at once.
2. After each further failure in a row, the pause before the next job is longer; in the end the slot is given up. It is
   given up at once for a reason that a restart cannot fix. The count starts again after a job that was ready for
   STABLE_S, and after `up` or `scale` (`Desired.forgiven`). An end that is not the replica's fault (its node failed, it
   was preempted) only adds a pause.
3. A claim without a job is abandoned after CLAIM_S. A surplus job is drained, then cancelled, then killed.
4. The control loop runs in the router's job and ends with it, so the next router's job is submitted while the present
   router serves, and Slurm starts it when the present job has ended.
5. A ready job near its walltime hands over (`handover` says when): its successor is submitted, or released if it waits
   in the queue, and the old job drains when the successor is ready. If Slurm refuses a successor that overlaps with the
   old job, the next one waits for the old job's end. Failures of successors count only once the old job has ended.
6. Jobs of an earlier config (`rolling`) are replaced slot by slot. A ready job hands over at once; where two jobs
   cannot run at the same time, it drains. A job that is not ready is ended. If Slurm refuses an overlapping successor,
   the ready job drains only after Slurm has accepted a successor that waits for its end.
7. The jobs have at most `Desired.max_gpus` GPUs together. Without room for two jobs of a slot, the next one waits for
   the end of the old one; without room for one, nothing is submitted.
8. The surplus job of an elastic expert drains until its last request has ended. If its slot is wanted again meanwhile,
   the next job is submitted at once.
9. Routers, and slots with a letter in their name, are never surplus: only the verb `down` ends them.
"""

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Final

from hpc_router import backoff
from hpc_router.cluster.control_loop.elasticity import ElasticState
from hpc_router.cluster.control_loop.handover import Due, HandoverPolicy, measured, schedule
from hpc_router.cluster.control_loop.rolling import is_outdated, may_roll
from hpc_router.cluster.control_loop.slots import CLAIM_S, ROUTER_SLOT, Attempt, Observed, Slot
from hpc_router.cluster.launchers.interface import ROUTER, JobState
from hpc_router.config.schema import HandoverMode
from hpc_router.state.job_records import BLAMELESS, PERMANENT, Exit, FailureReason, Runner
from hpc_router.state.registry import split_replica

STABLE_S: Final = 30.0
"""A job that was ready for this time in seconds does not count as a failure to start when it ends."""
STANDBY_S: Final = 10.0
"""A standby is submitted only after the router was ready for this time in seconds. Otherwise a router that crashes at
once would get new standbys for ever."""
FOUND_S: Final = 3.0
"""Time in seconds after a successor is ready at which its predecessor is drained. Routers need it to find and probe the
successor; on a busy node they would else have neither for a moment."""
BACKOFF_S: Final = 2.0
BACKOFF_MAX_S: Final = 60.0
KILL_AFTER_S: Final = 10.0
"""Time in seconds, after a job's drain time, at which the job is killed."""
END_MARGIN_S: Final = 10.0
"""A drain ends this many seconds before the walltime, so that the job can end cleanly."""
DEPENDENCY: Final = "Dependency"
"""Slurm's pending reason for a job that waits for the end of another job."""
TOLERATED: Final = frozenset({FailureReason.REFUSED})
"""Failures of a successor after which further ones are submitted."""
MAX_DRAIN_S: Final = 86400.0
"""Time limit in seconds of the drain of an elastic expert's surplus job."""
KILL_AGAIN_S: Final = 10.0
"""Interval in seconds between repeated kills. Slurm may take this long, and much longer for a lost node."""


@dataclass(frozen=True, slots=True)
class Desired:
    """The desired state of a run. `replicas`: number of replicas per expert. `router`: whether the run must have a
    router. `forgiven`: per slot, the generation up to which failures do not count. `standby`: whether a router that has
    served for STANDBY_S gets a successor whose job waits for its end.

    `handovers`: by expert, and for the router, how its jobs are replaced near their walltime. `revisions`: by expert,
    the config revision that its jobs should have. `overlapping`: the experts whose old and new jobs can run at the same
    time. `excluded`: the nodes on which no new job may start.

    `elastic`: the last decision for each expert whose number of replicas follows the demand. `gpus`: GPUs of one
    replica by expert; `max_gpus`: GPUs that all jobs may have together, None for no limit.

    `down_when_idle_s`: seconds without a request after which the run is to be taken down; None: never. `idle_from`:
    Unix time from which these seconds count.

    `down`: whether the run must have no jobs. `clear`: whether every live job must end, including routers and jobs that
    were started by hand. Only the command `down` sets `clear`, because a control loop that runs at that time must not
    end a router that is started after `down`.
    """

    replicas: Mapping[str, int] = field(default_factory=dict)
    router: bool = False
    standby: bool = False
    down: bool = False
    clear: bool = False
    forgiven: Mapping[str, int] = field(default_factory=dict)
    max_failures: int = 3
    drain_s: float = 30.0
    router_drain_s: float = 10.0
    handovers: Mapping[str, HandoverPolicy] = field(default_factory=dict)
    revisions: Mapping[str, str] = field(default_factory=dict)
    overlapping: frozenset[str] = frozenset()
    excluded: tuple[str, ...] = ()
    elastic: Mapping[str, ElasticState] = field(default_factory=dict)
    gpus: Mapping[str, int] = field(default_factory=dict)
    max_gpus: int | None = None
    down_when_idle_s: float | None = None
    idle_from: float = 0.0

    def slots(self) -> list[Slot]:
        """Returns every slot that should have a job."""
        if self.down:
            return []
        experts = [Slot(name, str(n)) for name, count in self.replicas.items() for n in range(count)]
        return [ROUTER_SLOT, *experts] if self.router else experts

    def drain_limit_s(self, slot: Slot) -> float:
        return self.router_drain_s if slot.expert == ROUTER else self.drain_s


@dataclass(frozen=True, slots=True)
class Submit:
    """Action: submit a job. `after`: id of the job that must end before Slurm starts the submitted job; None: no such
    job. `replaces`: the replica that hands over to the submitted job, if any."""

    slot: Slot
    generation: int
    after: str | None = None
    replaces: str | None = None

    @property
    def replica(self) -> str:
        return self.slot.replica(self.generation)


@dataclass(frozen=True, slots=True)
class ReleaseJob:
    """Action: let the replica's job start now. It waits in Slurm's queue for the end of its predecessor `replaces`."""

    replica: str
    replaces: str


@dataclass(frozen=True, slots=True)
class Drain:
    """Action: call `/drain` of the replica, which then takes no new requests and ends after the requests in flight.
    `until_at`: time limit for these requests (Unix seconds), if it is later than the usual limit."""

    replica: str
    until_at: float | None = None


@dataclass(frozen=True, slots=True)
class Cancel:
    """Action: send SIGTERM to the replica's job."""

    replica: str


@dataclass(frozen=True, slots=True)
class Kill:
    """Action: kill the replica's job, because its drain time has passed."""

    replica: str


@dataclass(frozen=True, slots=True)
class Wait:
    """No action for this replica before `until_at` (Unix seconds). `why`: the reason for waiting."""

    replica: str
    until_at: float
    why: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Action: submit no further job for this slot. `failures`: number of its failures. `exit`: the newest of them."""

    slot: Slot
    failures: int
    exit: Exit


Action = Submit | ReleaseJob | Drain | Cancel | Kill | Wait | GiveUp


def reconcile(
    desired: Desired, observed: Observed, now: float, handovers: Mapping[str, Due] | None = None
) -> list[Action]:
    """Returns the actions of one pass. `now`: Unix seconds. `handovers`: by replica, when it hands over; None:
    `schedule` computes this."""
    if desired.clear and not desired.down:  # `up` came after `down`: its jobs must stay
        return []
    wanted = desired.slots()
    actions: list[Action] = []
    due = dict(schedule(observed, desired.handovers, measured(observed)) if handovers is None else handovers)
    for slot in may_roll(wanted, observed, desired.revisions) if desired.revisions else ():
        mode: HandoverMode = "overlap" if slot.expert in desired.overlapping else "drain_first"
        outdated = [a for a in observed[slot] if a.ready and is_outdated(a, desired.revisions)]
        due |= {a.replica: Due(mode, now, math.inf, math.inf, outdated=True) for a in outdated}
    room = GpuRoom(desired, observed)
    if desired.max_gpus is not None:
        due = {name: room.overlapping_or_not(split_replica(name)[0], planned) for name, planned in due.items()}
    for slot in wanted:
        actions.extend(room.admit(a, now) for a in _fill_slot(slot, observed.get(slot, ()), desired, due, now))
    for slot in sorted(set(observed) - set(wanted)):
        if desired.clear or (slot.managed and slot.expert != ROUTER):
            actions.extend(_end_lingering(observed[slot], now))
            actions.extend(_stop_all(observed[slot], desired, now))
    return actions


class GpuRoom:
    """The number of GPUs that new jobs may have. Each admitted job reduces it."""

    def __init__(self, desired: Desired, observed: Observed) -> None:
        self._desired = desired
        self._free = math.inf if desired.max_gpus is None else desired.max_gpus - held_gpus(desired.gpus, observed)

    def overlapping_or_not(self, expert: str, due: Due) -> Due:
        """Returns the handover `due` of a replica of `expert`. If there are no GPUs for a second job, returns it as a
        handover without overlap."""
        fits = due.mode != "overlap" or self._desired.gpus.get(expert, 0) <= self._free
        return due if fits else replace(due, mode="drain_first")

    def admit(self, action: Action, now: float) -> Action:
        """Returns `action`, or a Wait in its place if it starts a job for which there are no GPUs."""
        if not isinstance(action, ReleaseJob | Submit) or (isinstance(action, Submit) and action.after is not None):
            return action
        gpus = self._desired.gpus.get(split_replica(action.replica)[0], 0)
        if gpus <= self._free:
            self._free -= gpus
            return action
        most = self._desired.max_gpus
        return Wait(action.replica, now, f"it needs {gpus} GPUs, and the other jobs have cluster.max_gpus={most}")


def held_gpus(gpus: Mapping[str, int], observed: Observed) -> int:
    """Returns the number of GPUs that all jobs have or will get. `gpus`: GPUs of one replica by expert. A job that
    waits for the end of another job is not counted, because it takes over that job's GPUs."""
    held = 0
    for slot, attempts in observed.items():
        holding = [a for a in attempts if a.holds_resources or (not a.submitted and a.exit is None)]
        ids = {a.job_id for a in holding}
        held += gpus.get(slot.expert, 0) * sum(a.after is None or a.after not in ids for a in holding)
    return held


def backoff_s(failures: int) -> float:
    """Returns the pause in seconds after `failures` failures in a row: 0, 2, 4, ... 60."""
    return backoff.pause_s(failures - 2, first_s=BACKOFF_S, max_s=BACKOFF_MAX_S)


def _fill_slot(
    slot: Slot, attempts: Sequence[Attempt], desired: Desired, handovers: Mapping[str, Due], now: float
) -> Iterator[Action]:
    if not attempts:
        yield Submit(slot, 1)
        return
    yield from _end_lingering(attempts, now)
    newest = attempts[-1]
    live = [attempt for attempt in attempts if attempt.live]
    outdated = [a for a in live if is_outdated(a, desired.revisions)]
    superseded = live[:-1] if live and live[-1].ready and _is_found(live[-1], now) else []
    if slot.expert == ROUTER:  # a superseded router with the current config ends by itself
        superseded = [a for a in superseded if a in outdated]
    unready = [a for a in outdated if not a.ready and a.draining_at is None]
    ending = [a for a in live if a.hung or a.stop_requested or a in superseded or a in unready]
    for attempt in ending:
        handover = attempt in superseded and attempt not in outdated
        yield _stop(attempt, desired, now, until_at=_walltime_end(attempt) if handover else None)
    if not newest.submitted and newest.exit is None and (newest.submitting or now < newest.claimed_at + CLAIM_S):
        yield Wait(newest.replica, newest.claimed_at + CLAIM_S, "claimed, not submitted yet")
    elif live and (due := _handover(live, handovers, now)) is not None:
        yield from _hand_over(slot, attempts, due, desired, now)
    elif slot == ROUTER_SLOT and desired.standby and len(live) == 1 and _has_served_long_enough(live[0], now):
        tried = [attempt for attempt in attempts if attempt.generation > live[0].generation]
        yield from _submit_successor(slot, newest.generation + 1, tried, desired, now, after=live[0].job_id)
    elif all(_cannot_serve_again(a) or _drains_unhurried(a) for a in live):
        past = [attempt for attempt in attempts if not (attempt.live and _drains_unhurried(attempt))]
        yield from _submit_next(slot, newest.generation + 1, past, desired, now)


def _handover(live: Sequence[Attempt], handovers: Mapping[str, Due], now: float) -> tuple[Attempt, Due] | None:
    """Returns the newest ready job of a slot, and its handover; None if no job is ready or the handover is not due.
    `live`: the slot's live jobs."""
    ready = next((attempt for attempt in reversed(live) if attempt.ready and not attempt.stop_requested), None)
    due = handovers.get(ready.replica) if ready is not None else None
    return None if ready is None or due is None or now < due.due_at else (ready, due)


def _hand_over(
    slot: Slot, attempts: Sequence[Attempt], handover: tuple[Attempt, Due], desired: Desired, now: float
) -> Iterator[Action]:
    job, due = handover
    newer = [attempt for attempt in attempts if attempt.generation > job.generation]
    refused = next((attempt for attempt in newer if _is_refused(attempt)), None)
    overlap = due.mode == "overlap" and refused is None
    successor = next((attempt for attempt in newer if attempt.live), None)
    if due.outdated and not overlap and (successor is None if refused is None else _waits_for(successor, job)):
        yield _stop(job, desired, now)
    elif successor is None:
        tolerated = frozenset[FailureReason]() if due.outdated else TOLERATED
        after, generation = None if overlap else job.job_id, attempts[-1].generation + 1
        submitting = _submit_successor(slot, generation, _tried(newer), desired, now, after=after, tolerated=tolerated)
        for action in submitting:
            yield replace(action, replaces=job.replica) if isinstance(action, Submit) else action
    elif overlap and successor.job is JobState.PENDING and successor.report.pending_reason == DEPENDENCY:
        yield ReleaseJob(successor.replica, job.replica)


def _waits_for(successor: Attempt | None, job: Attempt) -> bool:
    """Returns whether the job of `successor` was submitted to start when `job` ends."""
    return successor is not None and successor.after is not None and successor.after == job.job_id


def _tried(newer: Sequence[Attempt]) -> list[Attempt]:
    """Returns the attempts in `newer` without the first one that Slurm refused. That refusal shows only that two jobs
    cannot run at the same time, so it is no failure of the successor."""
    refused = next((attempt for attempt in newer if _is_refused(attempt)), None)
    return [attempt for attempt in newer if attempt is not refused]


def _submit_successor(
    slot: Slot,
    generation: int,
    tried: Sequence[Attempt],
    desired: Desired,
    now: float,
    *,
    after: str | None,
    tolerated: Set[FailureReason] = TOLERATED,
) -> Iterator[Action]:
    """Yields the submission of a successor for a job that serves, or a Wait; nothing after too many failures in
    `tried`. Unlike `_submit_next`, never gives up the slot. A failure for one of the `tolerated` reasons only adds a
    pause. By default these are Slurm's refusals: a limit may refuse a second job now and allow it later, and a router
    without a successor ends the service."""
    submitting = _submit_next(slot, generation, tried, desired, now, after=after, tolerated=tolerated)
    yield from (action for action in submitting if not isinstance(action, GiveUp))


def refusal(successors: Sequence[Attempt]) -> Exit | None:
    """Returns the exit record of the first successor that Slurm refused; None if it refused none."""
    return next((attempt.exit for attempt in successors if _is_refused(attempt)), None)


def _is_refused(attempt: Attempt) -> bool:
    return attempt.exit is not None and attempt.exit.reason is FailureReason.REFUSED


def _submit_next(
    slot: Slot,
    generation: int,
    past: Sequence[Attempt],
    desired: Desired,
    now: float,
    *,
    after: str | None = None,
    tolerated: Set[FailureReason] = frozenset(),
) -> Iterator[Action]:
    """Yields one action for the slot: the submission of job number `generation`, a Wait for the pause after failures in
    `past`, or GiveUp. A failure for one of the `tolerated` reasons does not count towards giving up the slot."""
    ends = _consecutive_failures(past, forgiven=desired.forgiven.get(str(slot), 0))
    blamed = _final_failures(ends, desired, tolerated=tolerated)
    if blamed:
        yield GiveUp(slot, len(blamed), blamed[0])
        return
    due_at = ends[0].at + backoff_s(len(ends)) if ends else now
    if now < due_at:
        yield Wait(slot.replica(generation), due_at, f"{len(ends)} failures in a row")
    else:
        yield Submit(slot, generation, after)


def _final_failures(ends: Sequence[Exit], desired: Desired, *, tolerated: Set[FailureReason]) -> list[Exit]:
    """Returns the failures in `ends` that count, newest first, if the slot must be given up for them: there are
    `max_failures` of them, or a restart cannot fix the newest. Otherwise returns an empty list. A failure that is not
    the replica's fault, or for one of the `tolerated` reasons, does not count."""
    blamed = [end for end in ends if end.reason not in BLAMELESS and end.reason not in tolerated]
    final = blamed and (blamed[0].reason in PERMANENT or len(blamed) >= desired.max_failures)
    return blamed if final else []


def rollout_failure(job: Attempt, attempts: Sequence[Attempt], desired: Desired) -> Exit | None:
    """Returns the newest failure among the successors of `job`, an outdated job, if no further successor will be
    submitted; None if one is live or will be submitted. `attempts`: those of the job's slot, oldest first."""
    newer = [attempt for attempt in attempts if attempt.generation > job.generation]
    if any(attempt.live for attempt in newer):
        return None
    ends = _consecutive_failures(_tried(newer), forgiven=desired.forgiven.get(str(job.slot), 0))
    return next(iter(_final_failures(ends, desired, tolerated=frozenset())), None)


def _cannot_serve_again(attempt: Attempt) -> bool:
    """Returns whether the attempt hangs, or was asked to end before it started."""
    return attempt.hung or (attempt.stop.cancel_at is not None and attempt.job is JobState.PENDING)


def _drains_unhurried(attempt: Attempt) -> bool:
    """Returns whether the attempt drains without the usual time limit for its requests, because it was superseded or
    its elastic expert needed fewer replicas."""
    return attempt.stop.until_at is not None and attempt.stop.cancel_at is None


def _end_lingering(attempts: Sequence[Attempt], now: float) -> Iterator[Action]:
    """Yields actions that cancel, and later kill, jobs whose service has ended but which hold resources."""
    for attempt in attempts:
        if attempt.submitted and attempt.job is JobState.ENDING:
            end = attempt.exit or attempt.report.end  # the job's own record, else what its launcher reports
            ended_at = end.at if end is not None else attempt.claimed_at
            begun = attempt.started_at is not None or end is None or end.reason is not FailureReason.NODE_FAILED
            if attempt.stop.cancel_at is not None:
                yield _kill_or_wait(attempt, attempt.stop.cancel_at + KILL_AFTER_S, now)
            elif not begun or now >= ended_at + KILL_AFTER_S:  # Slurm would start one that was not begun again
                yield Cancel(attempt.replica)


def _is_found(attempt: Attempt, now: float) -> bool:
    """Returns whether the attempt has been ready for so long that the routers have found it. Returns True for a time of
    readiness in the future, because the clock of the attempt's node may be ahead."""
    return attempt.ready_at is None or not 0 <= now - attempt.ready_at < FOUND_S


def _has_served_long_enough(router: Attempt, now: float) -> bool:
    """Returns whether the router is a Slurm job that has been ready for STANDBY_S."""
    ready_at = router.ready_at
    return router.ready and router.runner is Runner.SLURM and ready_at is not None and now - ready_at >= STANDBY_S


def _consecutive_failures(attempts: Sequence[Attempt], *, forgiven: int) -> list[Exit]:
    """Returns the exit records of a slot's failures since its last success and after generation `forgiven`, newest
    first. Leaves out a job that Slurm refused while an older job of the slot ran, because that refusal shows only that
    the two cannot run at the same time."""
    ends: list[Exit] = []
    for attempt in reversed(attempts):
        end = _exit_of(attempt)
        if attempt.generation <= forgiven or end.ok:
            break
        if _is_refused(attempt) and any(
            a.exit.at > end.at for a in attempts if a.exit and a.generation < attempt.generation
        ):
            continue
        ends.append(end)
        ready_at = attempt.ready_at
        if ready_at is not None and end.at - ready_at >= STABLE_S:
            break
    return ends


def _exit_of(attempt: Attempt) -> Exit:
    """Returns the exit record of an attempt that cannot serve again. Makes one for a job that hangs and for an
    abandoned claim, which have none."""
    if attempt.exit is not None:
        return attempt.exit
    if attempt.submitted:
        message, at = "it hangs, or its job ended without an exit record", attempt.claimed_at
    else:
        message, at = "claimed, but never submitted", attempt.claimed_at + CLAIM_S
    return Exit(ok=False, reason=FailureReason.VANISHED, message=message, at=at)


def _stop_all(attempts: Sequence[Attempt], desired: Desired, now: float) -> Iterator[Action]:
    for attempt in attempts:
        if attempt.live:
            unhurried = attempt.slot.expert in desired.elastic
            yield _stop(attempt, desired, now, until_at=_last_request_end(attempt, now) if unhurried else None)
        elif not attempt.submitted and attempt.exit is None and attempt.stop.cancel_at is None:
            # If its job is being submitted now, the job reads this request before it starts.
            yield Cancel(attempt.replica)


def _walltime_end(attempt: Attempt) -> float | None:
    """Returns when a drain must have ended because of the walltime (Unix seconds); None without a known walltime."""
    return None if attempt.expires_at is None else attempt.expires_at - END_MARGIN_S


def _last_request_end(attempt: Attempt, now: float) -> float:
    """Returns the time at which the drain of a job must have ended if nothing else needs its place (Unix seconds)."""
    return min(_walltime_end(attempt) or math.inf, now + MAX_DRAIN_S)


def _stop(attempt: Attempt, desired: Desired, now: float, *, until_at: float | None = None) -> Action:
    """Returns the next action to end the attempt: Drain, Wait, Cancel or Kill. `until_at`: time until which its
    requests in flight may run (Unix seconds), if that is later than the usual limit."""
    replica, stop = attempt.replica, attempt.stop
    drain_s = 0.0 if attempt.hung else desired.drain_limit_s(attempt.slot)
    if stop.cancel_at is not None:
        return _kill_or_wait(attempt, stop.cancel_at + drain_s + KILL_AFTER_S, now)
    if not desired.down:
        draining_at = stop.drain_at if stop.drain_at is not None else attempt.draining_at
        if draining_at is None and attempt.ready and attempt.slot.expert != ROUTER:
            return Drain(replica, until_at)
        if draining_at is not None and now < (until := max(draining_at + drain_s, stop.until_at or 0.0)):
            return Wait(replica, until, "asked to drain")
    return Cancel(replica)  # the agent drains on SIGTERM too


def _kill_or_wait(attempt: Attempt, kill_at: float, now: float) -> Action:
    if attempt.stop.kill_at is not None:
        kill_at = max(kill_at, attempt.stop.kill_at + KILL_AGAIN_S)
    return Kill(attempt.replica) if now >= kill_at else Wait(attempt.replica, kill_at, "asked to end")
