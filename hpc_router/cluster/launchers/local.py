"""Jobs as processes of this machine, through submitit's local executor.

submitit can cancel a job only from the process that submitted it. Here any process of the user can, because process ids
and start times are in `jobs/`. Signals go through a pidfd whose start time was checked, so that a reused process id is
never signalled. A job of another host is UNKNOWN, never ENDED.
"""

import contextlib
import fcntl
import logging
import os
import signal
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from hpc_router.cluster.launchers.interface import JobReport, JobRequest, JobState
from hpc_router.cluster.launchers.submitit.submission import Submission, record_refusals, submit_all
from hpc_router.state.job_records import JobDir, Process, start_ticks
from hpc_router.state.run_directory import RunDir

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LocalLauncher:
    """Runs jobs on this machine. `gpus`: number of GPUs of the machine. A GPU belongs to at most one live job."""

    run: RunDir
    gpus: int = 0

    def submit(self, requests: Sequence[JobRequest]) -> list[str]:
        with self._lock():
            claimed = self._claim(requests)
            if not claimed:
                return []
            errors = submit_all([_submission(self.run, request, gpus) for request, gpus in claimed])
        record_refusals(self.run, errors)
        return [request.replica for request, _ in claimed]

    def observe(self, replicas: Iterable[str], *, fresh: bool = False) -> Mapping[str, JobReport]:
        return {replica: self._report(JobDir(self.run, replica)) for replica in replicas}

    def release(self, requests: Sequence[JobRequest]) -> None:
        """Does nothing, because jobs of this machine never wait for another job."""

    def cancel(self, replicas: Iterable[str]) -> None:
        for replica in replicas:
            controller, service = self._processes(JobDir(self.run, replica))
            # The service first: submitit's controller, which forwards signals, may have ended already.
            if not _signal(service, signal.SIGTERM):
                _signal(controller, signal.SIGTERM)

    def kill(self, replicas: Iterable[str]) -> None:
        for replica in replicas:
            for process in reversed(self._processes(JobDir(self.run, replica))):
                _signal(process, signal.SIGKILL)

    def remaining(self, replicas: Iterable[str]) -> list[str]:
        return []  # a process that has ended holds no resources

    def update_exclusions(self, requests: Sequence[JobRequest]) -> list[str]:
        return []  # there is no other node

    def trouble(self) -> str | None:
        return None

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Lets one submission at a time run on this host, so that two of them never choose the same GPU. If the file
        system has no locks, only the claims prevent a double submission, which is enough for jobs without GPUs."""
        descriptor = os.open(self.run.jobs, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _claim(self, requests: Sequence[JobRequest]) -> list[tuple[JobRequest, tuple[int, ...]]]:
        chosen: list[tuple[JobRequest, tuple[int, ...]]] = []
        free = self._free_gpus() if any(r.resources.gpus for r in requests) else []
        for request in requests:
            wanted = request.resources.gpus
            if wanted > len(free):
                logger.warning("%s waits for %d GPUs; free: %s", request.replica, wanted, free or "none")
            elif JobDir(self.run, request.replica).claim():
                chosen.append((request, tuple(free[:wanted])))
                free = free[wanted:]
        return chosen

    def _free_gpus(self) -> list[int]:
        taken: set[int] = set()
        for folder in self.run.jobs.iterdir():
            job = JobDir(self.run, folder.name)
            info = job.info()
            if info is not None and info.gpus and self._state(job) is not JobState.ENDED:
                taken.update(info.gpus)
        return [number for number in range(self.gpus) if number not in taken]

    def _report(self, job: JobDir) -> JobReport:
        info = job.info()
        return JobReport(self._state(job), node=info.host if info is not None else None)

    def _state(self, job: JobDir) -> JobState:
        hosts = {record.host for record in (job.info(), job.process()) if record is not None}
        if not hosts:
            return JobState.PENDING
        if hosts != {socket.gethostname()}:
            return JobState.UNKNOWN
        alive = any(p is not None and start_ticks(p.pid) == p.start_ticks for p in self._processes(job))
        return JobState.RUNNING if alive else JobState.ENDED

    def _processes(self, job: JobDir) -> tuple[Process | None, Process | None]:
        """Returns the processes of submitit's controller and of the service; each is None if it is not known or runs on
        another host."""
        info, service = job.info(), job.process()
        controller = None
        if info is not None and info.start_ticks is not None and info.job_id.isdecimal():
            controller = Process(pid=int(info.job_id), start_ticks=info.start_ticks, host=info.host)
        here = socket.gethostname()
        return (
            controller if controller is not None and controller.host == here else None,
            service if service is not None and service.host == here else None,
        )


def _submission(run: RunDir, request: JobRequest, gpus: tuple[int, ...]) -> Submission:
    revisions = {request.replica: request.revision}
    return Submission(str(run.path), {request.replica: request.argv}, gpus=gpus, revisions=revisions)


def _signal(process: Process | None, number: signal.Signals) -> bool:
    """Sends the signal `number` to the process. Returns whether the process was alive and got it."""
    if process is None:
        return False
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    try:
        if start_ticks(process.pid) != process.start_ticks:
            return False
        signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(descriptor)
    return True
