"""A snapshot of the user's Slurm jobs from one call of `squeue`, shared by all processes that observe a run.

The snapshot is a file in the run directory, so that the Slurm controller is queried once per `cluster.ask_s`, however
many loops and verbs there are. A process that finds the snapshot too old creates a lock file and makes the next query;
a verb that needs the present state queries at once. If the controller does not answer, the last snapshot is used.
"""

import contextlib
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any, Final

from hpc_router.cluster.launchers.commands import SlurmCommandError, run_slurm_command
from hpc_router.errors import RegistryError
from hpc_router.state.atomic_files import replace_json
from hpc_router.state.run_directory import RunDir
from hpc_router.state.stamped_file import StampedFile

logger = logging.getLogger(__name__)

TIMEOUT_S: Final = 30.0
_FORMAT: Final = "%i\t%T\t%N\t%S\t%e\t%j\t%Z\t%P\t%r"
MAX_CLOCK_SKEW_S: Final = 5.0
"""A snapshot dated more than this many seconds in the future is ignored, because a clock was wrong."""


@dataclass(frozen=True, slots=True)
class QueuedJob:
    """One job in Slurm's queue; times are Unix seconds. `starts_at`: Slurm's estimate for a waiting job. `name` and
    `folder`, the job's working folder, identify a job whose id is not recorded."""

    state: str
    node: str | None = None
    reason: str | None = None
    starts_at: float | None = None
    ends_at: float | None = None
    name: str | None = None
    folder: str | None = None


@dataclass(frozen=True, slots=True)
class QueueSnapshot:
    """All jobs of this user at `asked_at` (Unix seconds), including those that ended a few minutes ago."""

    asked_at: float
    jobs: Mapping[str, QueuedJob] = field(default_factory=dict)


class Queue:
    """Slurm's queue of the user's jobs, with the snapshot that the processes of one run share."""

    def __init__(self, run: RunDir, *, ask_s: float) -> None:
        self._file = run.squeue_json
        self._shared = StampedFile(run.squeue_json, _from_json)
        self._claim = run.path / ".squeue.asking"
        self._ask_s = ask_s
        self._snapshot: QueueSnapshot | None = None
        self.answers = 0
        """Number of answers that Slurm gave to this process itself."""
        self.trouble: str | None = None
        """Why the last query of this process failed."""

    def snapshot(self, *, fresh: bool = False) -> QueueSnapshot | None:
        """Returns the newest snapshot; None if Slurm has never answered. `fresh`: whether to query Slurm now."""
        if not fresh:
            self._read()
            if self._snapshot is not None and abs(time.time() - self._snapshot.asked_at) < self._ask_s:
                return self._snapshot
        with self._asking(fresh=fresh) as mine:
            if mine:
                self._ask()
        return self._snapshot

    def _ask(self) -> None:
        asked_at = time.time()
        try:
            jobs = ask_squeue()
        except SlurmCommandError as error:
            logger.warning("the queue cannot be read: %s", error)
            self.trouble = str(error)
            self._read()
            return
        self.trouble = None
        self._snapshot = QueueSnapshot(asked_at, jobs)
        self.answers += 1
        with contextlib.suppress(OSError):  # the file system stalls; this process keeps its own copy
            replace_json(self._file, asdict(self._snapshot))

    def _read(self) -> None:
        snapshot = None
        with contextlib.suppress(OSError):
            snapshot = self._shared.read()
        if snapshot is None or snapshot.asked_at > time.time() + MAX_CLOCK_SKEW_S:
            return
        if self._snapshot is None or snapshot.asked_at > self._snapshot.asked_at:
            self._snapshot = snapshot

    @contextlib.contextmanager
    def _asking(self, *, fresh: bool) -> Iterator[bool]:
        """Yields whether this process may query Slurm now: `fresh` is set, it has created the lock file, or the lock
        file cannot be created. Removes a lock file that is older than `ask_s`, because its process has died."""
        if fresh:
            yield True
            return
        try:
            os.close(os.open(self._claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):
                if time.time() - self._claim.stat().st_mtime > self._ask_s:
                    self._claim.unlink()
            yield False
            return
        except OSError:  # no claim can be made: two queries are better than none
            yield True
            return
        try:
            yield True
        finally:
            self._claim.unlink(missing_ok=True)


def stored_snapshot(run: RunDir) -> QueueSnapshot | None:
    """Returns the newest snapshot that the processes of a run have stored, however old it is; None if there is none."""
    with contextlib.suppress(OSError):
        return StampedFile(run.squeue_json, _from_json).read()
    return None


def ask_squeue() -> dict[str, QueuedJob]:
    """Returns the user's jobs by id, from one call of `squeue`. Raises SlurmCommandError."""
    argv = ["squeue", "--me", "--states=all", "--noheader", f"--format={_FORMAT}"]
    return parse_squeue(run_slurm_command(argv, timeout_s=TIMEOUT_S, environment={"SLURM_TIME_FORMAT": "standard"}))


def running_steps(job_ids: Iterable[str]) -> set[str]:
    """Returns the ids (`JOB.STEP`) of the steps that run in these jobs. Raises SlurmCommandError."""
    argv = ["squeue", "--steps", "--noheader", "--format=%i", f"--jobs={','.join(sorted(set(job_ids)))}"]
    return set(run_slurm_command(argv, timeout_s=TIMEOUT_S).split())


def parse_squeue(text: str) -> dict[str, QueuedJob]:
    """Returns the jobs by id, from the output of squeue."""
    jobs = {}
    for line in text.splitlines():
        words = [word.strip() for word in line.split("\t", 8)]
        if len(words) == 9:
            job_id, state, node, starts, ends, name, folder, partition, reason = words
            if "," in partition and reason.startswith("Partition"):  # the reason is that of the last partition
                reason = f"{reason} for one of the partitions {partition}"
            jobs[job_id] = QueuedJob(
                state=state,
                node=node or None,
                reason=None if reason in ("", "None") else reason,
                starts_at=_unix(starts),
                ends_at=_unix(ends),
                name=name or None,
                folder=folder or None,
            )
    return jobs


def _unix(text: str) -> float | None:
    """Returns Unix seconds from local time as Slurm prints it; None for `N/A` and `Unknown`."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def _from_json(value: Mapping[str, Any]) -> QueueSnapshot:
    try:
        jobs = {str(job_id): QueuedJob(**job) for job_id, job in value["jobs"].items()}
        return QueueSnapshot(float(value["asked_at"]), jobs)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RegistryError(f"not a snapshot of the queue: {error!r}") from error
