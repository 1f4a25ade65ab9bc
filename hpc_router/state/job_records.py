"""`jobs/<replica>/`: what submitter, agent and control loop tell each other about one job.

Making the folder is the claim: whoever makes it submits, so two control loops never submit the same replica. Each file
has one writer: `job.json` the submitter, `process.json` and `progress.json` the job itself, `exit.json` the job or,
for one that ended without a word, whoever noticed first, `ended.json` the batch script around the job, `stop.json`
whoever asks the job to go.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Self, TypeVar

from hpc_router.state.atomic_files import read_json, replace_json
from hpc_router.state.run_directory import RunDir, private_umask


class JobPhase(StrEnum):
    """How far a job has come; the registry's `State` says only whether it takes requests (docs/states.md)."""

    STARTING = "starting"  # the agent runs, the engine process does not yet
    LOADING = "loading"  # the engine process runs and does not answer yet
    READY = "ready"  # the engine answers
    RESTARTING = "restarting"  # the engine ended and is started again after a pause
    DRAINING = "draining"  # finishes its requests, takes no new ones


class FailureReason(StrEnum):
    """Why an engine or a job failed."""

    OUT_OF_MEMORY = "out_of_memory"
    WEIGHTS = "weights"
    CUDA = "cuda"
    BAD_OPTION = "bad_option"
    INTERPRETER = "interpreter"
    TIMEOUT = "timeout"
    KILLED = "killed"
    CRASHED = "crashed"
    PORT_TAKEN = "port_taken"
    RANK_LOST = "rank_lost"  # of an engine on several nodes
    SETUP = "setup"  # a module or setup line of the batch script failed
    REFUSED = "refused"  # Slurm did not take the job
    UNANSWERED = "unanswered"  # Slurm could not be asked, or is too busy now
    NODE_FAILED = "node_failed"
    PREEMPTED = "preempted"
    WALLTIME = "walltime"
    CANCELLED = "cancelled"  # by somebody else than us
    DRAINED = "drained"  # asked to stop: no failure
    VANISHED = "vanished"  # the job ended and left no exit record


PERMANENT: Final = frozenset(
    {
        FailureReason.WEIGHTS,
        FailureReason.BAD_OPTION,
        FailureReason.INTERPRETER,
        FailureReason.SETUP,
        FailureReason.REFUSED,
    },
)
"""Failures that a restart cannot cure."""
BLAMELESS: Final = frozenset(
    {FailureReason.NODE_FAILED, FailureReason.PREEMPTED, FailureReason.CANCELLED, FailureReason.UNANSWERED}
)
"""Ends that say nothing about the replica: another is submitted, however often."""


class Runner(StrEnum):
    """Who runs a job, so who can be asked about it."""

    PROCESS = "process"  # a process of one host; its job id is its process id
    SLURM = "slurm"  # a Slurm job, perhaps shared with other replicas
    STEP = "step"  # a step inside a job that is not ours to end


@dataclass(frozen=True, slots=True)
class JobInfo:
    """Written at submission, on `host`. A local job's id is a process id, so `start_ticks` guards against its reuse.

    `shared`: the Slurm job carries other replicas as well, so this one is its step alone.
    """

    job_id: str
    host: str
    start_ticks: int | None = None
    submitted_at: float = field(default_factory=time.time)
    gpus: tuple[int, ...] = ()
    argv: tuple[str, ...] = ()
    runner: Runner = Runner.PROCESS
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Submitter:
    """The process that is submitting a claimed job, while `job.json` is not there yet."""

    pid: int
    start_ticks: int
    host: str


@dataclass(frozen=True, slots=True)
class Process:
    """The job body's own process, written by itself before it becomes the agent or the router. `step_id`: Slurm's."""

    pid: int
    start_ticks: int
    host: str
    step_id: str | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """The last word of the batch script: the service's exit status as a shell has it, or a setup line's."""

    status: int
    at: float
    message: str | None = None


@dataclass(frozen=True, slots=True)
class JobProgress:
    """`url`, `node`: where a router serves; its record in the registry goes with it."""

    phase: JobPhase
    reason: FailureReason | None = None  # of the last engine failure
    message: str | None = None
    restarts: int = 0
    pid: int = field(default_factory=os.getpid)
    engine_pid: int | None = None
    at: float = field(default_factory=time.time)
    ready_at: float | None = None  # the first time
    url: str | None = None
    node: str | None = None


@dataclass(frozen=True, slots=True)
class Exit:
    """`cut`: how many answers a drain did not let finish."""

    ok: bool
    reason: FailureReason
    message: str
    at: float = field(default_factory=time.time)
    cut: int = 0

    @classmethod
    def drained(cls, message: str, *, cut: int) -> Self:
        """The end of a service that was asked to stop."""
        said = f"; {cut} answer{'s were' if cut > 1 else ' was'} cut off" if cut else ""
        return cls(ok=True, reason=FailureReason.DRAINED, message=f"{message}{said}", cut=cut)


@dataclass(frozen=True, slots=True)
class Stop:
    """What a job was asked and when: to drain (over HTTP), to end (SIGTERM); when it was last killed."""

    drain_at: float | None = None
    cancel_at: float | None = None
    kill_at: float | None = None


_T = TypeVar("_T", JobInfo, Submitter, Process, JobProgress, Exit, Ended, Stop)


@dataclass(frozen=True, slots=True)
class JobDir:
    run: RunDir
    replica: str

    @property
    def path(self) -> Path:
        return self.run.jobs / self.replica

    @property
    def agent_log(self) -> Path:
        return self.run.logs / f"{self.replica}.log"

    def worker_log(self, worker: int) -> Path:
        """Of one of a router's workers; `agent_log` is that of its control process."""
        return self.run.logs / f"{self.replica}.worker{worker}.log"

    @property
    def reconcile_log(self) -> Path:
        """Of the control loop beside a router."""
        return self.run.logs / f"{self.replica}.reconcile.log"

    @property
    def engine_log(self) -> Path:
        return self.run.logs / f"{self.replica}.engine.log"

    def claim(self) -> bool:
        """True for the one caller that made the folder."""
        try:
            with private_umask():
                self.path.mkdir()
        except FileExistsError:
            return False
        return True

    def claimed_at(self) -> float:
        return self.path.stat().st_mtime

    def write(self, value: JobInfo | Submitter | Process | JobProgress | Exit | Ended | Stop) -> None:
        replace_json(self.path / _FILES[type(value)], asdict(value))

    def info(self) -> JobInfo | None:
        value = self._read(JobInfo)
        return value and JobInfo(**{**asdict(value), "gpus": tuple(value.gpus), "argv": tuple(value.argv)})

    def submitter(self) -> Submitter | None:
        return self._read(Submitter)

    def progress(self) -> JobProgress | None:
        return self._read(JobProgress)

    def exit(self) -> Exit | None:
        return self._read(Exit)

    def ended(self) -> Ended | None:
        return self._read(Ended)

    def process(self) -> Process | None:
        return self._read(Process)

    def stop(self) -> Stop | None:
        return self._read(Stop)

    def _read(self, kind: type[_T]) -> _T | None:
        value = read_json(self.path / _FILES[kind])
        try:
            return None if value is None else kind(**_enums(value))
        except (TypeError, ValueError):
            return None


_FILES: Final[Mapping[type, str]] = {
    JobInfo: "job.json",
    Submitter: "submitter.json",
    Process: "process.json",
    JobProgress: "progress.json",
    Exit: "exit.json",
    Ended: "ended.json",
    Stop: "stop.json",
}


def _enums(value: dict[str, Any]) -> dict[str, Any]:
    if value.get("phase") is not None:
        value["phase"] = JobPhase(value["phase"])
    if value.get("reason") is not None:
        value["reason"] = FailureReason(value["reason"])
    if value.get("runner") is not None:
        value["runner"] = Runner(value["runner"])
    return value


def start_ticks(pid: int) -> int | None:
    """When a process of this host started, in clock ticks since boot; None when there is none (or only its corpse)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    values = text.rpartition(")")[2].split()
    return None if values[0] in "ZX" else int(values[19])
