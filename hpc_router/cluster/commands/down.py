"""Takes a deployment down: nothing is wanted any more, everything drains and ends, what hangs is killed.

The deadlines are the control loop's own (`reconcile`), so this only repeats passes until nothing lives. What was asked
stays in `desired.json`: a `down` that was cut off is finished by the next one or by any control loop.
"""

import logging
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

from hpc_router.cluster.control_loop.desired_state import want_down
from hpc_router.cluster.control_loop.loop import ControlLoop, LoopPass
from hpc_router.cluster.control_loop.slots import Attempt
from hpc_router.cluster.launchers.interface import JobState
from hpc_router.config.schema import Deployment
from hpc_router.errors import ConfigError, LaunchError
from hpc_router.expert.engine_process.scratch_dir import expanded, sweep
from hpc_router.state import registry
from hpc_router.state.registry import RecordKind
from hpc_router.state.run_directory import RunDir

logger = logging.getLogger(__name__)

POLL_S: Final = 0.1
REMAINING_POLL_S: Final = 2.0
"""Slurm takes a moment to clean up after a job whose processes have ended."""
CLAIM_GRACE_S: Final = 5.0
"""A claim younger than this may still become a job; so may one whose submitter lives."""


class Watcher(Protocol):
    def living(self, attempts: list[Attempt]) -> None:
        """Called after each pass with what is still there."""


class NoWatcher:
    def living(self, attempts: list[Attempt]) -> None:
        pass


def down(run: RunDir, *, watcher: Watcher | None = None) -> int:
    """How many jobs were ended. Raises LaunchError for jobs of another host, and when an `up` comes in between."""
    try:
        control = ControlLoop(run)
    except ConfigError as error:  # another version's, or damaged: no reason to let jobs run
        logger.warning("%s; its jobs are ended anyway", error)
        control = ControlLoop(run, deployment=Deployment())
    before = {a.replica for a in living(control.preview())}  # once it is asked for, the control loop may end them first
    want_down(run)
    return end_all(control, before, watcher=watcher or NoWatcher())


def end_all(control: ControlLoop, before: set[str], *, watcher: Watcher) -> int:
    """Repeat passes until nothing lives, then remove what the dead left. How many jobs were ended, those `before`
    included."""
    ended = set(before)
    while True:
        seen = control.run_pass(clear=True)
        if not seen.desired.down:
            raise LaunchError(f"{control.run.path} was started again in the meantime")
        left = living(seen)
        _refuse_other_hosts(left)
        ended |= {attempt.replica for attempt in left}
        watcher.living(left)
        if not left and not control.launcher.remaining(ended):
            break
        time.sleep(POLL_S if left else REMAINING_POLL_S)
    _remove_records(control.run)
    with suppress(OSError, ConfigError):  # what killed agents left; a missing folder is a clean one
        sweep(Path(expanded(control.deployment.cluster.scratch, os.environ)) / f"hpc-router-{os.getuid()}")
    if ended:
        control.run.event("down", replicas=sorted(ended))
    return len(ended)


def living(seen: LoopPass) -> list[Attempt]:
    """Jobs that live, and claims that may become jobs."""
    now = time.time()
    attempts = [attempt for found in seen.observed.values() for attempt in found]
    return [
        a
        for a in attempts
        if a.holds_resources or (_claimed(a) and (a.submitting or now < a.claimed_at + CLAIM_GRACE_S))
    ]


def _claimed(attempt: Attempt) -> bool:
    return not attempt.submitted and attempt.exit is None


def _refuse_other_hosts(left: list[Attempt]) -> None:
    far = [attempt for attempt in left if attempt.job is JobState.UNKNOWN]
    if far and len(far) == len(left):
        hosts = sorted({attempt.node or "?" for attempt in far})
        raise LaunchError(
            f"{', '.join(a.replica for a in far)} run on {', '.join(hosts)}, out of reach from here: "
            "run `hpc-router down` there"
        )


def _remove_records(run: RunDir) -> None:
    """Records nobody renews, the file of all records, temporary files. External endpoints stay: they are no jobs."""
    for name, record in registry.Reader(run.registry).snapshot().items():
        if record.kind is not RecordKind.EXTERNAL:
            registry.withdraw(run.registry, name)
    run.registry_json.unlink(missing_ok=True)
    for path in run.registry.glob(".*"):
        path.unlink(missing_ok=True)
