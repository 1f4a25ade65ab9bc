"""Removes the job folders and logs of generations that ended long ago. Only the leading loop does this.

These generations are kept: live jobs and all replicas in the same Slurm job; the newest generation of a slot, which
determines the next number; the newest generation of a slot that has ended; and every generation that ended less than
MIN_AGE_S ago. Of the others, a slot keeps the newest `cluster.keep_generations`, for at most `cluster.keep_days` days.
"""

import logging
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from typing import Final

from hpc_router.cluster.control_loop.slots import Attempt, Observed
from hpc_router.cluster.launchers.interface import JobState
from hpc_router.config.schema import ClusterConfig
from hpc_router.errors import RegistryError
from hpc_router.state.log_file import rotated_path
from hpc_router.state.registry import split_replica
from hpc_router.state.run_directory import RunDir

logger = logging.getLogger(__name__)

MIN_AGE_S: Final = 3600.0
"""Minimum age in seconds of a generation that is removed."""
INTERVAL_S: Final = 60.0
"""Minimum interval between removals, in seconds."""
MAX_REMOVED: Final = 50
"""Maximum number of job folders that one call removes."""
MAX_CALL_S: Final = 0.5
"""Time limit of one call in seconds, so that it does not delay a pass."""
_REMOVED: Final = ".removed-"
"""Prefix of the name that a folder gets before its removal, because a half-removed folder would look like a claim
without a job."""
DAY_S: Final = 86400.0


def expired(observed: Observed, cluster: ClusterConfig, now: float) -> list[Attempt]:
    """Returns the generations whose files are to be removed, oldest first. Pure. `now`: Unix seconds."""
    held = {a.job_id for attempts in observed.values() for a in attempts if not _is_over(a)}
    count = max(cluster.keep_generations, cluster.max_failures)  # failures in a row are counted from these records
    found = []
    for attempts in observed.values():
        over = [a for a in attempts[:-1] if _is_over(a) and (a.job_id is None or a.job_id not in held)]
        if over and not _is_over(attempts[-1]):
            over.pop()  # keeps the newest generation that has ended
        for place, attempt in enumerate(reversed(over), start=2):
            assert attempt.exit is not None
            age_s = now - attempt.exit.at
            if age_s >= MIN_AGE_S and (place > count or age_s >= cluster.keep_days * DAY_S):
                found.append((attempt.exit.at, attempt.generation, attempt))
    return [attempt for *_, attempt in sorted(found, key=itemgetter(0, 1))]


def _is_over(attempt: Attempt) -> bool:
    """Returns whether the attempt has ended and holds no resources."""
    return attempt.exit is not None and (attempt.job is JobState.ENDED or not attempt.submitted)


class Retention:
    """Removes the files of expired generations, at most MAX_REMOVED generations per INTERVAL_S."""

    def __init__(self, run: RunDir, cluster: ClusterConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._run, self._cluster = run, cluster
        self._clock = clock
        self._due_at = -float("inf")

    def apply(self, observed: Observed, now: float) -> list[str]:
        """Removes the files of expired generations and returns their replicas. Logs an error instead of raising it; the
        next call tries again."""
        began = self._clock()
        if began < self._due_at:
            return []
        self._due_at = began + INTERVAL_S
        removed: list[str] = []
        try:
            self._remove_old_events(now)
            self._remove_leftovers()
            doomed = [attempt.replica for attempt in expired(observed, self._cluster, now)[:MAX_REMOVED]]
            logs = self._logs() if doomed else {}
            for replica in doomed:
                if self._clock() - began > MAX_CALL_S:
                    break
                self._remove(replica, logs.get(replica, ()))
                removed.append(replica)
        except OSError as error:
            logger.warning("old generations cannot be removed: %s", error)
        if removed:
            logger.info("removed the files of %s", ", ".join(removed))
        return removed

    def _logs(self) -> dict[str, list[Path]]:
        """Returns the log files of each replica. For example, `math-0.g3.rank1.engine.log.1` belongs to math-0.g3."""
        logs: defaultdict[str, list[Path]] = defaultdict(list)
        with os.scandir(self._run.logs) as entries:
            for entry in entries:
                replica = ".".join(entry.name.split(".")[:2])
                with suppress(RegistryError):
                    split_replica(replica)
                    logs[replica].append(Path(entry.path))
        return logs

    def _remove(self, replica: str, logs: list[Path] | tuple[()]) -> None:
        """Removes a replica's logs, and then its job folder. If the removal is interrupted, the next one repeats it,
        because the folder still exists."""
        for path in logs:
            path.unlink(missing_ok=True)
        renamed = self._run.jobs / f"{_REMOVED}{replica}"
        with suppress(FileNotFoundError):  # another loop has removed it
            (self._run.jobs / replica).rename(renamed)
            shutil.rmtree(renamed, ignore_errors=True)

    def _remove_leftovers(self) -> None:
        """Removes job folders that an earlier call renamed but could not remove. On NFS, a file that is open keeps its
        folder from being removed."""
        with os.scandir(self._run.jobs) as entries:
            left = [entry.path for entry in entries if entry.name.startswith(_REMOVED)]
        for path in left[:MAX_REMOVED]:
            shutil.rmtree(path, ignore_errors=True)

    def _remove_old_events(self, now: float) -> None:
        """Removes the older part of `events.jsonl` once it is older than `cluster.keep_days`."""
        older = rotated_path(self._run.events)
        with suppress(FileNotFoundError):
            if now - older.stat().st_mtime >= self._cluster.keep_days * DAY_S:
                older.unlink()
