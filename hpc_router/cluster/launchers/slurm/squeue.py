"""What `squeue` says of all our jobs, asked once for everything and shared by everybody who looks at a run.

The answer lies in the run directory, so however many replicas, loops and watchers there are, the controller is asked
once per `cluster.ask_s`; who finds the answer old enough claims the next question by making a file. A verb asks afresh.
A controller that does not answer leaves the last answer standing.
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
from hpc_router.state.atomic_files import read_json, replace_json
from hpc_router.state.run_directory import RunDir

logger = logging.getLogger(__name__)

TIMEOUT_S: Final = 30.0
_FORMAT: Final = "%i\t%T\t%N\t%S\t%e\t%j\t%Z\t%r"
MAX_CLOCK_SKEW_S: Final = 5.0
"""A view that was asked so long from now is of a clock that is wrong."""


@dataclass(frozen=True, slots=True)
class QueuedJob:
    """One job; times are Unix seconds. `starts_at` is Slurm's estimate for a job that waits. `name` and `folder`: the
    job's name and where it runs, by which a job is known that nobody here knows the id of."""

    state: str
    node: str | None = None
    reason: str | None = None
    starts_at: float | None = None
    ends_at: float | None = None
    name: str | None = None
    folder: str | None = None


@dataclass(frozen=True, slots=True)
class QueueSnapshot:
    """The queue as it was at `asked_at`: all jobs of this user, those that ended a few minutes ago included."""

    asked_at: float
    jobs: Mapping[str, QueuedJob] = field(default_factory=dict)


class Queue:
    """One run's view of the queue."""

    def __init__(self, run: RunDir, *, ask_s: float) -> None:
        self._file = run.path / "squeue.json"
        self._claim = run.path / ".squeue.asking"
        self._ask_s = ask_s
        self._view: QueueSnapshot | None = None
        self.answers = 0
        """How often this process itself has been answered."""

    def view(self, *, fresh: bool = False) -> QueueSnapshot | None:
        """None where nobody has ever been answered."""
        if not fresh:
            self._read()
            if self._view is not None and abs(time.time() - self._view.asked_at) < self._ask_s:
                return self._view
        with self._asking(fresh=fresh) as mine:
            if mine:
                self._ask()
        return self._view

    def _ask(self) -> None:
        asked_at = time.time()
        try:
            jobs = ask_squeue()
        except SlurmCommandError as error:
            logger.warning("the queue cannot be read: %s", error)
            self._read()
            return
        self._view = QueueSnapshot(asked_at, jobs)
        self.answers += 1
        with contextlib.suppress(OSError):  # a shared file system that stalls: our own view is good
            replace_json(self._file, asdict(self._view))

    def _read(self) -> None:
        value = read_json(self._file)
        view = None if value is None else _from_json(value)
        if view is None or view.asked_at > time.time() + MAX_CLOCK_SKEW_S:
            return
        if self._view is None or view.asked_at > self._view.asked_at:
            self._view = view

    @contextlib.contextmanager
    def _asking(self, *, fresh: bool) -> Iterator[bool]:
        """Whether it is ours to ask. A claim whose maker died is taken over when its question would be old."""
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
        except OSError:  # no place to claim in: better asked twice than never
            yield True
            return
        try:
            yield True
        finally:
            self._claim.unlink(missing_ok=True)


def ask_squeue() -> dict[str, QueuedJob]:
    """Raises SlurmCommandError."""
    argv = ["squeue", "--me", "--states=all", "--noheader", f"--format={_FORMAT}"]
    return parse_squeue(run_slurm_command(argv, timeout_s=TIMEOUT_S, environment={"SLURM_TIME_FORMAT": "standard"}))


def running_steps(job_ids: Iterable[str]) -> set[str]:
    """`JOB.STEP` of each step that runs in these jobs. Raises SlurmCommandError."""
    argv = ["squeue", "--steps", "--noheader", "--format=%i", f"--jobs={','.join(sorted(set(job_ids)))}"]
    return set(run_slurm_command(argv, timeout_s=TIMEOUT_S).split())


def parse_squeue(text: str) -> dict[str, QueuedJob]:
    jobs = {}
    for line in text.splitlines():
        words = [word.strip() for word in line.split("\t", 7)]
        if len(words) == 8:
            job_id, state, node, starts, ends, name, folder, reason = words
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
    """Slurm writes local time of the machine where it is asked; `N/A` and `Unknown` are no times."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def _from_json(value: Mapping[str, Any]) -> QueueSnapshot | None:
    try:
        jobs = {str(job_id): QueuedJob(**job) for job_id, job in value["jobs"].items()}
        return QueueSnapshot(float(value["asked_at"]), jobs)
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
