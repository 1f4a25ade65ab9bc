"""Jobs of Slurm: submitted through submitit, known from their own files, and from `squeue` where files cannot tell.

What a job writes itself counts first: `process.json` that it runs, `exit.json` and `ended.json` that it is over. So the
controller, asked once per `cluster.ask_s`, is needed only for what waits in the queue and for what died without a word.
A job asked to end gets SIGTERM alone and has its whole drain time; Slurm's own end, with its short grace, comes after.
"""

import logging
import os
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from hpc_router.cluster.batch import BatchJob, batch_jobs
from hpc_router.cluster.child import keep_refusals, submit_all
from hpc_router.cluster.launcher import JobReport, JobRequest, JobState
from hpc_router.cluster.queue import Queue, QueuedJob, View
from hpc_router.cluster.refusal import explain, is_passing
from hpc_router.config import Deployment
from hpc_router.environment import scrubbed
from hpc_router.jobdir import Ended, Exit, JobDir, JobInfo, Reason, Runner
from hpc_router.registry import split_replica
from hpc_router.rundir import RunDir

logger = logging.getLogger(__name__)

SCANCEL_TIMEOUT_S: Final = 60.0
LOOK_AGAIN_S: Final = 3.0
"""After a submission or a cancellation Slurm is asked once more so soon."""
PURGED_S: Final = 60.0
"""A job that a view taken so long after its submission does not show is over; clocks may differ a little."""

STATES: Final[Mapping[str, JobState]] = {
    **dict.fromkeys(("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD"), JobState.PENDING),
    **dict.fromkeys(("RESV_DEL_HOLD", "SPECIAL_EXIT"), JobState.PENDING),
    **dict.fromkeys(("CONFIGURING", "RUNNING", "RESIZING", "SIGNALING", "STAGE_OUT"), JobState.RUNNING),
    **dict.fromkeys(("STOPPED", "SUSPENDED"), JobState.RUNNING),
    "COMPLETING": JobState.ENDING,
    **dict.fromkeys(("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED"), JobState.ENDED),
    **dict.fromkeys(("NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"), JobState.ENDED),
}
"""Slurm's words for a job's state; one unknown here says nothing."""
_REASONS: Final[Mapping[str, Reason]] = {
    "BOOT_FAIL": Reason.NODE_FAILED,
    "CANCELLED": Reason.CANCELLED,
    "COMPLETING": Reason.CANCELLED,
    "DEADLINE": Reason.WALLTIME,
    "NODE_FAIL": Reason.NODE_FAILED,
    "OUT_OF_MEMORY": Reason.OUT_OF_MEMORY,
    "PREEMPTED": Reason.PREEMPTED,
    "TIMEOUT": Reason.WALLTIME,
}


@dataclass(slots=True)
class SlurmLauncher:
    """Also looks after steps inside jobs that are not ours (`Runner.STEP`), which it ends one by one."""

    run: RunDir
    deployment: Deployment
    queue: Queue
    _look_again_at: float = field(default=float("inf"), init=False)

    def submit(self, requests: Sequence[JobRequest]) -> list[str]:
        claimed = [request for request in requests if JobDir(self.run, request.replica).claim()]
        jobs = batch_jobs(self.run, self.deployment, claimed)
        if jobs:
            answers = submit_all([_submission(job) for job in jobs])
            self._look_again()
            refused = {replica: said for replica, said in answers.items() if said is not None}
            keep_refusals(self.run, {replica: self._refusal(replica, said) for replica, said in refused.items()})
        return [request.replica for request in claimed]

    def observe(self, replicas: Iterable[str], *, fresh: bool = False) -> Mapping[str, JobReport]:
        jobs = [JobDir(self.run, replica) for replica in replicas]
        if not jobs:
            return {}
        due = time.monotonic() >= self._look_again_at
        if due:
            self._look_again_at = float("inf")
        view = self.queue.view(fresh=fresh or due)
        return {job.replica: _report(job, view) for job in jobs}

    def cancel(self, replicas: Iterable[str]) -> None:
        whole, steps = self._targets(replicas)
        if whole:
            _scancel("--state=PENDING", *whole)
            _scancel("--signal=TERM", *whole)
        if steps:
            _scancel("--signal=TERM", *steps)
        self._look_again()

    def kill(self, replicas: Iterable[str]) -> None:
        whole, steps = self._targets(replicas)
        if whole or steps:
            _scancel("--signal=KILL", *whole, *steps)
        if whole:
            _scancel(*whole)
        self._look_again()

    def remaining(self, replicas: Iterable[str]) -> list[str]:
        jobs = {job_id for job_id, info in self._infos(replicas) if info.runner is Runner.SLURM}
        view = self.queue.view(fresh=True) if jobs else None
        queued = view.jobs if view is not None else {}
        return sorted(j for j in jobs if j in queued and STATES.get(queued[j].state) is not JobState.ENDED)

    def _infos(self, replicas: Iterable[str]) -> list[tuple[str, JobInfo]]:
        infos = [JobDir(self.run, replica).info() for replica in replicas]
        return [(info.job_id, info) for info in infos if info is not None]

    def _targets(self, replicas: Iterable[str]) -> tuple[list[str], list[str]]:
        """Whole jobs, and steps of jobs that others share. A shared job that waits goes when all in it were asked to
        end; until then the body looks at `stop.json` before it begins."""
        whole, steps = set(), []
        for replica in replicas:
            job = JobDir(self.run, replica)
            info, process = job.info(), job.process()
            if info is None:
                continue
            if info.runner is Runner.SLURM and (not info.shared or self._all_stopped(info.job_id)):
                whole.add(info.job_id)
            elif process is not None and process.step_id is not None:
                steps.append(f"{info.job_id}.{process.step_id}")
        return sorted(whole), steps

    def _all_stopped(self, job_id: str) -> bool:
        jobs = [JobDir(self.run, folder.name) for folder in self.run.jobs.iterdir()]
        sharing = [job for job in jobs if (info := job.info()) is not None and info.job_id == job_id]
        return all(job.ended() is not None or ((s := job.stop()) is not None and s.cancel_at) for job in sharing)

    def _refusal(self, replica: str, said: str) -> Exit:
        reason = Reason.UNANSWERED if is_passing(said) else Reason.REFUSED
        return Exit(ok=False, reason=reason, message=explain(said, self.deployment, split_replica(replica)[0]))

    def _look_again(self) -> None:
        self._look_again_at = time.monotonic() + LOOK_AGAIN_S


def _submission(job: BatchJob) -> dict[str, object]:
    argv_of = {request.replica: request.argv for request in job.requests}
    return {"run": str(job.run.path), "argv_of": argv_of, "script": job.script(), "gpus": ()}


def _report(job: JobDir, view: View | None) -> JobReport:
    info, process, ended = job.info(), job.process(), job.ended()
    if info is None:
        return JobReport(JobState.PENDING)
    queued = view.jobs.get(info.job_id) if view is not None else None
    node = process.host if process is not None else queued.node if queued is not None else None
    state = _state(job, info, view, started=process is not None)
    running = state is JobState.RUNNING and queued is not None
    waiting = state is JobState.PENDING and queued is not None
    return JobReport(
        state=state,
        node=node,
        word=queued.state if queued is not None else None,
        pending=queued.reason if waiting and queued is not None else None,
        starts_at=queued.starts_at if waiting and queued is not None else None,
        ends_at=queued.ends_at if running and queued is not None else None,
        end=_end(queued, ended) if state in (JobState.ENDING, JobState.ENDED) else None,
    )


def _state(job: JobDir, info: JobInfo, view: View | None, *, started: bool) -> JobState:
    if job.ended() is not None:
        return JobState.ENDED
    queued = view.jobs.get(info.job_id) if view is not None else None
    known = STATES.get(queued.state) if queued is not None else None
    if known is JobState.ENDED:
        return JobState.ENDED
    if queued is None and view is not None and view.asked_at > info.submitted_at + PURGED_S:
        return JobState.ENDED
    if job.exit() is not None:
        return JobState.ENDED if info.runner is Runner.STEP else JobState.ENDING
    if known is JobState.ENDING:
        return JobState.ENDING
    return JobState.RUNNING if started else JobState.PENDING


def _end(queued: QueuedJob | None, ended: Ended | None) -> Exit | None:
    """How a job that said nothing itself came to its end, by Slurm's word and the batch script's."""
    at = ended.at if ended is not None else time.time()
    reason = _REASONS.get(queued.state) if queued is not None else None
    if queued is not None and reason is not None:
        where = f" on {queued.node}" if queued.node else ""
        return Exit(ok=False, reason=reason, message=f"Slurm says {queued.state}{where}", at=at)
    if ended is None:
        return None
    if ended.message is not None:
        return Exit(ok=False, reason=Reason.SETUP, message=ended.message, at=at)
    if ended.status == 128 + 15:
        return Exit(ok=False, reason=Reason.CANCELLED, message="it was asked to end before it had begun", at=at)
    if ended.status > 128:
        return Exit(ok=False, reason=Reason.KILLED, message=f"killed by signal {ended.status - 128}", at=at)
    return Exit(ok=False, reason=Reason.CRASHED, message=f"its step ended with status {ended.status}", at=at)


def _scancel(*words: str) -> None:
    """Jobs that have ended meanwhile are no failure; whatever else is wrong, the next pass tries again."""
    try:
        done = subprocess.run(
            ["scancel", "--quiet", *words],
            env=scrubbed(os.environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            text=True,
            timeout=SCANCEL_TIMEOUT_S,
        )
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("scancel %s: %s", " ".join(words), error)
        return
    if done.returncode:
        logger.info("scancel %s: %s", " ".join(words), done.stderr.strip())
