"""Brings a deployment up and waits until its router serves.

The plan is checked before anything is created. Passes of the control loop run here until the router serves; then the
loop beside the router continues. Ctrl-C ends the jobs that this call submitted. A second Ctrl-C does not wait for their
end, but prints which jobs may still run. If nothing can serve, the deployment is taken down.
"""

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from hpc_router.cluster.commands.advice import FAILURE_ADVICE
from hpc_router.cluster.commands.down import NoWatcher, down, leftover_text, unended_jobs
from hpc_router.cluster.commands.replica_view import DisplayedState, ReplicaView, expert_views, views
from hpc_router.cluster.commands.status import found_by_router
from hpc_router.cluster.control_loop.desired_state import desired_of, want_up, with_desired_counts
from hpc_router.cluster.control_loop.loop import ControlLoop
from hpc_router.cluster.control_loop.observer import record_exit
from hpc_router.cluster.control_loop.slots import all_attempts
from hpc_router.cluster.launchers.interface import ROUTER, JobState
from hpc_router.cluster.launchers.select import check_reach
from hpc_router.cluster.launchers.slurm.pending_reasons import explain_pending
from hpc_router.cluster.planning.classifier_training import needs_training, trained_classifier
from hpc_router.cluster.planning.plan import Plan, make_plan
from hpc_router.cluster.planning.run_target import RunTarget, discard, latest_of
from hpc_router.cluster.planning.share_claim import claim_share
from hpc_router.cluster.signals import Interrupted, explaining_interrupt, interrupt_event
from hpc_router.config.schema import Deployment
from hpc_router.errors import ArtefactError, HpcRouterError, LaunchError
from hpc_router.net.http_client import Unreachable, call_blocking
from hpc_router.state.job_records import Exit, FailureReason, JobDir
from hpc_router.state.registry import RecordKind, record_file, split_replica
from hpc_router.state.run_directory import RunDir, private_umask

logger = logging.getLogger(__name__)

POLL_S: Final = 0.2
ENDED_TEXT: Final = "what this `up` started has been ended"
_NOT_RUNNING: Final = (JobState.ENDED, JobState.PENDING)
"""States in which `up` need not wait for a job's end: a pending job reads the request to end before it starts."""
_FINAL: Final = frozenset({DisplayedState.READY, DisplayedState.FAILED, DisplayedState.REGISTERED})
"""States in which `up --wait all` waits for a replica no longer."""


class Reporter(Protocol):
    """Interface of an object that shows the progress of `up`."""

    def begin(self, run: RunDir, plan: Plan) -> None: ...

    def show(self, shown: Sequence[ReplicaView]) -> None: ...


@dataclass(frozen=True, slots=True)
class Served:
    """The result of `up`: a router serves at `url`. `shown`: the views of all replicas."""

    run: RunDir
    url: str
    shown: Sequence[ReplicaView] = field(default_factory=tuple)

    @property
    def failed(self) -> list[ReplicaView]:
        """Returns the views of the replicas whose slots were given up."""
        return [view for view in self.shown if view.state is DisplayedState.FAILED]


def up(target: RunTarget, *, wait_all: bool, reporter: Reporter) -> Served:
    """Starts the deployment and returns once its router serves. `wait_all`: whether to wait until no expert is starting
    any more. Raises ConfigError before anything is created, LaunchError if nothing can serve, and Interrupted after
    Ctrl-C."""
    deployment, run = target.deployment, target.run
    wanted = deployment if run is None else with_desired_counts(deployment, desired_of(run, deployment))
    check_reach(deployment)
    plan = make_plan(wanted, run=target.planned)
    before = latest_of(Path(deployment.runs))
    with interrupt_event() as interrupted:
        run, made = target.open()
        with explaining_interrupt(lambda: _left_by_interrupt(run, made=made, before=before)):
            try:
                attempt = _BringUp(run, deployment, made_over=before if made else None, made=made)
                reporter.begin(run, plan)
                claim_share(run, deployment)
                train_classifier(run, deployment)
            except (OSError, HpcRouterError):
                if made:  # nothing was submitted yet
                    discard(run, before=before)
                raise
            served = attempt.wait(wait_all=wait_all, reporter=reporter, interrupted=interrupted)
    if served is None:
        raise Interrupted(ENDED_TEXT)
    return served


def _left_by_interrupt(run: RunDir, *, made: bool, before: str | None) -> str:
    """Returns the text for the user after a second Ctrl-C: which jobs and files are left. `made`: whether this call
    created the run directory, which is removed if it has no jobs. `before`: the run to which `latest` pointed."""
    if made and not unended_jobs(run):
        discard(run, before=before)
        return ENDED_TEXT
    return leftover_text(run)


def train_classifier(run: RunDir, deployment: Deployment, *, replace: bool = False) -> None:
    """Trains the classifier from the experts' exemplars, if the run needs one and has none. `replace`: whether to train
    a new one even if the run has one."""
    if not needs_training(deployment) or (run.classifier.is_dir() and not replace):
        return
    try:
        with private_umask():
            trained_classifier(deployment, progress=lambda *_: None).write(run.classifier)
    except ArtefactError:
        if not run.classifier.is_dir():  # another `up` may have written it in the meantime
            raise


class _BringUp:
    """One call of `up`. Remembers the jobs that it submitted, so that it can end them after Ctrl-C."""

    def __init__(self, run: RunDir, deployment: Deployment, *, made: bool, made_over: str | None) -> None:
        self._run, self._made, self._made_over = run, made, made_over
        self._control = ControlLoop(run, deployment=deployment)
        observed = self._control.preview().observed
        self._fresh = not any(attempt.live for attempt in all_attempts(observed))
        self._submitted: set[str] = set()
        want_up(run, observed)

    def wait(self, *, wait_all: bool, reporter: Reporter, interrupted: threading.Event) -> Served | None:
        """Runs passes until the router serves, and returns the result. Returns None after the first Ctrl-C, once the
        jobs that this call of `up` submitted have ended. Raises LaunchError if nothing can serve."""
        while not interrupted.is_set():
            seen = self._control.run_pass()  # safe beside the router's own loop: claims decide
            self._submitted |= set(seen.submitted)
            if seen.desired.down:
                raise LaunchError(f"{self._run.path} was taken down by `hpc-router down` in the meantime")
            shown = views(seen, self._control.observer.records)
            reporter.show(shown)
            url = self._serving(shown, wait_all=wait_all)
            if url is not None:
                return Served(self._run, url, tuple(shown))
            reasons = _cannot_serve(shown)
            if reasons and not seen.submitted:
                self._cancel_unstartable(shown)
                self._end_submitted()
                raise LaunchError(reasons)
            interrupted.wait(POLL_S)
        names = ", ".join(sorted(self._submitted)) or "what was begun"
        logger.warning("interrupted: ending %s; press Ctrl-C again to leave without waiting", names)
        self._end_submitted()
        if self._made:
            discard(self._run, before=self._made_over)
        return None

    def _serving(self, shown: Sequence[ReplicaView], *, wait_all: bool) -> str | None:
        """Returns the router's address once the router and at least one expert serve; None before that. With
        `wait_all`, returns None while an expert is starting, or is ready and the router has not found it yet."""
        routers = [v for v in shown if v.kind is RecordKind.ROUTER and v.state is DisplayedState.READY and v.url]
        if not routers or routers[-1].url is None:
            return None
        experts = expert_views(shown)
        if wait_all and any(view.state not in _FINAL and _never_starts(view) is None for view in experts):
            return None
        url, record = routers[-1].url, record_file(self._run.registry / f"{routers[-1].replica}.json").read()
        path, certificate = "/ready" if experts else "/health", None if record is None else record.certificate
        try:
            ready = call_blocking("GET", url + path, certificate=certificate).status == 200
        except Unreachable:
            return None
        serving = [view.replica for view in experts if view.state is DisplayedState.READY]
        return url if ready and (not wait_all or found_by_router(self._run, serving)) else None

    def _cancel_unstartable(self, shown: Sequence[ReplicaView]) -> None:
        """Cancels those jobs of this call of `up` that Slurm will never start, and records the reason as their end, so
        that `why` shows it afterwards."""
        found = {
            v.replica: why for v in shown if v.replica in self._submitted and (why := _never_starts(v)) is not None
        }
        self._control.cancel(list(found))
        for replica, reason in found.items():
            record_exit(JobDir(self._run, replica), Exit(ok=False, reason=FailureReason.REFUSED, message=reason))

    def _end_submitted(self) -> None:
        """Ends the jobs that this call of `up` submitted. Ends the whole deployment if the router's job is among them
        and no job ran before this call."""
        if self._fresh and any(split_replica(name)[0] == ROUTER for name in self._submitted):
            down(self._run, watcher=NoWatcher())
            return
        control, left = self._control, sorted(self._submitted)
        control.cancel(left)
        deadline = time.monotonic() + control.deployment.cluster.drain_s
        while left and time.monotonic() < deadline:
            time.sleep(POLL_S)
            left = [name for name, report in control.launcher.observe(left).items() if report.state not in _NOT_RUNNING]
        if left:
            control.kill(left)


def _cannot_serve(shown: Sequence[ReplicaView]) -> str | None:
    """Returns the reasons if it is certain that the router will not serve, or that no expert will; else None."""
    reasons = {view.replica: reason for view in shown if (reason := _cannot_become_ready(view)) is not None}
    experts = [view.replica for view in expert_views(shown)]
    router_lost = any(view.kind is RecordKind.ROUTER and view.replica in reasons for view in shown)
    if not router_lost and (not experts or any(replica not in reasons for replica in experts)):
        return None
    unseen = next((view for view in shown if view.reason is FailureReason.RUN_UNSEEN), None)
    if unseen is not None:  # each job would fail in the same way
        advice = FAILURE_ADVICE[FailureReason.RUN_UNSEEN]
        return f"{unseen.message}, so nothing can serve ({advice})"
    alike: dict[str, list[str]] = {}
    for replica, reason in reasons.items():
        alike.setdefault(reason, []).append(replica)
    lines = [f"{', '.join(replicas)}: {reason}" for reason, replicas in alike.items()]
    return "\n".join([*lines, "nothing can serve"])


def _cannot_become_ready(view: ReplicaView) -> str | None:
    """Returns why the replica will never be ready; None if it may become ready."""
    return f"{view.reason}: {view.message}" if view.state is DisplayedState.FAILED else _never_starts(view)


def _never_starts(view: ReplicaView) -> str | None:
    """Returns why the replica's job will never start with its present options; None if it may start."""
    waiting = explain_pending(view.pending_reason, view.job_id) if view.pending_reason is not None else None
    return (
        f"{view.pending_reason}: {waiting.what}; {waiting.advice}" if waiting is not None and waiting.hopeless else None
    )
