"""Why a replica does not serve: the class of its failure, the line that decided it, and what to do about it.

For one that waits in Slurm's queue: what for, and until when Slurm thinks it will.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from hpc_router.cluster.commands.findings import findings
from hpc_router.cluster.commands.logs import last_lines, tail
from hpc_router.cluster.commands.replica_view import DisplayedState, ReplicaView
from hpc_router.cluster.commands.status import ask_router, replica_views
from hpc_router.cluster.control_loop.desired_state import host_expert
from hpc_router.cluster.control_loop.loop import ControlLoop
from hpc_router.cluster.control_loop.slots import Observed, Slot
from hpc_router.cluster.launchers.interface import ROUTER
from hpc_router.cluster.launchers.slurm.pending_reasons import explain_pending
from hpc_router.cluster.launchers.slurm.process_tracking import signals_note
from hpc_router.errors import ConfigError, suggest
from hpc_router.state.job_records import FailureReason
from hpc_router.state.registry import split_replica
from hpc_router.state.run_directory import RunDir

LOG_LINES: Final = 12
RECENT_S: Final = 3600.0
RANK_LINES: Final = 4
"""Of each further rank."""

_R = FailureReason
ADVICE: Final[Mapping[FailureReason, str]] = {
    _R.OUT_OF_MEMORY: "give it more memory: fewer tokens (max_model_len), a quantised model, more GPUs, or fewer "
    "replicas on one node",
    _R.WEIGHTS: "check experts.{expert}.model, or that of the adapter which the message names: the folder or hub "
    "id, and whether its files are complete",
    _R.CUDA: "check the node's GPU and driver (nvidia-smi there) and that the engine's build matches it",
    _R.BAD_OPTION: "edit the option that the message names, then `hpc-router up` in a new run",
    _R.INTERPRETER: "check experts.{expert}.engine.python: that interpreter must have the engine installed",
    _R.TIMEOUT: "it did not answer in time: while it loads, raise experts.{expert}.engine.startup_timeout_s or put "
    "the model on a faster file system; once it was ready, it hung: look at its log's end and at its node",
    _R.KILLED: "it was killed from outside: by the node's memory limit, a user, or the system; `dmesg` may show it",
    _R.CRASHED: "read the log lines; `hpc-router up` tries again",
    _R.PORT_TAKEN: "another process has the port: leave it to the kernel (router.port=0), or choose another",
    _R.RANK_LOST: "one of its nodes ended: the log of that rank shows the reason (`hpc-router logs {replica}` "
    "prints all of them); `hpc-router up` tries again",
    _R.SETUP: "edit the line of cluster.setup or cluster.modules that the message names, then `hpc-router up` in a "
    "new run",
    _R.UNANSWERED: "Slurm did not answer, or takes no more jobs of yours for now; the submission is retried",
    _R.REFUSED: "edit the key that the message names (`hpc-router plan` tries it), then `hpc-router up` in a new run",
    _R.NODE_FAILED: "its node failed: another is submitted; cluster.exclude leaves a bad node out",
    _R.PREEMPTED: "a job of higher priority took its place: another is submitted; another cluster.partition or "
    "cluster.qos may not be preempted",
    _R.WALLTIME: "its walltime ended: another is submitted; a longer cluster.walltime makes that rarer",
    _R.CANCELLED: "a user or an administrator cancelled its job: another is submitted; `hpc-router scale` or "
    "`down` ends it for good",
    _R.DRAINED: "it was asked to stop; `hpc-router up` or `scale` starts it again",
    _R.VANISHED: "it was killed, or could not start: its log ends where it died; `hpc-router up` tries again",
}
_STATE_TEXT: Final[Mapping[DisplayedState, str]] = {
    DisplayedState.MISSING: "no job was submitted yet: `hpc-router up` or `hpc-router reconcile` submits one",
    DisplayedState.SUBMITTED: "its job was submitted and has not begun yet",
    DisplayedState.STARTING: "it is starting",
    DisplayedState.LOADING: "its engine is loading the model",
    DisplayedState.RESTARTING: "its engine failed and is started again",
    DisplayedState.DRAINING: "it takes no new requests and ends after those in flight",
    DisplayedState.WAITING: "it failed and is submitted again after a pause",
    DisplayedState.FAILED: "it failed too often, or for a reason that a restart cannot fix",
    DisplayedState.STOPPED: "it is not running",
    DisplayedState.REGISTERED: "it runs elsewhere: `hpc-router status` shows whether the router reaches it",
}
_ROUTER_ADVICE: Final = "edit router.* as the message says, then `hpc-router up` in a new run"


_DEGRADED_ADVICE: Final = "`hpc-router logs {replica}` may show the reason; `hpc-router drain {replica}` replaces it"
_EXTERNAL_ADVICE: Final = (
    "start or repair the server there, or `hpc-router unregister {replica}`; if it does serve, `hpc-router register` "
    "it again with --probe-path, --no-probe or --token-file"
)


@dataclass(frozen=True, slots=True)
class Cause:
    view: ReplicaView
    what: str
    advice: str | None
    lines: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        told = self.view.to_json()
        return told | {"expert": self.view.expert, "what": self.what, "advice": self.advice, "log": list(self.lines)}


def why(run: RunDir, name: str | None = None) -> list[Cause]:
    """A cause for each replica that is not ready, or for those of one expert or replica; and what a router that serves
    has found amiss with those that are."""
    control = ControlLoop(run, read_only=True)
    seen = control.preview(fresh=True)
    shown = replica_views(control, seen)
    if name is not None:
        name = host_expert(run, name)
        names = {v.expert for v in shown} | {v.replica for v in shown} | {v.replica.rpartition(".")[0] for v in shown}
        if name not in names:
            raise ConfigError(f"no replica of this run is named '{name}'{suggest(name, names)}")
        shown = [v for v in shown if name in (v.expert, v.replica, v.replica.rpartition(".")[0])]
    now = time.time()
    fine = (DisplayedState.READY, DisplayedState.REGISTERED)
    causes = [_cause(run, view, now=now) for view in shown if view.state not in fine]
    causes += _cut_off_drains(shown, seen.observed, now=now)
    if control.deployment.cluster.kind != "local":
        causes = _with_signals_note(causes)
    told = ask_router(run)[1]
    causes += _write_failures(run, shown, told)
    causes += [Cause(one.view, one.what, one.advice, ()) for one in findings(shown, told)]
    return causes + _degraded([view for view in shown if view.state in fine and view.expert != ROUTER], told)


def _cut_off_drains(shown: Sequence[ReplicaView], observed: Observed, *, now: float) -> list[Cause]:
    """Drains of the last hour that did not let all answers finish, one per slot: the newest."""
    causes = []
    for view in shown:
        attempts = observed.get(Slot(*split_replica(view.replica)[:2]), ())
        last = next((a for a in reversed(attempts) if a.exit is not None), None)
        if last is None or last.exit is None or not last.exit.cut or now - last.exit.at > RECENT_S:
            continue
        key = "router.drain_s" if view.expert == ROUTER else "cluster.drain_s"
        advice = f"{key} is how long a drain waits; preemption allows no more than the partition's GraceTime"
        causes.append(Cause(view, f"{last.replica} {last.exit.message}", advice, ()))
    return causes


def _with_signals_note(causes: list[Cause]) -> list[Cause]:
    """Where jobs were signalled from outside: whether their engines were as well."""
    note = signals_note() if any(_signalled(cause) for cause in causes) else None
    if note is None:
        return causes
    return [replace(c, advice=f"{c.advice}; {note}" if c.advice else note) if _signalled(c) else c for c in causes]


def _signalled(cause: Cause) -> bool:
    cut = cause.what.endswith("cut off")
    return cause.view.expert != ROUTER and (
        cut or cause.view.reason in (FailureReason.CANCELLED, FailureReason.PREEMPTED)
    )


def _write_failures(run: RunDir, shown: list[ReplicaView], told: Mapping[str, Any]) -> list[Cause]:
    """That nothing can be written to the run directory: by its file system's word, or by the router's (a quota)."""
    what = run.full() or (told.get("router") or {}).get("write_trouble")
    if what is None or not shown:
        return []
    view = next((view for view in shown if view.expert == ROUTER), shown[0])
    return [Cause(view, what, "free space or raise the quota: records, logs and the control loop need it", ())]


def _degraded(shown: list[ReplicaView], told: Mapping[str, Any]) -> list[Cause]:
    """Those that count as ready and are not of use, which only the router knows."""
    known = {r["replica"]: r for e in (told.get("experts") or {}).values() for r in e.get("replicas", ())}
    causes = []
    for view in shown:
        seen = known.get(view.replica) or {}
        external = seen.get("kind") == "external"
        advice = (_EXTERNAL_ADVICE if external else _DEGRADED_ADVICE).format(replica=view.replica)
        if seen.get("state") == "ejected":
            what = f"the router has ejected it: {seen.get('trouble') or 'it does not answer'}"
            causes.append(Cause(view, what, advice, ()))
        elif seen.get("sick"):
            causes.append(Cause(view, f"it {seen['sick']}", advice, ()))
    return causes


def _cause(run: RunDir, view: ReplicaView, *, now: float) -> Cause:
    if view.pending_reason is not None and view.state is DisplayedState.SUBMITTED:
        waiting = explain_pending(view.pending_reason, view.job_id)
        until = "so it will never start" if waiting.hopeless else expected(view.starts_at, now=now)
        return Cause(view, f"its job waits: {waiting.what}; {until}", waiting.advice, ())
    advice = None
    if view.reason is not None:
        advice = ADVICE[view.reason].format(expert=view.expert, replica=view.replica)
        if view.expert == ROUTER and view.reason is FailureReason.BAD_OPTION:
            advice = _ROUTER_ADVICE
    failed = view.reason not in (None, FailureReason.DRAINED)
    lines = _log_lines(run, view) if failed else []
    return Cause(view, _STATE_TEXT[view.state], advice, tuple(lines))


def _log_lines(run: RunDir, view: ReplicaView) -> list[str]:
    """Of the service, or of the batch script around it, which lies with the first replica of the job."""
    own = [] if view.reason is FailureReason.SETUP else last_lines(run, view.replica, lines=LOG_LINES)
    if view.reason is FailureReason.RANK_LOST:
        own += _rank_log_lines(run, view.replica)
    scripts = run.jobs.glob(f"*/{view.job_id}_batch.log") if view.job_id else ()
    return own or [line for path in scripts for line in tail(path, LOG_LINES)]


def _rank_log_lines(run: RunDir, replica: str) -> list[str]:
    """Of the engines of all ranks but the first, each line with its rank; of its agent where no engine spoke."""
    logs: dict[int, Path] = {}
    for suffix in (".log", ".engine.log"):
        for path in run.logs.glob(f"{replica}.rank*{suffix}"):
            rank = path.name.removeprefix(f"{replica}.rank").removesuffix(suffix)
            if rank.isdecimal() and path.stat().st_size:
                logs[int(rank)] = path
    return [f"rank {rank}: {line}" for rank in sorted(logs) for line in tail(logs[rank], RANK_LINES)]


def expected(starts_at: float | None, *, now: float) -> str:
    """Slurm's estimate for people, in the time of this machine."""
    if starts_at is None:
        return "Slurm gives no estimate yet"
    begin, today = datetime.fromtimestamp(starts_at), datetime.fromtimestamp(now)
    day = "" if begin.date() == today.date() else f"{begin:%Y-%m-%d} "
    minutes = round((starts_at - now) / 60)
    if minutes < 1:
        return f"Slurm expects to start it at {day}{begin:%H:%M}, which is now"
    if minutes < 120:
        left = "a minute" if minutes == 1 else f"{minutes} minutes"
    else:
        left = f"{round(minutes / 60)} hours" if minutes < 48 * 60 else f"{round(minutes / 1440)} days"
    return f"Slurm expects to start it at {day}{begin:%H:%M}, in {left}"
