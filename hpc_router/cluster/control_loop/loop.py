"""The control loop, whose passes each observe, decide and act.

Passes run in commands, in a router's job and from cron. Several passes at once are safe: a claim decides which one
submits a job, and every other action may be repeated. If a pass fails, the error is logged and the next pass tries
again. An error of a job or of the file system never ends the loop.
"""

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from hpc_router import __version__
from hpc_router.cluster.control_loop.desired_state import (
    deployment_of,
    desired_of,
    excluded_nodes,
    forgotten_nodes,
    version_of,
    want_down,
)
from hpc_router.cluster.control_loop.drain_calls import ask_to_drain
from hpc_router.cluster.control_loop.elastic_counts import BY, ElasticCounts, is_idle
from hpc_router.cluster.control_loop.forecast import ForecastFiles
from hpc_router.cluster.control_loop.gpu_hours import GpuHours
from hpc_router.cluster.control_loop.handover import Due, Durations, measured, schedule, served_until_ready
from hpc_router.cluster.control_loop.job_requests import job_requests
from hpc_router.cluster.control_loop.node_exclusion import NodeExclusion
from hpc_router.cluster.control_loop.notices import Notifier, problems
from hpc_router.cluster.control_loop.observer import RunObserver
from hpc_router.cluster.control_loop.reconcile import (
    Action,
    Cancel,
    Desired,
    Drain,
    GiveUp,
    Kill,
    ReleaseJob,
    Submit,
    reconcile,
)
from hpc_router.cluster.control_loop.retention import Retention
from hpc_router.cluster.control_loop.slots import Observed, all_attempts
from hpc_router.cluster.launchers.interface import ROUTER, JobRequest, JobState, Launcher
from hpc_router.cluster.launchers.select import launcher_for
from hpc_router.cluster.launchers.slurm.node_fit import partition_of
from hpc_router.cluster.signals import ignored, interrupt_event
from hpc_router.config.revision import revisions
from hpc_router.config.schema import Deployment
from hpc_router.errors import LaunchError
from hpc_router.net.job_environment import END_SIGNALS, WARNING_SIGNALS
from hpc_router.net.tie import when_stdin_ends
from hpc_router.state import registry
from hpc_router.state.atomic_files import exists_now
from hpc_router.state.demand import read_demand
from hpc_router.state.forecast import FAILED, NO_GPUS, SCALED_TO_ZERO
from hpc_router.state.job_reader import JobReader
from hpc_router.state.job_records import FailureReason, JobDir, JobPhase, Stop
from hpc_router.state.registry import RecordKind, leading_router, split_replica
from hpc_router.state.run_directory import RunDir
from hpc_router.state.stamped_file import Stamp, stamp_at

logger = logging.getLogger(__name__)

MAX_SUBMITTED_PER_PASS: Final = 32
"""Maximum number of jobs submitted per pass, so that a lower replica count takes effect before all jobs are
submitted."""
MAX_MISSED_PASSES: Final = 5
"""Number of consecutive passes without a run directory after which it counts as removed."""


@dataclass(frozen=True, slots=True)
class LoopPass:
    """One pass: its desired and observed state, and its actions. `durations`: measured times by expert. `handovers`: by
    replica, when each ready replica with a known walltime hands over. `submitted`: replicas whose jobs the pass
    submitted. `refused`: the error if Slurm refused a job; else None."""

    desired: Desired
    observed: Observed
    actions: Sequence[Action]
    durations: Mapping[str, Durations]
    handovers: Mapping[str, Due]
    submitted: Sequence[str] = ()
    refused: str | None = None

    @property
    def given_up(self) -> list[GiveUp]:
        return [action for action in self.actions if isinstance(action, GiveUp)]


class ControlLoop:
    """The control loop of one run: observes the run and carries out the actions. `read_only`: whether the loop must not
    write to the run directory; the caller then uses only `preview`."""

    def __init__(
        self,
        run: RunDir,
        *,
        deployment: Deployment | None = None,
        launcher: Launcher | None = None,
        read_only: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.run = run
        self.deployment = deployment or deployment_of(run)
        reader = JobReader(run, clock=clock)
        self.launcher = launcher or launcher_for(run, self.deployment, reader)
        self.observer = RunObserver(run, self.launcher, reader=reader, clock=clock, read_only=read_only)
        self._reported: set[str] = set()
        self._forecast = ForecastFiles(run)
        self._nodes = NodeExclusion(run, self.deployment, clock=clock)
        self._retention = Retention(run, self.deployment.cluster, clock=clock)
        self._notifier = Notifier(run, self.deployment.cluster.notify, clock=clock)
        self._elastic = ElasticCounts(run, self.deployment)
        self._gpu_hours = GpuHours(run)
        self._released: set[str] = set()
        self._handed_over: set[str] = set()
        self._revisions: Mapping[str, str] | None = None
        self._excluded: tuple[str, ...] | None = None

    def preview(self, *, clear: bool = False, fresh: bool = False) -> LoopPass:
        """Returns a pass without carrying out its actions. `clear`: whether every live job must end, even routers and
        jobs that were started by hand. `fresh`: whether to query the Slurm controller now."""
        # The desired state is read last: if `down` ended jobs meanwhile, no pass takes their end for a failure.
        observed = self.observer.observe(fresh=fresh)
        return self.decide(replace(self._desired(), clear=clear), observed)

    def _desired(self) -> Desired:
        """Returns the desired state. If its config revisions are not those of this loop's config, returns it without
        revisions, so that no job counts as outdated. This happens when `apply` is about to replace the config, or has
        replaced it since this loop read it."""
        desired = desired_of(self.run, self.deployment)
        if desired.revisions and self._revisions is None:
            self._revisions = revisions(self.deployment)
        return desired if desired.revisions == self._revisions else replace(desired, revisions={})

    def decide(self, desired: Desired, observed: Observed) -> LoopPass:
        durations = measured(observed)
        handovers = schedule(observed, desired.handovers, durations)
        actions = reconcile(desired, observed, time.time(), handovers)
        return LoopPass(desired, observed, actions, durations, handovers)

    def run_pass(self, *, clear: bool = False, fresh: bool = False, leading: bool = False) -> LoopPass:
        """Carries out one pass and returns what it saw and did. `clear`, `fresh`: as for `preview`. `leading`: whether
        this is the leading loop, which decides on the number of replicas of elastic experts. If Slurm refuses a
        submission, the pass has the error in `refused`, and an exit record is written, so that later passes count the
        refusal as a failure of the slot."""
        seen = self.preview(clear=clear, fresh=fresh)
        if leading:
            seen = self._follow_demand(seen)
        for replica in self.observer.lost:
            self.run.event("lost", replica=replica)
        # Submissions come first: scancel may take many seconds for a job whose node is lost.
        submitted, refused = self._submit([a for a in seen.actions if isinstance(a, Submit)], seen.desired.excluded)
        self.apply_exclusions(seen, submitted)
        self._drain([a for a in seen.actions if isinstance(a, Drain)])
        self.cancel([a.replica for a in seen.actions if isinstance(a, Cancel)])
        self.kill([a.replica for a in seen.actions if isinstance(a, Kill)])
        self._report_given_up(seen.given_up)
        self._withdraw_dead(seen)
        self._release([a for a in seen.actions if isinstance(a, ReleaseJob)], seen.desired.excluded)
        return replace(seen, submitted=submitted, refused=refused)

    def _follow_demand(self, seen: LoopPass) -> LoopPass:
        """Returns the pass with the numbers of replicas that the present demand needs. If the run had no request for as
        long as `down --when-idle` allows, takes the run down; its routers end last."""
        desired, observed, idle_s = seen.desired, seen.observed, seen.desired.down_when_idle_s
        if desired.down:
            over = not any(a.holds_resources for a in all_attempts(observed) if a.slot.expert != ROUTER)
            return self.decide(replace(desired, clear=True), observed) if idle_s is not None and over else seen
        if idle_s is not None:
            demand = read_demand(self.run, self._routers())
            if is_idle(demand, idle_s, since=desired.idle_from, now=time.time()):
                self.run.event("down", reason=f"no request for {idle_s:.0f} s", by=BY)
                want_down(self.run)
                return self.decide(self._desired(), observed)
        if desired.elastic:
            given_up = {action.slot for action in seen.given_up}
            self._elastic.update(desired, observed, self._routers(), seen.handovers, seen.durations, failed=given_up)
            return self.decide(self._desired(), observed)
        return seen

    def _routers(self) -> list[str]:
        """Returns the names of the routers that have a record."""
        return [name for name, record in self.observer.records.items() if record.kind is RecordKind.ROUTER]

    def publish(self, seen: LoopPass) -> None:
        """Reports what the pass has found: notifies the user of new problems, writes forecasts, completed handovers,
        GPU hours and node exclusions, and removes the files of old generations. Only the leading loop calls this."""
        elastic, full = seen.desired.elastic, self.run.space_error()
        self._notifier.look(problems(seen.given_up, self._forecast.handovers, elastic, full))
        partitions = {
            expert: partition_of(self.deployment, expert) for expert in {slot.expert for slot in seen.desired.slots()}
        }
        experts = self.deployment.experts
        adapters = {name: host for name, expert in experts.items() if (host := expert.adapter_of) is not None}
        self._forecast.write(
            seen.observed,
            seen.handovers,
            seen.durations,
            partitions,
            time.time(),
            absent=self._absent(seen),
            adapters=adapters,
        )
        self._report_handovers(seen.observed)
        demand = read_demand(self.run, self._routers())
        self._gpu_hours.update(seen.observed, seen.desired.gpus, demand, time.time())
        if self._nodes.apply(seen.observed, time.time()):
            self.apply_exclusions(seen)
        self._retention.apply(seen.observed, time.time())

    def _absent(self, seen: LoopPass) -> dict[str, str]:
        """Returns the experts that may have no job now, each with the reason: it gets one on demand, or in the next
        passes, or none because all its slots are given up."""
        if seen.desired.down:
            return {}
        given_up = {action.slot for action in seen.given_up}
        wanted = {slot.expert for slot in seen.desired.slots() if slot not in given_up and slot.expert != ROUTER}
        asleep = {name for name in seen.desired.elastic if not seen.desired.replicas.get(name)}
        blocked = self._elastic.blocked()
        absent = dict.fromkeys((slot.expert for slot in given_up if slot.expert != ROUTER), FAILED)
        absent |= dict.fromkeys(wanted, JobPhase.STARTING.value)
        return absent | {name: NO_GPUS if name in blocked else SCALED_TO_ZERO for name in asleep}

    def _report_handovers(self, observed: Observed) -> None:
        """Writes an event for each replica that became ready while its predecessor served. A file in the replica's
        folder records this, so that another loop does not write the event again."""
        ready = {attempts[-1].replica: attempts for attempts in observed.values() if attempts[-1].ready}
        seen, self._handed_over = self._handed_over, set(ready)
        for attempts in (attempts for replica, attempts in ready.items() if replica not in seen):
            newest = attempts[-1]
            before = next((a for a in reversed(attempts[:-1]) if served_until_ready(a, newest)), None)
            if before is not None and JobDir(self.run, newest.replica).report_handover():
                reason = f"{before.replica} served until it was ready"
                self.run.event("handover_done", replica=newest.replica, expert=newest.slot.expert, reason=reason)

    def _release(self, wanted: Sequence[ReleaseJob], excluded: tuple[str, ...]) -> None:
        new = [action for action in wanted if action.replica not in self._released]
        self._released |= {action.replica for action in new}
        if wanted:
            self.launcher.release(self._requests([action.replica for action in wanted], excluded))
        for action in new:
            self._handover_started(action.replica, action.replaces)

    def _handover_started(self, replica: str, replaces: str) -> None:
        reason = f"it is to replace {replaces}"
        self.run.event("handover_started", replica=replica, expert=split_replica(replica)[0], reason=reason)

    def _requests(self, replicas: Sequence[str], excluded: tuple[str, ...]) -> list[JobRequest]:
        return job_requests(self.run, self.deployment, replicas, exclude=excluded)

    def _submit(self, wanted: Sequence[Submit], excluded: tuple[str, ...]) -> tuple[list[str], str | None]:
        if not wanted:
            return [], None
        after = {action.replica: action.after for action in wanted[:MAX_SUBMITTED_PER_PASS]}
        requests = [replace(r, after=after[r.replica]) for r in self._requests(list(after), excluded)]
        refused = None
        try:
            submitted = self.launcher.submit(requests)
        except LaunchError as error:
            refused = str(error)
            submitted = [r.replica for r in requests if JobDir(self.run, r.replica).info() is not None]
            self.run.event("refused", message=refused)
        for replica in submitted:
            logger.info("submitted %s", replica)
            self.run.event("submitted", replica=replica)
        for action in wanted:
            if action.replaces is not None and action.replica in submitted:
                self._handover_started(action.replica, action.replaces)
        return submitted, refused

    def apply_exclusions(self, seen: LoopPass, submitted: Sequence[str] = ()) -> None:
        """Tells Slurm the run's excluded nodes for the jobs in the queue, if these nodes have changed since the last
        call. `submitted`: jobs that this pass submitted with the nodes that were excluded at its beginning. If another
        node was excluded since then, jobs that have started in the meantime are ended, because they may run there. If
        Slurm does not answer, the next call tries again."""
        wanted = excluded_nodes(self.run)
        if self._excluded is None and not wanted and not forgotten_nodes(self.run):
            self._excluded = wanted  # no job can have been submitted with other nodes
        if wanted == self._excluded or self.launcher.trouble() is not None:
            return
        waiting = [a.replica for a in all_attempts(seen.observed) if a.live and a.job is JobState.PENDING]
        try:
            started = self.launcher.update_exclusions(self._requests([*waiting, *submitted], wanted))
        except LaunchError as error:
            logger.warning("the excluded nodes of the jobs in the queue are not changed yet: %s", error)
            return
        self._excluded = wanted
        if set(wanted) - set(seen.desired.excluded):
            self.cancel(started)

    def _drain(self, wanted: Sequence[Drain]) -> None:
        for action in wanted:
            JobDir(self.run, action.replica).write(Stop(drain_at=time.time(), until_at=action.until_at))
            self.run.event("drain", replica=action.replica)
        records = [self.observer.records[a.replica] for a in wanted if a.replica in self.observer.records]
        ask_to_drain(self.run, records, {action.replica: action.until_at for action in wanted})

    def cancel(self, replicas: Sequence[str]) -> None:
        """Asks these jobs to end, including those that have not started."""
        for replica in replicas:
            self._stamp_cancel(replica)
            self.run.event("cancel", replica=replica)
        self.launcher.cancel(replicas)
        for replica in replicas:
            self._stamp_cancel(replica)  # repeated, because scancel may take a minute and the drain time starts now

    def _stamp_cancel(self, replica: str) -> None:
        job = JobDir(self.run, replica)
        job.write(replace(job.stop() or Stop(), cancel_at=time.time()))

    def kill(self, replicas: Sequence[str]) -> None:
        for replica in replicas:
            job = JobDir(self.run, replica)
            stop = job.stop() or Stop()
            if stop.kill_at is None:  # only the first kill is logged; the kill is repeated until the job has ended
                logger.warning("%s did not end in its drain time: killing it", replica)
                self.run.event("kill", replica=replica)
            job.write(replace(stop, kill_at=time.time()))
        self.launcher.kill(replicas)

    def _report_given_up(self, given_up: Sequence[GiveUp]) -> None:
        """Logs each slot that was given up, once. Slots that failed for the same reason share one line."""
        fresh: dict[tuple[FailureReason, str], list[GiveUp]] = {}
        for action in given_up:
            if str(action.slot) not in self._reported:
                end = action.exit
                same = "" if end.reason is FailureReason.RUN_UNSEEN else end.message  # that message names the node
                fresh.setdefault((end.reason, same), []).append(action)
                self.run.event("gave_up", slot=str(action.slot), reason=end.reason.value)
        for (reason, _), actions in fresh.items():
            slots = ", ".join(str(action.slot) for action in actions)
            logger.warning("%s failed for good: %s: %s", slots, reason, actions[0].exit.message)
        self._reported = {str(action.slot) for action in given_up}

    def leads(self, replica: str) -> bool:
        """Returns whether the router `replica` leads, that is, whether no newer router is live."""
        records = self.observer.read_records()
        reports = self.launcher.observe([name for name, r in records.items() if r.kind is RecordKind.ROUTER])
        living = {n: r for n, r in records.items() if n not in reports or reports[n].state is not JobState.ENDED}
        leader = leading_router(living)
        return leader is None or leader.generation <= split_replica(replica)[2]

    def _withdraw_dead(self, seen: LoopPass) -> None:
        """Removes the registry records of jobs that have ended."""
        for attempts in seen.observed.values():
            for attempt in attempts:
                if attempt.replica in self.observer.records and attempt.job in (JobState.ENDING, JobState.ENDED):
                    registry.withdraw(self.run.registry, attempt.replica)
                    logger.info("removed the record of %s, which has ended", attempt.replica)


def run_loop(run: RunDir, *, while_leading: str | None = None, tied: bool = False) -> None:
    """Runs a pass every `cluster.reconcile_s` seconds until SIGTERM or SIGINT, or until the run directory is removed.
    Skips passes once `apply` has moved the run to another version of this package. `while_leading`: name of a router;
    passes are skipped while another router leads. `tied`: whether the loop ends when stdin is closed, and so with the
    process at the other end of the pipe."""
    config, control, missed = _stamp(run), ControlLoop(run), 0
    with _stop_event(tied=tied) as stop:
        while not stop.is_set() and missed < MAX_MISSED_PASSES:
            pause_s = control.deployment.cluster.reconcile_s
            try:
                if (stamp := _stamp(run)) != config:  # `apply` has replaced the config, or `up` has added one
                    config, control = stamp, ControlLoop(run)
                if version_of(run) in (None, __version__) and (while_leading is None or control.leads(while_leading)):
                    control.publish(control.run_pass(leading=True))
            except Exception:
                logger.exception("a pass of the control loop failed; the next one is in %.1f s", pause_s)
            missed = missed + 1 if run.is_removed() else 0
            stop.wait(pause_s)


def _stamp(run: RunDir) -> Stamp | None:
    """Returns a value that changes when `config.yaml` is replaced; None if there is no such file."""
    return stamp_at(run.config) if exists_now(run.config) else None


@contextlib.contextmanager
def _stop_event(*, tied: bool) -> Iterator[threading.Event]:
    """Yields an event that SIGTERM and SIGINT set; if `tied`, the end of stdin sets it as well. Ignores
    WARNING_SIGNALS and END_SIGNALS, and if `tied` SIGHUP: at some sites Slurm sends them to every process of a job, but
    only the router in that job must handle them."""
    unhandled = (*WARNING_SIGNALS, *END_SIGNALS, *((signal.SIGHUP,) if tied else ()))
    with ignored(*unhandled), interrupt_event(once=False) as event:
        if tied:
            when_stdin_ends(event.set)
        yield event
