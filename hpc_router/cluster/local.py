"""Jobs as processes of this machine, through submitit's local executor.

submitit can cancel only from the process that submitted; here the processes are known by their ids and start times in
`jobs/`, so any process of the user can. A signal goes through a pidfd that was checked against the start time: a reused
process id is never hit. A job of another host is UNKNOWN, never ENDED.
"""

import contextlib
import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from hpc_router.cluster.body import scrubbed
from hpc_router.cluster.launcher import JobRequest, JobState
from hpc_router.errors import LaunchError
from hpc_router.jobdir import Exit, JobDir, Process, Reason, start_ticks
from hpc_router.rundir import RunDir, private_umask

logger = logging.getLogger(__name__)

SUBMIT_TIMEOUT_S: Final = 120.0


@dataclass(frozen=True, slots=True)
class LocalLauncher:
    """`gpus`: how many this machine has; each live job holds some of them alone."""

    run: RunDir
    gpus: int = 0

    def submit(self, requests: Sequence[JobRequest]) -> list[str]:
        with self._choosing():
            chosen = self._claim(requests)
            if not chosen:
                return []
            answers = self._submit_child(chosen)
        failed = []
        for replica, error in answers.items():
            if error is not None:
                JobDir(self.run, replica).write(Exit(ok=False, reason=Reason.CRASHED, message=error))
                failed.append(f"{replica}: {error}")
        if failed:
            raise LaunchError("cannot be submitted: " + "; ".join(failed))
        return [request.replica for request, _ in chosen]

    def observe(self, replicas: Iterable[str]) -> Mapping[str, JobState]:
        return {replica: self._state(JobDir(self.run, replica)) for replica in replicas}

    def cancel(self, replicas: Iterable[str]) -> None:
        for replica in replicas:
            controller, service = self._processes(JobDir(self.run, replica))
            # The controller forwards to the service, which may have outlived it.
            if not _signal(service, signal.SIGTERM):
                _signal(controller, signal.SIGTERM)

    def kill(self, replicas: Iterable[str]) -> None:
        for replica in replicas:
            for process in reversed(self._processes(JobDir(self.run, replica))):
                _signal(process, signal.SIGKILL)

    @contextlib.contextmanager
    def _choosing(self) -> Iterator[None]:
        """One at a time on this host, so that two callers don't choose the same GPU. Where a file system has no
        locks, only the claims protect: that is enough for jobs without GPUs."""
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

    def _submit_child(self, chosen: Sequence[tuple[JobRequest, tuple[int, ...]]]) -> dict[str, str | None]:
        """Replica to what went wrong with it."""
        batch = [
            {"run": str(self.run.path), "replica": request.replica, "argv": request.argv, "gpus": gpus}
            for request, gpus in chosen
        ]
        try:
            with private_umask():
                done = subprocess.run(
                    [sys.executable, "-m", "hpc_router.cluster.jobs"],
                    input=json.dumps(batch),
                    env=scrubbed(dict(os.environ)),
                    capture_output=True,
                    check=True,
                    start_new_session=True,
                    text=True,
                    timeout=SUBMIT_TIMEOUT_S,
                )
            answers = json.loads(done.stdout)
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            said = (getattr(error, "stderr", None) or "").strip().rpartition("\n")[2]
            message = f"the submitting process failed: {said or error}"
            return {request.replica: message for request, _ in chosen}
        return {answer["replica"]: answer["error"] for answer in answers}

    def _state(self, job: JobDir) -> JobState:
        hosts = {record.host for record in (job.info(), job.process()) if record is not None}
        if not hosts:
            return JobState.PENDING
        if hosts != {socket.gethostname()}:
            return JobState.UNKNOWN
        alive = any(p is not None and start_ticks(p.pid) == p.start_ticks for p in self._processes(job))
        return JobState.RUNNING if alive else JobState.ENDED

    def _processes(self, job: JobDir) -> tuple[Process | None, Process | None]:
        """submitit's controller and the service, as far as known and started on this host."""
        info, service = job.info(), job.process()
        controller = None
        if info is not None and info.start_ticks is not None and info.job_id.isdecimal():
            controller = Process(pid=int(info.job_id), start_ticks=info.start_ticks, host=info.host)
        here = socket.gethostname()
        return (
            controller if controller is not None and controller.host == here else None,
            service if service is not None and service.host == here else None,
        )


def _signal(process: Process | None, number: signal.Signals) -> bool:
    """True when exactly this process was there to be signalled."""
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
