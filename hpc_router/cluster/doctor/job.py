"""The job of `doctor`: submits it with a batch script like that of a replica, waits for the files that it writes, and
removes it."""

import getpass
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Self, TypeVar

from hpc_router.cluster.doctor.exchange import REPLICA, ROUNDS, ClockReading, ExchangeFolder, read_now
from hpc_router.cluster.doctor.node_checks import SIGNAL_BEFORE_S
from hpc_router.cluster.launchers.commands import SlurmCommandError, run_slurm_command
from hpc_router.cluster.launchers.interface import JobRequest, JobState
from hpc_router.cluster.launchers.slurm.launcher import STATES
from hpc_router.cluster.launchers.slurm.sbatch import BatchJob, python_of
from hpc_router.cluster.launchers.slurm.squeue import QueuedJob, ask_squeue
from hpc_router.cluster.signals import ignored
from hpc_router.config import frozen
from hpc_router.config.adapters import hosts
from hpc_router.config.schema import Deployment, ResourceConfig
from hpc_router.state.atomic_files import replace_json, replace_text
from hpc_router.state.job_records import Ended, JobDir
from hpc_router.state.run_directory import RunDir

WALLTIME: Final = "2"
"""Time limit of the job in minutes. Slurm checks time limits twice a minute and sends the signal up to a minute
early."""
START_S: Final = 120.0
"""Maximum time in the queue, in seconds."""
UNSEEN_S: Final = 30.0
"""Maximum time in seconds from the start or end of the job until its first file is visible here."""
FACTS_S: Final = 60.0
"""Maximum time in seconds until the job has written its facts."""
ANSWER_S: Final = 30.0
"""Maximum time in seconds until the job answers a file."""
SIGNAL_S: Final = 100.0
"""Maximum time in seconds until the job has received its signal."""
SUBMIT_S: Final = 60.0
"""Time limit of a Slurm command, in seconds."""
POLL_S: Final = 0.02
"""Interval between reads of a file, in seconds."""
QUEUE_POLL_S: Final = 2.0
"""Interval between queries of the queue, in seconds."""
END_S: Final = 20.0
"""Maximum time in seconds for the end of the job, and for the removal of its folder."""
_OF_STEP: Final = re.compile(r"srun: |slurmstepd: error: \*\*\*|hpc-router: ")
"""Matches log lines that only report the end of the step or of the script."""
_SETUP: Final = re.compile(r"(cluster\.(?:setup|modules)\[\d+\]) failed")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class JobStart:
    """How the start of doctor's job ended. `started`: the content of the job's first file; None if there is no such
    file. The other fields then say what Slurm and the logs show."""

    started: Mapping[str, Any] | None = None
    pending_reason: str | None = None
    node: str | None = None
    left_logs: bool = False
    error: str = ""
    failed_key: str | None = None


@dataclass
class DoctorJob:
    """A context manager that owns doctor's job and its folder. At the end of the block, even after an error, the job is
    cancelled and the folder removed."""

    deployment: Deployment
    runs: Path
    job_id: str | None = field(default=None, init=False)
    _submitting: bool = field(default=False, init=False)
    _made: bool = field(default=False, init=False)

    def __enter__(self) -> Self:
        self._made = not self.runs.exists()
        self.runs.mkdir(parents=True, exist_ok=True)
        self.exchange = ExchangeFolder(Path(tempfile.mkdtemp(prefix=".doctor-", dir=self.runs.absolute())))
        self._dir = JobDir(RunDir(self.exchange.folder), REPLICA)
        return self

    def __exit__(self, *_error: object) -> None:
        with ignored(signal.SIGINT):
            with suppress(OSError):
                replace_json(self.exchange.stop, {})
            if self._submitting:
                self._end()
            _until(self._removed, END_S)
            if self._made:
                with suppress(OSError):
                    self.runs.rmdir()

    @property
    def batch_job(self) -> BatchJob:
        """Returns the job as the Slurm launcher would submit it."""
        folder = self.exchange.folder
        cluster = replace(self.deployment.cluster, warn_s=float(SIGNAL_BEFORE_S), replicas_per_job=1)
        argv = (python_of(cluster), "-m", "hpc_router.cluster.doctor.node_job", str(folder))
        request = JobRequest(REPLICA, argv, doctor_resources(self.deployment)[1])
        return BatchJob(RunDir(folder), (request,), cluster, f"doctor:{folder.name[1:]}", argv)

    def submit(self, login: Mapping[str, Any]) -> None:
        """Writes the files that the job reads, and submits the job. `login`: the address and port at which `doctor`
        listens. Raises SlurmCommandError."""
        self._dir.path.mkdir(parents=True, mode=0o700)
        job, exchange = self.batch_job, self.exchange
        replace_text(exchange.config, frozen.to_yaml(self.deployment))
        replace_text(exchange.script, job.script())
        replace_json(exchange.login, login)
        self._submitting = True
        answer = run_slurm_command(["sbatch", "--parsable"], stdin=job.script(), timeout_s=SUBMIT_S)
        self.job_id = answer.strip().partition(";")[0]

    def wait_for_start(self) -> JobStart:
        """Waits until the job's first file is visible, and returns its content. If the job ends or a time limit passes
        before that, the result says what Slurm and the logs show."""
        waits_until, queue_at, begun_at = time.monotonic() + START_S, 0.0, None
        job: QueuedJob | None = None
        while True:
            if (started := read_now(self.exchange.started)) is not None:
                return JobStart(started)
            now = time.monotonic()
            if now >= queue_at:
                queue_at = now + QUEUE_POLL_S
                job = self.in_queue() or job
                state = None if job is None else STATES.get(job.state)
                begun_at = begun_at or (now if state not in (None, JobState.PENDING) else None)
            ended = self._dir.ended()
            if begun_at is not None and (ended is not None or now > begun_at + UNSEEN_S):
                return self._unstarted(job, ended)
            if begun_at is None and now > waits_until:
                return JobStart(pending_reason=(job.reason if job else None) or "None")
            time.sleep(POLL_S)

    def _unstarted(self, job: QueuedJob | None, ended: Ended | None) -> JobStart:
        """Returns the result for a job that ran without writing its first file, with an error text from its logs.
        `job`: the job as squeue lists it. `ended`: the record that the batch script left; each may be None."""
        logs = [*sorted(self._dir.path.glob("*_log.err")), *sorted(self._dir.path.glob("*_batch.log"))]
        lines = [line for log in logs for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
        own = [line for line in lines if line.strip() and not _OF_STEP.match(line)]
        key = _SETUP.search(ended.message or "") if ended is not None else None
        return JobStart(
            node=None if job is None else job.node,
            left_logs=bool(logs) or ended is not None,
            error=(own or lines or ["no message"])[-1],
            failed_key=None if key is None else key[1],
        )

    def in_queue(self) -> QueuedJob | None:
        """Returns the job as squeue lists it; None if it is not listed or squeue fails."""
        try:
            return ask_squeue().get(self.job_id or "")
        except SlurmCommandError:
            return None

    def round_trips(self) -> Iterator[ClockReading]:
        """Measures how long it takes until a renamed file is seen by the node, and its answer here. Yields one clock
        reading per round trip. Stops early if the job does not answer."""
        for number in range(ROUNDS):
            sent = time.time()
            replace_json(self.exchange.ping(number), {"at": sent})
            answer = _until(lambda number=number: read_now(self.exchange.pong(number)), ANSWER_S)  # type: ignore[misc]
            received = time.time()
            if answer is None:
                return
            yield ClockReading(float(answer["at"]) - (sent + received) / 2, (received - sent) / 2)

    def facts(self) -> dict[str, Any] | None:
        """Waits until the job has written the facts about its node, and returns them; None if that takes too long."""
        return _until(lambda: read_now(self.exchange.node), FACTS_S)

    def signals(self) -> dict[str, Any] | None:
        """Waits until the job has recorded Slurm's signal, and returns the record; None if that takes too long."""
        return _until(lambda: read_now(self.exchange.signals), SIGNAL_S)

    def shown(self) -> dict[str, str]:
        """Returns what `scontrol show job` prints about the job, by field, such as `Partition` and `Requeue`; empty if
        scontrol fails."""
        try:
            argv = ["scontrol", "--oneliner", "show", "job", self.job_id or ""]
            text = run_slurm_command(argv, timeout_s=SUBMIT_S)
        except SlurmCommandError:
            return {}
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def _end(self) -> None:
        """Cancels the job and waits for its end. Cancels it by its name, which is unique, because the id is not known
        after Ctrl-C in sbatch."""
        with suppress(SlurmCommandError):
            argv = ["scancel", "--quiet", f"--user={getpass.getuser()}", f"--name={self.batch_job.name}"]
            run_slurm_command(argv, timeout_s=SUBMIT_S)
        if self.job_id is not None:
            _until(self._has_ended, END_S, every_s=0.5)

    def _has_ended(self) -> bool:
        job = self.in_queue()
        return job is None or STATES.get(job.state) is JobState.ENDED

    def _removed(self) -> bool:
        """Removes the job's folder and returns whether it is gone. The job may be writing logs there, so the caller
        repeats this."""
        shutil.rmtree(self.exchange.folder, ignore_errors=True)
        return not self.exchange.folder.exists()


def doctor_resources(deployment: Deployment) -> tuple[str, ResourceConfig]:
    """Returns the name of an expert, and the resources of doctor's job: that expert's, with small sizes. The expert is
    the first one with GPUs, else the first one, else `router`."""
    experts = hosts(deployment.experts)
    name = next((n for n, e in experts.items() if e.resources.gpus), next(iter(experts), "router"))
    own = experts[name].resources if name in experts else deployment.router.resources
    memory = None if own.memory_gb is None else min(own.memory_gb, 1.0)
    sbatch = {**own.sbatch, "dependency": None}
    small = replace(own, nodes=1, gpus=min(own.gpus, 1), cpus=1, memory_gb=memory, walltime=WALLTIME, sbatch=sbatch)
    return name, small


def _until(ask: Callable[[], T], within_s: float, every_s: float = POLL_S) -> T | None:
    """Calls `ask` repeatedly until it returns a true value, and returns that value; None after `within_s` seconds."""
    until = time.monotonic() + within_s
    while True:
        if value := ask():
            return value
        if time.monotonic() > until:
            return None
        time.sleep(every_s)
