"""`jobs/<replica>/`: the records of one job, shared by submitter, job and control loop.

The process that creates the folder submits the job, so two control loops never submit the same replica. Each file has
one writer: `job.json` the submitter; `process.json` and `progress.json` the job itself; `exit.json` the job, or the
first observer if the job ended without writing it; `ended.json` the batch script around the job; `stop.json` the
process that asks the job to stop.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Self, TypeVar

from hpc_router.state.atomic_files import create_text, read_json, replace_json
from hpc_router.state.run_directory import RunDir, private_umask


class JobPhase(StrEnum):
    """The phase of a job. The registry's `State` says only whether the job takes requests (docs/states.md)."""

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
    RANK_LOST = "rank_lost"  # a rank of an engine on several nodes ended or does not respond
    SETUP = "setup"  # a module or setup line of the batch script failed
    RUN_UNSEEN = "run_unseen"  # the job's node does not see the run directory
    REFUSED = "refused"  # Slurm rejected the job
    UNANSWERED = "unanswered"  # Slurm's controller did not respond, or was too busy
    NODE_FAILED = "node_failed"
    PREEMPTED = "preempted"
    WALLTIME = "walltime"
    CANCELLED = "cancelled"  # by another command than ours, such as scancel
    DRAINED = "drained"  # stopped on request, which is not a failure
    VANISHED = "vanished"  # the job ended and left no exit record


PERMANENT: Final = frozenset(
    {
        FailureReason.WEIGHTS,
        FailureReason.BAD_OPTION,
        FailureReason.INTERPRETER,
        FailureReason.SETUP,
        FailureReason.RUN_UNSEEN,
        FailureReason.REFUSED,
    },
)
"""Failures that a restart does not repair."""
BLAMELESS: Final = frozenset(
    {
        FailureReason.NODE_FAILED,
        FailureReason.PREEMPTED,
        FailureReason.WALLTIME,
        FailureReason.CANCELLED,
        FailureReason.UNANSWERED,
    }
)
"""Failures that the replica did not cause. Such a replica is submitted again, without limit."""


def _now() -> float:
    """Returns the time in Unix seconds. Looks `time.time` up at each call, so that tests can replace the clock."""
    return time.time()


class Runner(StrEnum):
    """The system that runs a job, and can therefore report its state."""

    PROCESS = "process"  # a process of one host; its job id is its process id
    SLURM = "slurm"  # a Slurm job, which other replicas may share
    STEP = "step"  # a step in a Slurm job that this deployment did not submit and does not end


@dataclass(frozen=True, slots=True)
class JobInfo:
    """A submitted job, as recorded by the submitter on `host`.

    The id of a local job is a process id; `start_ticks` shows whether that id now belongs to another process. `shared`:
    whether the Slurm job runs several replicas, each as one of its steps. `after`: id of the job for whose end this job
    had to wait. `revision`: revision of the config with which it was submitted (`config.revision`). `dependency`: the
    `sbatch.dependency` of that config, even if the job was submitted without it because it was met; empty if the config
    had none, None in records of earlier versions.
    """

    job_id: str
    host: str
    start_ticks: int | None = None
    submitted_at: float = field(default_factory=_now)
    gpus: tuple[int, ...] = ()
    argv: tuple[str, ...] = ()
    runner: Runner = Runner.PROCESS
    shared: bool = False
    after: str | None = None
    revision: str | None = None
    dependency: str | None = None


@dataclass(frozen=True, slots=True)
class Submitter:
    """The process that submits a claimed job, and what it will write into `job.json`. The record is of interest only
    until `job.json` exists. `replicas`: all replicas of the job; the other fields are those of `JobInfo`."""

    pid: int
    start_ticks: int
    host: str
    replicas: tuple[str, ...] = ()
    argv: tuple[str, ...] = ()
    after: str | None = None
    revision: str | None = None
    dependency: str | None = None

    def job_info(self, job_id: str, **more: Any) -> JobInfo:
        """Returns the record of the job that it has submitted. `more`: the fields that it does not know beforehand."""
        shared = len(self.replicas) > 1
        return JobInfo(
            job_id,
            self.host,
            argv=self.argv,
            shared=shared,
            after=self.after,
            revision=self.revision,
            dependency=self.dependency,
            **more,
        )

    @property
    def is_alive(self) -> bool:
        """Whether it lives on this host. A process on another host counts as gone."""
        return self.host == socket.gethostname() and start_ticks(self.pid) == self.start_ticks


@dataclass(frozen=True, slots=True)
class Process:
    """The operating-system process of a job, recorded when it starts and before it runs the agent or the router.
    `step_id`: Slurm's step id. `started_at`: Unix seconds."""

    pid: int
    start_ticks: int
    host: str
    step_id: str | None = None
    started_at: float | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of a batch script, recorded by the script itself. `status`: exit status of the service that it ran; if a
    line of `cluster.setup` failed, that of this line."""

    status: int
    at: float
    message: str | None = None


@dataclass(frozen=True, slots=True)
class JobProgress:
    """The progress of a job. `url`, `node`: the address of a router; a later router on the same node takes its port
    from here, because the registry record has been removed by then. `load_s`: seconds from the last start of the engine
    until it was ready. `stage_s`: seconds until the models were on the node's disk; `stage_bytes`: bytes that this job
    copied to that disk. Both are None if `cluster.stage_to` is not set."""

    phase: JobPhase
    reason: FailureReason | None = None  # reason of the last engine failure
    message: str | None = None
    restarts: int = 0
    pid: int = field(default_factory=os.getpid)
    engine_pid: int | None = None
    at: float = field(default_factory=_now)
    ready_at: float | None = None  # when the engine was first ready
    url: str | None = None
    node: str | None = None
    load_s: float | None = None
    stage_s: float | None = None
    stage_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Exit:
    """The end of a job. `cut`: number of responses that were cut off because the time limit of the drain had passed."""

    ok: bool
    reason: FailureReason
    message: str
    at: float = field(default_factory=_now)
    cut: int = 0

    @classmethod
    def drained(cls, message: str, *, cut: int) -> Self:
        """Returns the exit record of a service that stopped on request. `cut`: as in the class; `message` gets its
        number."""
        suffix = f"; {cut} answer{'s were' if cut > 1 else ' was'} cut off" if cut else ""
        return cls(ok=True, reason=FailureReason.DRAINED, message=f"{message}{suffix}", cut=cut)


@dataclass(frozen=True, slots=True)
class Stop:
    """When a job was or will be asked to stop, in Unix seconds. `drain_at`: the drain call over HTTP; `cancel_at`:
    SIGTERM; `kill_at`: the last SIGKILL. `until_at`: time at which the drain must end, if that is later than
    `cluster.drain_s` allows."""

    drain_at: float | None = None
    cancel_at: float | None = None
    kill_at: float | None = None
    until_at: float | None = None


_T = TypeVar("_T", JobInfo, Submitter, Process, JobProgress, Exit, Ended, Stop)


@dataclass(frozen=True, slots=True)
class JobDir:
    """The paths and records of one job. A record that is missing or not valid is read as None."""

    run: RunDir
    replica: str

    @property
    def path(self) -> Path:
        return self.run.jobs / self.replica

    @property
    def agent_log(self) -> Path:
        return self.run.logs / f"{self.replica}.log"

    def worker_log(self, worker: int) -> Path:
        """Returns the log file of one worker of a router; `agent_log` is the log of its control process."""
        return self.run.logs / f"{self.replica}.worker{worker}.log"

    @property
    def reconcile_log(self) -> Path:
        """Returns the log file of the control loop that runs in the router's job."""
        return self.run.logs / f"{self.replica}.reconcile.log"

    @property
    def batches_log(self) -> Path:
        """Returns the log file of the process that runs batches in the router's job."""
        return self.run.logs / f"{self.replica}.batches.log"

    @property
    def engine_log(self) -> Path:
        return self.run.logs / f"{self.replica}.engine.log"

    def claim(self) -> bool:
        """Creates the job's folder, which claims the job. Returns True to the caller that created it, False to all
        others."""
        try:
            with private_umask():
                self.path.mkdir()
        except FileExistsError:
            return False
        return True

    def claimed_at(self) -> float:
        return self.path.stat().st_mtime

    def write(self, value: JobInfo | Submitter | Process | JobProgress | Exit | Ended | Stop) -> None:
        replace_json(self.path / FILES[type(value)], asdict(value))

    def report_handover(self) -> bool:
        """Records that the handover to this job was reported as an event. Returns True to the first caller, which then
        reports it, and False to all others."""
        return create_text(self.path / "handover.json", json.dumps({"reported_at": round(time.time(), 3)}) + "\n")

    def write_exit(self, end: Exit) -> None:
        """Writes the exit record. If another process has written one already, keeps that, because the control loop may
        have acted on it."""
        if self.exit() is None:
            self.write(end)

    def info(self) -> JobInfo | None:
        return self._read(JobInfo)

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
        value = read_json(self.path / FILES[kind])
        return None if value is None else parse_record(kind, value)


FILES: Final[Mapping[type, str]] = {
    JobInfo: "job.json",
    Submitter: "submitter.json",
    Process: "process.json",
    JobProgress: "progress.json",
    Exit: "exit.json",
    Ended: "ended.json",
    Stop: "stop.json",
}


_TYPES: Final[Mapping[str, Callable[[Any], object]]] = {
    "phase": JobPhase,
    "reason": FailureReason,
    "runner": Runner,
    "gpus": tuple,
    "argv": tuple,
    "replicas": tuple,
}


def parse_record(kind: type[_T], value: Mapping[str, Any]) -> _T | None:
    """Returns the record of type `kind` that the JSON object `value` describes; None if `value` is not valid."""
    try:
        typed: dict[str, Any] = {k: _TYPES[k](v) if k in _TYPES and v is not None else v for k, v in value.items()}
        return kind(**typed)
    except (TypeError, ValueError):
        return None


def start_ticks(pid: int) -> int | None:
    """Returns the start time of a process in clock ticks since boot; None if it does not exist or is a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    values = text.rpartition(")")[2].split()
    return None if values[0] in "ZX" else int(values[19])
