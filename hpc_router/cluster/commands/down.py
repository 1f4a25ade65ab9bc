"""Takes a deployment down: all jobs drain and end, and those that do not end in time are killed.

The deadlines are in `control_loop.reconcile`; this module repeats passes until no job is left. `desired.json` records
that the run is to be down, so that another `down` or any control loop completes a `down` that was interrupted.
"""

import logging
import os
import shlex
import time
from contextlib import suppress
from typing import Final, Protocol

from hpc_router.cluster.commands.router_access import live_router
from hpc_router.cluster.control_loop.desired_state import want_down, want_down_when_idle
from hpc_router.cluster.control_loop.loop import ControlLoop, LoopPass
from hpc_router.cluster.control_loop.slots import Attempt, all_attempts
from hpc_router.cluster.launchers.interface import JobState
from hpc_router.cluster.signals import explaining_interrupt
from hpc_router.config.schema import Deployment
from hpc_router.errors import ConfigError, LaunchError
from hpc_router.expert.engine_process.scratch_dir import expanded, sweep
from hpc_router.state import registry
from hpc_router.state.job_records import JobDir
from hpc_router.state.private_folder import user_folder
from hpc_router.state.registry import RecordKind
from hpc_router.state.run_directory import RunDir

logger = logging.getLogger(__name__)

POLL_S: Final = 0.1
REMAINING_POLL_S: Final = 2.0
"""Interval in seconds between checks for jobs that have ended and after which Slurm still cleans up."""
CLAIM_GRACE_S: Final = 5.0
"""Seconds within which a claim without a job may still become a job. After that it may only while its submitter is
alive."""


class Watcher(Protocol):
    """Interface of an object that shows the progress of `down`."""

    def living(self, attempts: list[Attempt]) -> None:
        """Shows `attempts`, the jobs that are left. Called after each pass."""


class NoWatcher:
    """A watcher that shows nothing."""

    def living(self, attempts: list[Attempt]) -> None:
        pass


def down(run: RunDir, *, watcher: Watcher | None = None) -> int:
    """Ends the deployment and returns the number of ended jobs. Raises LaunchError if all jobs that are left run on
    other hosts, or if an `up` starts in the meantime, and Interrupted after Ctrl-C."""
    with explaining_interrupt(lambda: leftover_text(run)):
        try:
            control = ControlLoop(run)
        except ConfigError as error:  # the config is damaged or of another version
            logger.warning("%s; `down` ends its jobs nevertheless", error)
            control = ControlLoop(run, deployment=Deployment())
        before = {a.replica for a in living(control.preview())}  # counted first, because the control loop may end them
        want_down(run)
        return end_all(control, before, watcher=watcher or NoWatcher())


def down_when_idle(run: RunDir, idle_s: float) -> None:
    """Makes the control loop end the deployment after `idle_s` seconds without a request. Raises LaunchError if no
    router serves whose job runs the control loop."""
    control = ControlLoop(run)
    if control.preview().desired.down:
        raise LaunchError(f"{run.path} is down already")
    if not control.deployment.router.reconcile or live_router(run) is None:
        raise LaunchError("no router runs the control loop, which would end the deployment (router.reconcile)")
    want_down_when_idle(run, idle_s)
    run.event("down_when_idle", idle_s=idle_s)


def leftover_text(run: RunDir) -> str:
    """Returns the text for the user after an interrupt: the jobs that may still run, and the command that ends them."""
    jobs, command = unended_jobs(run), f"`hpc-router down --run {shlex.quote(str(run.path))}`"
    if not jobs:
        return f"{command} removes what is left"
    return f"{', '.join(jobs)} may still run; {command} ends the deployment"


def unended_jobs(run: RunDir) -> list[str]:
    """Returns the replicas without a file that records the end of their job. Does not ask Slurm, which may take long to
    answer."""
    jobs = [JobDir(run, folder.name) for folder in run.jobs.glob("*")]
    return sorted(job.replica for job in jobs if job.exit() is None and job.ended() is None)


def end_all(control: ControlLoop, before: set[str], *, watcher: Watcher) -> int:
    """Repeats passes until no job is left, then removes the records and files of the jobs. Returns the number of ended
    jobs. `before`: replicas that had jobs before the first pass; they are counted even if they end before it."""
    ended = set(before)
    while True:
        seen = control.run_pass(clear=True)
        if not seen.desired.down:
            raise LaunchError(f"{control.run.path} was started again by `hpc-router up` in the meantime")
        left = living(seen)
        _refuse_other_hosts(left)
        ended |= {attempt.replica for attempt in left}
        watcher.living(left)
        if not left and not control.launcher.remaining(ended):
            break
        time.sleep(POLL_S if left else REMAINING_POLL_S)
    _remove_records(control.run)
    with suppress(OSError, ConfigError):  # folders of killed agents; a missing folder is fine
        sweep(user_folder(expanded(control.deployment.cluster.scratch, os.environ)))
    if ended:
        control.run.event("down", replicas=sorted(ended))
    return len(ended)


def living(seen: LoopPass) -> list[Attempt]:
    """Returns the jobs that may hold resources, and the claims that may still become jobs."""
    now = time.time()
    return [
        a
        for a in all_attempts(seen.observed)
        if a.holds_resources or (_is_claim(a) and (a.submitting or now < a.claimed_at + CLAIM_GRACE_S))
    ]


def _is_claim(attempt: Attempt) -> bool:
    return not attempt.submitted and attempt.exit is None


def _refuse_other_hosts(left: list[Attempt]) -> None:
    remote = [attempt for attempt in left if attempt.job is JobState.UNKNOWN]
    if remote and len(remote) == len(left):
        hosts = sorted({attempt.node or "?" for attempt in remote})
        raise LaunchError(
            f"{', '.join(a.replica for a in remote)} run on {', '.join(hosts)} and cannot be reached from here: "
            "run `hpc-router down` there"
        )


def _remove_records(run: RunDir) -> None:
    """Removes the records of jobs, `registry.json` and temporary files. Keeps records of external endpoints."""
    for name, record in registry.RegistryReader(run.registry).snapshot().items():
        if record.kind is not RecordKind.EXTERNAL:
            registry.withdraw(run.registry, name)
    run.registry_json.unlink(missing_ok=True)
    run.prometheus_sd_json.unlink(missing_ok=True)
    for path in run.registry.glob(".*"):
        path.unlink(missing_ok=True)
