"""Explains why replicas do not serve, for `hpc-router why`.

For a failed replica, the explanation is the reason, the last lines of its log, and advice. For a job in Slurm's queue,
it is Slurm's reason and its estimate of the start. For a replica whose walltime ends, it is the handover, and whether
that will be late. For a router that serves, it is what the router reports about its processes, its settings and its
replicas.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from hpc_router.cluster.commands.advice import (
    CUT_ADVICE,
    DEGRADED_ADVICE,
    EXTERNAL_ADVICE,
    FAILURE_ADVICE,
    GAP_ADVICE,
    LOG_ADVICE,
    MAX_GPUS_ADVICE,
    NODE_EXCLUDED_ADVICE,
    NODE_FAILING_ADVICE,
    ROUTER_OPTION_ADVICE,
    SETTINGS_ADVICE,
    SHARE_ADVICE,
    SLURM_ADVICE,
    SPACE_ADVICE,
    STATE_TEXT,
    STEP_ADVICE,
)
from hpc_router.cluster.commands.logs import last_lines, tail
from hpc_router.cluster.commands.replica_view import DisplayedState, ReplicaView
from hpc_router.cluster.commands.status import ask_router, process_problems, replica_views
from hpc_router.cluster.control_loop.desired_state import forgotten_nodes, host_expert, node_exclusions
from hpc_router.cluster.control_loop.forecast import PlannedHandover, forecast
from hpc_router.cluster.control_loop.loop import ControlLoop
from hpc_router.cluster.control_loop.node_exclusion import BY, failing_nodes
from hpc_router.cluster.control_loop.reconcile import Desired
from hpc_router.cluster.control_loop.slots import Observed, Slot
from hpc_router.cluster.launchers.interface import ROUTER
from hpc_router.cluster.launchers.slurm.pending_reasons import explain_pending
from hpc_router.cluster.launchers.slurm.process_tracking import signals_note
from hpc_router.errors import ConfigError, suggest
from hpc_router.state.job_records import FailureReason, JobPhase
from hpc_router.state.registry import split_replica
from hpc_router.state.run_directory import RunDir

LOG_LINES: Final = 12
RECENT_S: Final = 3600.0
RANK_LINES: Final = 4
"""Number of log lines that are shown of each rank except the first."""


@dataclass(frozen=True, slots=True)
class Cause:
    """A reason why the replica in `view` does not serve, or a problem that concerns it. `what`: the problem. `lines`:
    lines from the replica's log."""

    view: ReplicaView
    what: str
    advice: str | None
    lines: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return self.view.to_json() | {
            "expert": self.view.expert,
            "what": self.what,
            "advice": self.advice,
            "log": list(self.lines),
        }


def why(run: RunDir, name: str | None = None) -> list[Cause]:
    """Returns a cause for each replica that is not ready, and for each problem that the serving router reports. With
    `name`, returns only those of that expert, slot or replica. Raises ConfigError for an unknown name."""
    control = ControlLoop(run, read_only=True)
    seen = control.preview(fresh=True)
    shown = replica_views(control, seen)
    if name is not None:
        name = host_expert(run, name)
        names = (
            set(seen.desired.elastic)
            | {v.expert for v in shown}
            | {v.replica for v in shown}
            | {v.replica.rpartition(".")[0] for v in shown}
        )
        if name not in names:
            raise ConfigError(f"no replica of this run is named '{name}'{suggest(name, names)}")
        shown = [v for v in shown if name in (v.expert, v.replica, v.replica.rpartition(".")[0])]
    now = time.time()
    fine = (DisplayedState.READY, DisplayedState.REGISTERED)
    causes = [_cause(run, view, now=now) for view in shown if view.state not in fine]
    if control.deployment.cluster.kind == "allocation":
        causes = [_step_cause(cause) for cause in causes]
    planned = forecast(seen.observed, seen.handovers, seen.durations, now)[1]
    causes += _handovers(shown, planned, now=now)
    causes += _scaled(seen.desired, shown, name, now=now)
    refused = {handover.replica for handover in planned if handover.refused is not None}  # said already
    others = [view for view in shown if view.replica not in refused]
    causes += _last_ends(run, others, seen.observed, forgiven=seen.desired.forgiven, now=now)
    if control.deployment.cluster.kind != "local":
        causes = _with_signals_note(causes)
    answer = ask_router(run)[1]
    causes += _silent_slurm(shown, control.launcher.trouble())
    causes += _write_failures(run, shown, answer)
    causes += router_causes(shown, answer)
    causes += _node_causes(run, shown, seen.observed, now=now)
    causes += _degraded([view for view in shown if view.state in fine and view.expert != ROUTER], answer)
    return list({(c.view.replica, c.what): c for c in reversed(causes)}.values())[::-1]


def _step_cause(cause: Cause) -> Cause:
    """Returns the cause unchanged, unless its replica is a step of the user's job that has not begun. Slurm gives no
    reason for such a step, so a general explanation takes the place of the cause."""
    view = cause.view
    if view.state is not DisplayedState.SUBMITTED or view.job_id is None:
        return cause
    what = f"its step has not begun: other steps hold the resources of job {view.job_id}, or it is just starting"
    return Cause(view, what, STEP_ADVICE.format(job_id=view.job_id))


def _scaled(desired: Desired, shown: Sequence[ReplicaView], name: str | None, *, now: float) -> list[Cause]:
    """Returns a cause for each elastic expert that has no replica, has fewer than its demand needs, or got another
    number of replicas in the last hour. `name`: None, or the only expert to consider."""
    causes = []
    for expert, state in desired.elastic.items():
        if name not in (None, expert) or desired.down:
            continue
        own = next((view for view in shown if view.expert == expert), None)
        view = own or ReplicaView(expert, expert, DisplayedState.STOPPED)
        replicas = "no replica" if state.replicas == 0 else f"{state.replicas} replica{'s' * (state.replicas > 1)}"
        since = f" since {datetime.fromtimestamp(state.changed_at):%H:%M:%S}" if state.changed_at else ""
        told = f"{expert} has {replicas}{since}: {state.reason}"
        if state.blocked is not None:
            causes.append(Cause(view, f"{told}; {state.blocked}", MAX_GPUS_ADVICE))
        elif state.replicas == 0:
            causes.append(Cause(view, f"{told}; the next request starts one", None))
        elif now - state.changed_at < RECENT_S and state.changes:
            causes.append(Cause(view, told, None))
    return causes


def _handovers(shown: Sequence[ReplicaView], planned: Sequence[PlannedHandover], *, now: float) -> list[Cause]:
    """Returns a cause for each replica in `shown` whose handover is due or in progress. `planned`: these handovers."""
    found = {handover.replica: handover for handover in planned}
    return [_handover(view, found[view.replica], now=now) for view in shown if view.replica in found]


def _handover(view: ReplicaView, planned: PlannedHandover, *, now: float) -> Cause:
    waiting = None
    if planned.refused is not None:
        how = f"Slurm refused a second job beside it, so the next one starts when it has ended: {planned.refused}"
    elif planned.mode != "overlap":
        how = f"{planned.successor or 'its successor'} starts when it has ended"
    elif planned.successor is None:
        how = "its successor is due and not submitted yet"
    elif planned.reason in (None, *JobPhase):
        how = f"{planned.successor} is to replace it and is starting"
    else:
        waiting = explain_pending(planned.reason or "")
        how = f"{planned.successor} is to replace it and waits: {waiting.what}"
    ready = f"; expected to be ready at {_moment(planned.ready_at, now=now)}" if planned.ready_at is not None else ""
    gap = f"; no replica of this slot serves for about {planned.late_s:.0f} s" if planned.late_s is not None else ""
    what = f"its walltime ends at {_moment(planned.expires_at, now=now)}: {how}{ready}{gap}"
    return Cause(view, what, GAP_ADVICE if planned.refused is not None else waiting.advice if waiting else None)


def _last_ends(
    run: RunDir, shown: Sequence[ReplicaView], observed: Observed, *, forgiven: Mapping[str, int], now: float
) -> list[Cause]:
    """Returns a cause for each slot in `shown` whose newest ended job failed or cut off responses in the last hour.
    Leaves out failures up to the generations in `forgiven`, which the last `up` or `scale` has forgiven, and a failed
    job that is displayed itself, because its state shows the failure."""
    causes = []
    for view in shown:
        slot = Slot(*split_replica(view.replica)[:2])
        last = next((a for a in reversed(observed.get(slot, ())) if a.exit is not None), None)
        end = last.exit if last is not None else None
        if last is None or end is None or now - end.at > RECENT_S:
            continue
        if end.cut:
            key = "router.drain_s" if view.expert == ROUTER else "cluster.drain_s"
            causes.append(Cause(view, f"{last.replica} {end.message}", CUT_ADVICE.format(key=key)))
        elif not end.ok and last.replica != view.replica and last.generation > forgiven.get(str(slot), 0):
            ended = replace(view, replica=last.replica, job_id=last.job_id, reason=end.reason)
            what = f"{last.replica} ended at {datetime.fromtimestamp(end.at):%H:%M:%S}: {end.reason}: {end.message}"
            causes.append(Cause(view, what, _advice(ended), tuple(_log_lines(run, ended))))
    return causes


def _silent_slurm(shown: Sequence[ReplicaView], trouble: str | None) -> list[Cause]:
    """Returns one cause if Slurm's controller does not answer, else none: job states may then be old, and no job can be
    submitted. `trouble`: why it does not answer; None if it does."""
    if trouble is None or not shown:
        return []
    view = next((view for view in shown if view.expert == ROUTER), shown[0])
    return [Cause(view, f"Slurm's controller does not answer: {trouble}", SLURM_ADVICE)]


def _with_signals_note(causes: list[Cause]) -> list[Cause]:
    """Returns the causes. If signals to a job reach its engine as well, adds a note on this to the advice for jobs that
    Slurm or a user has signalled."""
    note = signals_note() if any(_signalled(cause) for cause in causes) else None
    if note is None:
        return causes
    return [replace(c, advice=f"{c.advice}; {note}" if c.advice else note) if _signalled(c) else c for c in causes]


def _signalled(cause: Cause) -> bool:
    cut = cause.what.endswith("cut off")
    return cause.view.expert != ROUTER and (
        cut or cause.view.reason in (FailureReason.CANCELLED, FailureReason.PREEMPTED)
    )


def router_causes(shown: Sequence[ReplicaView], answer: Mapping[str, Any]) -> list[Cause]:
    """Returns a cause for each problem of the serving router's processes and settings. `answer`: the router's
    `/status`; empty if the router does not answer."""
    router = answer.get("router") or {}
    view = next((v for v in shown if v.replica == router.get("replica")), None)
    if view is None:
        return []
    stopped = [w for w in router.get("workers") or () if not w["serving"]]
    problems = [f"worker {w['worker']} does not serve: {w.get('last_end') or 'it is being started'}" for w in stopped]
    causes = [Cause(view, what, LOG_ADVICE) for what in [*problems, *process_problems(router)]]
    if router.get("share_trouble"):
        causes.append(Cause(view, f"the router is not shared: {router['share_trouble']}", SHARE_ADVICE))
    if router.get("settings_trouble"):
        causes.append(Cause(view, f"a change was not applied: {router['settings_trouble']}", SETTINGS_ADVICE))
    return causes


def _write_failures(run: RunDir, shown: list[ReplicaView], answer: Mapping[str, Any]) -> list[Cause]:
    """Returns one cause if the run directory cannot be written, because its file system is full or the router reports
    an error such as an exceeded quota; else none."""
    what = run.space_error() or (answer.get("router") or {}).get("write_trouble")
    if what is None or not shown:
        return []
    view = next((view for view in shown if view.expert == ROUTER), shown[0])
    return [Cause(view, what, SPACE_ADVICE)]


def _node_causes(run: RunDir, shown: Sequence[ReplicaView], observed: Observed, *, now: float) -> list[Cause]:
    """Returns a cause for each node that the control loop has excluded, and for each node that fails as often but is
    not excluded, because too many nodes would then be excluded."""
    if not shown:
        return []
    view = next((view for view in shown if view.expert == ROUTER), shown[0])
    excluded = node_exclusions(run)
    causes = [
        Cause(view, f"node {node} gets no further jobs: {facts.get('reason')}", NODE_EXCLUDED_ADVICE.format(node=node))
        for node, facts in excluded.items()
        if facts.get("by") == BY
    ]
    for node, told in failing_nodes(observed, forgotten_nodes(run), now).items():
        if node not in excluded:
            causes.append(Cause(view, f"node {node} is not excluded: {told}", NODE_FAILING_ADVICE.format(node=node)))
    return causes


def _degraded(shown: list[ReplicaView], answer: Mapping[str, Any]) -> list[Cause]:
    """Returns a cause for each ready replica in `shown` that the router's `/status` shows as ejected or degraded."""
    known = {r["replica"]: r for e in (answer.get("experts") or {}).values() for r in e.get("replicas")}
    causes = []
    for view in shown:
        seen = known.get(view.replica) or {}
        external = seen.get("kind") == "external"
        advice = (EXTERNAL_ADVICE if external else DEGRADED_ADVICE).format(replica=view.replica)
        if seen.get("state") == "ejected":
            what = f"the router has ejected it: {seen.get('trouble') or 'it does not answer'}"
            causes.append(Cause(view, what, advice))
        elif seen.get("sick"):
            causes.append(Cause(view, f"it {seen['sick']}", advice))
    return causes


def _cause(run: RunDir, view: ReplicaView, *, now: float) -> Cause:
    if view.pending_reason is not None and view.state is DisplayedState.SUBMITTED:
        waiting = explain_pending(view.pending_reason, view.job_id)
        until = "so it will never start" if waiting.hopeless else expected(view.starts_at, now=now)
        return Cause(view, f"its job waits: {waiting.what}; {until}", waiting.advice)
    failed = view.reason not in (None, FailureReason.DRAINED)
    lines = _log_lines(run, view) if failed else []
    starting = view.state in (DisplayedState.STARTING, DisplayedState.LOADING)
    staging = f"; {view.message}" if starting and view.reason is None and view.message is not None else ""
    return Cause(view, f"{STATE_TEXT[view.state]}{staging}", _advice(view), tuple(lines))


def _advice(view: ReplicaView) -> str | None:
    if view.reason is None:
        return None
    if view.expert == ROUTER and view.reason is FailureReason.BAD_OPTION:
        return ROUTER_OPTION_ADVICE
    return FAILURE_ADVICE[view.reason].format(expert=view.expert, replica=view.replica)


def _log_lines(run: RunDir, view: ReplicaView) -> list[str]:
    """Returns the last lines of the replica's log. If it has none, returns those of the batch script's log, which is in
    the folder of the first replica of the same job."""
    lines = [] if view.reason is FailureReason.SETUP else last_lines(run, view.replica, lines=LOG_LINES)
    if view.reason is FailureReason.RANK_LOST:
        lines += _rank_log_lines(run, view.replica)
    scripts = run.jobs.glob(f"*/{view.job_id}_batch.log") if view.job_id else ()
    return lines or [line for path in scripts for line in tail(path, LOG_LINES)]


def _rank_log_lines(run: RunDir, replica: str) -> list[str]:
    """Returns the last log lines of each rank except the first: of its engine's log, or of its agent's log if the
    engine wrote none. Each line names the rank."""
    logs: dict[int, Path] = {}
    for suffix in (".log", ".engine.log"):
        for path in run.logs.glob(f"{replica}.rank*{suffix}"):
            rank = path.name.removeprefix(f"{replica}.rank").removesuffix(suffix)
            if rank.isdecimal() and path.stat().st_size:
                logs[int(rank)] = path
    return [f"rank {rank}: {line}" for rank in sorted(logs) for line in tail(logs[rank], RANK_LINES)]


def expected(starts_at: float | None, *, now: float) -> str:
    """Returns text with Slurm's estimate of a job's start, in local time. `starts_at`, `now`: Unix seconds; `starts_at`
    is None without an estimate."""
    if starts_at is None:
        return "Slurm gives no estimate yet"
    return f"Slurm expects to start it at {_moment(starts_at, now=now)}"


def _moment(at: float, *, now: float) -> str:
    """Returns the time `at` as text in local time, with the time from `now` until then. Both are Unix seconds."""
    begin, today = datetime.fromtimestamp(at), datetime.fromtimestamp(now)
    day = "" if begin.date() == today.date() else f"{begin:%Y-%m-%d} "
    minutes = round((at - now) / 60)
    if minutes < 1:
        return f"{day}{begin:%H:%M}, which is now"
    if minutes < 120:
        left = "a minute" if minutes == 1 else f"{minutes} minutes"
    else:
        left = f"{round(minutes / 60)} hours" if minutes < 48 * 60 else f"{round(minutes / 1440)} days"
    return f"{day}{begin:%H:%M}, in {left}"
