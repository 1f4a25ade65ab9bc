"""Slurm jobs: submitted through submitit, observed through their own files and through `squeue`.

The state of a job comes from its files where possible: `process.json` shows that it runs, `exit.json` and `ended.json`
show that it has ended. The Slurm controller, queried at most once per `cluster.ask_s`, is needed for jobs that wait in
the queue and for jobs that died without a record. A job that is asked to end first gets SIGTERM and its whole drain
time. Only after that, `scancel` without a signal is run, which leaves a job only Slurm's short KillWait to end.
"""

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Final

from hpc_router.cluster.launchers.commands import SlurmCommandError, run_slurm_command
from hpc_router.cluster.launchers.interface import JobReport, JobRequest, JobState
from hpc_router.cluster.launchers.slurm.pending_reasons import STEP_RESOURCES
from hpc_router.cluster.launchers.slurm.sbatch import BatchJob, batch_jobs, excluded
from hpc_router.cluster.launchers.slurm.squeue import Queue, QueuedJob, QueueSnapshot, running_steps
from hpc_router.cluster.launchers.slurm.submit_errors import explain, is_temporary
from hpc_router.cluster.launchers.submitit.submission import Submission, record_refusals, submit_all
from hpc_router.config.schema import Deployment
from hpc_router.state.job_reader import JobReader, JobRecords
from hpc_router.state.job_records import Ended, Exit, FailureReason, JobDir, JobInfo, Runner
from hpc_router.state.registry import split_replica
from hpc_router.state.run_directory import RunDir

logger = logging.getLogger(__name__)

SCANCEL_TIMEOUT_S: Final = 60.0
SCONTROL_TIMEOUT_S: Final = 30.0
QUERY_AGAIN_S: Final = 3.0
"""Seconds between a submission or cancellation and the next query of Slurm."""
MIN_MISSED_ANSWERS: Final = 2
STEP_WAITS_S: Final = 5.0
"""Time in seconds after which a step that has not started waits for resources. Slurm gives no reason for steps."""
SETTLE_S: Final = 10.0
"""Seconds to wait for Slurm's state of a job whose batch script has ended without a record."""

STATES: Final[Mapping[str, JobState]] = {
    **dict.fromkeys(("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD"), JobState.PENDING),
    **dict.fromkeys(("RESV_DEL_HOLD", "SPECIAL_EXIT"), JobState.PENDING),
    **dict.fromkeys(("CONFIGURING", "RUNNING", "RESIZING", "SIGNALING", "STAGE_OUT"), JobState.RUNNING),
    **dict.fromkeys(("STOPPED", "SUSPENDED"), JobState.RUNNING),
    "COMPLETING": JobState.ENDING,
    **dict.fromkeys(("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED"), JobState.ENDED),
    **dict.fromkeys(("NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"), JobState.ENDED),
}
"""The state of a job by Slurm's name of the state. Other names are ignored."""
REASONS: Final[Mapping[str, FailureReason]] = {
    "BOOT_FAIL": FailureReason.NODE_FAILED,
    "CANCELLED": FailureReason.CANCELLED,
    "COMPLETING": FailureReason.CANCELLED,
    "DEADLINE": FailureReason.WALLTIME,
    "NODE_FAIL": FailureReason.NODE_FAILED,
    "OUT_OF_MEMORY": FailureReason.OUT_OF_MEMORY,
    "PREEMPTED": FailureReason.PREEMPTED,
    "TIMEOUT": FailureReason.WALLTIME,
}


@dataclass(slots=True)
class SlurmLauncher:
    """Submits, observes and ends Slurm jobs. Observes steps in a job of the user as well (`Runner.STEP`), and ends them
    one by one."""

    run: RunDir
    deployment: Deployment
    queue: Queue
    reader: JobReader
    _query_at: float = field(default=float("inf"), init=False)
    _checked_at: float = field(default=0.0, init=False)
    _missed: dict[str, int] = field(default_factory=dict, init=False)
    _orphans: set[str] = field(default_factory=set, init=False)

    def jobs(self, requests: Sequence[JobRequest]) -> list[BatchJob]:
        """Returns the jobs that `submit` hands to sbatch for these requests."""
        return batch_jobs(self.run, self.deployment, requests)

    def submit(self, requests: Sequence[JobRequest]) -> list[str]:
        claimed = [request for request in requests if JobDir(self.run, request.replica).claim()]
        if claimed:
            errors = submit_all([_submission(job) for job in self.jobs(claimed)])
            self._query_soon()
            record_refusals(self.run, errors, self._exit_for)
        return [request.replica for request in claimed]

    def observe(self, replicas: Iterable[str], *, fresh: bool = False) -> Mapping[str, JobReport]:
        names = list(replicas)
        if not names:
            return {}
        due = time.monotonic() >= self._query_at
        if due:
            self._query_at = float("inf")
        snapshot = self.queue.snapshot(fresh=fresh or due)
        if snapshot is not None:
            self._settle_unrecorded_jobs(snapshot)
        jobs = [self.reader.read(name) or JobRecords(name, time.time()) for name in names]
        reports = {job.replica: _report(job, snapshot, purged=self._purged(job, snapshot)) for job in jobs}
        if any(report.state is JobState.ENDING for report in reports.values()):
            self._query_soon()
        self._end_orphans(jobs, reports)
        return reports

    def release(self, requests: Sequence[JobRequest]) -> None:
        for job in self.jobs([replace(request, after=None) for request in requests]):
            info = JobDir(self.run, job.replicas[0]).info()
            if info is not None:
                dependency = job.options().get("dependency", "")
                argv = ["scontrol", "update", f"JobId={info.job_id}", f"Dependency={dependency}"]
                try:
                    run_slurm_command(argv, timeout_s=SCANCEL_TIMEOUT_S)
                except SlurmCommandError as error:
                    logger.warning("job %s still waits for the end of its predecessor: %s", info.job_id, error)
        self._query_soon()

    def cancel(self, replicas: Iterable[str]) -> None:
        whole, steps = self._targets(replicas)
        if whole:
            _scancel("--state=PENDING", *whole)
            _scancel("--signal=TERM", *whole)
            if completing := self._completing(whole):
                _scancel(*completing)
        if steps:
            _scancel("--signal=TERM", *steps)
        self._query_soon()

    def kill(self, replicas: Iterable[str]) -> None:
        whole, steps = self._targets(replicas)
        if whole or steps:
            _scancel("--signal=KILL", *whole, *steps)
        if whole:
            _scancel(*whole)
        self._query_soon()

    def _completing(self, job_ids: Sequence[str]) -> list[str]:
        """Returns those of the jobs that Slurm is cleaning up. Slurm may start such a job again on another node."""
        snapshot = self.queue.snapshot()
        jobs = snapshot.jobs if snapshot is not None else {}
        return [job_id for job_id in job_ids if job_id in jobs and jobs[job_id].state == "COMPLETING"]

    def remaining(self, replicas: Iterable[str]) -> list[str]:
        """Returns the ids of the replicas' jobs that hold resources, and of jobs of this run in Slurm's queue that have
        no record in `jobs/`. Cancels the latter."""
        infos = [info for replica in replicas if (info := JobDir(self.run, replica).info()) is not None]
        jobs = {info.job_id for info in infos if info.runner is Runner.SLURM}
        snapshot = self.queue.snapshot(fresh=True)
        queued = (
            {job_id for job_id, job in snapshot.jobs.items() if _holds_resources(job)}
            if snapshot is not None
            else set()
        )
        unknown = self._unknown_jobs(snapshot) if snapshot is not None else set()
        if snapshot is not None:
            self._settle_unrecorded_jobs(snapshot)
        return sorted((jobs & queued) | unknown | self._steps_left(replicas))

    def update_exclusions(self, requests: Sequence[JobRequest]) -> list[str]:
        failed = []
        for request in requests:
            info = JobDir(self.run, request.replica).info()
            if info is None or info.runner is not Runner.SLURM:
                continue
            nodes = excluded(self.deployment.cluster, request) or ""
            try:
                run_slurm_command(
                    ["scontrol", "update", f"JobId={info.job_id}", f"ExcNodeList={nodes}"], timeout_s=SCONTROL_TIMEOUT_S
                )
            except SlurmCommandError as error:
                if error.output is None or is_temporary(error.output):
                    raise
                logger.info("the excluded nodes of job %s cannot be changed: %s", info.job_id, error)
                failed.append(request.replica)
        return failed

    def trouble(self) -> str | None:
        return self.queue.trouble

    def _steps_left(self, replicas: Iterable[str]) -> set[str]:
        """Kills those steps of the replicas that run in jobs of the user, and returns their ids."""
        steps = {step: info for replica in replicas for step, info in self._steps(replica)}
        held = {info.job_id for info in steps.values() if info.runner is Runner.STEP}
        try:
            left = steps.keys() & running_steps(held) if held else set()
        except SlurmCommandError:  # the job that held them has ended
            return set()
        if left:
            _scancel("--signal=KILL", *sorted(left))
        return left

    def _steps(self, replica: str) -> list[tuple[str, JobInfo]]:
        job = JobDir(self.run, replica)
        info, process = job.info(), job.process()
        if info is None or process is None or process.step_id is None:
            return []
        return [(f"{info.job_id}.{process.step_id}", info)]

    def _settle_unrecorded_jobs(self, snapshot: QueueSnapshot) -> None:
        """Records jobs of this run in the queue whose submitter died before it could record them, and cancels those
        whose submission counts as failed. The latter exist because sbatch may fail after it has submitted a job."""
        if snapshot.asked_at == self._checked_at:
            return
        self._checked_at = snapshot.asked_at
        for job_id, queued in snapshot.jobs.items():
            if _holds_resources(queued) and self._is_ours(queued):
                self._record_for_submitter(job_id, queued)
        for job_id in sorted(self._unknown_jobs(snapshot)):
            logger.warning(
                "job %s (%s) was submitted although sbatch failed: cancelling it", job_id, snapshot.jobs[job_id].name
            )
            _scancel(job_id)

    def _is_ours(self, queued: QueuedJob) -> bool:
        return queued.folder == str(self.run.path) and bool(queued.name)

    def _record_for_submitter(self, job_id: str, queued: QueuedJob) -> None:
        """Writes `job.json` of each replica of the job, unless another process has, still may, or has given it up."""
        first = _named(self.run, queued)
        submitter = first.submitter()
        if submitter is None or first.info() is not None or submitter.is_alive:
            return
        jobs = [JobDir(self.run, replica) for replica in submitter.replicas]
        if not jobs or any(job.exit() is not None or job.stop() is not None for job in jobs):
            return
        with suppress(OSError):
            for job in jobs:
                if (planned := job.submitter()) is not None:
                    job.write(planned.job_info(job_id, runner=Runner.SLURM, submitted_at=first.claimed_at()))
            logger.warning("job %s (%s) was submitted, but not recorded: recorded it now", job_id, queued.name)

    def _unknown_jobs(self, snapshot: QueueSnapshot) -> set[str]:
        held = {job_id: queued for job_id, queued in snapshot.jobs.items() if _holds_resources(queued)}
        return {job_id for job_id, queued in held.items() if self._given_up(job_id, queued)}

    def _given_up(self, job_id: str, queued: QueuedJob) -> bool:
        """Returns whether nothing needs job `job_id`: its replica has ended or was asked to end, and no record says
        that the replica runs in this job."""
        if not self._is_ours(queued):
            return False
        job = _named(self.run, queued)
        info, stop = job.info(), job.stop()
        if info is not None:
            return job.exit() is not None and info.job_id != job_id
        return job.exit() is not None or (stop is not None and stop.cancel_at is not None)

    def _purged(self, job: JobRecords, snapshot: QueueSnapshot | None) -> bool:
        """Returns whether Slurm has forgotten the job, that is, whether two answers that came after this process first
        knew the job do not list it. Timestamps are not compared, because the clocks of two hosts differ."""
        info = job.info
        if info is None or info.runner is not Runner.SLURM or snapshot is None:
            return False
        if info.job_id in snapshot.jobs:
            self._missed.pop(info.job_id, None)
            return False
        first = self._missed.setdefault(info.job_id, self.queue.answers)
        if self.queue.answers < first + MIN_MISSED_ANSWERS:
            self._query_soon()
            return False
        return True

    def _end_orphans(self, jobs: Sequence[JobRecords], reports: Mapping[str, JobReport]) -> None:
        """Kills the steps in shared jobs whose `srun` was killed, because such steps continue without it."""
        for job in jobs:
            ended = job.ended
            if reports[job.replica].state is not JobState.ENDED or ended is None or ended.status <= 128:
                continue
            for step, info in self._steps(job.replica):
                if info.shared and step not in self._orphans:
                    self._orphans.add(step)
                    _scancel("--signal=KILL", step)

    def _targets(self, replicas: Iterable[str]) -> tuple[list[str], list[str]]:
        """Returns the ids of the jobs, and of the steps in shared jobs, that scancel must end for these replicas. A
        shared job in the queue is cancelled only when all its replicas were asked to end. If it starts before that,
        each replica that was asked to end reads `stop.json` and does not start."""
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
        infos = {job: info for job in jobs if (info := job.info()) is not None and info.runner is Runner.SLURM}
        sharing = [job for job, info in infos.items() if info.job_id == job_id]
        return all(job.ended() is not None or ((s := job.stop()) is not None and s.cancel_at) for job in sharing)

    def _exit_for(self, replica: str, error: str) -> Exit:
        reason = FailureReason.UNANSWERED if is_temporary(error) else FailureReason.REFUSED
        return Exit(ok=False, reason=reason, message=explain(error, self.deployment, split_replica(replica)[0]))

    def _query_soon(self) -> None:
        self._query_at = min(self._query_at, time.monotonic() + QUERY_AGAIN_S)


def _submission(job: BatchJob) -> Submission:
    argv_of = {request.replica: request.argv for request in job.requests}
    revisions = {request.replica: request.revision for request in job.requests}
    return Submission(
        str(job.run.path),
        argv_of,
        job.script(),
        after=job.requests[0].after,
        revisions=revisions,
        dependency=job.dependency or "",
    )


def _named(run: RunDir, queued: QueuedJob) -> JobDir:
    """Returns the folder of the replica after which the job is named, which is the job's first."""
    return JobDir(run, (queued.name or "").partition(":")[0])


def _holds_resources(queued: QueuedJob) -> bool:
    """Returns whether the job has resources or waits for them."""
    return STATES.get(queued.state) is not JobState.ENDED


def _report(job: JobRecords, snapshot: QueueSnapshot | None, *, purged: bool) -> JobReport:
    info, process, ended = job.info, job.process, job.ended
    if info is None:
        return JobReport(JobState.PENDING)
    queued = snapshot.jobs.get(info.job_id) if snapshot is not None else None
    node = process.host if process is not None else queued.node if queued is not None else None
    state = JobState.ENDED if purged else _state(job, info, snapshot, started=process is not None)
    running = state is JobState.RUNNING and queued is not None
    waiting = state is JobState.PENDING and queued is not None
    reason = queued.reason if waiting and queued is not None else None
    if waiting and info.runner is Runner.STEP and time.time() - info.submitted_at > STEP_WAITS_S:
        reason = STEP_RESOURCES
    return JobReport(
        state=state,
        node=node,
        native_state=queued.state if queued is not None else None,
        pending_reason=reason,
        starts_at=queued.starts_at if waiting and queued is not None else None,
        ends_at=queued.ends_at if running and queued is not None else None,
        end=_end(queued, ended) if state in (JobState.ENDING, JobState.ENDED) else None,
    )


def _state(job: JobRecords, info: JobInfo, snapshot: QueueSnapshot | None, *, started: bool) -> JobState:
    queued = snapshot.jobs.get(info.job_id) if snapshot is not None else None
    known = STATES.get(queued.state) if queued is not None else None
    if known is JobState.ENDED:
        return JobState.ENDED
    ended = job.ended
    if ended is not None:
        final = job.exit is not None or ended.message is not None or info.shared or info.runner is Runner.STEP
        return JobState.ENDED if final or abs(time.time() - ended.at) > SETTLE_S else JobState.ENDING
    if job.exit is not None:
        return JobState.ENDED if info.runner is Runner.STEP else JobState.ENDING
    if known is JobState.ENDING:
        return JobState.ENDING
    return JobState.RUNNING if started else JobState.PENDING


def _end(queued: QueuedJob | None, ended: Ended | None) -> Exit | None:
    """Returns the exit record of a job that left none, from Slurm's state and the batch script's record; None if these
    do not show how the job ended."""
    at = ended.at if ended is not None else time.time()
    reason = REASONS.get(queued.state) if queued is not None else None
    if queued is not None and reason is not None:
        where = f" on {queued.node}" if queued.node else ""
        return Exit(ok=False, reason=reason, message=f"Slurm says {queued.state}{where}", at=at)
    if ended is None:
        return None
    if ended.status == 128 + 15:
        return Exit(
            ok=False, reason=FailureReason.CANCELLED, message="it was asked to end before it had started", at=at
        )
    if ended.message is not None:
        return Exit(ok=False, reason=FailureReason.SETUP, message=ended.message, at=at)
    if 128 < ended.status < 128 + 65:
        return Exit(ok=False, reason=FailureReason.KILLED, message=f"killed by signal {ended.status - 128}", at=at)
    return Exit(ok=False, reason=FailureReason.CRASHED, message=f"srun ended with status {ended.status}", at=at)


def _scancel(*words: str) -> None:
    """Runs scancel with these arguments. A failure is only logged, because the job may have ended meanwhile and the
    next pass repeats the call."""
    try:
        run_slurm_command(["scancel", "--quiet", *words], timeout_s=SCANCEL_TIMEOUT_S)
    except SlurmCommandError as error:
        logger.info("scancel %s: %s", " ".join(words), error)
